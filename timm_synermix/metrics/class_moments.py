"""How tight and how far apart classes are in feature space: streaming metrics over a whole evaluation set.

Every metric takes features `[N, D]` of any floating dtype and classes int64 `[N]`, accumulates in float64, and adds up
over processes. "Mean over images" weighs every image alike, "mean over classes" every class that has images. Measure on
clean images, over a whole evaluation set: the class means of few images are biased.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

_ROUNDING = 1e-13  # relative error that float64 sums are given; float32 features differ by 1e-7 or not at all


class _ClassMetric(Metric):
    """What the metrics have in common: checks, float64 states that add up, and the classes that have images.

    Args:
        num_classes: Number of classes C.
        feature_dim: Length D of a feature.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    count: Tensor

    def __init__(self, num_classes: int, feature_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or feature_dim < 1:
            raise ValueError(
                f'num_classes and feature_dim must be positive, got num_classes={num_classes}, {feature_dim=}.'
            )
        self.num_classes, self.feature_dim = num_classes, feature_dim
        self._add_sum('count', num_classes)
        self.set_dtype(torch.float64)

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx='sum')

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process that had no images has empty lists, where the others expect a tensor of as many dimensions.
        if any(getattr(self, name) == [] for name in self._defaults):
            self.update(self.count.new_empty(0, self.feature_dim), self.count.new_empty(0, dtype=torch.int64))
        super()._sync_dist(*args, **kwargs)

    def _check(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Features in float64 and targets, on the device of the states."""
        if feature.ndim != 2 or feature.shape[1] != self.feature_dim or target.shape != feature.shape[:1]:
            raise ValueError(
                f'feature must be [N, {self.feature_dim}] and target [N], '
                f'got {list(feature.shape)} and {list(target.shape)}.'
            )
        return feature.detach().to(self.count.device, torch.float64), target.to(self.count.device)


class _ClassMoments(_ClassMetric):
    """Of each class the count, the sum, the sum of squared norms and the sum of directions, in O(C x D) memory.

    The metrics made of these share one state in a `MetricCollection`, which updates it once.
    """

    sum: Tensor
    square: Tensor
    direction: Tensor

    def __init__(self, num_classes: int, feature_dim: int, **kwargs: Any) -> None:
        super().__init__(num_classes, feature_dim, **kwargs)
        self._add_sum('sum', num_classes, feature_dim)
        self._add_sum('square', num_classes)
        self._add_sum('direction', num_classes, feature_dim)

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]` in `[0, num_classes)`."""
        feature, target = self._check(feature, target)
        square = feature.square().sum(1)
        self.count.index_add_(0, target, torch.ones_like(square))
        self.sum.index_add_(0, target, feature)
        self.square.index_add_(0, target, square)
        norm = square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)  # a zero feature has no direction
        self.direction.index_add_(0, target, feature / norm[:, None])

    def _present(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the K classes with images: counts `[K]`, means `[K, D]`, and mean squared distances to the means `[K]`."""
        present = self.count > 0
        count = self.count[present]
        mean = self.sum[present] / count[:, None]
        size = self.square[present] / count
        variance = size - mean.square().sum(1)
        # The difference of two nearly equal sums: what rounding may have left is nothing.
        return count, mean, torch.where(variance <= _ROUNDING * size, 0.0, variance)

    def _scatters(self) -> tuple[Tensor, Tensor]:
        """Traces of the scatter within and between classes: sums of squared distances, over images."""
        count, mean, variance = self._present()
        center = (count[:, None] * mean).sum(0) / count.sum()
        apart = (mean - center).square().sum(1)
        apart = torch.where(apart <= _ROUNDING**2 * mean.square().sum(1), 0.0, apart)
        return (count * variance).sum(), (count * apart).sum()


class IntraClassDistance(_ClassMoments):
    """Root mean square Euclidean distance of the features to the mean of their class.

    `sqrt(mean_i |f_i - mu_{y_i}|^2)` over images, in `[0, inf)`; lower is tighter. In units of the features, whose
    scale differs from model to model: divide by the inter-class distance to compare.

    Example:
        >>> metric = IntraClassDistance(num_classes=2, feature_dim=1)
        >>> metric.update(torch.tensor([[0.0], [2.0], [10.0]]), torch.tensor([0, 0, 1]))
        >>> round(metric.compute().item(), 4)
        0.8165
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance, float64 scalar; NaN before the first update."""
        count, _, variance = self._present()
        return ((count * variance).sum() / count.sum()).sqrt()


class CosineCohesion(_ClassMoments):
    """Mean cosine of the features to the direction of their class, or the mean resultant length of their directions.

    With `u_i = f_i / |f_i|`: `mean_i cos(f_i, sum_{j: y_j = y_i} u_j)` over images, which equals
    `1/N sum_c |sum_{i: y_i = c} u_i|`. In `[0, 1]`; 1 if all features of a class point the same way. Does not depend on
    the scale of the features, but on their origin: after a ReLU all cosines are positive.

    Source: mean resultant length, Mardia and Jupp, Directional Statistics (2000).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The mean cosine, float64 scalar; NaN before the first update."""
        return self.direction.norm(dim=1).sum() / self.count.sum()


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
        mean = self._present()[1]
        total = sum((distance.sum() for _, distance in _distance_rows(mean)), mean.new_zeros(()))
        return total / (len(mean) * (len(mean) - 1)) if len(mean) > 1 else mean.new_tensor(torch.nan)


class MinInterClassDistance(_ClassMoments):
    """Smallest Euclidean distance between the means of two classes, in `[0, inf)`; higher is further apart."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The distance, float64 scalar; NaN with fewer than two classes."""
        mean = self._present()[1]
        if len(mean) < 2:
            return mean.new_tensor(torch.nan)
        return torch.stack([_others(row, distance).min() for row, distance in _distance_rows(mean)]).min()


class FisherRatio(_ClassMoments):
    """Trace of the scatter between classes over that within: `tr(S_B) / tr(S_W)`.

    `sum_c n_c |mu_c - mu|^2 / sum_i |f_i - mu_{y_i}|^2`, mu the mean of all features. In `[0, inf]`; higher is tighter
    and further apart, infinite for classes that are points. Free of the scale of the features.

    Source: Fisher (1936); the criterion `J = tr(S_B) / tr(S_W)` in Fukunaga, Introduction to Statistical Pattern
    Recognition (1990).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The ratio, float64 scalar; NaN if there is no scatter at all."""
        within, between = self._scatters()
        return between / within


class CDNV(_ClassMoments):
    """Class-distance normalised variance: the spread of two classes over the distance of their means.

    `mean_{a < b} (v_a + v_b) / (2 |mu_a - mu_b|^2)`, v the mean squared distance to the class mean. In `[0, inf]`;
    lower is tighter and further apart, 0 at neural collapse, infinite if two classes have the same mean. Free of the
    scale of the features.

    Source: Galanti, György and Hutter, On the Role of Neural Collapse in Transfer Learning (2021, arXiv 2112.15121).
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The mean over pairs of classes, float64 scalar; NaN with fewer than two classes."""
        _, mean, variance = self._present()
        if len(mean) < 2:
            return mean.new_tensor(torch.nan)
        total = mean.new_zeros(())
        for row, distance in _distance_rows(mean):
            ratio = (variance[row, None] + variance) / (2 * _others(row, distance).square())
            total += torch.where(distance > 0, ratio, _others(row, torch.full_like(distance, torch.inf), 0.0)).sum()
        return total / (len(mean) * (len(mean) - 1))


class CalinskiHarabasz(_ClassMoments):
    """Scatter between over within classes, each by its degrees of freedom: `tr(S_B) / tr(S_W) (N - K) / (K - 1)`.

    In `[0, inf]`; higher is tighter and further apart. As `sklearn.metrics.calinski_harabasz_score`, but infinite for
    classes that are points, where that returns 1.

    Source: Calinski and Harabasz (1974).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The score, float64 scalar; NaN with one class, or with one image in each."""
        within, between = self._scatters()
        count = self.count[self.count > 0]
        freedom = (count.sum() - len(count)) / (len(count) - 1) if len(count) > 1 else torch.nan
        return between / within * freedom


class DaviesBouldin(_ClassMoments):
    """How much each class overlaps with the one it overlaps with most.

    `mean_a max_{b != a} (s_a + s_b) / |mu_a - mu_b|` over classes, s the root mean square distance to the class mean.
    In `[0, inf]`; lower is tighter and further apart. scikit-learn takes the mean distance for s (q = 1 in the paper),
    which cannot be had in one pass; this is q = 2, never lower than scikit-learn's. Infinite if two classes have the
    same mean, which scikit-learn leaves out.

    Source: Davies and Bouldin (1979).
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The index, float64 scalar; NaN with fewer than two classes."""
        _, mean, variance = self._present()
        if len(mean) < 2:
            return mean.new_tensor(torch.nan)
        spread, worst = variance.sqrt(), []
        for row, distance in _distance_rows(mean):
            overlap = torch.where(distance > 0, (spread[row, None] + spread) / distance, torch.inf)
            worst.append(_others(row, overlap, 0.0).max(1).values)
        return torch.cat(worst).mean()


class ClassTable(_ClassMoments):
    """The classes one by one: how tight each is, and which is nearest to it."""

    def compute(self) -> dict[str, Tensor]:
        """Tensors `[C]`, NaN (or -1) for classes without images.

        'intra_class_distance': `sqrt(mean_i |f_i - mu_c|^2)` over the class, float64. 'cosine_cohesion': mean cosine to
        the class direction, float64. 'nearest_class': the class with the nearest mean, int64. 'nearest_class_distance':
        the distance to it, float64. 'count': images, float64.
        """
        present = (self.count > 0).nonzero()[:, 0]
        count, mean, variance = self._present()
        table = {
            name: self.count.new_full((self.num_classes,), torch.nan)
            for name in ('intra_class_distance', 'cosine_cohesion', 'nearest_class_distance')
        }
        table['intra_class_distance'][present] = variance.sqrt()
        table['cosine_cohesion'][present] = self.direction[present].norm(dim=1) / count
        table['nearest_class'] = torch.full_like(self.count, -1, dtype=torch.int64)
        if len(present) > 1:
            for row, distance in _distance_rows(mean):
                nearest = _others(row, distance).min(1)
                table['nearest_class'][present[row]] = present[nearest.indices]
                table['nearest_class_distance'][present[row]] = nearest.values
        return {**table, 'count': self.count.clone()}


def _distance_rows(mean: Tensor, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Euclidean distances of points `[K, D]`, a few of the K rows at a time: their indices `[R]`, and `[R, K]`."""
    rounding = _ROUNDING * mean.norm(dim=1).nan_to_num(posinf=0).amax() if len(mean) else 0.0
    for row in torch.arange(len(mean), device=mean.device).split(size):
        distance = torch.cdist(mean[row], mean, compute_mode='donot_use_mm_for_euclid_dist')
        yield row, torch.where(distance <= rounding, 0.0, distance)


def _others(row: Tensor, values: Tensor, own: float = torch.inf) -> Tensor:
    """Rows of pairwise values `[R, K]`, with another value for a class and itself."""
    return values.scatter(1, row[:, None], own)
