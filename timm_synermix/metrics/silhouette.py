"""The silhouette of features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from timm_synermix.metrics.class_moments import _ClassMetric


class Silhouette(_ClassMetric):
    """Mean silhouette of a random sample of the images: how much nearer an image is to its own class than to another.

    `mean_i (b_i - a_i) / max(a_i, b_i)`, with a the mean Euclidean distance to the other images of the class, b that to
    the images of the nearest other class. In `[-1, 1]`; higher is tighter and further apart.

    Args:
        num_classes, feature_dim: As for the other metrics.
        size: Images in the sample, `O(size x D)` memory on each process.
        seed: Seed of the sample; it also depends on the order in which images come.

    Source: Rousseeuw (1987), by `sklearn.metrics.silhouette_score`.
    """

    higher_is_better = True
    feature: list[Tensor]
    target: list[Tensor]
    priority: list[Tensor]
    _generator: np.random.Generator
    _lowest: float

    def __init__(self, num_classes: int, feature_dim: int, size: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(num_classes, feature_dim, **kwargs)
        self.size, self.seed = size, seed
        for name in ('feature', 'target', 'priority'):
            self.add_state(name, [], dist_reduce_fx='cat')
        self.reset()

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]`."""
        feature, target = self._check(feature, target)
        priority = self._generator.random(len(target))
        (places,) = np.nonzero(priority > self._lowest)  # the others cannot get into the sample any more
        if not len(places) and self.priority:
            return
        kept = torch.from_numpy(places).to(target.device)
        self.feature.append(feature[kept])
        self.target.append(target[kept])
        self.priority.append(torch.from_numpy(priority[places]).to(target.device))
        if sum(map(len, self.priority)) > 2 * self.size:
            sample = self._sample()
            self.feature, self.target, self.priority = ([part] for part in sample)
            self._lowest = sample[2].min().item()

    def _sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, targets and priorities of the images with the highest priority, in their order.

        That is a random sample of all images so far, and the samples of several processes can be merged into one.
        """
        feature, target, priority = map(dim_zero_cat, (self.feature, self.target, self.priority))
        kept = priority.topk(min(self.size, len(priority))).indices.sort().values
        return feature[kept], target[kept], priority[kept]

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._lowest = -1.0  # priority that an image must exceed
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # A spawned sequence is independent of default_rng(seed), by which somebody may have drawn the data.
        self._generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(rank,)))

    def compute(self) -> Tensor:
        """The silhouette, float64 scalar; NaN unless the sample has two classes, and fewer classes than images."""
        from sklearn.metrics import silhouette_score  # slow to import

        if not len(self.priority):
            return self.count.new_tensor(torch.nan)
        feature, target, _ = self._sample()
        if not 2 <= len(target.unique()) < len(target) or not feature.isfinite().all():
            return self.count.new_tensor(torch.nan)
        return self.count.new_tensor(silhouette_score(feature.cpu().numpy(), target.cpu().numpy()))
