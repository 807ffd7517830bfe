"""A loader whose batches depend on seed, epoch and data alone: not on workers, nor on where in an epoch it starts."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from timm_synermix.reading import UnreadableImage
from timm_synermix.seeding import random_state_kept, seed_everything, seed_of

_logger = logging.getLogger(__name__)

_MAX_TRIES = 10  # images of a class that are tried in the place of an unreadable one, as many as in timm


class Draw(NamedTuple):
    """One sample of an epoch.

    Attributes:
        epoch: The epoch.
        occurrence: Tells the times apart that an image is seen in an epoch, on all processes.
        item: What the data set takes: an index, or `~index`, or a pair of an index and something else.
    """

    epoch: int
    occurrence: int
    item: Any


class DrawSampler(Sampler[list[Draw]]):
    """The batches of a batch sampler, as draws.

    Args:
        batch_sampler: Yields lists of what a data set takes.
        rank, world_size: This process, and how many there are.
    """

    def __init__(self, batch_sampler: Any, rank: int = 0, world_size: int = 1) -> None:
        self.batch_sampler = batch_sampler
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Select the epoch that the next iteration yields, and the batch it starts with."""
        self.epoch, self.first_batch = epoch, first_batch
        part: Any
        for part in (self.batch_sampler, getattr(self.batch_sampler, 'sampler', None)):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Draw]]:
        seen: Counter[int] = Counter()
        for number, batch in enumerate(self.batch_sampler):
            draws = []
            for item in batch:
                image = _image(item)
                draws.append(Draw(self.epoch, seen[image] * self.world_size + self.rank, item))
                seen[image] += 1
            if number >= self.first_batch:
                yield draws


def _image(item: Any) -> int:
    """The index of an item's image."""
    index = item[0] if isinstance(item, tuple) else item
    return index if index >= 0 else ~index


def _instead(item: Any, image: int) -> Any:
    """The item with another image."""
    if isinstance(item, tuple):
        return (image, *item[1:])
    return image if item >= 0 else ~image


class SampleDataset(Dataset):
    """Samples of a data set, each with random numbers of its own, and with others in the place of unreadable ones.

    Whatever a sample's transforms draw from the global generators is a function of (seed, epoch, index): the generators
    are seeded before each. An image that cannot be read is named once, and another image of its class takes its place,
    drawn at random, which is not in the batch yet if the class has such a one.

    Args:
        dataset: Takes an index; raises UnreadableImage. `ReadableImages`, or a data set around one.
        seed: Seed of all samples.
        targets: The class of every image, int `[len(dataset)]`. None if unknown: then any image takes the place.
        strict: Raise UnreadableImage instead.
    """

    def __init__(self, dataset: Any, seed: int = 42, targets: np.ndarray | None = None, strict: bool = False) -> None:
        self.dataset = dataset
        self.seed = seed
        self.targets = targets
        self.strict = strict
        # 1 + the last epoch in which an image was skipped, 0 for never; workers write, the main process reads
        self._skipped = torch.zeros(len(dataset), dtype=torch.int16).share_memory_()

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
        """How many images could not be read in an epoch."""
        return int((self._skipped == epoch + 1).sum())

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
        in_batch = {_image(_item(draw)) for draw in draws}
        return [self._sample(draw, in_batch) for draw in draws]

    def _sample(self, draw: Any, in_batch: set[int]) -> Any:
        if isinstance(draw, Draw):
            seed_everything(seed_of('sample', self.seed, draw.epoch, _image(draw.item), draw.occurrence))
        try:
            return self.dataset[_item(draw)]
        except UnreadableImage as error:
            self._note(draw, _image(_item(draw)), error)
            for image in self._others(draw, in_batch):
                with suppress(UnreadableImage):
                    sample = self.dataset[_instead(_item(draw), image)]
                    in_batch.add(image)
                    return sample
            raise UnreadableImage(f'{error}; nor can another one of its class or its batch be') from error

    def _note(self, draw: Any, image: int, error: UnreadableImage) -> None:
        if self.strict:
            raise error
        if not self._skipped[image]:
            _logger.warning(f'Skipped: {error}')
        self._skipped[image] = 1 + (draw.epoch if isinstance(draw, Draw) else 0)

    def _others(self, draw: Any, in_batch: set[int]) -> Iterator[int]:
        """Images to try instead: of the class, then those of the class in the batch, then the others in the batch."""
        image = _image(_item(draw))
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


