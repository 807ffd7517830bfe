"""The augmentation of small images that timm's transforms do not have: a crop of the padded image, and Cutout."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation, ToNumpy
from torchvision import transforms


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
