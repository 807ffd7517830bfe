"""Images from a data set, one by one, with an error where one cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, Subset


class UnreadableImage(ValueError):
    """An image cannot be read. The message names it, and says why."""


class ReadableImages(Dataset):
    """The images of a map-style data set, transformed here.

    timm's own data set would put the next image, often of another class, in the place of one that it cannot read.

    Args:
        dataset: A timm or torchvision image data set, or a Subset of one; its own transform is taken off.
        transform: Applied to every image. None for none; timm's `create_loader` sets it.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any] | None = None) -> None:
        self.dataset = dataset
        self.transform = transform
        source = dataset
        while isinstance(source, Subset):
            source = source.dataset
        source.transform = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.read(index)
        return (image if self.transform is None else self.transform(image)), target

    def read(self, index: int) -> tuple[Any, Any]:
        """The image, decoded but not transformed, and its target.

        Raises:
            UnreadableImage: It cannot be read, for whatever reason.
        """
        try:
            return _read(self.dataset, index)
        except Exception as error:  # decoders raise all kinds
            reason = re.sub(r'<_io[^>]*>', 'it', ' '.join(str(error).split())) or type(error).__name__
            raise UnreadableImage(f'{image_name(self.dataset, index)} cannot be read: {reason}') from error

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a data set that wants to know it."""
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)


def _read(dataset: Any, index: int) -> tuple[Any, Any]:
    if isinstance(dataset, Subset):
        return _read(dataset.dataset, dataset.indices[index])
    if not isinstance(dataset, ImageDataset):
        image, target, *_ = dataset[index]
        return image, target
    # ImageDataset.__getitem__ without its rule of taking the next image
    image, target, *_ = dataset.reader[index]
    if dataset.load_bytes:
        image = image.read()
    else:
        image = Image.open(image)
        image.load()
        if dataset.input_img_mode not in (None, image.mode):  # convert() would copy the image for nothing
            image = image.convert(dataset.input_img_mode)
    if target is None:
        target = -1
    elif dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image, target


def image_name(dataset: Any, index: int) -> str:
    """The path of an image in its data set, or its number if it has none."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ImageDataset):
        try:
            return str(dataset.filename(index, absolute=True))
        except (NotImplementedError, AssertionError):  # a reader without names
            pass
    return f'image {index}'
