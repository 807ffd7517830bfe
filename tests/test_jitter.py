"""Colour jitter by numpy, against torchvision's of Pillow's images."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybePILToTensor
from torchvision.transforms import ColorJitter, Compose, RandomApply
from torchvision.transforms.functional import pil_to_tensor

from timm_synermix.data import jitter as module
from timm_synermix.data.jitter import JitterToTensor, jitter_by_numpy

JITTERS = {
    'as in timm': ColorJitter(0.4, 0.4, 0.4),
    'strong': ColorJitter((0, 4), (0, 4), (0, 4)),
    'dark': ColorJitter(brightness=(0.2, 0.3)),
    'contrast': ColorJitter(contrast=(1.1, 1.9)),
    'saturation': ColorJitter(saturation=(1.1, 1.9)),
    'none': ColorJitter(),
}


def picture(width, height, mode='RGB'):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(autouse=True)
def asked_once():
    module._pillow_rounds_twice.cache_clear()
    yield
    module._pillow_rounds_twice.cache_clear()


@pytest.mark.parametrize('name', JITTERS)
def test_pixels_and_draws_are_torchvisions(name):
    jitter, pictures = JITTERS[name], [picture(37, 23), picture(1, 1), Image.new('RGB', (9, 5), (255, 0, 254))]
    for seed in range(40):
        image = pictures[seed % 3]
        torch.manual_seed(seed)
        expected, after = pil_to_tensor(jitter(image)), torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(JitterToTensor(jitter)(image), expected)
        assert torch.rand(1) == after


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'tensor'])
def test_other_images_are_torchvisions(mode):
    """And a tensor is left to it, too."""
    jitter = JITTERS['as in timm']
    image = picture(8, 9, 'RGB' if mode == 'tensor' else mode)
    image = pil_to_tensor(image) if mode == 'tensor' else image
    torch.manual_seed(0)
    expected = MaybePILToTensor()(jitter(image))
    torch.manual_seed(0)
    assert torch.equal(JitterToTensor(jitter)(image), expected)


def test_timms_transform_ends_with_it():
    transform = create_transform(16, is_training=True, use_prefetcher=True)
    faster = jitter_by_numpy(transform)
    assert len(transform.transforms) == len(faster.transforms) + 1 == 4
    for seed in range(8):
        views = []
        for each in (transform, faster):
            random.seed(seed)
            torch.manual_seed(seed)
            views.append(each(picture(40, 30)))
        assert torch.equal(*views)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(color_jitter=(0.4, 0.4, 0.4, 0.1)),
        dict(color_jitter_prob=0.5),
        dict(grayscale_prob=0.5),
        dict(auto_augment='rand-m9-mstd0.5-inc1'),
        dict(use_prefetcher=False),
        dict(no_aug=True),
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_other_transforms_are_left(kwargs):
    transform = create_transform(16, is_training=True, **dict(use_prefetcher=True) | kwargs)
    assert jitter_by_numpy(transform) is transform


def test_what_is_no_transform_of_timms_is_left():
    for transform in (None, np.asarray, Compose([]), Compose([RandomApply([ColorJitter(1)]), MaybePILToTensor()])):
        assert jitter_by_numpy(transform) is transform


def test_a_pillow_that_rounds_once_keeps_its_jitter(monkeypatch):
    """As where product and sum are one instruction: float64 has room for the exact product."""

    def merged(first, second, factor):
        first, second = (np.asarray(image, np.float64) for image in (first, second))
        total = (first + np.float64(np.float32(factor)) * (second - first)).astype(np.float32)
        return Image.fromarray(total.clip(0, 255).astype(np.uint8))

    assert JitterToTensor.suits(ColorJitter(0.4)) == np.array_equal(
        *(np.asarray(blend(*ramps(), 1.1)) for blend in (Image.blend, twice))
    )
    module._pillow_rounds_twice.cache_clear()
    monkeypatch.setattr(Image, 'blend', merged)
    assert not JitterToTensor.suits(ColorJitter(0.4))


def ramps():
    ramp = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    return Image.fromarray(ramp.T), Image.fromarray(ramp)


def twice(first, second, factor):
    first, second = (np.asarray(image, np.float32) for image in (first, second))
    product = np.float32(factor) * (second - first)
    return (first + product).clip(0, 255).astype(np.uint8)