def _item(draw: Any) -> Any:
    return draw.item if isinstance(draw, Draw) else draw


def warn_of_skipped(what: str, dataset: Any, epoch: int = 0, count: int | None = None) -> None:
    """Say how many images could not be read, and which classes have none left.

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
        _logger.warning(f'{what}: skipped {count} images that cannot be read, others of their class took their place')
    lost = ', '.join(map(str, dataset.lost_classes()))
    if lost:
        _logger.warning(f'{what}: no image of class {lost} can be read, images of other classes took their place')


class SampleLoader(DataLoader):
    """A DataLoader of a `SampleDataset` that can start in the middle of an epoch.

    Its batches are a function of (seed, epoch): the same for any number of workers, from whatever batch it starts.
    Iterating leaves the global generators as they are. Call `batch_sampler.set_epoch` before each epoch.

    Args:
        dataset, seed, targets, strict: See `SampleDataset`.
        batch_sampler: Yields lists of what the data set takes; has `set_epoch`, or its sampler has.
        rank, world_size: This process, and how many there are.
        kwargs: Other arguments of DataLoader.
    """

    dataset: SampleDataset
    batch_sampler: DrawSampler

    def __init__(
        self,
        dataset: Any,
        batch_sampler: Any,
        *,
        seed: int = 42,
        targets: np.ndarray | None = None,
        strict: bool = False,
        rank: int = 0,
        world_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            SampleDataset(dataset, seed, targets, strict),
            batch_sampler=DrawSampler(batch_sampler, rank, world_size),
            **kwargs,
        )
        self.seed = seed
        shield(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with random_state_kept():  # a DataLoader draws a seed for its workers, which nothing here depends on
            batches = super().__iter__()
        while True:
            with nullcontext() if self.num_workers else random_state_kept():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def shield(loader: DataLoader) -> DataLoader:
    """Make a loader's workers stop when the main process stops, and give the loader back. See `shielded`."""
    loader.worker_init_fn = partial(shielded, loader.worker_init_fn)
    return loader


def shielded(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Start a worker that stops when the main process stops, not when a signal is sent to all processes of a run.

    The main process may be about to save where it is, and would be torn away by the loss of a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class SamplePrefetchLoader(PrefetchLoader):
    """timm's PrefetchLoader of a `SampleLoader`, whose random erasing is a function of (seed, epoch, batch).

    Args:
        loader: The loader, or one of a stream, whose erasing has no seed.
        erase: Erases in place. None for not.
        clean_view: Batches of more images than targets begin with as many clean ones, which stay as they are.
        kwargs: Other arguments of PrefetchLoader.
    """

    def __init__(self, loader: DataLoader, erase: RandomErasing | None, clean_view: bool, **kwargs: Any) -> None:
        super().__init__(loader, **kwargs)
        self.erase = erase
        self.clean_view = clean_view

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = self.batch_sampler
        known = isinstance(draws, DrawSampler)  # a stream is erased as it comes
        for number, (input, target) in enumerate(super().__iter__(), draws.first_batch if known else 0):
            if self.erase is not None:
                with random_state_kept(self.device) if known else nullcontext():
                    if known:
                        key = ('erase', self.loader.seed, draws.rank, draws.epoch, number)
                        seed_everything(seed_of(*key), self.device)
                    self.erase(input[len(target) if self.clean_view and len(input) > len(target) else 0 :])
            yield input, target
