"""Distances between class means, in one pass of matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PAIRS = 2**29  # ordered pairs of classes that are looked at: all of up to 23,170 classes
_BLOCK = 2**20  # of them at a time, 8 MB
_NEAR = 1e-4  # squared distance, to the squared norms, below which a product tells too little of it


class ClassDistances(NamedTuple):
    """Of the K classes with images, R of them with all others; R = K unless K is above 23,170.

    Attributes:
        row: These R among the K, int64 `[R]`, ascending; a random sample where R < K.
        mean, smallest: Mean and smallest distance.
        cdnv: Mean of `(v_a + v_b) / (2 d_ab^2)`.
        davies_bouldin: Mean over a of `max_b (s_a + s_b) / d_ab`.
        nearest, nearest_distance: Of each the nearest other class, int64 `[R]` among the K, and its distance, `[R]`.
    """

    row: Tensor
    mean: Tensor
    smallest: Tensor
    cdnv: Tensor
    davies_bouldin: Tensor
    nearest: Tensor
    nearest_distance: Tensor


def class_distances(mean: Tensor, variance: Tensor, rounding: Tensor | float = 0.0, seed: int = 0) -> ClassDistances:
    """Distances of class means, `|a - b|^2 = |a|^2 + |b|^2 - 2 ab` about their common mean.

    Nearly equal means, of which rounding would leave little in that sum, are subtracted from each other instead.

    Args:
        mean: Float64 `[K, D]`, overwritten.
        variance: Mean squared distance of the features of a class to its mean, `[K]`.
        rounding: Distances up to this one are none.
        seed: Seed of the sample of rows.

    Returns:
        NaN, and no rows, with fewer than two classes. A class whose mean is not finite is infinitely far from all.
    """
    num_classes = len(mean)
    if num_classes < 2:
        nothing, nobody = mean.new_tensor(torch.nan), mean.new_empty(0)
        return ClassDistances(nobody.long(), nothing, nothing, nothing, nothing, nobody.long(), nobody)
    row = torch.arange(num_classes, device=mean.device)
    if num_classes**2 > _PAIRS:
        sample = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
        row = sample[: max(1, _PAIRS // num_classes)].sort().values.to(mean.device)
    square = _center(mean)
    spread = variance.sqrt()
    totals, ratios, overlaps, neighbours, distances = [], [], [], [], []
    for part in row.split(max(1, _BLOCK // num_classes)):
        own = torch.arange(len(part), device=mean.device), part
        squared = _squared(mean, square, part, rounding)
        squared[own] = torch.inf
        inverse = squared.reciprocal()
        ratios.append((variance[part] * inverse.sum(1) + inverse @ variance).sum() / 2)
        overlaps.append((inverse.sqrt_().mul_(spread[part, None] + spread)).amax(1))
        distance = squared.sqrt_()
        nearest = distance.min(1)
        neighbours.append(nearest.indices)
        distances.append(nearest.values)
        distance[own] = 0.0
        totals.append(distance.sum())
    pairs = len(row) * (num_classes - 1)
    values = torch.cat(distances)
    smallest = values.min()
    return ClassDistances(
        row=row,
        mean=torch.stack(totals).sum() / pairs,
        smallest=smallest,
        cdnv=torch.where(smallest == 0, torch.inf, torch.stack(ratios).sum() / pairs),
        davies_bouldin=torch.where(smallest == 0, torch.inf, torch.cat(overlaps).mean()),
        nearest=torch.cat(neighbours),
        nearest_distance=values,
    )


def _center(mean: Tensor) -> Tensor:
    """Take the common mean away, in place, and return squared norms `[K]`; those that are not finite become zero."""
    size = max(1, _BLOCK // mean.shape[1])
    finite = torch.cat([part.isfinite().all(1) for part in mean.split(size)])
    mean[~finite] = 0.0
    center = mean.sum(0) / finite.sum().clamp(min=1)
    for part in mean.split(size):
        part -= center
    mean[~finite] = 0.0
    square = torch.cat([part.square().sum(1) for part in mean.split(size)])
    return torch.where(finite, square, torch.inf)


def _squared(mean: Tensor, square: Tensor, part: Tensor, rounding: Tensor | float) -> Tensor:
    """Squared distances `[R, K]` of a part of the classes to all."""
    size = square[part, None] + square
    squared = torch.addmm(size, mean[part], mean.T, alpha=-2)
    one, other = (squared < size.mul_(_NEAR)).nonzero().unbind(1)
    # Two means within the rounding of the origin are the same, which needs no second look; nor does one by itself.
    again = (size[one, other] > _NEAR * rounding**2 / 2) & (part[one] != other)
    for pairs in torch.stack([one[again], other[again]]).split(max(1, _BLOCK // mean.shape[1]), dim=1):
        squared[pairs[0], pairs[1]] = (mean[part[pairs[0]]] - mean[pairs[1]]).square().sum(1)
    return squared.masked_fill_(squared <= rounding**2, 0.0)
