"""SynerMix as pure tensor functions: the weights, the intra-class mix and the loss. No module, no I/O."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_synermix.utils.checks import BETA, NUM_MIXED

IGNORE_INDEX = -100  # torch's own default `ignore_index`: cross-entropy leaves rows with this target out of its mean


def class_rows(target: Tensor) -> tuple[Tensor, Tensor]:
    """Give every class present in a batch one row, in ascending order of the class index.

    The number of classes present is known on the device only, so the rows are padded to the batch size: shapes
    depend on the batch size alone and the host never waits for the device.

    Args:
        target: Class indices, int64 `[N]`.

    Returns:
        row: int64 `[N]`, the row of each image's class, in `[0, K)` for the K classes present.
        row_target: int64 `[N]`, the class of rows 0 to K - 1, then `IGNORE_INDEX`.

    Raises:
        ValueError: target is not a 1-D integer tensor.
    """
    row, row_target, _ = _sorted_rows(target)
    return row, row_target


def _sorted_rows(target: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`class_rows`, and the rows in ascending order with the images they are of, as `torch.sort(row)` has them."""
    if target.ndim != 1 or target.is_floating_point():
        raise ValueError(
            f'target must be class indices of shape [N], got {target.dtype} of shape {list(target.shape)}.'
        )
    ordered, order = torch.sort(target)
    ordered_row = torch.zeros_like(target)
    torch.cumsum(ordered[1:] != ordered[:-1], 0, out=ordered_row[1:])
    row = torch.empty_like(target).scatter_(0, order, ordered_row)
    row_target = torch.full_like(target, IGNORE_INDEX).scatter_(0, ordered_row, ordered)
    return row, row_target, (ordered_row, order)


