"""Rows of all ranks, for classes that are mixed across them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist


def gather_rows(local: Tensor, num_rows: int, fill: float = 0) -> Tensor:
    """The rows of all ranks, in the order of the ranks; every rank must call it.

    A loss that every rank computes alike from the result has, with the gradients averaged over the ranks as DDP does,
    the gradients of one process with all the rows: what enters through this rank's own rows counts world size times,
    and nothing enters through the others', whose ranks see to that. So the backward pass needs no communication.

    Args:
        local: `[N, ...]`, N may differ from rank to rank.
        num_rows: Rows that each rank's part is padded to, not less than its N: shapes stay the same from step to step,
            and no rank has to ask another for its N.
        fill: Value of the padding.

    Returns:
        `[world_size * num_rows, ...]` in the dtype of local.

    Raises:
        ValueError: num_rows is less than N.
    """
    if len(local) > num_rows:
        raise ValueError(f'num_rows must be at least the {len(local)} rows of this rank, got {num_rows}.')
    world_size, rank = dist.get_world_size(), dist.get_rank()
    padded = F.pad(local, (0, 0) * (local.ndim - 1) + (0, num_rows - len(local)), value=fill)
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded.detach().contiguous())
    if padded.requires_grad:  # the same values, with a gradient of world_size times
        gathered[rank] = padded + (world_size - 1) * (padded - padded.detach())
    return torch.cat(gathered)
