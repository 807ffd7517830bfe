"""JPEGs decoded without Pillow: each test has timm's own path as its oracle."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from timm_synermix.data.augment_ops import mend_augmentation
from timm_synermix.data.dataset import ReadableImages, TwoViewDataset, UnreadableImage
from timm_synermix.data.loader import stack
from timm_synermix.data.pixels import Pixels, decode_jpeg, transform_pixels
from timm_synermix.data.transforms import TwoViewTransform
from timm_synermix.utils.random import seed_everything

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
    single = ReadableImages(single, training)
    two = TwoViewDataset(two, TwoViewTransform(lambda _: torch.zeros(1), training))
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


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_stack(dtype):
    images = [torch.randint(0, 255, (5, 6, 3)).to(dtype).permute(2, 0, 1)[:, 1:4] for _ in range(3)]
    stacked = stack(images)
    assert torch.equal(stacked, torch.stack(images))
    assert stacked.is_contiguous()
