"""Evaluation of a classifier over a whole data set."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn
from tqdm import tqdm

from timm_synermix.data.sample_dataset import warn_of_skipped
from timm_synermix.features import FeatureHook, pool_feature

_logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable,
    evaluator: ClassificationEvaluator,
    *,
    channels_last: bool = False,
    amp_dtype: str | None = None,
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
        amp_dtype: Type that torch's autocast computes in; None leaves it to accelerator.
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
    autocast: Callable[[], Any] = accelerator.autocast
    if amp_dtype:
        autocast = partial(torch.autocast, accelerator.device.type, getattr(torch, amp_dtype))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    watched = accelerator.is_main_process and sys.stderr.isatty()
    with tqdm(loader, desc=log_name, unit='batch', leave=False, disable=not watched) as batches:  # taken away on errors
        for input, target in batches:
            if on_batch is not None:
                on_batch()
            input, target = input.to(accelerator.device, dtype), target.to(accelerator.device)
            if channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            with autocast():
                output, feature = (model(input), None) if feature_hook is None else feature_hook(input, model=model)
            if isinstance(output, (tuple, list)):
                output = output[0]
            if on_features is not None and feature is not None:
                feature = pool_feature(feature)
                limit = evaluator.max_samples
                count = len(target) if limit is None else max(0, min(len(target), limit - evaluator.num_samples))
                on_features(feature[:count], target[:count])
            evaluator.update(output, target)
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    if accelerator.is_main_process:
        warn_of_skipped(log_name, getattr(loader, 'dataset', None))
        _logger.info(f'{log_name}: ' + '  '.join(f'{name}: {value:.4g}' for name, value in metrics.items()))
    return metrics


class FeatureStore:
    """All features of an evaluation and their targets, in the order of the data set."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []

    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]` and targets `[N]`; N may be 0."""
        self._batches.append((feature.float().cpu(), target.cpu()))

    def gather(self, loader: Any) -> tuple[Tensor, Tensor]:
        """Features float32 `[N, D]` and targets int64 `[N]` of all processes; every process must call it."""
        batches = self._batches or [(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))]
        features, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if not (dist.is_available() and dist.is_initialized()):
            return features, targets
        limit = evaluation_sample_limit(loader)
        index = list(loader.sampler)[:limit] if limit is not None else [0] * len(targets)  # a stream has no order
        parts = gather_object([(features, targets, torch.tensor(index, dtype=torch.int64))])
        parts = [part for part in parts if len(part[1])]
        features, targets, order = (torch.cat(part) for part in zip(*parts, strict=True))
        order = order.argsort(stable=True)
        return features[order], targets[order]
