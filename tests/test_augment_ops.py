"""timm's augmentation operators on every kind of image, and transforms that raise."""

import logging
import random

import numpy as np
import pytest
import torch
from conftest import make_image_folder
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, auto_augment_transform, rand_augment_transform

from timm_synermix import create_synermix_loader
from timm_synermix.data.augment_ops import mend_augmentation
from timm_synermix.data.dataset import ReadableImages, UnreadableImage
from timm_synermix.data.dataset_factory import create_dataset
from timm_synermix.data.draws import Draws
from timm_synermix.data.sample_dataset import SampleDataset
from timm_synermix.data.stream import ReadableStream

HPARAMS = dict(translate_const=5, img_mean=(124, 116, 104), interpolation=Image.Resampling.BILINEAR)


def picture(mode='RGB', seed=0, size=16):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, bands), dtype=np.uint8)
    bands = [Image.fromarray(pixels[..., i]) for i in range(bands)]
    return Image.merge(mode, bands) if len(bands) > 1 else bands[0]


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('name', ['Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'])
def test_posterize_keeps_the_highest_bits_and_none_if_there_are_none(name, mode):
    seen = set()
    for magnitude in range(11):
        operator = AugmentOp(name, 1.0, magnitude, HPARAMS)
        (bits,) = operator.level_fn(magnitude, {})
        mend_augmentation([operator], mode)
        expected = np.asarray(picture(mode)) >> (8 - bits) << (8 - bits)
        assert np.array_equal(np.asarray(operator(picture(mode))), expected)
        seen.add(bits)
    assert seen == (set(range(4, 9)) if name == 'PosterizeOriginal' else set(range(5)))


def test_a_policy_never_raises_and_is_timms_where_that_does_not():
    compared = failed = 0
    for policy in ('v0', 'rand-m9-mstd0.5-inc1', 'rand-m10-inc1'):
        create = auto_augment_transform if policy == 'v0' else rand_augment_transform
        mended, plain = mend_augmentation(create(policy, HPARAMS), 'RGB'), create(policy, HPARAMS)
        for seed in range(150):
            results = []
            for transform in (mended, plain):
                random.seed(seed)
                np.random.seed(seed)
                try:
                    results.append(transform(picture(seed=seed)).tobytes())
                except ValueError:
                    assert transform is plain
            if len(results) == 2:
                assert results[0] == results[1]
            compared, failed = compared + len(results) - 1, failed + 2 - len(results)
    assert compared > 300
    assert failed > 3 or int(Image.__version__.split('.')[0]) < 13


@pytest.mark.parametrize('mode', ['RGBA', 'CMYK', 'LA', 'HSV'])
def test_operators_that_cannot_work_on_a_mode_are_left_out_and_named(mode, caplog):
    transform = mend_augmentation(rand_augment_transform('rand-m9-n15-mstd0.5-inc1', HPARAMS), mode)
    for seed in range(40):
        random.seed(seed)
        assert transform(picture(mode, seed)).mode == mode
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert 'AutoContrast, Equalize, Invert, PosterizeIncreasing' in record.getMessage()
    assert f'cannot be done to {mode} images' in record.getMessage()


@pytest.mark.parametrize(
    'flags',
    [
        ['--synermix'],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(['--aug-splits', '2', '--jsd-loss', '--resplit'], marks=pytest.mark.slow),
    ],
)
def test_four_channels_with_randaugment(run_train, tmp_path, caplog, flags):
    for split in ('train', 'validation'):
        for name in 'ab':
            (tmp_path / 'images' / split / name).mkdir(parents=True)
            for i in range(8):
                picture('RGBA', seed=i).save(tmp_path / 'images' / split / name / f'{i}.png')
    data = ('--data-dir', str(tmp_path / 'images'), '--num-classes', '2')
    run = run_train(*flags, '--aa', 'rand-m9-n9-mstd0.5-inc1', '--in-chans', '4', '--input-img-mode', 'RGBA', data=data)
    assert len(run.summary()) == 1
    assert 'Equalize' in caplog.text
    assert 'skipped' not in caplog.text


class Fails:
    """A transform that raises for images of some colours."""

    def __init__(self, colours):
        self.colours = colours

    def __call__(self, image):
        high, low, _ = image.getpixel((0, 0))
        if 256 * high + low in self.colours:
            raise KeyError('no such colour')
        return 256 * high + low


