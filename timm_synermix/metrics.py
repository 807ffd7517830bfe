"""Distances within and between classes in feature space, over a whole evaluation set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _ClassMoments(Metric):
    """Count, sum and squared norm of the features of each class: all that the distances need, in O(C x D) memory.

    Args:
        num_classes: Number of classes C.
        feature_dim: Length D of a feature.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    count: Tensor
    sum: Tensor
    square: Tensor

    def __init__(self, num_classes: int, feature_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or feature_dim < 1:
            raise ValueError(
                f'num_classes and feature_dim must be positive, got num_classes={num_classes}, {feature_dim=}.'
            )
        shapes = dict(count=(num_classes,), square=(num_classes,), sum=(num_classes, feature_dim))
        for name, shape in shapes.items():  # float64: the spread is a small difference of large sums
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx='sum')
        self.set_dtype(torch.float64)

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]` in `[0, num_classes)`."""
        if feature.ndim != 2 or feature.shape[1] != self.sum.shape[1] or target.shape != feature.shape[:1]:
            raise ValueError(
                f'feature must be [N, {self.sum.shape[1]}] and target [N], '
                f'got {list(feature.shape)} and {list(target.shape)}.'
            )
        feature = feature.detach().double()
        self.count.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
        self.sum.index_add_(0, target, feature)
        self.square.index_add_(0, target, feature.square().sum(1))

    def _means(self) -> Tensor:
        """Means of the classes that have features."""
        present = self.count > 0
        return self.sum[present] / self.count[present, None]


class IntraClassDistance(_ClassMoments):
    """Root mean square Euclidean distance of the features to the mean of their class.

    `sqrt(1/N sum_i |f_i - mu_{y_i}|^2)`, in `[0, inf)`; lower is tighter. In units of the features, whose scale differs
    from model to model: divide by the inter-class distance to compare.

    Example:
        >>> metric = IntraClassDistance(num_classes=2, feature_dim=1)
        >>> metric.update(torch.tensor([[0.0], [2.0], [10.0]]), torch.tensor([0, 0, 1]))
        >>> round(metric.compute().item(), 4)
        0.8165
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance, float64 scalar; NaN before the first update."""
        present = self.count > 0
        scatter = self.square[present] - self.sum[present].square().sum(1) / self.count[present]
        return (scatter.clamp(min=0).sum() / self.count.sum()).sqrt()


class InterClassDistance(_ClassMoments):
    """Mean Euclidean distance between the means of two classes.

    `2 / (K (K - 1)) sum_{a < b} |mu_a - mu_b|` over the K classes present, in `[0, inf)`; higher is further apart. In
    units of the features.

    Example:
        >>> metric = InterClassDistance(num_classes=2, feature_dim=1)
        >>> metric.update(torch.tensor([[0.0], [2.0], [10.0]]), torch.tensor([0, 0, 1]))
        >>> metric.compute().item()
        9.0
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The distance, float64 scalar; NaN with fewer than two classes."""
        return torch.nn.functional.pdist(self._means()).mean()


def pool_feature(feature: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The features of a `FeatureHook` as one vector per image, `[N, D]`.

    Positions of a feature map `[N, D, H, W]` or tokens `[N, T, D]` are averaged, several classifiers' features joined.
    """
    if isinstance(feature, tuple):
        return torch.cat([pool_feature(part) for part in feature], dim=1)
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature
