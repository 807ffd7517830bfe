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

    def gather_to_first(self, value: Any) -> list[Any]:
        """The value of every process, by rank, in the first one alone; every process must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if dist.get_rank() == 0 else None
        dist.gather_object(value, values, group=self._group)
        return values or []

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


NO_SHARED_MEMORY = 'A loader worker found no room in shared memory (/dev/shm)'


def lost_worker(error: BaseException) -> bool:
    """Whether an error says that a worker of a loader was killed, or had no room in shared memory.

    The former torch raises wherever the process is just then; what a worker itself raises is another thing.
    """
    return 'DataLoader worker (pid' in str(error) or NO_SHARED_MEMORY in str(error)


def lost_worker_reason(error: BaseException) -> str:
    """What to tell a user of it, in one line."""
    if 'shared memory' in str(error):
        return (
            f'{NO_SHARED_MEMORY}: fewer --workers or a smaller --batch-size need less; in Docker --shm-size gives more'
        )
    reason = str(error).strip().splitlines()[-1].partition('. ')[0].rstrip('. ')
    return f'{reason}, as the system does when memory runs out: fewer --workers need less'


def add_up(tensor: torch.Tensor, group: Any = None, size: int = 2**24) -> None:
    """Add a tensor up over the processes of a group, in place and a part at a time; every process must call it."""
    for part in tensor.view(-1).split(size):
        moved = part.to(_exchanged_on(part, group))
        dist.all_reduce(moved, group=group)
        if moved.device != part.device:
            part.copy_(moved)


def gather_tensors(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """The tensors of all processes of a group, which have one shape; every process must call it."""
    moved = tensor.to(_exchanged_on(tensor, group)).contiguous()
    gathered = [torch.empty_like(moved) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, moved, group=group)
    return [each.to(tensor.device) for each in gathered]


def _exchanged_on(tensor: torch.Tensor, group: Any) -> torch.device:
    """Where a group exchanges a tensor: NCCL knows those of GPUs alone."""
    return torch.device('cuda') if dist.get_backend(group) == 'nccl' else tensor.device
