"""Photographs that are decoded without Pillow."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import functional as F


class Pixels:
    """A decoded RGB image, of which Pillow gets as much as it needs.

    Args:
        array: uint8 `[H, W, 4]`, contiguous; the fourth byte is padding, as in Pillow's own images.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def tensor(self) -> Tensor:
        """The image, uint8 `[4, H, W]`, in the same memory; the fourth channel is padding."""
        return torch.from_numpy(self.array).permute(2, 0, 1)

    def image(self, box: tuple[int, int, int, int] | None = None) -> Image.Image:
        """Pillow's image of it, or of a box of it: top, left, height, width."""
        rows, columns, depth = self.array.shape
        top, left, height, width = box or (0, 0, rows, columns)
        start = (top * columns + left) * depth
        data: Any = self.array.reshape(-1)[start:]
        return Image.frombytes('RGB', (width, height), data, 'raw', 'RGBX', columns * depth, 1)


def decode_jpeg(data: bytes) -> Pixels | None:
    """The pixels of a JPEG of colour or grey, those that Pillow would give, in half of the time.

    libjpeg-turbo is behind both. None for what Pillow decodes in a way of its own (CMYK), warns of or refuses (large
    images), and for what libjpeg-turbo says anything of: damaged files, and other formats.
    """
    if not data.startswith(b'\xff\xd8'):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ('YCbCr', 'RGB', 'Gray') or height * width > (Image.MAX_IMAGE_PIXELS or float('inf')):
            return None
        return Pixels(simplejpeg.decode_jpeg(data, 'RGBX'))
    except ValueError:
        return None


def transform_pixels(transform: Callable[[Any], Any], image: Any) -> Any:
    """A transform of Pillow's images, of `Pixels` or of whatever else it takes.

    If it begins with a random crop, only the box of that is made an image of Pillow. Draws and result are the same.
    """
    if not isinstance(image, Pixels):
        return transform(image)
    crop, *rest = getattr(transform, 'transforms', None) or [None]
    if type(crop) is not RandomResizedCropAndInterpolation:
        return transform(image.image())
    box = crop.get_params(image.tensor, crop.scale, crop.ratio)
    choice = crop.interpolation
    mode = random.choice(choice) if isinstance(choice, (tuple, list)) else choice
    image = F.resize(image.image(box), crop.size, mode)
    for step in rest:
        image = step(image)
    return image
