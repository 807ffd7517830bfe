"""What validate.py counts besides what timm's evaluator does: other labels, averages over classes, and features."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.data import RealLabelsImagenet
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator, evaluation_sample_limit
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

from timm_synermix.cli.rules import flag
from timm_synermix.data.classes import check_classes
from timm_synermix.data.overview import log_overview
from timm_synermix.models.factory import Built

_logger = logging.getLogger(__name__)


class LabelEvaluator(ClassificationEvaluator):
    """timm's evaluator of loss and top-k accuracy, with the labels and averages of its validation script.

    Args:
        device: Device of the model's outputs.
        num_classes: Number of classes of the targets.
        valid_labels: Outputs of the model that stand for the classes of the targets; None for all, in order.
        real_labels: Takes over top-1 and top-5, see `create_real_labels`.
        average: 'micro', 'macro' or 'weighted' adds precision, recall and F1 score, in per cent.
        log_freq: Batches between two lines of progress; 0 for none.
        num_batches: Batches there are.
    """

    def __init__(
        self,
        device: torch.device,
        num_classes: int,
        *,
        valid_labels: list[int] | None = None,
        real_labels: RealLabelsImagenet | None = None,
        average: str | None = None,
        log_freq: int = 0,
        num_batches: int = 0,
    ) -> None:
        super().__init__(device)
        self.valid_labels, self.real_labels = valid_labels, real_labels
        self.averages = create_averages(num_classes, average, device) if average else {}
        self.log_freq, self.num_batches, self.batch = log_freq, num_batches, 0

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch, `[N, num_outputs]` and `[N]`, but for the images beyond max_samples."""
        if self.valid_labels is not None:
            output = output[:, self.valid_labels]
        before = self.num_samples
        super().update(output, target)
        count = self.num_samples - before
        if count and self.real_labels is not None:
            self.real_labels.add_result(output[:count])
        for metric in self.averages.values() if count else ():
            metric.update(output[:count].argmax(1), target[:count])
        if self.log_freq and self.batch % self.log_freq == 0:
            values = '  '.join(f'{name}: {value:.4g}' for name, value in self.summary().items())
            _logger.info(f'Test: [{self.batch:>4d}/{self.num_batches}]  {values}')
        self.batch += 1

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """The metrics over all processes; every process must call it."""
        metrics = super().compute(distributed=distributed)
        if self.real_labels is not None:
            correct = self.real_labels.is_correct
            counts = torch.tensor([sum(correct[1]), sum(correct[5]), len(correct[1])], device=self.device)
            if distributed:
                dist.all_reduce(counts)
            top1, top5, count = counts.tolist()
            metrics.update(top1=top1 / max(count, 1) * 100, top5=top5 / max(count, 1) * 100)
        return metrics | {name: 100 * metric.compute().item() for name, metric in self.averages.items()}


def create_averages(num_classes: int, average: str, device: torch.device) -> dict[str, Metric]:
    """Precision, recall and F1 score, averaged over the classes, under timm's names."""
    kinds = dict(precision=MulticlassPrecision, recall=MulticlassRecall, f1_score=MulticlassF1Score)
    kwargs: dict[str, Any] = dict(num_classes=num_classes, average=average, validate_args=False)
    return {f'{average}_{name}': kind(**kwargs).to(device) for name, kind in kinds.items()}


def load_valid_labels(path: str) -> list[int]:
    """The class indices of a --valid-labels file, one a line.

    Raises:
        ValueError: The file holds something else, or nothing.
    """
    with open(path, encoding='utf-8') as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines or not all(line.isdecimal() for line in lines):
        raise ValueError(f'--valid-labels must be a file of class indices, one a line, got {path}')
    return [int(line) for line in lines]


def create_real_labels(path: str, dataset: Any, loader: Any) -> RealLabelsImagenet:
    """The labels of Beyer et al. 2020, 'Are we done with ImageNet?', for the images of this process.

    Raises:
        ValueError: The images are not those that the file has labels for, or cannot be told from each other.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, 'filenames'):
        raise ValueError('--real-labels needs a folder of images: those of this dataset come without their names')
    names = [os.path.basename(name) for name in dataset.filenames(basename=True)]
    try:
        labels = RealLabelsImagenet(names, real_json=path)
    except AssertionError as error:
        raise ValueError(f'--real-labels: {path} has labels of another number of images than {len(names)}') from error
    except (ValueError, TypeError) as error:
        raise ValueError(f'--real-labels: cannot read {path}: {error}') from error
    unknown = [name for name in names if name not in labels.real_labels]
    if unknown:
        raise ValueError(f"--real-labels needs ImageNet's validation images under their names, got {unknown[0]}")
    limit = evaluation_sample_limit(loader)
    if limit is not None:
        labels.filenames = [names[index] for index in list(loader.sampler)[:limit]]
    return labels


def build_evaluator(
    args: argparse.Namespace, dataset: Any, built: Built, loader: Any, accelerator: Accelerator
) -> tuple[ClassificationEvaluator, int]:
    """The evaluator with the labels of the flags, and the number of classes of the targets.

    Raises:
        ValueError: The labels do not fit the model or the data.
    """
    if args.task == 'multilabel':
        for name in ('real_labels', 'valid_labels', 'metrics_avg', 'features_out', 'report'):
            if getattr(args, name):
                raise ValueError(f'{flag(name)} and --task multilabel cannot be used together')
        threshold = args.multilabel_threshold
        return MultiLabelClassificationEvaluator(accelerator.device, threshold=threshold), built.num_classes
    valid_labels = load_valid_labels(args.valid_labels) if args.valid_labels else None
    if valid_labels and max(valid_labels) >= built.num_classes:
        raise ValueError(f'--valid-labels must be below the {built.num_classes} classes, got {max(valid_labels)}')
    num_classes = len(valid_labels) if valid_labels else built.num_classes
    if valid_labels or args.num_classes is None:
        check_classes(None, dataset, num_classes)
    if accelerator.is_main_process:
        log_overview('Evaluation', dataset, None if args.real_labels else num_classes)
    evaluator = LabelEvaluator(
        accelerator.device,
        num_classes,
        valid_labels=valid_labels,
        real_labels=create_real_labels(args.real_labels, dataset, loader) if args.real_labels else None,
        average=args.metrics_avg,
        log_freq=args.log_freq if accelerator.is_main_process else 0,
        num_batches=len(loader),
    )
    return evaluator, num_classes
