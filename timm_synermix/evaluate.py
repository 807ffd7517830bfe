"""Evaluation of a classifier over a whole data set."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn
from tqdm import tqdm

from timm_synermix.features import FeatureHook, pool_feature
from timm_synermix.loading import warn_of_skipped

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

_logger = logging.getLogger('train')


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
        device: Where to accumulate.
        num_drawn: Classes whose features are kept, spread evenly over all.
    """

    def __init__(self, num_classes: int, device: torch.device | str = 'cpu', num_drawn: int = 10) -> None:
        self.num_classes = num_classes
        # float64 keeps large sums exact; Apple's GPUs have none
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
        from timm_synermix.metrics import cohesion_metrics  # slow to import

        if self._metrics is None:  # the first features tell how long one is
            self._metrics = cohesion_metrics(self.num_classes, self._feature_dim).to(self.device)
        self._metrics.update(feature, target)
        drawn = torch.isin(target, self.drawn_classes.to(target.device))
        self._drawn.append((feature[drawn].float().cpu(), target[drawn].cpu()))

    def compute(self) -> Cohesion:
        """The metrics over all processes, and features of this one; every process must call it."""
        from timm_synermix.metrics import METRIC_NAMES  # slow to import

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


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable,
    evaluator: ClassificationEvaluator,
    *,
    channels_last: bool = False,
    tta: int = 0,
    log_name: str = 'Test',
    feature_hook: FeatureHook | None = None,
    on_features: Callable[[Tensor, Tensor], None] | None = None,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Evaluate a model on every image of a loader once, on all processes together.

    Args:
        accelerator: Device, precision and distribution.
        model: Maps images `[N, C, H, W]` to logits `[N, num_classes]`.
        loader: timm evaluation loader. Images that a distributed sampler repeats to even out the ranks are not counted.
        evaluator: timm evaluator, fresh.
        channels_last: Convert images to the channels-last memory layout.
        tta: Average the logits of this many consecutive images, the augmented copies of one.
        log_name: Start of the log line.
        feature_hook: Hook on the model, or on what is compiled or wrapped in it; needed for on_features.
        on_features: Called with the features `[N, D]` (see `pool_feature`) and targets `[N]` of each batch, read in the
            same forward, without the images that a distributed sampler repeats; N may be 0.
        on_batch: Called before each batch; may raise to end the evaluation.

    Returns:
        timm's metrics: loss, and top1 and top5 in per cent.
    """
    evaluator.max_samples = evaluation_sample_limit(loader)
    model.eval()
    watched = accelerator.is_main_process and sys.stderr.isatty()
    for input, target in tqdm(loader, desc=log_name, unit='batch', leave=False, disable=not watched):
        if on_batch is not None:
            on_batch()
        input, target = input.to(accelerator.device), target.to(accelerator.device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output, feature = (model(input), None) if feature_hook is None else feature_hook(input, model=model)
        if isinstance(output, (tuple, list)):
            output = output[0]
        if tta > 1:
            output = output.unfold(0, tta, tta).mean(dim=2)
            target = target[::tta]
        if on_features is not None and feature is not None:
            feature = pool_feature(feature)
            if tta > 1:
                feature = feature.unflatten(0, (-1, tta)).mean(1)
            limit = evaluator.max_samples
            count = len(target) if limit is None else max(0, min(len(target), limit - evaluator.num_samples))
            on_features(feature[:count], target[:count])
        evaluator.update(output, target)
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    if accelerator.is_main_process:
        warn_of_skipped(log_name, getattr(loader, 'dataset', None))
        _logger.info(f'{log_name}: ' + '  '.join(f'{name}: {value:.4g}' for name, value in metrics.items()))
    return metrics
