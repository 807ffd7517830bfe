"""What the processes of a run tell each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist


class HostGroup:
    """The processes of a run, who exchange a few numbers without their GPUs. One process is a group too."""

    def __init__(self) -> None:
        self._group: Any = None
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.size > 1 and dist.get_backend() != 'gloo':
            self._group = dist.new_group(backend='gloo')

    def max(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all processes; every process must call it, with as many values."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; every process must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def check_same(self, facts: dict[str, Any]) -> None:
        """Compare facts, by name, with those of the other processes; every process must call it.

        Raises:
            ValueError: On every process: one differs.
        """
        everyone = self.gather(facts)
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if other.get(name) != value:
                    raise ValueError(
                        f'{name} must be the same in all processes, got {value} on rank 0, '
                        f'{other.get(name)} on rank {rank}'
                    )


def lost_process(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another process has gone."""
    return isinstance(error, dist.DistError) or bool(
        re.search('gloo|nccl|Connection (closed|reset)', str(error), re.IGNORECASE)
    )


def lost_worker(error: BaseException) -> bool:
    """Whether an error says that a worker of a loader was killed; torch raises it wherever the process is just then."""
    return 'DataLoader worker' in str(error)


def lost_worker_reason(error: BaseException) -> str:
    """What to tell a user of it, in one line."""
    reason = str(error).strip().splitlines()[-1].partition('. ')[0].rstrip('. ')
    return f'{reason}, as the system does when memory runs out: fewer --workers need less'
