import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional._geometry import _do_native_uint8_resize_on_cpu

from timm_synermix.data import transforms as views


def picture(height, width, mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, 'RGBA').convert(mode)


def evaluation(interpolation='bicubic'):
    return create_transform((3, 16, 16), interpolation=interpolation, crop_pct=0.8, use_prefetcher=True)


@pytest.mark.parametrize('mode', ['RGBA', 'P', 'tensor'])
def test_clean_view_of_other_images(mode):
    """Those that are not RGB or grey go through timm's own transform, tensors too."""
    image = torch.rand(3, 30, 40) if mode == 'tensor' else picture(30, 40, mode)
    transform = evaluation()
    assert torch.equal(views.TensorEvalTransform(transform)(image), transform(image))


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [(20, 20), (7, 90), (90, 7), (480, 360)])
def test_clean_view_is_torchvisions_of_a_tensor(mode, interpolation, size):
    """To the pixel where both have the same kernel; 20 is the size asked for."""
    check_clean_view(picture(*size, mode), interpolation)


def test_clean_view_of_a_grey_array():
    """Pillow uses the memory of the array itself."""
    check_clean_view(Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 33), dtype=np.uint8)))


def test_clean_view_of_a_grey_file(tmp_path):
    """Pillow maps the file into memory, whose lines are padded, and the last one first."""
    picture(31, 33, 'L').save(tmp_path / 'grey.bmp')
    with Image.open(tmp_path / 'grey.bmp') as image:
        check_clean_view(image)


def check_clean_view(image, interpolation='bicubic'):
    transform = evaluation(interpolation)
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
    expected = F.resize(pixels, 20, InterpolationMode(interpolation), antialias=True)
    rounding = 0 if _do_native_uint8_resize_on_cpu(InterpolationMode(interpolation)) else 1
    view = views.TensorEvalTransform(transform)(image)
    torch.testing.assert_close(view, F.center_crop(expected, [16, 16]), atol=rounding, rtol=0)


def test_clean_view_is_a_copy():
    image = picture(20, 20)
    before = np.array(image)
    view = views.TensorEvalTransform(evaluation())(image)
    view += 1
    assert np.array_equal(np.array(image), before)
