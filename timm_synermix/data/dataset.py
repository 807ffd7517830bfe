"""Images from a data set, one by one, with an error where one cannot be read."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, Subset

from timm_synermix.data.draws import Draw, Views, image_of, item_of, with_image
from timm_synermix.data.transforms import TwoViewTransform
from timm_synermix.utils.random import seed_everything, seed_of

_logger = logging.getLogger(__name__)


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
        image, target = self.read(index)
        return (image if self.transform is None else self.transform(image)), target

    def read(self, index: int) -> tuple[Any, Any]:
        """The image, decoded but not transformed, and its target.

        Raises:
            UnreadableImage: It cannot be read, for whatever reason.
        """
        try:
            image, target = _read(self.dataset, index)
            return self._convert(image, index) if isinstance(image, Image.Image) else image, target
        except UnreadableImage:
            raise
        except Exception as error:  # decoders raise all kinds
            reason = re.sub(r'<_io[^>]*>', 'it', _one_line(error))
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


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def _read(dataset: Any, index: int) -> tuple[Any, Any]:
    if isinstance(dataset, Subset):
        return _read(dataset.dataset, dataset.indices[index])
    if not isinstance(dataset, ImageDataset):
        image, target, *_ = dataset[index]
        return image, target
    # ImageDataset.__getitem__ without its rule of taking the next image, and without its conversion
    image, target, *_ = dataset.reader[index]
    if dataset.load_bytes:
        image = image.read()
    else:
        image = Image.open(image)
        image.load()
    if target is None:
        target = -1
    elif dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image, target


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
    """The views of a data set's images: a sample is `(views, target)`, views a tuple of those that are wanted.

    An index asks for both, `(clean, augmented)`; `Views` say which.

    Args:
        dataset: See `ReadableImages`.
        transform: Makes the views.
    """

    transform: TwoViewTransform

    def __init__(self, dataset: Any, transform: TwoViewTransform) -> None:
        super().__init__(dataset, transform)

    def __getitem__(self, item: Any) -> tuple[tuple[Tensor, ...], int]:
        wanted = item if isinstance(item, Views) else Views(item)
        image, target = self.read(wanted.image)
        steps = [(wanted.clean, self.transform.clean), (wanted.augmented, self.transform.augmented)]
        return tuple(view(image) for is_wanted, view in steps if is_wanted), target


_MAX_TRIES = 10  # images of a class that are tried in the place of an unreadable one, as many as in timm


class SampleDataset(Dataset):
    """Samples of a data set, each with random numbers of its own, and with others in the place of unreadable ones.

    Whatever a sample's transforms draw from the global generators is a function of (seed, epoch, index): the generators
    are seeded before each. An image that cannot be read is named once, and another image of its class takes its place,
    drawn at random, which is not in the batch yet if the class has such a one. So it is with an image for which a
    transform raises; but where that happens to two images and over 1 % of an epoch, it is the transform that is wrong.

    Args:
        dataset: Takes an index; raises UnreadableImage. `ReadableImages`, or a data set around one.
        seed: Seed of all samples.
        targets: The class of every image, int `[len(dataset)]`. None if unknown: then any image takes the place.
        strict: Raise UnreadableImage instead.
        epoch_size: Images of an epoch in this process; None for all.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int = 42,
        targets: np.ndarray | None = None,
        strict: bool = False,
        epoch_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.targets = targets
        self.strict = strict
        self.told_of_clipped = False
        self.epoch_size = len(dataset) if epoch_size is None else epoch_size
        # 1 + the last epoch in which an image was skipped, or for a transform, 0 for never; workers write, the main
        # process reads
        self._skipped, self._failed = (torch.zeros(len(dataset), dtype=torch.int16).share_memory_() for _ in range(2))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def transform(self) -> Any:
        """That of the data set; timm's `create_loader` sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a data set that wants to know it."""
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def num_skipped(self, epoch: int = 0) -> int:
        """How many images could not be read or transformed in an epoch."""
        return int((self._skipped == epoch + 1).sum())

    def num_failed(self, epoch: int = 0) -> int:
        """For how many images a transform raised in an epoch."""
        return int((self._failed == epoch + 1).sum())

    def lost_classes(self) -> list[int]:
        """The classes of which every image was tried, and none could be read."""
        if self.targets is None:
            return []
        skipped = self._skipped.numpy() > 0
        lost = np.setdiff1d(self.targets[skipped], self.targets[~skipped])
        return lost.tolist()

    def __getitem__(self, draw: Any) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Any]) -> list[Any]:
        """The samples of a batch of draws; of plain items, as of an evaluation, without seeding."""
        in_batch = {image_of(item_of(draw)) for draw in draws}
        return [self._sample(draw, in_batch) for draw in draws]

    def _sample(self, draw: Any, in_batch: set[int]) -> Any:
        if isinstance(draw, Draw):
            seed_everything(seed_of('sample', self.seed, draw.epoch, image_of(draw.item), draw.occurrence))
        try:
            return self._get(item_of(draw))
        except UnreadableImage as error:
            self._note(draw, image_of(item_of(draw)), error)
            for image in self._others(draw, in_batch):
                sample = self._instead(draw, image)
                if sample is not None:
                    in_batch.add(image)
                    return sample
            raise UnreadableImage(f'{error}; nor can another one of its class or its batch be') from error

    def _instead(self, draw: Any, image: int) -> Any:
        """The sample of another image, or None; that it cannot be read is said where it is drawn itself."""
        try:
            return self._get(with_image(item_of(draw), image))
        except FailedTransform as error:
            self._note(draw, image, error)
        except UnreadableImage:
            pass
        return None

    def _get(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except UnreadableImage:
            raise
        except Exception as error:  # transforms raise all kinds
            reason = f'{type(error).__name__}: {_one_line(error)}'
            raise FailedTransform(
                f'{image_name(self.dataset, image_of(item))} cannot be transformed: {reason}'
            ) from error

    def _note(self, draw: Any, image: int, error: UnreadableImage) -> None:
        if self.strict:
            raise UnreadableImage(str(error)) from error
        if not self._skipped[image]:
            _logger.warning(f'Skipped: {error}')
        epoch = draw.epoch if isinstance(draw, Draw) else 0
        self._skipped[image] = 1 + epoch
        if not isinstance(error, FailedTransform):
            return
        self._failed[image] = 1 + epoch
        count = self.num_failed(epoch)
        if count > max(1, self.epoch_size / 100):
            message = (
                f'a transform fails for over 1 % of the images ({count} of {self.epoch_size} so far), the last one:'
            )
            raise UnreadableImage(f'{message} {error}') from error

    def _others(self, draw: Any, in_batch: set[int]) -> Iterator[int]:
        """Images to try instead: of the class, then those of the class in the batch, then the others in the batch."""
        image = image_of(item_of(draw))
        generator = random.Random(seed_of('instead', self.seed, *(draw[:2] if isinstance(draw, Draw) else ()), image))
        known = sorted(in_batch)
        generator.shuffle(known)
        targets = self.targets
        if targets is None:
            members = generator.sample(range(len(self)), min(len(self), len(known) + _MAX_TRIES))
        else:
            members = np.flatnonzero(targets == targets[image]).tolist()
            generator.shuffle(members)
            known.sort(key=lambda other: targets[other] != targets[image])
        yield from [other for other in members if other not in in_batch][:_MAX_TRIES]
        yield from [other for other in known if other != image]


def image_mode(dataset: Any) -> str | None:
    """Pillow's mode of the images of a data set; None if it does not say."""
    while not hasattr(dataset, 'input_img_mode') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(getattr(dataset, 'reader', None), 'input_img_mode', None) or getattr(dataset, 'input_img_mode', None)


def num_clipped(dataset: Any) -> int:
    """How many of the images that were read have more than 8 bits a pixel, and were cut to them."""
    count = 0
    while dataset is not None:
        count += int(dataset.clipped.sum()) if hasattr(dataset, 'clipped') else 0
        dataset = getattr(dataset, 'dataset', None)
    return count


def warn_of_skipped(what: str, dataset: Any, epoch: int = 0, count: int | None = None) -> None:
    """Say how many images could not be read, and which classes have none left; once, how many were clipped.

    Args:
        what: Start of the log line.
        dataset: A `SampleDataset`; nothing is said of another.
        epoch: The epoch.
        count: How many over all processes, if there are several.
    """
    if not isinstance(dataset, SampleDataset):
        return
    count = dataset.num_skipped(epoch) if count is None else count
    if count:
        read = 'read or transformed' if dataset.num_failed(epoch) else 'read'
        _logger.warning(f'{what}: skipped {count} images that cannot be {read}, others of their class took their place')
    clipped = 0 if dataset.told_of_clipped else num_clipped(dataset)
    if clipped:
        dataset.told_of_clipped = True
        _logger.warning(
            f'{what}: {clipped} images have more than 8 bits a pixel; what is above 255 becomes white, as in timm. '
            'Convert them first, for instance with ImageMagick: mogrify -depth 8 FILES'
        )
    lost = ', '.join(map(str, dataset.lost_classes()))
    if lost:
        _logger.warning(f'{what}: no image of class {lost} can be read, images of other classes took their place')
