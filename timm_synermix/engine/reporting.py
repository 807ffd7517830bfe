"""The report of a run, and of an evaluation."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

import torch
from timm.data import Mixup
from timm.utils import load_checkpoint_metadata
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from timm_synermix.data.classes import class_names
from timm_synermix.data.loader import create_synermix_loader
from timm_synermix.engine.loaders import set_epoch
from timm_synermix.utils.layout import EACH_TWICE

if TYPE_CHECKING:
    from timm_synermix.engine.candidates import Outcome
    from timm_synermix.engine.run import ReportedEpoch, Run

_logger = logging.getLogger(__name__)

# Arguments of timm's create_loader, and the flags of train.py that set them.
_AUGMENTATION = {
    **{name: name for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter')},
    **{name: name for name in ('color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')},
    **dict(auto_augment='aa', re_prob='reprob', re_mode='remode', re_count='recount'),
    **dict(interpolation='train_interpolation'),
}


def best_or_last(kept: ReportedEpoch | None, new: ReportedEpoch, best_epoch: int | None) -> ReportedEpoch:
    """Which of two evaluations to show: that of the best epoch; the later one if a run resumed after its best epoch."""
    return kept if kept is not None and kept.epoch == best_epoch else new


def write_run_report(run: Run, reported: ReportedEpoch) -> None:
    """A page of a run's curves, and of the features of one of its evaluations."""
    from timm_synermix.report import Evaluated, example_images, write_report  # slow to import

    saver = run.keeper.saver
    assert saver is not None  # the main process has one
    evaluated = Evaluated(
        run.args.experiment,
        reported.metrics,
        reported.cohesion.features,
        reported.cohesion.targets,
        model=run.args.model,
        shown=_which_epoch(reported.epoch, saver.best_epoch, run.evaluation.metric),
        summary=saver.summary_path,
        args=vars(run.args),
    )
    folder = os.path.join(saver.checkpoint_dir, 'report')
    loaders = run.loaders
    set_epoch(loaders.train, 0)
    layout = getattr(run.trained.task, 'layout', EACH_TWICE)
    examples = example_images(loaders.train, run.trained.mixup_fn, loaders.data_config, layout)
    data = data_name(run.args, run.args.val_split)
    path = write_report(folder, [evaluated], data=data, class_names=loaders.class_names, examples=examples)
    _logger.info(f'Report: {path}')


def _which_epoch(epoch: int, best_epoch: int, metric: str) -> str:
    """Which epoch of a run is shown, and why."""
    if epoch == best_epoch:
        return f'epoch {epoch}, the best by {metric}'
    return f'epoch {epoch}, the last; the best, epoch {best_epoch}, was before the run was resumed'


def _which_checkpoint(path: str) -> str:
    """Which epoch of its run a checkpoint is, as far as its content and its name tell."""
    name = os.path.basename(path)
    epoch = None if path.endswith('.safetensors') else load_checkpoint_metadata(path).get('epoch')
    kept = {'model_best': 'the best', 'last': 'the last'}.get(name.partition('.')[0])
    known = ', '.join(filter(None, [None if epoch is None else f'epoch {epoch}', kept]))
    return f'{known} ({name})' if known else name


def data_name(args: argparse.Namespace, split: str) -> str:
    """What to call a data set: its name, or its folder's, and the split."""
    root = args.data_dir or args.data or ''
    return ', '.join(filter(None, [args.dataset or os.path.basename(os.path.abspath(root)), split]))


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
            model=outcome.candidate.args.model,
            shown=_which_checkpoint(outcome.candidate.args.checkpoint) if outcome.candidate.args.checkpoint else '',
            summary=outcome.candidate.summary,
            args=outcome.candidate.run_args,
        )
        for outcome in outcomes
    ]
    first = outcomes[0]
    return write_report(
        folder,
        evaluated,
        data=data_name(first.candidate.args, first.candidate.args.split),
        class_names=class_names(first.dataset),
        examples=create_examples(outcomes[-1]),
    )


def create_examples(outcome: Outcome, count: int = 8) -> dict[str, Tensor] | None:
    """Images of an outcome's data set as in `example_images`, augmented and mixed as its training run did.

    What the run does not tell is timm's default, with a MixUp of 0.2. None for a stream, and for images that TensorFlow
    decodes.
    """
    from timm_synermix.report import example_images  # slow to import

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
    return example_images(loader, mixup, config, count=count)
