"""Batches with random numbers of their own, and with others in the place of images that cannot be read."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from timm_synermix.data.dataset import FailedTransform, UnreadableImage, image_name, one_line
from timm_synermix.data.draws import Draws, image_of, items_of, with_image
from timm_synermix.utils.random import seed_everything, seed_of

_logger = logging.getLogger(__name__)

_MAX_TRIES = 10  # images of a class that are tried in the place of an unreadable one, as many as in timm


class SampleDataset(Dataset):
    """Batches of a data set, with random numbers of their own, and with other images in the place of unreadable ones.

    Whatever the transforms of a batch draw from the global generators is a function of (seed, epoch, rank, batch): the
    generators are seeded before each. An image that cannot be read is named once, and another image of its class takes
    its place, drawn at random, which is not in the batch yet if the class has such a one. So it is with an image for
    which a transform raises; but where that happens to two images and over 1 % of an epoch, it is the transform that
    is wrong.

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
        self._any = torch.zeros(1, dtype=torch.bool).share_memory_()  # has been: else nobody looks through the others

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
        return int((self._skipped == epoch + 1).sum()) if self._any else 0

    def num_failed(self, epoch: int = 0) -> int:
        """For how many images a transform raised in an epoch."""
        return int((self._failed == epoch + 1).sum()) if self._any else 0

    def lost_classes(self) -> list[int]:
        """The classes of which every image was tried, and none could be read."""
        if self.targets is None or not self._any:
            return []
        skipped = self._skipped.numpy() > 0
        lost = np.setdiff1d(self.targets[skipped], self.targets[~skipped])
        return lost.tolist()

    def __getitem__(self, item: Any) -> Any:
        return self.__getitems__([item])[0]

    def __getitems__(self, batch: Draws | Sequence[Any]) -> list[Any]:
        """The samples of a batch; of plain items, as of an evaluation, without seeding."""
        draws = batch if isinstance(batch, Draws) else None
        items = items_of(batch)
        if draws is not None:
            seed_everything(seed_of('batch', self.seed, *draws[1:]))
        in_batch: set[int] = set()
        return [self._sample(item, items, in_batch, draws) for item in items]

    def _sample(self, item: Any, items: Sequence[Any], in_batch: set[int], draws: Draws | None) -> Any:
        try:
            return self._get(item)
        except UnreadableImage as error:
            in_batch.update(image_of(other) for other in items)  # the images of the batch, once one is looked for
            epoch = 0 if draws is None else draws.epoch
            self._note(image_of(item), error, epoch)
            for image in self._others(image_of(item), in_batch, draws):
                sample = self._instead(with_image(item, image), epoch)
                if sample is not None:
                    in_batch.add(image)
                    return sample
            raise UnreadableImage(f'{error}; nor can another one of its class or its batch be') from error

    def _instead(self, item: Any, epoch: int) -> Any:
        """The sample of another image, or None; that it cannot be read is said where it is drawn itself."""
        try:
            return self._get(item)
        except FailedTransform as error:
            self._note(image_of(item), error, epoch)
        except UnreadableImage:
            pass
        return None

    def _get(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except UnreadableImage:
            raise
        except Exception as error:  # transforms raise all kinds
            reason = f'{type(error).__name__}: {one_line(error)}'
            raise FailedTransform(
                f'{image_name(self.dataset, image_of(item))} cannot be transformed: {reason}'
            ) from error

    def _note(self, image: int, error: UnreadableImage, epoch: int) -> None:
        if self.strict:
            raise UnreadableImage(str(error)) from error
        if not self._skipped[image]:
            _logger.warning(f'Skipped: {error}')
        self._any[0] = True
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

    def _others(self, image: int, in_batch: set[int], draws: Draws | None) -> Iterator[int]:
        """Images to try instead: of the class, then those of the class in the batch, then the others in the batch."""
        generator = random.Random(seed_of('instead', self.seed, *(draws[1:] if draws else ()), image))
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
