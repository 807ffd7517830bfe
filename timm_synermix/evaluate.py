"""Evaluation of a classifier over a whole data set."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn
from tqdm import tqdm

from timm_synermix.features import FeatureHook
from timm_synermix.metrics import pool_feature

_logger = logging.getLogger('train')


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
    on_features: Callable[[Tensor, Tensor], None] | None = None,
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
        on_features: Called with the features `[N, D]` (see `pool_feature`) and targets `[N]` of each batch, read in the
            same forward. In one process only.

    Returns:
        timm's metrics: loss, and top1 and top5 in per cent.
    """
    evaluator.max_samples = evaluation_sample_limit(loader)
    model.eval()
    hook = None if on_features is None else FeatureHook(model)
    watched = accelerator.is_main_process and sys.stderr.isatty()
    for input, target in tqdm(loader, desc=log_name, unit='batch', leave=False, disable=not watched):
        input, target = input.to(accelerator.device), target.to(accelerator.device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output, feature = (model(input), None) if hook is None else hook(input)
        if on_features is not None and feature is not None:
            on_features(pool_feature(feature), target)
        if isinstance(output, (tuple, list)):
            output = output[0]
        if tta > 1:
            output = output.unfold(0, tta, tta).mean(dim=2)
            target = target[::tta]
        evaluator.update(output, target)
    if hook is not None:
        hook.remove()
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    if accelerator.is_main_process:
        _logger.info(f'{log_name}: ' + '  '.join(f'{name}: {value:.4g}' for name, value in metrics.items()))
    return metrics
