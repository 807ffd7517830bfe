"""Batches of scheduled image sizes, with two images of a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from timm.data.scheduled_sampler import ScheduledBatchSampler

from timm_synermix.data.draws import Views
from timm_synermix.data.sampler import SupplementBatchSampler

# The arguments of timm's create_loader that describe a schedule, and what its sampler calls them.
_SCHEDULE = {
    'batch_size_choices': 'batch_sizes',
    'batch_choice_weights': 'choice_weights',
    'batch_choice_seed': 'seed',
    'batch_choice_schedule': 'choice_schedule',
    'batch_schedule_epochs': 'schedule_epochs',
    'batch_schedule_spread': 'schedule_spread',
    'batch_schedule_random_mix': 'schedule_random_mix',
    'num_batches': 'num_batches',
}


def take_schedule(
    kwargs: dict[str, Any], batch_size: int, one_size: bool = False
) -> tuple[Sequence[Any] | None, dict[str, Any]]:
    """Take the arguments of a schedule out of those of timm's create_loader.

    Args:
        kwargs: What they are taken out of.
        batch_size: That of all sizes without batch_size_choices.
        one_size: No schedule is possible.

    Returns:
        The image sizes, None without a schedule, and the arguments of `ScheduledBatchSampler`.

    Raises:
        ValueError: There is not a batch size for each image size; or there is a schedule with one_size.
    """
    sizes = kwargs.pop('input_size_choices', None)
    schedule = {name: kwargs.pop(old) for old, name in _SCHEDULE.items() if old in kwargs}
    if sizes is None:
        return None, {}
    if one_size:
        raise ValueError('input_size_choices must be None with num_aug_splits, and for a streaming data set.')
    if schedule.get('batch_sizes') is None:
        schedule['batch_sizes'] = [batch_size] * len(sizes)
    if len(schedule['batch_sizes']) != len(sizes):
        raise ValueError(
            f'batch_size_choices must have a value for each of the {len(sizes)} input_size_choices, '
            f'got {schedule["batch_sizes"]}.'
        )
    return sizes, schedule


class ScheduledSupplementSampler(SupplementBatchSampler):
    """The batches of timm's `ScheduledBatchSampler`, and a second image for every lone class of each.

    The partners have the size of their batch. What is yielded are pairs of an image and the number of its size, as of
    timm's sampler, and `Views` with that number.

    Args:
        scheduled: Of this rank's indices, see `SupplementBatchSampler`.
        targets, kwargs: See `SupplementBatchSampler`; without fixed.
    """

    def __init__(self, scheduled: ScheduledBatchSampler, targets: Any, **kwargs: Any) -> None:
        if kwargs.get('fixed'):
            raise ValueError("batch must be 'grow' with input_size_choices, got 'fixed'.")
        super().__init__(scheduled.sampler, targets, max(2, *scheduled.batch_sizes), **kwargs)
        self.scheduled = scheduled

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration yields."""
        self.scheduled.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.scheduled)

    @property
    def _length(self) -> int:
        return sum(size for _, size in self.scheduled.schedule)

    def __iter__(self) -> Iterator[list[Any]]:
        generator = np.random.default_rng([self.seed, self.epoch, self.rank])
        for batch in self.scheduled:
            size = batch[0][1]
            items = self._items(self._completed(np.array([index for index, _ in batch]), generator), generator)
            yield [item._replace(size=size) if isinstance(item, Views) else (item, size) for item in items]