class Colours:
    """Image i is of colour i, in two classes."""

    transform = None

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Image.new('RGB', (2, 2), (index // 256, index % 256, 0)), index % 2


def samples_of(size, colours, **kwargs):
    images = ReadableImages(Colours(size), Fails(colours))
    return SampleDataset(images, targets=np.arange(size) % 2, **kwargs)


def test_another_image_takes_the_place_of_one_that_a_transform_fails_for(caplog):
    samples = samples_of(20, {4})
    for epoch in (0, 1):
        drawn = samples.__getitems__(Draws([3, 4, 5], epoch, 0, 0))
        assert [image for image, _ in drawn][::2] == [3, 5]
        image, target = drawn[1]
        assert image % 2 == target == 0
        assert image != 4
        assert samples.num_skipped(epoch) == samples.num_failed(epoch) == 1
    (record,) = caplog.records  # once
    assert record.getMessage() == "Skipped: image 4 cannot be transformed: KeyError: 'no such colour'"


def test_a_transform_that_fails_stops_strict_data():
    with pytest.raises(UnreadableImage, match='image 4 cannot be transformed'):
        samples_of(20, {4}, strict=True).__getitems__(Draws([4], 0, 0, 0))


@pytest.mark.parametrize(('size', 'share', 'allowed'), [(1000, 1000, 10), (1000, 500, 5), (20, 20, 1)])
def test_a_transform_that_fails_for_over_one_in_a_hundred_stops(size, share, allowed):
    bad = {2 * i for i in range(allowed + 1)}  # of one class
    samples = samples_of(size, bad, epoch_size=share)
    for epoch in (0, 1):  # each epoch counts by itself
        for i in sorted(bad)[:-1]:
            samples.__getitems__(Draws([i, 1], epoch, 0, number=1))  # this batch draws no other bad image
            samples.__getitems__(Draws([i, 1], epoch, 0, number=1))  # again: no other image
    with pytest.raises(UnreadableImage, match=rf'over 1 % of the images \({allowed + 1} of {share} so far\).*KeyError'):
        samples.__getitems__(Draws([max(bad)], 1, 0, 0))


@pytest.mark.parametrize(
    ('flags', 'workers'), [(['--synermix'], '1'), ([], '0'), pytest.param([], '1', marks=pytest.mark.slow)]
)
def test_a_run_stops_with_one_line(run_train, image_folder, caplog, monkeypatch, flags, workers):
    def fail(image, *args, **kwargs):
        raise ArithmeticError('not today')

    monkeypatch.setattr('torchvision.transforms.functional.hflip', fail)
    with pytest.raises(SystemExit) as error:
        run_train('--hflip', '1', '-j', workers, *flags)
    assert error.value.code == 1
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line.startswith('Stopped: a transform fails for over 1 % of the images')
    assert 'ArithmeticError: not today' in line


def test_evaluation_goes_on_without_an_image(tmp_path, caplog):
    root = make_image_folder(tmp_path, {'train': {'a': 3, 'b': 3}})
    dataset = create_dataset('', root=str(root), split='train')
    whole = create_transform((3, 16, 16))
    samples = SampleDataset(
        ReadableImages(dataset, lambda image: 1 / 0 if image.height == 17 else whole(image)),
        targets=np.array([0] * 3 + [1] * 3),
    )
    assert len(samples[1][0]) == 3
    assert '/a/1.png cannot be transformed: ZeroDivisionError' in caplog.text


def test_the_synermix_loader_is_mended(tmp_path, monkeypatch):
    root = make_image_folder(tmp_path, {'train': {'a': 4, 'b': 4}})
    dataset = create_dataset('', root=str(root), split='train')
    kwargs = dict(num_workers=0, device=torch.device('cpu'), auto_augment='rand-m10-inc1-n15')
    loader = create_synermix_loader(dataset, (3, 16, 16), 4, strict=True, **kwargs)
    for epoch in range(5):
        loader.batch_sampler.set_epoch(epoch)
        assert all(len(y) for _, y in loader)


@pytest.mark.parametrize(('bad', 'expected'), [({3}, [0, 1, 2, 2, 4]), ({0}, [1, 1, 2, 3, 4]), ({1, 3}, None)])
def test_the_sample_before_takes_the_place_in_a_stream(caplog, bad, expected):
    stream = ReadableStream([(Image.new('RGB', (1, 1), (0, i, 0)), i) for i in range(5)])
    stream.transform = Fails(bad)
    if expected is None:
        with pytest.raises(UnreadableImage, match=r"fails for 2 of the first 4 images of the .*KeyError: 'no such"):
            list(stream)
    else:
        assert list(stream) == [(i, i) for i in expected]
        assert [record.getMessage() for record in caplog.records] == [
            "Skipped: an image of the stream cannot be transformed: KeyError: 'no such colour'",
            'Skipped 1 of 5 images of the stream, the ones before took their place',
        ]
    stream.strict = True
    with pytest.raises(UnreadableImage, match=f'fails for 1 of the first {min(bad) + 1} images'):
        list(stream)
