"""Images from a data set, one by one, with an error where one cannot be read."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, Subset

from timm_synermix.data.draws import views_of
from timm_synermix.data.pixels import Pixels, decode_jpeg, transform_pixels
from timm_synermix.data.transforms import TwoViewTransform


class UnreadableImage(ValueError):
    """An image cannot be read. The message names it, and says why."""


class FailedTransform(UnreadableImage):
    """An image can be read, but a transform raises. The message names it, and says why."""


class ReadableImages(Dataset):
    """The images of a map-style data set, transformed here.

    timm's own data set would put the next image, often of another class, in the place of one that it cannot read.

    Args:
        dataset: A timm or torchvision image data set, or a Subset of one; its own transform is taken off. Images are
            converted to its `input_img_mode`, if it has one.
        transform: Applied to every image. None for none; timm's `create_loader` sets it.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any] | None = None) -> None:
        self.dataset = dataset
        self.transform = transform
        source = dataset
        while isinstance(source, Subset):
            source = source.dataset
        source.transform = None
        self.source = source
        # whether an image had more bits than it was given; workers write, the main process reads
        self.clipped = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self.transform is None:
            return self.read(index)
        image, target = self.read_pixels(index)
        return transform_pixels(self.transform, image), target

    def read(self, index: int) -> tuple[Any, Any]:
        """The image, decoded but not transformed, and its target.

        Raises:
            UnreadableImage: It cannot be read, for whatever reason.
        """
        image, target = self.read_pixels(index)
        return image.image() if isinstance(image, Pixels) else image, target

    def read_pixels(self, index: int) -> tuple[Any, Any]:
        """The same, but the image as `Pixels` if it is a JPEG that is decoded without Pillow."""
        try:
            image, target = _read(self.dataset, index)
            return self._convert(image, index) if isinstance(image, Image.Image) else image, target
        except UnreadableImage:
            raise
        except Exception as error:  # decoders raise all kinds
            reason = re.sub(r'<_io[^>]*>', 'it', one_line(error))
            raise UnreadableImage(f'{image_name(self.dataset, index)} cannot be read: {reason}') from error

    def _convert(self, image: Image.Image, index: int) -> Image.Image:
        """The image in the mode that its data set is to give."""
        mode = getattr(self.source, 'input_img_mode', None)
        if mode in (None, image.mode):  # convert() would copy the image for nothing
            return image
        if image.mode == 'F' or (image.mode.startswith('I') and np.asarray(image).max() > 255):
            self.clipped[index] = True
        return image.convert(mode)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a data set that wants to know it."""
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return ' '.join(str(error).split()) or type(error).__name__


def _read(dataset: Any, index: int) -> tuple[Any, Any]:
    if isinstance(dataset, Subset):
        return _read(dataset.dataset, dataset.indices[index])
    if not isinstance(dataset, ImageDataset):
        image, target, *_ = dataset[index]
        return image, target
    # ImageDataset.__getitem__ without its rule of taking the next image, and without its conversion
    file, target, *_ = dataset.reader[index]
    data = file.read()
    image = data if dataset.load_bytes else _decode(data, dataset.input_img_mode)
    if target is None:
        target = -1
    elif dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image, target


def _decode(data: bytes, mode: str | None) -> Pixels | Image.Image:
    pixels = decode_jpeg(data) if mode == 'RGB' else None
    if pixels is not None:
        return pixels
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def image_name(dataset: Any, index: int) -> str:
    """The path of an image in its data set, or its number if it has none."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index])
    name = None
    if isinstance(dataset, ImageDataset):
        with suppress(NotImplementedError, AssertionError):  # a reader without names
            name = dataset.filename(index, absolute=True)
    elif hasattr(dataset, 'samples'):  # torchvision's image folder
        name = dataset.samples[index][0]
    elif hasattr(dataset, 'dataset'):  # one around another
        return image_name(dataset.dataset, index)
    return str(name or f'image {index}').encode(errors='backslashreplace').decode()


class TwoViewDataset(ReadableImages):
    """The views of a data set's images: a sample is `(views, target)`, views `(clean, augmented)`.

    An index asks for both, `Views` say which; None stands for one that is not wanted.

    Args:
        dataset: See `ReadableImages`.
        transform: Makes the views.
        more: The same for each further one of scheduled image sizes.
    """

    def __init__(self, dataset: Any, transform: TwoViewTransform, *more: TwoViewTransform) -> None:
        super().__init__(dataset, transform)
        self.transforms = (transform, *more)

    def __getitem__(self, item: Any) -> tuple[tuple[Tensor | None, ...], int]:
        wanted = views_of(item)
        image, target = self.read_pixels(wanted.image)
        return self.transforms[wanted.size](image, wanted.clean, wanted.augmented), target


def image_mode(dataset: Any) -> str | None:
    """Pillow's mode of the images of a data set; None if it does not say."""
    while not hasattr(dataset, 'input_img_mode') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(getattr(dataset, 'reader', None), 'input_img_mode', None) or getattr(dataset, 'input_img_mode', None)
