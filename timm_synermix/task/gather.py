"""Rows of all ranks, for classes that are mixed across them; each rank classifies its share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from timm_synermix.functional import IGNORE_INDEX


@torch.compiler.disable
def gather_rows(local: Tensor, num_rows: int, fill: float = 0) -> Tensor:
    """The rows of all ranks, in the order of the ranks; every rank must call it.

    What ranks compute of them may differ: the gradient of a rank's rows is the sum of those of all ranks, for which
    the backward pass exchanges as much again.

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
    padded = F.pad(local, (0, 0) * (local.ndim - 1) + (0, num_rows - len(local)), value=fill)
    gathered: Tensor = _Gather.apply(padded)
    return gathered


class _Gather(torch.autograd.Function):
    """`[N, ...]` of each rank as `[world_size * N, ...]` on all of them."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        total = grad[0].contiguous()
        if dist.get_backend() == 'nccl':
            own = total.new_empty(len(total) // dist.get_world_size(), *total.shape[1:])
            dist.reduce_scatter_tensor(own, total)
            return own
        total = total.clone()  # the engine's
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def own_share(rows: Tensor) -> Tensor:
    """The rows of the ranks' that this rank classifies: every world_size-th, as the classes present come first."""
    return rows[dist.get_rank() :: dist.get_world_size()]


def share_weight(row_target: Tensor) -> tuple[Tensor, Tensor]:
    """How a mean over the classes of this rank's share counts in that over all ranks' classes, the mean over ranks.

    Args:
        row_target: Of all ranks, int64, `IGNORE_INDEX` for padding.

    Returns:
        The targets of the share, classes if there is none in it; and the weight `world_size * K_r / K` of its
        mean, K_r of the K classes being in it, 0 if none is.
    """
    share = own_share(row_target)
    present, own = (row_target != IGNORE_INDEX).sum(), (share != IGNORE_INDEX).sum()
    share = torch.where(own > 0, share, share.clamp(min=0))
    return share, dist.get_world_size() * own / present


def mean_over_ranks(loss: Tensor) -> Tensor:
    """A loss with its mean over the ranks as its value, and its own gradient; every rank must call it."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - loss).detach()
