"""Colour jitter by numpy: Pillow's pixels in half of the time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose

_GREY = np.array([19595, 38470, 7471], np.float32) / 2**16  # as Pillow's; sums with whole numbers are exact


class JitterToTensor:
    """torchvision's `ColorJitter` and the tensor of its image in one step: the same draws, the same pixels.

    Brightness blends an image with black, contrast with its mean grey, and saturation with its greys, in an order that
    is drawn.

    Args:
        jitter: One that `suits`.
    """

    def __init__(self, jitter: ColorJitter) -> None:
        self.jitter = jitter

    def __call__(self, image: Any) -> Tensor:
        jitter = self.jitter
        if getattr(image, 'mode', None) != 'RGB':
            tensor: Tensor = MaybePILToTensor()(jitter(image))
            return tensor
        order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        rows = np.frombuffer(image.tobytes('raw', 'RGB;L'), np.uint8).reshape(image.height, 3, image.width)
        pixels = rows.transpose(1, 0, 2).astype(np.float32, order='C')
        for kind in order.tolist():
            if factors[kind] is not None:
                blend(pixels, (_black, _mean_grey, _greys)[kind](pixels), factors[kind])
        return torch.from_numpy(pixels.astype(np.uint8))

    @staticmethod
    def suits(jitter: Any) -> bool:
        """Whether it is a jitter without hue, and Pillow is compiled to round as numpy does."""
        return type(jitter) is ColorJitter and jitter.hue is None and _pillow_rounds_twice()


def jitter_by_numpy(transform: Any) -> Any:
    """A training transform of timm's with `JitterToTensor` as its end, if it ends with jitter and tensor."""
    steps = list(getattr(transform, 'transforms', ()))
    if len(steps) < 2 or type(steps[-1]) is not MaybePILToTensor or not JitterToTensor.suits(steps[-2]):
        return transform
    return Compose([*steps[:-2], JitterToTensor(steps[-2])])


def blend(pixels: np.ndarray, other: Any, factor: float) -> None:
    """Blend pixels, float32, in place: `other + factor (pixels - other)`, cut to whole numbers from 0 to 255."""
    if other is not None:
        pixels -= other
    pixels *= np.float32(factor)
    if other is not None:
        pixels += other
    if factor > 1:
        np.clip(pixels, 0, 255, out=pixels)
    np.floor(pixels, out=pixels)


def _black(pixels: np.ndarray) -> None:
    return None


def _mean_grey(pixels: np.ndarray) -> int:
    greys = _greys(pixels)
    return int(greys.sum(axis=1).sum(dtype=np.float64) / greys.size + 0.5)  # each row's sum is exact


def _greys(pixels: np.ndarray) -> np.ndarray:
    """The greys `[H, W]` of colours `[3, H, W]`."""
    red, green, blue = pixels
    greys: np.ndarray = red * _GREY[0]
    greys += green * _GREY[1]
    greys += blue * _GREY[2]
    greys += 0.5
    return np.floor(greys, out=greys)


@cache
def _pillow_rounds_twice() -> bool:
    """Whether Pillow's blend rounds after the product and after the sum: compilers for ARM merge the two."""
    values = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    pixels, other = values.astype(np.float32), values.T.astype(np.float32)
    blend(pixels, other, 1.1)
    blended = Image.blend(Image.fromarray(values.T), Image.fromarray(values), 1.1)
    return np.array_equal(np.asarray(blended), pixels)
