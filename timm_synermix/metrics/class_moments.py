"""How tight and how far apart classes are in feature space: streaming metrics over a whole evaluation set.

Every metric takes features `[N, D]` of any floating dtype and classes int64 `[N]`, accumulates in float64, and adds up
over processes. "Mean over images" weighs every image alike, "mean over classes" every class that has images. Measure on
clean images, over a whole evaluation set: the class means of few images are biased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from timm_synermix.metrics.moments import ClassMoments


class _ClassMetric(Metric):
    """What all metrics have in common: the size, and the check of what is added.

    Args:
        num_classes: Number of classes C.
        feature_dim: Length D of a feature.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, num_classes: int, feature_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or feature_dim < 1:
            raise ValueError(
                f'num_classes and feature_dim must be positive, got num_classes={num_classes}, {feature_dim=}.'
            )
        self.num_classes, self.feature_dim = num_classes, feature_dim

    def _check(self, feature: Tensor, target: Tensor) -> None:
        if feature.ndim != 2 or feature.shape[1] != self.feature_dim or target.shape != feature.shape[:1]:
            raise ValueError(
                f'feature must be [N, {self.feature_dim}] and target [N], '
                f'got {list(feature.shape)} and {list(target.shape)}.'
            )


class _MomentsMetric(_ClassMetric):
    """A metric of the sums of `ClassMoments`, which those of a collection have in common.

    Args:
        num_classes, feature_dim, kwargs: As for all metrics.
        moments: Sums that other metrics share; None for its own. Whoever shares them updates one metric alone.
    """

    with_product = False  # of what ClassMoments adds up

    def __init__(self, num_classes: int, feature_dim: int, moments: ClassMoments | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, feature_dim, **kwargs)
        self.moments = ClassMoments(num_classes, feature_dim, self.with_product) if moments is None else moments

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]` in `[0, num_classes)`."""
        self._check(feature, target)
        self.moments.update(feature, target)

    def forward(self, feature: Tensor, target: Tensor) -> Any:
        """Add features, and return the metric of these alone."""
        self.update(feature, target)
        return of_these_alone(self, feature, target)

    def sync(
        self,
        dist_sync_fn: Any = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Any = None,
    ) -> None:
        """Add the sums of all processes up in place: a copy of them to go back to would be as large again."""
        available = distributed_available or self.distributed_available_fn
        if should_sync and available():
            self.moments.reduce(process_group or self.process_group)

    def reset(self) -> None:
        """Forget all features, for every metric that shares the sums."""
        super().reset()
        self.moments.reset()

    def _apply(self, fn: Any, exclude_state: Any = '') -> Any:
        moved = super()._apply(fn, exclude_state)
        if self.moments.device != self.device:
            self.moments.to(self.device)
        return moved


def of_these_alone(metric: Any, feature: Tensor, target: Tensor) -> Any:
    """The value of a metric, or of a collection, of these features alone and of this process."""
    alone = metric.clone()
    alone.reset()
    for part in alone.modules():
        if isinstance(part, Metric):
            part._to_sync = part.dist_sync_on_step
    alone.update(feature, target)
    return alone.compute()


class IntraClassDistance(_MomentsMetric):
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
        count = self.moments.count
        return ((count * self.moments.variance()).sum() / count.sum()).sqrt()


class CosineCohesion(_MomentsMetric):
    """Mean cosine of the features to the direction of their class, or the mean resultant length of their directions.

    With `u_i = f_i / |f_i|`: `mean_i cos(f_i, sum_{j: y_j = y_i} u_j)` over images, which equals
    `1/N sum_c |sum_{i: y_i = c} u_i|`. In `[0, 1]`; 1 if all features of a class point the same way. Does not depend on
    the scale of the features, but on their origin: after a ReLU all cosines are positive.

    Source: mean resultant length, Mardia and Jupp, Directional Statistics (2000).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The mean cosine, float64 scalar; NaN before the first update."""
        return self.moments.cosine().sum() / self.moments.count.sum()


class InterClassDistance(_MomentsMetric):
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
        return self.moments.distances().mean


class MinInterClassDistance(_MomentsMetric):
    """Smallest Euclidean distance between the means of two classes, in `[0, inf)`; higher is further apart."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The distance, float64 scalar; NaN with fewer than two classes."""
        return self.moments.distances().smallest


class FisherRatio(_MomentsMetric):
    """Trace of the scatter between classes over that within: `tr(S_B) / tr(S_W)`.

    `sum_c n_c |mu_c - mu|^2 / sum_i |f_i - mu_{y_i}|^2`, mu the mean of all features. In `[0, inf]`; higher is tighter
    and further apart, infinite for classes that are points. Free of the scale of the features.

    Source: Fisher (1936); the criterion `J = tr(S_B) / tr(S_W)` in Fukunaga, Introduction to Statistical Pattern
    Recognition (1990).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The ratio, float64 scalar; NaN if there is no scatter at all."""
        within, between = self.moments.scatters()
        return between / within


class CDNV(_MomentsMetric):
    """Class-distance normalised variance: the spread of two classes over the distance of their means.

    `mean_{a < b} (v_a + v_b) / (2 |mu_a - mu_b|^2)`, v the mean squared distance to the class mean. In `[0, inf]`;
    lower is tighter and further apart, 0 at neural collapse, infinite if two classes have the same mean. Free of the
    scale of the features.

    Source: Galanti, György and Hutter, On the Role of Neural Collapse in Transfer Learning (2021, arXiv 2112.15121).
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The mean over pairs of classes, float64 scalar; NaN with fewer than two classes."""
        return self.moments.distances().cdnv


class CalinskiHarabasz(_MomentsMetric):
    """Scatter between over within classes, each by its degrees of freedom: `tr(S_B) / tr(S_W) (N - K) / (K - 1)`.

    In `[0, inf]`; higher is tighter and further apart. As `sklearn.metrics.calinski_harabasz_score`, but infinite for
    classes that are points, where that returns 1.

    Source: Calinski and Harabasz (1974).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The score, float64 scalar; NaN with one class, or with one image in each."""
        within, between = self.moments.scatters()
        count = self.moments.count
        freedom = (count.sum() - len(count)) / (len(count) - 1) if len(count) > 1 else torch.nan
        return between / within * freedom


class DaviesBouldin(_MomentsMetric):
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
        return self.moments.distances().davies_bouldin


class ClassTable(_MomentsMetric):
    """The classes one by one: how tight each is, and which is nearest to it."""

    def compute(self) -> dict[str, Tensor]:
        """Tensors `[C]`, NaN (or -1) for classes without images.

        'intra_class_distance': `sqrt(mean_i |f_i - mu_c|^2)` over the class, float64. 'cosine_cohesion': mean cosine to
        the class direction, float64. 'nearest_class': the class with the nearest mean, int64. 'nearest_class_distance':
        the distance to it, float64. 'count': images, float64.
        """
        moments, present, distances = self.moments, self.moments.present, self.moments.distances()
        table = {
            name: moments.count.new_full((self.num_classes,), torch.nan)
            for name in ('intra_class_distance', 'cosine_cohesion', 'nearest_class_distance')
        }
        table['intra_class_distance'][present] = moments.variance().sqrt()
        table['cosine_cohesion'][present] = moments.cosine() / moments.count
        rows = present[distances.row]
        table['nearest_class'] = present.new_full((self.num_classes,), -1)
        table['nearest_class'][rows] = present[distances.nearest]
        table['nearest_class_distance'][rows] = distances.nearest_distance
        return {**table, 'count': moments.sums.images.clone()}
