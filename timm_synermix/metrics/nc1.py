"""NC1: the variability collapse of features."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_synermix.metrics.class_moments import _MomentsMetric
from timm_synermix.metrics.moments import ROUNDING


class NC1(_MomentsMetric):
    """Variability collapse: the covariance within classes, seen along the directions that tell the classes apart.

    `trace(Sigma_W Sigma_B^+) / C`, where `Sigma_W = mean_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T` over images,
    `Sigma_B = mean_c (mu_c - m)(mu_c - m)^T` over classes with m the mean of the class means, and ^+ the
    pseudo-inverse. In `[0, inf)`; lower is tighter, 0 at neural collapse. The only metric here that needs `O(D^2)`
    memory besides.

    Source: NC1 of Papyan, Han and Donoho (2020, arXiv 2008.08186).
    """

    higher_is_better = False
    with_product = True

    def compute(self) -> Tensor:
        """The ratio, float64 scalar; NaN with fewer than two classes, or if all class means are the same."""
        moments, sums = self.moments, self.moments.sums
        count, num_classes = moments.count, len(moments.present)
        center = torch.stack([mean.sum(0) for _, mean in moments.mean_blocks()] or [sums.sum.sum(0)]).sum(0)
        center /= num_classes
        if not (sums.product.isfinite().all() and center.isfinite().all()):
            return count.new_tensor(torch.nan)
        # The triangle that is left of the centred means, when they are reduced a few at a time, has their singular
        # values and directions, and D rows at most.
        rest, norm = center.new_empty(0, self.feature_dim), 0.0
        for _, mean in moments.mean_blocks(2 * self.feature_dim):
            rest = torch.linalg.qr(torch.cat([rest, mean - center]), mode='r').R
            norm = max(norm, mean.norm(dim=1).amax().item())
        _, scale, directions = torch.linalg.svd(rest, full_matrices=False)
        rounding = max(num_classes, self.feature_dim) * torch.finfo(torch.float64).eps * norm
        kept = scale[: max(0, num_classes - 1)] > rounding  # K points span K - 1 directions
        if not kept.any():
            return count.new_tensor(torch.nan)
        scale, directions = scale[: len(kept)][kept], directions[: len(kept)][kept]
        between = torch.zeros_like(scale)
        for classes, mean in moments.mean_blocks():
            between += (directions @ mean.T).square() @ sums.images[classes]
        total = (directions @ sums.product * directions).sum(1) / count.sum()
        within = total - between / count.sum()
        within = torch.where(within <= ROUNDING * total, 0.0, within)
        return (within * num_classes / scale.square()).sum() / num_classes
