"""All cohesion metrics of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from timm_synermix.metrics.class_moments import (
    CDNV,
    CalinskiHarabasz,
    ClassTable,
    CosineCohesion,
    DaviesBouldin,
    FisherRatio,
    InterClassDistance,
    IntraClassDistance,
    MinInterClassDistance,
    _MomentsMetric,
    of_these_alone,
)
from timm_synermix.metrics.moments import ClassMoments
from timm_synermix.metrics.nc1 import NC1
from timm_synermix.metrics.silhouette import Silhouette

# The metrics that are one number, tightness first; all but the silhouette share their sums.
_METRICS: dict[str, Callable[..., Metric]] = {
    'intra_class_distance': IntraClassDistance,
    'cosine_cohesion': CosineCohesion,
    'inter_class_distance': InterClassDistance,
    'min_inter_class_distance': MinInterClassDistance,
    'fisher_ratio': FisherRatio,
    'cdnv': CDNV,
    'nc1': NC1,
    'calinski_harabasz': CalinskiHarabasz,
    'davies_bouldin': DaviesBouldin,
    'silhouette': Silhouette,
}


METRIC_NAMES = tuple(_METRICS)
HIGHER_IS_BETTER: dict[str, bool] = {name: vars(metric)['higher_is_better'] for name, metric in _METRICS.items()}
COHESION_MEMORY = 1.0  # GB on the device, unless somebody wants more


def cohesion_metrics(num_classes: int, feature_dim: int, seed: int = 0) -> MetricCollection:
    """All metrics of this module, `METRIC_NAMES` and 'class_table', as a collection that keeps what they share once.

    Args:
        num_classes: Number of classes.
        feature_dim: Length of a feature.
        seed: Seed of the silhouette's sample.
    """
    size = dict(num_classes=num_classes, feature_dim=feature_dim)
    moments = ClassMoments(num_classes, feature_dim, product=True)
    metrics: dict[str, Metric | MetricCollection] = {}
    for name, metric in [*_METRICS.items(), ('class_table', ClassTable)]:
        metrics[name] = metric(**size, **({'seed': seed} if metric is Silhouette else {'moments': moments}))
    shared = [name for name, metric in metrics.items() if isinstance(metric, _MomentsMetric)]
    return _SharingCollection(metrics, compute_groups=[shared, *([name] for name in metrics if name not in shared)])


class _SharingCollection(MetricCollection):
    """Metrics that share their sums, which one of each group updates."""

    def forward(self, feature: Tensor, target: Tensor) -> dict[str, Any]:
        """Add features, and return the metrics of these alone."""
        self.update(feature, target)
        return of_these_alone(self, feature, target)


class CohesionPlace(NamedTuple):
    """Where the cohesion metrics are computed.

    Attributes:
        device: The device; None if they are left out.
        reason: Why it is not the one that was asked for, a line to say; empty if it is.
    """

    device: torch.device | None
    reason: str


def cohesion_place(
    num_classes: int, feature_dim: int, device: torch.device | str, limit: float = COHESION_MEMORY
) -> CohesionPlace:
    """Where the cohesion metrics of an evaluation fit, which is known before there are any features.

    Every process must call it, and gets the same answer.

    Args:
        num_classes, feature_dim: Size of what they add up, see `ClassMoments`.
        device: Where they are computed if that needs limit GB at most; else on the CPU, if half of its free memory is
            enough, and otherwise not at all.
        limit: GB.
    """
    device, need = torch.device(device), ClassMoments.memory(num_classes, feature_dim) / 1e9
    if need <= limit:
        # float64 keeps large sums exact; Apple's GPUs have none
        return CohesionPlace(torch.device('cpu') if device.type == 'mps' else device, '')
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    free = psutil.virtual_memory().available / 2 / processes / 1e9
    what = f'Cohesion metrics of {num_classes:,} classes and {feature_dim:,} features take {need:.1f} GB'
    fits = [need <= free]
    if dist.is_available() and dist.is_initialized():
        fits *= dist.get_world_size()
        dist.all_gather_object(fits, need <= free)
    if all(fits):
        return CohesionPlace(torch.device('cpu'), f'{what}, above --cohesion-memory {limit:g}: they stay on the CPU.')
    return CohesionPlace(None, f'{what}, more than the CPU has free: they are left out.')


class Cohesion(NamedTuple):
    """The cohesion of an evaluation.

    Attributes:
        metrics: Those of `cohesion_metrics` by name.
        table: That of `ClassTable`.
        features, targets: Float32 `[M, D]` and int64 `[M]` on the CPU, of the classes to draw.
    """

    metrics: dict[str, float]
    table: dict[str, Tensor]
    features: Tensor
    targets: Tensor


class CohesionMeter:
    """The cohesion metrics of an evaluation, and the features of a few classes to draw.

    Args:
        num_classes: Number of classes.
        device: Where to accumulate, see `cohesion_place`.
        num_drawn: Classes whose features are kept, spread evenly over all.
    """

    def __init__(self, num_classes: int, device: torch.device | str = 'cpu', num_drawn: int = 10) -> None:
        self.num_classes = num_classes
        self.device = torch.device('cpu' if torch.device(device).type == 'mps' else device)
        self.drawn_classes = torch.linspace(0, num_classes - 1, min(num_drawn, num_classes)).long()
        self._feature_dim = 0
        self._metrics: MetricCollection | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]` and targets `[N]`; N may be 0."""
        self._feature_dim = feature.shape[1]
        self._waiting.append((feature.detach().to(self.device), target.to(self.device)))
        if sum(len(waiting) for _, waiting in self._waiting) >= 1024:  # a thousand at once take a fraction of the time
            self._flush()

    def _flush(self) -> None:
        feature, target = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        if self._metrics is None:  # the first features tell how long one is
            self._metrics = cohesion_metrics(self.num_classes, self._feature_dim).to(self.device)
        self._metrics.update(feature, target)
        drawn = torch.isin(target, self.drawn_classes.to(target.device))
        self._drawn.append((feature[drawn].float().cpu(), target[drawn].cpu()))

    def compute(self) -> Cohesion:
        """The metrics over all processes, and features of this one; every process must call it."""
        dim = self._feature_dim
        if dist.is_available() and dist.is_initialized():  # a process may have had nothing to read from a stream
            lengths: list[int] = [0] * dist.get_world_size()
            dist.all_gather_object(lengths, dim)
            dim = max(lengths)
        if not dim:
            raise ValueError('there were no images to measure the cohesion of')
        self.update(torch.empty(0, dim, device=self.device), torch.empty(0, dtype=torch.int64, device=self.device))
        self._flush()
        assert self._metrics is not None
        values = {name: metric.compute() for name, metric in self._metrics.items(keep_base=True, copy_state=False)}
        # torchmetrics makes scalars of tensors with one element
        table = {name: value.reshape(-1) for name, value in values.pop('class_table').items()}
        features, targets = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
        return Cohesion({name: values[name].item() for name in METRIC_NAMES}, table, features, targets)
