"""The silhouette of features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from timm_synermix.metrics.class_moments import _ClassMetric
from timm_synermix.utils.distributed import add_up, gather_tensors

# The mean distance to a class is that to its images in the sample; the fewer these are, the nearer the nearest of many
# classes looks. So there are 40 of each where that makes 10,000, and ten of each of 1,000 classes at least.
_PER_CLASS, _CLASSES = (10, 40), 1000
_MEMORY = 64  # MB of distances at a time


class Silhouette(_ClassMetric):
    """Mean silhouette of the images: how much nearer an image is to its own class than to another.

    `mean_i (b_i - a_i) / max(a_i, b_i)`, with a the mean Euclidean distance to the other images of the class, b that to
    the images of the nearest other class; 0 for an image alone in its class. In `[-1, 1]`; higher is tighter and
    further apart.

    Of a random sample: as many images of every class, and the mean weighs each class by its images. Up to 500 classes
    it is within 0.02 of the value of all images; of 1,000 classes, ten images each, it was 0.03 too low where they
    overlap widely, and 0.01 where they are apart. Of more than 1,000 classes a random 1,000 are taken, and an image has
    fewer classes to be near to, which makes it higher by about as much.

    Args:
        num_classes, feature_dim: As for the other metrics.
        size: Images in the sample. More, up to 10,000, where it takes them to have 40, or at least ten, of each class.
        seed: Seed of the sample; it also depends on the order in which images come.

    Source: Rousseeuw (1987), by `sklearn.metrics.silhouette_samples`.
    """

    higher_is_better = True
    count: Tensor
    feature: list[Tensor]
    target: list[Tensor]
    priority: list[Tensor]
    _generator: np.random.Generator
    _lowest: np.ndarray

    def __init__(self, num_classes: int, feature_dim: int, size: int = 4000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(num_classes, feature_dim, **kwargs)
        self.size, self.seed = size, seed
        least, enough = _PER_CLASS
        self.per_class = max(least, size // num_classes, min(enough, least * _CLASSES // num_classes))
        self._class_priority = np.random.default_rng([seed, num_classes]).random(num_classes)
        self.add_state('count', torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx='sum')
        for name in ('feature', 'target', 'priority'):
            self.add_state(name, [], dist_reduce_fx='cat')
        self.reset()

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]`."""
        self._check(feature, target)
        feature, target = feature.detach().to(self.device, torch.float32), target.to(self.device)
        self.count += target.bincount(minlength=self.num_classes)
        priority = self._generator.random(len(target))
        (places,) = np.nonzero(priority > self._lowest[target.cpu().numpy()])  # the others cannot get in any more
        if not len(places) and self.priority:
            return
        kept = torch.from_numpy(places).to(target.device)
        self.feature.append(feature[kept])
        self.target.append(target[kept])
        self.priority.append(torch.from_numpy(priority[places]).to(target.device))
        if sum(map(len, self.priority)) > 2 * self.per_class * min(self.num_classes, _CLASSES):
            self._trim()

    def _trim(self) -> None:
        """Keep the sample of the images so far alone."""
        present = self._present(dim_zero_cat(self.target).unique().cpu().numpy())
        feature, target, priority = self._sample()
        self.feature, self.target, self.priority = [feature], [target], [priority]
        classes, values = target.cpu().numpy(), priority.cpu().numpy()
        full = np.bincount(classes, minlength=self.num_classes) == self.per_class
        lowest = np.full(self.num_classes, np.inf)
        np.minimum.at(lowest, classes, values)
        self._lowest = np.where(full, lowest, self._lowest)
        if len(present) == _CLASSES:  # a class that comes in must be before the last of these
            self._lowest[self._class_priority < self._class_priority[present].min()] = np.inf

    def _present(self, classes: np.ndarray) -> np.ndarray:
        """Those of some classes that are in the sample: the ones with the highest priority of their own."""
        return classes[np.argsort(-self._class_priority[classes], kind='stable')[:_CLASSES]]

    def _sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, targets and priorities of the images of each class with the highest priority, in their order.

        That is a random sample of all images so far, and the samples of several processes can be merged into one.
        """
        feature, target, priority = map(dim_zero_cat, (self.feature, self.target, self.priority))
        kept = torch.from_numpy(self._choose(target.cpu().numpy(), priority.cpu().numpy())).to(target.device)
        return feature[kept], target[kept], priority[kept]

    def _choose(self, classes: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Which images of some classes and priorities are in the sample of them, bool."""
        order = np.lexsort((-priority, classes))
        first = np.searchsorted(classes[order], classes[order])
        chosen = np.zeros(len(order), dtype=bool)
        chosen[order] = np.arange(len(order)) - first < self.per_class
        return chosen & np.isin(classes, self._present(np.unique(classes)))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Merge the samples of all processes: only features that are in the sample of all of them are sent."""
        group = process_group or self.process_group
        if not self.priority:
            self.update(self.count.new_empty(0, self.feature_dim), self.count.new_empty(0))
        self._trim()
        (feature,), (target,), (priority,) = self.feature, self.target, self.priority
        self.count = self.count.clone()
        add_up(self.count, group)
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (target.cpu(), priority.cpu()), group=group)
        chosen = self._choose(*(torch.cat(part).numpy() for part in zip(*everyone, strict=True)))
        lengths = [len(part[0]) for part in everyone]
        kept = np.split(chosen, np.cumsum(lengths)[:-1])
        most = max(int(k.sum()) for k in kept)
        own = torch.from_numpy(np.flatnonzero(kept[dist.get_rank(group)])).to(feature.device)
        sent = feature.new_zeros(most, self.feature_dim)
        sent[: len(own)] = feature[own]
        parts = gather_tensors(sent, group)
        self.feature = [torch.cat([part[: k.sum()] for part, k in zip(parts, kept, strict=True)])]
        self.target, self.priority = (
            [torch.cat(part)[torch.from_numpy(chosen)].to(feature.device)] for part in zip(*everyone, strict=True)
        )

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._lowest = np.full(self.num_classes, -1.0)  # priority that an image of the class must exceed
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        # A spawned sequence is independent of default_rng(seed), by which somebody may have drawn the data.
        self._generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(rank,)))

    def compute(self) -> Tensor:
        """The silhouette, float64 scalar; NaN unless the sample has two classes, and fewer classes than images."""
        from sklearn import config_context  # slow to import
        from sklearn.metrics import silhouette_samples

        nothing = torch.tensor(torch.nan, dtype=torch.float64, device=self.count.device)
        if not len(self.priority):
            return nothing
        feature, target, _ = self._sample()
        if not 2 <= len(target.unique()) < len(target) or not feature.isfinite().all():
            return nothing
        with config_context(working_memory=_MEMORY):
            value = silhouette_samples(feature.cpu().numpy(), target.cpu().numpy())
        sampled = target.bincount(minlength=self.num_classes)
        weight = (self.count.double() / sampled)[target].cpu().numpy()
        return torch.full_like(nothing, np.average(value, weights=weight))
