"""What the processes of a run agree on: numbers, and that they are the same run."""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from timm_synermix.data import dataset_targets

# What may differ between the processes of a run.
_OWN = {'rank', 'local_rank', 'device', 'workers', 'pin_mem', 'data', 'data_dir', 'config'}


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


def check_same_run(group: HostGroup, args: argparse.Namespace, *datasets: Any) -> None:
    """Refuse to train one model with processes that were given different flags or data.

    Args:
        group: The processes.
        args: The flags, as parsed.
        datasets: The data sets, or None. Compared are their lengths, labels and file names.

    Raises:
        ValueError: On every process: what differs, and how.
    """
    if group.size == 1:
        return
    facts = {f'--{name.replace("_", "-")}': repr(value) for name, value in vars(args).items() if name not in _OWN}
    for kind, dataset in zip(('training', 'validation'), datasets, strict=True):
        if dataset is not None:
            facts[f'the {kind} set'] = _describe(dataset)
    group.check_same(facts)


def _describe(dataset: Any) -> str:
    targets, text = dataset_targets(dataset), f'{len(dataset)} images'
    if targets is not None:
        text += f' with labels of checksum {zlib.crc32(targets.tobytes()):08x}'
    try:
        names = [os.path.basename(name) for name in dataset.filenames(basename=True)]
    except (AttributeError, NotImplementedError, AssertionError, TypeError):
        return text
    return text + f' and names of checksum {zlib.crc32(chr(0).join(names).encode(errors="replace")):08x}'
