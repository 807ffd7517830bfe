import gc

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from timm_synermix.views import TensorEvalTransform


def picture(height, width, mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, 'RGBA').convert(mode)


def evaluation(interpolation='bicubic'):
    return create_transform((3, 16, 16), interpolation=interpolation, crop_pct=0.8, use_prefetcher=True)


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'tensor'])
def test_clean_view_of_other_images(mode):
    """Those that are not RGB or grey go through timm's own transform, tensors too."""
    image = torch.rand(3, 30, 40) if mode == 'tensor' else picture(30, 40, mode)
    transform = evaluation()
    view, expected = TensorEvalTransform(transform)(image), transform(image)
    torch.testing.assert_close(view.float(), expected.float(), atol=2 if mode == 'L' else 0, rtol=0)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [(20, 20), (7, 90), (90, 7), (480, 360), (2100, 2100)])
def test_clean_view_is_torchvisions_of_a_tensor(mode, interpolation, size):
    """To the pixel where both have the same kernel; 20 is the size asked for, Pillow has 2100 in pieces of memory."""
    image = picture(*size, mode)
    expected = F.resize(F.pil_to_tensor(image), 20, InterpolationMode(interpolation), antialias=True)
    view = TensorEvalTransform(evaluation(interpolation))(image)
    rounding = 0 if 'AVX' in torch.backends.cpu.get_cpu_capability() else 1
    torch.testing.assert_close(view, F.center_crop(expected, [16, 16]), atol=rounding, rtol=0)


def test_clean_view_of_a_part_of_an_image():
    image = picture(50, 60)
    part = image.crop((3, 4, 40, 45))
    expected = TensorEvalTransform(evaluation())(Image.fromarray(np.array(part)))
    assert torch.equal(TensorEvalTransform(evaluation())(part), expected)


def test_clean_view_outlives_its_image_and_leaves_it_alone():
    image = picture(20, 20)
    before = np.array(image)
    view = TensorEvalTransform(evaluation())(image)
    expected = view.clone()
    view += 1  # a view of its own
    assert np.array_equal(np.array(image), before)
    del image
    gc.collect()
    others = [picture(20, 20, 'L') for _ in range(100)]  # would take the place of memory given back
    assert torch.equal(view, expected + 1)
    assert others
