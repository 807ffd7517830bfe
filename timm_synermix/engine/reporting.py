"""The report of a run, and of an evaluation."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from timm_synermix.data.dataset_factory import class_names
from timm_synermix.data.loader import create_synermix_loader
from timm_synermix.engine.loaders import set_epoch
from timm_synermix.report.example_images import example_images

if TYPE_CHECKING:
    from timm_synermix.engine.candidates import Outcome
    from timm_synermix.metrics import Cohesion

_logger = logging.getLogger(__name__)

# Arguments of timm's create_loader, and the flags of train.py that set them.
_AUGMENTATION = {
    **{name: name for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter')},
    **{name: name for name in ('color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')},
    **dict(auto_augment='aa', re_prob='reprob', re_mode='remode', re_count='recount'),
    **dict(interpolation='train_interpolation'),
}


class ReportedEpoch(NamedTuple):
    """An evaluation of a training run, for its report.

    Attributes:
        epoch: Index of the epoch.
        metrics: Accuracy and cohesion.
        cohesion: With the features.
    """

    epoch: int
    metrics: dict[str, float]
    cohesion: Cohesion


def best_or_last(kept: ReportedEpoch | None, new: ReportedEpoch, best_epoch: int | None) -> ReportedEpoch:
    """Which of two evaluations to show: that of the best epoch; the later one if a run resumed after its best epoch."""
    return kept if kept is not None and kept.epoch == best_epoch else new


def write_run_report(run: Any, reported: ReportedEpoch) -> None:
    """A page of a run's curves, and of the features of one of its evaluations."""
    from timm_synermix.report import Evaluated, write_report  # slow to import

    evaluated = Evaluated(
        run.args.experiment,
        reported.metrics,
        reported.cohesion.features,
        reported.cohesion.targets,
        summary=run.saver.summary_path,
        args=vars(run.args),
    )
    folder = os.path.join(run.saver.checkpoint_dir, 'report')
    set_epoch(run.loader_train, 0)  # whose first batch has clean views, also with --synermix-interval
    examples = example_images(run.loader_train, run.mixup_fn, run.data_config)
    _logger.info(f'Report: {write_report(folder, [evaluated], class_names=run.class_names, examples=examples)}')


def write_outcome_report(folder: str, outcomes: list[Outcome]) -> str:
    """Write the report of outcomes whose features were kept, and return its path."""
    from timm_synermix.metrics.collection import METRIC_NAMES  # slow to import
    from timm_synermix.report import Evaluated, write_report

    shown = {'loss', 'top1', 'top5', *METRIC_NAMES}
    evaluated = [
        Evaluated(
            outcome.candidate.name,
            {name: value for name, value in outcome.row.items() if name in shown},
            outcome.features,
            outcome.targets,
            summary=outcome.candidate.summary,
            args=outcome.candidate.run_args,
        )
        for outcome in outcomes
    ]
    names = class_names(outcomes[0].dataset)
    return write_report(folder, evaluated, class_names=names, examples=create_examples(outcomes[-1]))


def create_examples(outcome: Outcome, count: int = 8) -> dict[str, Tensor] | None:
    """Images of an outcome's data set as in `example_images`, augmented and mixed as its training run did.

    What the run does not tell is timm's default, with a MixUp of 0.2.
    None for a stream, and for images that TensorFlow decodes.
    """
    dataset, config, run_args = outcome.dataset, outcome.data_config, outcome.candidate.run_args
    if isinstance(dataset, IterableDataset) or getattr(dataset, 'load_bytes', False) or len(dataset) < 2:
        return None
    augmentation = {name: run_args[flag] for name, flag in _AUGMENTATION.items() if run_args.get(flag) is not None}
    count = min(count, len(dataset))
    places = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    loader = create_synermix_loader(
        Subset(dataset, places),
        batch_size=count,
        singletons='keep',
        clean_interpolation=config['interpolation'],
        **{name: config[name] for name in ('input_size', 'crop_pct', 'crop_mode', 'mean', 'std')},
        num_workers=0,
        use_prefetcher=False,
        **augmentation,
    )
    # A coefficient for each image: one alone would often show next to nothing
    num_classes = int(outcome.targets.max()) + 1
    mixup = Mixup(mixup_alpha=run_args.get('mixup') or 0.2, mode='elem', num_classes=num_classes)
    return example_images(loader, mixup, config, count)
