"""JPEGs decoded without Pillow: each test has timm's own path as its oracle."""

import io
import random
import tarfile
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from timm_synermix.data import loader as loader_module
from timm_synermix.data.augment_ops import mend_augmentation
from timm_synermix.data.dataset import ReadableImages, TwoViewDataset, UnreadableImage
from timm_synermix.data.dataset_factory import create_dataset
from timm_synermix.data.jitter import jitter_by_numpy
from timm_synermix.data.loader import create_synermix_loader, stack
from timm_synermix.data.pixels import Pixels, decode_jpeg, transform_pixels
from timm_synermix.data.transforms import TwoViewTransform
from timm_synermix.utils.random import seed_everything, seed_of

ROTATED = Image.Exif()
ROTATED[0x112] = 6


def photograph(width=61, height=47):
    """Smooth colours and some noise, so that rounding of chroma and of the transform shows."""
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=2)
    return Image.fromarray((128 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind='JPEG', **kwargs):
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


JPEGS = {
    '4:2:0': encoded(photograph(), subsampling='4:2:0'),
    '4:2:2': encoded(photograph(), subsampling='4:2:2'),
    '4:4:4': encoded(photograph(), subsampling='4:4:4', quality=95),
    'progressive': encoded(photograph(), progressive=True),
    'grey': encoded(photograph().convert('L')),
    'rgb': encoded(photograph(), keep_rgb=True),
    'rotated': encoded(photograph(), exif=ROTATED),
    'one pixel': encoded(photograph(1, 1)),
    'more bytes': encoded(photograph()) + b'more',
}
OTHERS = {
    'cmyk': encoded(photograph().convert('CMYK')),
    'png': encoded(photograph(), 'PNG'),
    'palette': encoded(photograph().convert('P'), 'PNG'),
    'alpha': encoded(photograph().convert('RGBA'), 'PNG'),
    '16 bits': encoded(Image.fromarray(np.arange(61 * 47, dtype=np.uint16).reshape(47, 61)), 'PNG'),
    'webp': encoded(photograph(), 'WEBP'),
    'gif': encoded(photograph(), 'GIF'),
}
BROKEN = {
    'cut': JPEGS['4:2:0'][:-200],
    'without end': JPEGS['4:2:0'][:-2],
    'first bytes': JPEGS['4:2:0'][:2],
    'empty': b'',
    'text': b'\xff\xd8 is how a JPEG begins',
}


class Reader:
    """Bytes, as those of a row of a data set or of a member of a tar file."""

    def __init__(self, *images):
        self.images = images

    def __getitem__(self, index):
        return io.BytesIO(self.images[index]), 0

    def __len__(self):
        return len(self.images)

    def filename(self, index, *args):
        return f'row {index}'


def images_of(*data, mode='RGB'):
    return ImageDataset('', reader=Reader(*data), input_img_mode=mode)


@pytest.mark.parametrize('name', [*JPEGS, *OTHERS])
def test_pixels_are_timms(name):
    data = {**JPEGS, **OTHERS}[name]
    image, _ = ReadableImages(images_of(data)).read_pixels(0)
    assert isinstance(image, Pixels) == (name in JPEGS)
    expected = images_of(data)[0][0]
    read, _ = ReadableImages(images_of(data)).read(0)
    assert (read.mode, read.size, read.tobytes()) == (expected.mode, expected.size, expected.tobytes())


@pytest.mark.parametrize('name', BROKEN)
def test_what_is_broken_is_left_to_pillow(name):
    assert decode_jpeg(BROKEN[name]) is None
    with pytest.raises(UnreadableImage, match='row 0 cannot be read'):
        ReadableImages(images_of(BROKEN[name])).read_pixels(0)


def test_damaged_files_are_timms():
    """Whatever bytes are wrong: if timm reads it there are its pixels, if it does not there is an error."""
    generator, read = random.Random(0), 0
    for _ in range(150):
        data = bytearray(JPEGS[generator.choice(['4:2:0', 'progressive'])])
        for _ in range(2):
            data[generator.randrange(150, len(data))] = generator.randrange(256)
        images = images_of(bytes(data))
        images._max_retries = 1
        try:
            expected, _ = images[0]
        except (RuntimeError, SyntaxError):
            continue
        assert ReadableImages(images).read(0)[0].tobytes() == expected.tobytes()
        read += 1
    assert read > 50


@pytest.mark.parametrize('mode', ['L', None])
def test_other_modes_are_pillows(mode):
    image, _ = ReadableImages(images_of(JPEGS['4:2:0'], mode=mode)).read_pixels(0)
    assert image.tobytes() == images_of(JPEGS['4:2:0'], mode=mode)[0][0].tobytes()


def test_pillow_refuses_what_is_too_large(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(UnreadableImage, match='decompression bomb'):
        ReadableImages(images_of(JPEGS['4:2:0'])).read_pixels(0)


AUGMENTATIONS = {
    'jitter': dict(),
    'randaugment': dict(auto_augment='rand-m9-mstd0.5-inc1', interpolation='random'),
    'no crop': dict(no_aug=True),
    'other crop': dict(train_crop_mode='rkrc'),
    'erased': dict(use_prefetcher=False, re_prob=1.0),
}


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_views_are_timms(name):
    """The augmented one to the bit, with the same draws and as many."""
    training = create_transform(32, is_training=True, **dict(use_prefetcher=True) | AUGMENTATIONS[name])
    mend_augmentation(training, 'RGB')
    single, two = (images_of(*JPEGS.values()) for _ in range(2))
    faster = jitter_by_numpy(training)
    single = ReadableImages(single, faster)
    two = TwoViewDataset(two, TwoViewTransform(lambda _: torch.zeros(1), faster))
    for number in range(len(JPEGS)):
        image, _ = images_of(*JPEGS.values())[number]
        seed_everything(number)
        expected, after = training(image), random.random()
        for dataset in (two, single):
            seed_everything(number)
            views, _ = dataset[number]
            assert torch.equal(views[1] if dataset is two else views, expected)
            assert random.random() == after


@pytest.mark.parametrize('box', [None, (0, 0, 47, 61), (3, 5, 20, 30), (46, 60, 1, 1), (0, 31, 47, 30)])
def test_a_box_is_what_pillow_crops(box):
    image = photograph()
    top, left, height, width = box or (0, 0, 47, 61)
    pixels = Pixels(np.asarray(image.convert('RGBA')).copy())
    assert pixels.image(box).tobytes() == image.crop((left, top, left + width, top + height)).tobytes()


def test_what_comes_after_the_crop_is_done():
    crop = RandomResizedCropAndInterpolation(8)
    pixels = decode_jpeg(JPEGS['4:2:0'])
    assert transform_pixels(transforms.Compose([crop, np.asarray]), pixels).shape == (8, 8, 3)
    assert transform_pixels(lambda image: image.size, pixels) == (61, 47)
    assert transform_pixels(lambda image: image, 'no pixels') == 'no pixels'


@pytest.mark.parametrize('strategy', [None, 'file_descriptor', 'file_system'])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_stack(monkeypatch, dtype, strategy):
    """In the main process, and in a worker with torch's ways to share memory."""
    monkeypatch.setattr(loader_module, 'get_worker_info', lambda: strategy)
    monkeypatch.setattr(loader_module, 'get_sharing_strategy', lambda: strategy)
    images = [torch.randint(0, 255, (5, 6, 3)).to(dtype).permute(2, 0, 1)[:, 1:4] for _ in range(3)]
    images.append(images[0].contiguous())
    stacked = stack(images)
    assert torch.equal(stacked, torch.stack(images))
    assert stacked.is_contiguous()
    assert stacked.is_shared() == (strategy == 'file_descriptor' and dtype == torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match=r'same shape|equal size'):
        stack([*images, images[0][:, :2]])


@pytest.fixture
def jpegs(tmp_path):
    """A folder of 12 JPEGs of two classes, of all kinds."""
    for number in range(12):
        path = tmp_path / 'images' / 'train' / 'ab'[number % 2] / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(list(JPEGS.values())[number % 7])
    return tmp_path / 'images'


RECIPE = dict(re_prob=0.25, interpolation='random', mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('source', ['', 'hfds'])
@pytest.mark.parametrize(('num_workers', 'aa'), [(0, None), (0, 'rand-m9-mstd0.5-inc1'), (1, None)])
def test_a_recipes_batches_are_timms(jpegs, tmp_path, source, num_workers, aa):
    """Augmented views to the bit, of files and of the rows of a data set; each image is shown three times."""
    if source:
        pytest.importorskip('datasets', reason='needs the package datasets')
    create = partial(create_dataset, f'hfds/{jpegs}' if source else '', split='train')
    root = str(tmp_path / 'cache') if source else str(jpegs)
    kwargs = dict(num_workers=num_workers, num_aug_repeats=3, device=torch.device('cpu'))
    recipe = dict(auto_augment=aa, **RECIPE)
    loader = create_synermix_loader(create(root=root), 32, 4, **kwargs, **recipe)
    training = mend_augmentation(create_transform(32, is_training=True, use_prefetcher=True, **recipe), 'RGB')
    images = timm.data.create_dataset(f'hfds/{jpegs}' if source else '', root=root, split='train')
    erase = RandomErasing(0.25, device='cpu')
    for (input, target), draws in zip(loader, list(loader.batch_sampler), strict=True):
        seed_everything(seed_of('batch', 42, *draws[1:]))
        expected = torch.stack([training(images[index][0]) for index in draws.items]) / 255
        seed_everything(seed_of('erase', 42, 0, 0, draws.number))
        erase(expected)
        torch.testing.assert_close(input[len(target) :], expected, rtol=0, atol=1e-6)
        assert target.tolist() == [images[index][1] for index in draws.items]


def test_a_streams_images_are_timms(jpegs, tmp_path):
    pytest.importorskip('webdataset', reason='needs the package webdataset')
    (tmp_path / 'label.cls').write_text('1')
    with tarfile.open(tmp_path / 'train-0000.tar', 'w') as file:
        for path in sorted(jpegs.rglob('*.jpg')):
            file.add(path, arcname=path.name)
            file.add(tmp_path / 'label.cls', arcname=f'{path.stem}.cls')
    kwargs = dict(root=str(tmp_path), split='train-0000.tar', is_training=True, batch_size=4, num_samples=12)
    dataset = create_dataset('wds/local', **kwargs)
    loader = create_synermix_loader(
        dataset, 32, 4, no_aug=True, num_workers=0, use_prefetcher=False, clean_interpolation='nearest', crop_pct=1.0
    )
    evaluation = create_transform(32, is_training=True, no_aug=True)
    files = {evaluation(Image.open(path).convert('RGB')).numpy().tobytes() for path in jpegs.rglob('*.jpg')}
    seen = 0
    for input, target in loader:
        assert {view.numpy().tobytes() for view in input[len(target) :]} <= files
        seen += len(target)
    assert seen == 12
