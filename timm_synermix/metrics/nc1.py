"""NC1: the variability collapse of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_synermix.metrics.class_moments import _ROUNDING, _ClassMetric


class NC1(_ClassMetric):
    """Variability collapse: the covariance within classes, seen along the directions that tell the classes apart.

    `trace(Sigma_W Sigma_B^+) / C`, where `Sigma_W = mean_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T` over images,
    `Sigma_B = mean_c (mu_c - m)(mu_c - m)^T` over classes with m the mean of the class means, and ^+ the
    pseudo-inverse. In `[0, inf)`; lower is tighter, 0 at neural collapse. The only metric here that needs `O(D^2)`
    memory besides.

    Source: NC1 of Papyan, Han and Donoho (2020, arXiv 2008.08186).
    """

    higher_is_better = False
    sum: Tensor
    product: Tensor

    def __init__(self, num_classes: int, feature_dim: int, **kwargs: Any) -> None:
        super().__init__(num_classes, feature_dim, **kwargs)
        self._add_sum('sum', num_classes, feature_dim)
        self._add_sum('product', feature_dim, feature_dim)

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]` in `[0, num_classes)`."""
        feature, target = self._check(feature, target)
        self.count.index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
        self.sum.index_add_(0, target, feature)
        if not len(target):
            return
        # f = (f - m) + m with the batch's own class means m: few, and in float64, as near collapse little is left when
        # they are taken away. What remains is small; on a CPU its product in float32 costs half.
        classes, row, count = target.unique(return_inverse=True, return_counts=True)
        mean = feature.new_zeros(len(classes), self.feature_dim).index_add_(0, row, feature) / count[:, None]
        rest = (feature - mean[row]).to(torch.float32 if feature.device.type == 'cpu' else torch.float64)
        mean *= count.double().sqrt()[:, None]
        self.product += mean.T @ mean
        self.product += rest.T @ rest

    def compute(self) -> Tensor:
        """The ratio, float64 scalar; NaN with fewer than two classes, or if all class means are the same."""
        present = self.count > 0
        count = self.count[present]
        mean = self.sum[present] / count[:, None]
        if not (self.product.isfinite().all() and mean.isfinite().all()):
            return mean.new_tensor(torch.nan)
        _, scale, directions = torch.linalg.svd(mean - mean.mean(0), full_matrices=False)
        rounding = max(mean.shape) * torch.finfo(torch.float64).eps * mean.norm(dim=1).amax() if len(mean) else 0
        kept = scale[: max(0, len(mean) - 1)] > rounding  # K points span K - 1 directions
        if not kept.any():
            return mean.new_tensor(torch.nan)
        scale, directions = scale[: len(kept)][kept], directions[: len(kept)][kept]
        along = directions @ mean.T  # [R, K]
        total = (directions @ self.product * directions).sum(1) / count.sum()
        within = total - (along.square() * count).sum(1) / count.sum()
        within = torch.where(within <= _ROUNDING * total, 0.0, within)
        return (within * len(count) / scale.square()).sum() / len(count)