def intra_class_weight(
    target: Tensor,
    *,
    num_mixed: int = 0,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random convex weights inside each class of a batch: `w_i = u_i / sum_{j: y_j = y_i} u_j`, `u ~ U(0, 1)`.

    Uniform draws divided by their sum, as in the paper's code; this is not a Dirichlet(1) draw. An image that is alone
    in its class has weight 1.

    Args:
        target: Class indices, int64 `[N]`.
        num_mixed: Images interpolated per class (the paper's P). A class with more of them in the batch uses that many,
            chosen at random; the others have weight 0. 0 uses all.
        weight: The draws `u`, non-negative, floating point `[N]`, instead of random ones. A class needs a positive sum.
        generator: Generator of the random draws, on the device of target. None uses torch's global one.

    Returns:
        Weights, float32 `[N]` (float64 if weight is), in `[0, 1]`, that sum to 1 within each class.

    Raises:
        ValueError: num_mixed is negative, weight does not match target, or target is not int `[N]`.

    Source: SynerMix step 2 (arXiv 2403.14137), with the weights of the authors' code.
    """
    row, _ = class_rows(target)
    return row_weight(row, num_mixed=num_mixed, weight=weight, generator=generator)


def row_weight(
    row: Tensor, *, num_mixed: int = 0, weight: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """`intra_class_weight` of images whose `class_rows` are known, int64 `[N]`; arguments and errors are its own."""
    NUM_MIXED.check('num_mixed', num_mixed)
    if weight is not None and (weight.shape != row.shape or not weight.is_floating_point()):
        raise ValueError(
            f'weight must be a floating point tensor of shape {list(row.shape)}, '
            f'got {weight.dtype} of shape {list(weight.shape)}.'
        )
    if weight is None:
        # rand() is in [0, 1): mirrored to (0, 1], so that a lone image cannot draw 0 and divide 0 by 0
        weight = 1.0 - torch.rand(row.shape, device=row.device, generator=generator)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if num_mixed:
        weight = weight * _random_subset(row, num_mixed, generator)
    total = torch.zeros_like(weight).index_add_(0, row, weight)
    return weight / total.gather(0, row)


def _random_subset(row: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """A bool mask `[N]` that keeps at most `size` random members of each row."""
    shuffle = torch.rand(row.shape, device=row.device, generator=generator).argsort()
    ordered, order = torch.sort(row[shuffle], stable=True)
    order = shuffle[order]  # rows ascending, random inside a row
    position = torch.arange(len(row), device=row.device)
    rank_in_row = position - torch.searchsorted(ordered, ordered)
    return torch.zeros_like(row, dtype=torch.bool).scatter_(0, order, rank_in_row < size)


def mix_rows(feature: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    """Add up weighted features row by row: `mixed[r] = sum_{i: row_i = r} weight_i * feature_i`.

    Accumulates in float32 (float64 for float64 features) whatever autocast is on, and returns the features' dtype.

    Args:
        feature: `[N, ...]`, any floating dtype.
        row: int64 `[N]`, values in `[0, N)`.
        weight: `[N]`; gets no gradient.

    Returns:
        `[N, ...]` in the dtype of feature; rows that no image maps to are zero.
    """
    return _mix_rows(feature, row, weight, torch.sort(row))


def _mix_rows(feature: Tensor, row: Tensor, weight: Tensor, sorted_row: tuple[Tensor, Tensor]) -> Tensor:
    dtype = torch.promote_types(feature.dtype, torch.float32)
    if feature.dtype != dtype or feature.ndim != 2:
        mixed = _mix_rows(feature.to(dtype).flatten(1), row, weight, sorted_row)
        return mixed.view(feature.shape).to(feature.dtype)
    weight = weight.to(dtype)
    ordered_row, order = sorted_row
    image = torch.arange(len(row), device=row.device)
    start = torch.searchsorted(ordered_row, image)  # where in order the images of each row begin
    result: Tensor = _WeightedSum.apply(feature, order, start, weight.gather(0, order), row, image, weight)
    return result


def _weighted_sum(x: Tensor, index: Tensor, start: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    # what F.embedding_bag(mode='sum') calls, without the time of its checks
    result: Tensor = torch.embedding_bag(x, index, start, False, 0, False, weight)[0]
    return result


class _WeightedSum(torch.autograd.Function):
    """Weighted sums of rows in one fused kernel, and so is the backward pass; the order of summation is fixed.

    `result[r] = sum_{start_r <= k < start_{r+1}} weight_k * x[index_k]` for x `[N, D]`, float32 or float64. Arguments
    are x, the three tensors of these sums, and those of the backward pass, which are sums of the same kind.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, start: Tensor, weight: Tensor, *adjoint: Tensor) -> Tensor:
        ctx.save_for_backward(index, start, weight, *adjoint)
        return _weighted_sum(x, index, start, weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        index, start, weight, *adjoint = ctx.saved_tensors
        sums = _WeightedSum.apply if torch.is_grad_enabled() else _weighted_sum
        return sums(grad[0].contiguous(), *adjoint, index, start, weight), *[None] * 6


def intra_class_mix(
    feature: Tensor,
    target: Tensor,
    *,
    num_mixed: int = 0,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix the features of each class present in a batch into one synthesised feature: `s_c = sum_{i: y_i = c} w_i f_i`.

    Vectorised: no loop over classes, no wait for the device, and every feature receives a gradient. The result is
    padded to the batch size with rows whose target is `IGNORE_INDEX`, so that

        mixed, mixed_target = intra_class_mix(feature, target)
        intra_loss = F.cross_entropy(classifier(mixed), mixed_target)

    is the mean over the classes present. Drop the padding with `mixed[mixed_target >= 0]`.

    Args:
        feature: Features of unaugmented images, `[N, ...]`, any floating dtype. Mixed in float32 or better.
        target: Class indices, int64 `[N]`.
        num_mixed, weight, generator: See `intra_class_weight`.

    Returns:
        mixed: `[N, ...]` in the dtype of feature. Row k < K is the synthesised feature of the k-th smallest of the K
            classes present; the other rows are zero.
        mixed_target: int64 `[N]`, the class of each row, `IGNORE_INDEX` for the padding.

    Raises:
        ValueError: feature and target disagree in length, or see `intra_class_weight`.

    Source: SynerMix step 2 (arXiv 2403.14137). The authors' code loops over the classes on the host.
    """
    if len(feature) != len(target):
        raise ValueError(f'feature and target must have the same length, got {len(feature)} and {len(target)}.')
    row, row_target, sorted_row = _sorted_rows(target)
    weight = row_weight(row, num_mixed=num_mixed, weight=weight, generator=generator)
    return _mix_rows(feature, row, weight, sorted_row), row_target


def synermix_loss(intra_loss: Tensor | float, inter_loss: Tensor | float, beta: float) -> Tensor:
    """Integrate the two losses: `L = beta * L_intra + (1 - beta) * L_inter`.

    Args:
        intra_loss: Scalar, the loss of the intra-class mixed features.
        inter_loss: Scalar, the recipe's own loss on the augmented images. At least one of the two is a tensor.
        beta: Weight of the intra-class loss, in `[0, 1]`.

    Raises:
        ValueError: beta is outside `[0, 1]`.

    Source: SynerMix step 4 (arXiv 2403.14137).
    """
    BETA.check('beta', beta)
    loss: Any = beta * intra_loss + (1.0 - beta) * inter_loss
    return loss
