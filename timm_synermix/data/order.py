"""The order of an epoch's images: a function of seed and epoch that no other seed or epoch has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from timm_synermix.utils.random import seed_of


class EpochOrder(Sampler[int]):
    """An index sampler of torch or timm, in an order by a hash of (seed, epoch).

    By themselves `torch.utils.data.DistributedSampler` has the order of seed + epoch, which the next seed had an epoch
    before, and timm's `RepeatAugSampler` that of the epoch, whatever the seed.

    Args:
        sampler: One of these; a DistributedSampler with seed 0.
        seed: Seed of the order, the same on all ranks.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration yields."""
        self.epoch = epoch
        self.sampler.set_epoch(seed_of('order', self.seed, epoch))

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)
