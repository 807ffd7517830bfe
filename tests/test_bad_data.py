"""Files that users' folders have, and that break other training runs."""

import logging
import zlib

import numpy as np
import pytest
import torch
from conftest import assert_same_run, make_image_folder
from PIL import Image
from timm.data import create_transform

from timm_synermix import create_synermix_loader
from timm_synermix.data.dataset import ReadableImages, UnreadableImage
from timm_synermix.data.dataset_factory import create_dataset
from timm_synermix.data.draws import Draws, Views, with_image
from timm_synermix.data.sample_dataset import SampleDataset


def png_of_size(width, height):
    """A gray PNG of that size in a few kilobytes; nothing of it needs to be decoded to refuse it."""

    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')

    header = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([8, 0, 0, 0, 0])
    packer = zlib.compressobj(1)
    rows = b''.join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def truncated_jpeg(folder):
    path = folder / 'whole.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.unlink()
    return content[: len(content) // 2]


BROKEN = {
    'truncated.jpg': truncated_jpeg,
    'empty.png': lambda folder: b'',
    'text.jpg': lambda folder: b'this is no image',
    'huge.png': lambda folder: png_of_size(20_000, 20_000),
    'broken header.png': lambda folder: b'\x89PNG\r\n\x1a\n' + b'\x00' * 40,
}


def odd_images():
    """Images that can be read, each of another kind than an 8-bit RGB photograph."""
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    rotated = Image.fromarray(pixels)
    exif = rotated.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return {
        'one pixel.png': (Image.fromarray(pixels[:1, :1]), {}),
        'cmyk.jpg': (Image.fromarray(pixels).convert('CMYK'), {}),
        'palette.png': (Image.fromarray(pixels).convert('P'), dict(transparency=3)),
        'sixteen bits.png': (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        'gray with alpha.png': (Image.fromarray(pixels).convert('LA'), {}),
        'bilevel.png': (Image.fromarray(pixels).convert('1'), {}),
        'exif.jpg': (rotated, dict(exif=exif)),
        'animated.gif': (Image.fromarray(pixels), dict(save_all=True, append_images=[Image.fromarray(255 - pixels)])),
    }


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    """The content of the broken files."""
    folder = tmp_path_factory.mktemp('broken')
    return {name: content(folder) for name, content in BROKEN.items()}


@pytest.fixture
def folder(tmp_path, broken):
    """Three classes of 6, 6 and 2 good images; class b has the broken ones besides, c one of them."""
    root = make_image_folder(
        tmp_path / 'images', {'train': {'a': 6, 'b': 6, 'c': 2}, 'validation': {'a': 2, 'b': 2, 'c': 2}}
    )
    for name, content in broken.items():
        (root / 'train' / 'b' / name).write_bytes(content)
    (root / 'train' / 'c' / 'empty.png').write_bytes(b'')
    return root


def loader_of(root, batch_size=6, **kwargs):
    dataset = create_dataset('', root=str(root), split='train')
    kwargs = {**dict(num_workers=0, use_prefetcher=False, crop_pct=1.0), **kwargs}
    return dataset, create_synermix_loader(dataset, (3, 16, 16), batch_size, **kwargs)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_image_of_the_class_takes_the_place(folder, tmp_path, num_workers):
    """Every image comes with its own label, and a class with two readable images has two of them in a batch."""
    logging.getLogger().addHandler(logging.FileHandler(tmp_path / 'log'))  # workers have it too
    dataset, loader = loader_of(folder, num_workers=num_workers)
    evaluation = create_transform((3, 16, 16), crop_pct=1.0)
    clean = {}
    for i, (path, target) in enumerate(dataset.reader.samples):
        if not any(name in path for name in BROKEN):
            clean[i] = (evaluation(Image.open(path).convert('RGB')), target)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for x, y in loader:
            images = []
            for view, target in zip(x, y, strict=False):
                (image,) = [i for i, (expected, _) in clean.items() if torch.allclose(view, expected, atol=1e-6)]
                assert clean[image][1] == target
                images.append((image, target.item()))
            for c in set(y.tolist()):
                assert len({image for image, target in images if target == c}) >= 2
        assert loader.dataset.num_skipped(epoch) == 6
    text = (tmp_path / 'log').read_text()
    for name in BROKEN:  # once, whichever worker it was
        assert text.count(f'b/{name} cannot be read: ') == 1
    assert text.count('c/empty.png cannot be read') == 1


def test_what_takes_the_place_depends_on_seed_epoch_and_image_alone(folder):
    def batches(**kwargs):
        return [(x.shape, x.sum().item(), y.tolist()) for x, y in loader_of(folder, **kwargs)[1]]

    assert batches(seed=1) == batches(seed=1, num_workers=2) != batches(seed=2)


class Numbers:
    """A data set of its own indices, some of which cannot be read."""

    def __init__(self, size, broken):
        self.size, self.broken, self.tried = size, set(broken), []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.tried.append(index)
        if index in self.broken:
            raise UnreadableImage(f'image {index} cannot be read: it is broken')
        return index


TARGETS = np.array([0] * 5 + [1] * 5 + [2])


@pytest.mark.parametrize(
    ('broken', 'items', 'allowed'),
    [
        ([0], [0, 1, 5, 6], [{2, 3, 4}, {1}, {5}, {6}]),  # not the one in the batch
        ([0, 1, 2, 3], [0, 4, 5, 6], [{4}, {4}, {5}, {6}]),  # but that if there is no other
        ([0, 1], [0, 1, 5, 6], [{2, 3, 4}, {2, 3, 4}, {5}, {6}]),
        ([10], [10, 5, 6], [{5, 6}, {5}, {6}]),  # none of the class: one that is there, with its own label
        ([0], [5, 6, Views(0, True, False)], [{5}, {6}, {Views(i, True, False) for i in (1, 2, 3, 4)}]),
        ([0], [(0, 7), (1, 8)], [{(2, 7), (3, 7), (4, 7)}, {(1, 8)}]),  # timm's choice of a transform stays
    ],
)
def test_choice_of_the_image(broken, items, allowed):
    class Pairs(Numbers):
        def __getitem__(self, item):
            index = super().__getitem__(item[0] if isinstance(item, tuple) else item)
            return with_image(item, index)

    seen = [set() for _ in items]
    for epoch in range(30):
        samples = SampleDataset(Pairs(len(TARGETS), broken), targets=TARGETS)
        drawn = samples.__getitems__(Draws(items, epoch, 0, 0))
        assert drawn == samples.__getitems__(Draws(items, epoch, 0, 0))
        for i, sample in enumerate(drawn):
            seen[i].add(sample)
        originals = [item for item in items if not isinstance(item, tuple)]
        if broken == [0, 1]:
            assert len({*drawn}) == len(originals)  # two places, two images
    assert seen == allowed


def test_without_labels_any_image_takes_the_place(caplog):
    samples = SampleDataset(Numbers(11, [3]))
    assert {samples.__getitems__(Draws([3], epoch, 0, 0))[0] for epoch in range(60)} == set(range(11)) - {3}
    assert caplog.text.count('image 3 cannot be read') == 1
    assert samples[3] != 3  # an evaluation's items are plain


def test_when_nothing_can_be_read_it_stops(caplog):
    with pytest.raises(UnreadableImage, match='image 0 cannot be read: it is broken; nor can another'):
        SampleDataset(Numbers(200, range(200)), targets=np.zeros(200, int)).__getitems__(Draws([0], 0, 0, 0))
    samples = SampleDataset(broken := Numbers(200, range(200)), targets=np.zeros(200, int))
    with pytest.raises(UnreadableImage):
        samples.__getitems__(Draws([0, 1], 0, 0, 0))
    assert len(broken.tried) <= 13  # the shared disk is gone: it is not asked for every image of the class


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_odd_images_are_read_as_timm_reads_them(tmp_path, use_prefetcher):
    root = make_image_folder(tmp_path / 'images', {'train': {'a': 2, 'odd': 0}})
    for name, (image, kwargs) in odd_images().items():
        image.save(root / 'train' / 'odd' / name, **kwargs)
    _, loader = loader_of(root, 12, use_prefetcher=use_prefetcher, device=torch.device('cpu'))
    reference = create_dataset('', root=str(root), split='train')  # timm's own __getitem__
    reference.transform = create_transform((3, 16, 16), crop_pct=1.0)
    ((x, y),) = loader
    assert len(y) == 10
    for view, item in zip(x, next(iter(loader.batch_sampler)).items, strict=False):
        # the clean view is resized as a tensor: at most 2 of 255 apart, in units of the standard deviation
        torch.testing.assert_close(view, reference[item][0], atol=2.01 / 255 / 0.224, rtol=0)
    assert loader.dataset.num_skipped(0) == 0


@pytest.mark.parametrize(
    'flags', [['--synermix', '--mixup', '0.5'], ['--mixup', '0.5'], ['--synermix', '--val-split', 'train']]
)
def test_a_run_goes_on_and_counts(run_train, folder, caplog, flags):
    data = ('--data-dir', str(folder), '--num-classes', '3')
    run = run_train(*flags, '--epochs', '2', '-b', '10' if '--synermix' in flags else '20', data=data)
    assert len(run.summary()) == 2
    for epoch in (0, 1):
        assert f'Train: {epoch}: skipped 6 images that cannot be read' in caplog.text
    assert ('Test: skipped 6 images that cannot be read' in caplog.text) == ('train' in flags)
    for name in BROKEN:
        assert caplog.text.count(f'b/{name} cannot be read: ') == (2 if 'train' in flags else 1)  # of each data set


@pytest.mark.parametrize('workers', ['0', pytest.param('2', marks=pytest.mark.slow)])
@pytest.mark.parametrize('flags', [['--synermix'], pytest.param([], marks=pytest.mark.slow)])
def test_strict_data_stops_at_the_first(run_train, folder, caplog, tmp_path, flags, workers):
    data = ('--data-dir', str(folder), '--num-classes', '3')
    with pytest.raises(SystemExit) as error:
        run_train('--strict-data', *flags, '-j', workers, data=data)
    assert error.value.code == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert 'Stopped: ' in record.getMessage()
    assert 'cannot be read' in record.getMessage()


@pytest.mark.slow
def test_an_epoch_is_not_lost_to_its_evaluation(run_train, folder, caplog):
    """--strict-data and a broken validation image: once it is repaired, the run goes on with the evaluation."""
    data = ('--data-dir', str(folder), '--num-classes', '3')
    for path in folder.glob('train/*/*'):
        if path.name in BROKEN:
            path.unlink()
    image = folder / 'validation' / 'b' / '0.png'
    content = image.read_bytes()
    image.write_bytes(b'')
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '--strict-data', data=data)
    assert error.value.code == 1
    assert 'recovery-0-' in caplog.text
    image.write_bytes(content)
    run = run_train('--synermix', '--strict-data', '--resume', 'auto', data=data)
    assert len(run.summary()) == 1
    assert_same_run(run, run_train('--synermix', '--strict-data', data=data, experiment='whole'))


def test_a_class_without_a_readable_image_is_named(run_train, folder, caplog):
    for split in ('train', 'validation'):
        for path in (folder / split / 'c').iterdir():
            path.write_bytes(b'')
    run_train('--synermix', '-b', '20', data=('--data-dir', str(folder), '--num-classes', '3'))
    assert 'Train: 0: no image of class 2 can be read, images of other classes took their place' in caplog.text
    assert 'Test: no image of class 2 can be read' in caplog.text


STRANGE = ['two words', 'größe', '<script>alert(1)</script>', 'quote\'s & "more"', '-dash', '猫']


def test_strange_classes(run_train, tmp_path, caplog):
    """Names with spaces, Unicode and markup; a class with one image; a folder without any."""
    names = [name.replace('/', '∕') for name in STRANGE]
    counts = dict.fromkeys(names, 3) | {'lone': 1}
    root = make_image_folder(tmp_path / 'images', {'train': counts, 'validation': counts})
    (root / 'train' / 'empty').mkdir()
    data = ('--data-dir', str(root), '--num-classes', '7')
    run = run_train('--synermix', '--report', '--log-with', 'tensorboard', data=data)
    page = (run.folder / 'report' / 'report.html').read_text()
    assert '<script>alert' not in page
    assert '&lt;script&gt;alert' in page
    assert len(run.summary()) == 1
    assert 'numbers classes otherwise' not in caplog.text


def test_a_data_set_of_another_kind():
    """Whatever it raises for an image is about that image."""

    class Custom:
        transform = None

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return [1 / index, 'label', 'more'][:2]

    images = ReadableImages(Custom(), lambda image: image + 1)
    assert images[2] == (1.5, 'label')
    with pytest.raises(UnreadableImage, match='image 0 cannot be read: division by zero'):
        images[0]


@pytest.mark.parametrize('mode', ['RGB', 'L', None])
def test_images_are_timms(tmp_path, mode):
    """Of whatever mode file and data set are; a broken file is found when read, also if no mode is asked for."""
    folder = tmp_path / 'class'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    for number, file_mode in enumerate(('RGB', 'L', 'RGBA', 'P', '1')):
        Image.fromarray(pixels).convert(file_mode).save(folder / f'{number}.png')
    timm_images = create_dataset('', root=str(tmp_path), input_img_mode=mode)
    expected = [timm_images[number][0] for number in range(5)]
    for number, image in enumerate(expected):
        read = ReadableImages(timm_images)[number][0]
        assert read.mode == image.mode
        assert read.tobytes() == image.tobytes()
    (folder / '4.png').write_bytes((folder / '0.png').read_bytes()[:-60])
    with pytest.raises(UnreadableImage, match=r'4\.png'):
        ReadableImages(timm_images).read(4)
