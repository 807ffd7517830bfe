"""The two views of an image, from one decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation, ToNumpy
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from timm_synermix.data.pixels import Pixels, transform_pixels

# With antialias, as torch.nn.functional.interpolate, which sorts the pixels by colour: a quarter of its time.
_RESIZES = {
    InterpolationMode.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa,
    InterpolationMode.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa,
}


class TwoViewTransform:
    """Turn one decoded image into its two views, `(clean, augmented)`; None for one that is not wanted.

    Args:
        clean: Deterministic transform of the unaugmented view, the recipe's evaluation transform.
        augmented: The recipe's training transform. Must give the same shape as clean. A `SplitTransform` gives several
            images in place of the augmented view.
    """

    def __init__(self, clean: Callable[[Any], Tensor], augmented: Callable[[Any], Any]) -> None:
        self.clean = clean
        self.augmented = augmented

    def __call__(self, image: Any, clean: bool = True, augmented: bool = True) -> tuple[Tensor | None, ...]:
        view = self.clean(image) if clean else None  # first: it takes the most of what has just been decoded
        splits = transform_pixels(self.augmented, image) if augmented else None
        return (view, *(splits if isinstance(splits, tuple) else (splits,)))


class SplitTransform:
    """The augmentation splits of an image, as those of timm's `AugMixDataset`: the first has the base transform alone.

    Args:
        parts: The base transform, the augmentation and the last steps, of `timm.data.create_transform(separate=True)`.
        num_splits: At least 2.
    """

    def __init__(self, parts: Sequence[Callable[[Any], Any]], num_splits: int) -> None:
        self.base, self.augmentation, self.last = parts
        self.num_splits = num_splits

    def __call__(self, image: Any) -> tuple[Tensor, ...]:
        image = transform_pixels(self.base, image)
        return self.last(image), *[self.last(self.augmentation(image)) for _ in range(self.num_splits - 1)]


class TensorEvalTransform:
    """timm's evaluation transform, with torch's resize of uint8 tensors: some four times as fast as Pillow's.

    The pixels are those of torchvision's resize of tensors (but for rounding, on CPUs without AVX2). Photographs differ
    from timm's by rounding alone, by at most 2 of 255. What is neither `Pixels` nor an RGB or grey PIL image goes
    through timm's.

    Args:
        transform: timm's evaluation transform, one that suits: it begins with a bilinear or bicubic `Resize` of the
            shorter side and a `CenterCrop` within it.
    """

    def __init__(self, transform: transforms.Compose) -> None:
        self.transform = transform
        resize, crop, *rest = transform.transforms
        self.size, self.mode, self.crop_size = resize.size, resize.interpolation, crop.size
        self.rest = [
            partial(F.to_dtype, dtype=torch.float32, scale=True) if isinstance(t, MaybeToTensor) else t for t in rest
        ]

    def __call__(self, image: Any) -> Tensor:
        pixels = _pixels(image)
        if pixels is None:
            return self.transform(image)
        # torchvision's own steps for tensors look around for longer than the resize of a small image takes
        sides = pixels.shape[2:]
        size = [self.size * side // min(sides) for side in sides]
        top, left = (round((side - cropped) / 2) for side, cropped in zip(size, self.crop_size, strict=True))
        resized = pixels.new_empty((1, *size, pixels.shape[1])).permute(0, 3, 1, 2)
        _RESIZES[self.mode].out(pixels, size, False, None, None, out=resized)
        pixels = resized[0, :3, top : top + self.crop_size[0], left : left + self.crop_size[1]]
        for step in self.rest:
            pixels = step(pixels)
        return pixels

    @staticmethod
    def suits(transform: transforms.Compose) -> bool:
        """Whether the first two steps are as they must be."""
        resize, crop, *_ = transform.transforms
        return (
            isinstance(resize, transforms.Resize)
            and isinstance(resize.size, int)
            and resize.interpolation in _RESIZES
            and isinstance(crop, transforms.CenterCrop)
            and max(crop.size) <= resize.size
        )


def _pixels(image: Any) -> Tensor | None:
    """`Pixels`, or Pillow's RGB or grey image, as uint8 `[1, C, H, W]`, C = 1, 3 or 4 (the fourth is padding)."""
    if isinstance(image, Pixels):
        tensor = image.tensor
    elif getattr(image, 'mode', None) in ('RGB', 'L'):
        tensor = torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
    else:
        return None
    return tensor[None]  # channels_last, as the resize likes it


class Cutout:
    """Blacken one square of a PIL image, centred on a random pixel and clipped by the borders (arXiv 1708.04552).

    Args:
        length: Side of the square in pixels.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, image: Image.Image) -> Image.Image:
        image = image.copy()
        left, top = (int(torch.randint(side, ())) - self.length // 2 for side in image.size)
        right, bottom = left + self.length, top + self.length
        image.paste(0, (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
        return image


def add_small_image_augmentation(
    transform: transforms.Compose, crop_padding: int = 0, cutout: int = 0
) -> transforms.Compose:
    """timm's training transform with the augmentation customary for CIFAR.

    Args:
        transform: Of `timm.data.create_transform(is_training=True)`. Without a random resized crop, as with no_aug, it
            is given back as it is.
        crop_padding: In place of the random resized crop: a random crop of the image, padded with so many black pixels
            at each side. An image of another size is first resized, bilinearly, and cropped in its centre. 0 leaves
            the crop.
        cutout: Side of the square of `Cutout`, the last step on the image itself. 0 for none.

    Raises:
        ValueError: transform begins with another crop.

    Source: the CIFAR-100 and mini-ImageNet settings of SynerMix's code (crop with padding 4 or 12, Cutout 16 or 32).
    """
    steps: list[Any] = list(transform.transforms)
    crop = steps[0]
    if isinstance(crop, transforms.Resize):
        return transform
    if crop_padding:
        if not isinstance(crop, RandomResizedCropAndInterpolation):
            raise ValueError(f'crop_padding needs the random resized crop, got {type(crop).__name__} in its place.')
        whole = [transforms.Resize(max(crop.size)), transforms.CenterCrop(crop.size)]
        steps[:1] = [*whole, transforms.RandomCrop(crop.size, crop_padding)]
    if cutout:
        end = next(i for i, s in enumerate(steps) if isinstance(s, (ToNumpy, MaybeToTensor, MaybePILToTensor)))
        steps.insert(end, Cutout(cutout))
    return transforms.Compose(steps)
