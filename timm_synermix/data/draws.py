"""What a batch asks a data set for: images, the views of them that are wanted, and when in a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Sampler


class Views(NamedTuple):
    """An image, and which of its two views are wanted.

    An image with both views may be asked for by its bare index, or by a pair of that and its size.

    Attributes:
        image: Index of the image in the data set, first, as in the pairs of timm's samplers.
        clean, augmented: Whether the view is wanted.
        size: Which one of scheduled image sizes.
    """

    image: int
    clean: bool = True
    augmented: bool = True
    size: int = 0


class Draws(NamedTuple):
    """A batch of an epoch.

    Attributes:
        items: What the data set takes: indices, `Views`, or tuples of an index and something else.
        epoch: The epoch.
        rank: The process that it is of.
        number: Its number in the epoch, on this process.
    """

    items: list[Any]
    epoch: int
    rank: int
    number: int


class DrawSampler(Sampler[Any]):
    """The batches of a batch sampler, each with its place in the run.

    Args:
        batch_sampler: Yields lists of what a data set takes.
        rank: This process.
    """

    def __init__(self, batch_sampler: Any, rank: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.rank = rank
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

    def __iter__(self) -> Iterator[Any]:  # of Draws, where a DataLoader expects lists
        for number, batch in enumerate(self.batch_sampler):
            if number >= self.first_batch:
                yield Draws(batch, self.epoch, self.rank, number)


def views_of(item: Any) -> Views:
    """What an item asks for: `Views`, an index, or timm's pair of an index and the number of a size."""
    if isinstance(item, Views):
        return item
    return Views(item[0], size=item[1]) if isinstance(item, tuple) else Views(item)


def items_of(batch: Any) -> Sequence[Any]:
    """What the data set takes: of `Draws`, or of an evaluation's plain batch."""
    items: Sequence[Any] = batch.items if isinstance(batch, Draws) else batch
    return items


def image_of(item: Any) -> int:
    """The index of an item's image."""
    return item[0] if isinstance(item, tuple) else item


def with_image(item: Any, image: int) -> Any:
    """The item with another image."""
    if isinstance(item, Views):
        return item._replace(image=image)
    return (image, *item[1:]) if isinstance(item, tuple) else image
