"""What validate.py leaves behind: the results file, the table of --compare, and the report."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from timm_synermix.candidates import Candidate
from timm_synermix.data import create_synermix_loader
from timm_synermix.datasets import class_names
from timm_synermix.examples import example_images
from timm_synermix.metrics import METRIC_NAMES, cohesion_metrics
from timm_synermix.tracking import finite_or_none

# Arguments of timm's create_loader, and the flags of train.py that set them.
_AUGMENTATION = {
    **{name: name for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter')},
    **{name: name for name in ('color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')},
    **dict(auto_augment='aa', re_prob='reprob', re_mode='remode', re_count='recount'),
    **dict(interpolation='train_interpolation'),
}


@dataclass
class Outcome:
    """One candidate, evaluated.

    Args:
        candidate: What was evaluated.
        row: Its line of the results: timm's columns first, then the loss and the cohesion metrics.
        data_config: timm's data configuration.
        dataset: The data set; None unless it is for the report.
        features: float32 `[N, D]` tensor; None if it was not kept.
        targets: int64 `[N]` tensor, likewise.
    """

    candidate: Candidate
    row: dict[str, Any]
    data_config: dict[str, Any]
    dataset: Any = None
    features: Any = None
    targets: Any = None


def write_results(path: str, results: dict[str, Any] | list[dict[str, Any]], format: str) -> None:
    """Write one row, or a list of them, as 'csv' with a header or as 'json'."""
    with open(path, 'w', newline='') as file:
        if format == 'json':
            json.dump(finite_or_none(results), file, indent=4)
            return
        rows = results if isinstance(results, list) else [results]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def compare_table(outcomes: list[Outcome]) -> str:
    """An aligned table of accuracy and cohesion, a line per metric and a column per candidate."""
    better = {name: metric.higher_is_better for name, metric in cohesion_metrics(2, 1).items(keep_base=True)}
    better.update(top1=True, top5=True)
    hints = {True: 'higher is better', False: 'lower is better', None: ''}
    names = [outcome.candidate.name for outcome in outcomes]
    widths = [max(12, len(name) + 2) for name in names]
    lines = [' ' * 26 + ''.join(f'{name:>{width}}' for name, width in zip(names, widths, strict=True))]
    for metric in [name for name in ('top1', 'top5', *METRIC_NAMES) if name in outcomes[0].row]:
        values = [outcome.row.get(metric, math.nan) for outcome in outcomes]
        cells = ''.join(f'{value:{width}.5g}' for value, width in zip(values, widths, strict=True))
        lines.append(f'{metric:26}{cells}  {hints[better[metric]]}'.rstrip())
    return '\n'.join(lines)


def write_outcome_report(folder: str, outcomes: list[Outcome]) -> str:
    """Write the report of outcomes whose features were kept, and return its path."""
    from timm_synermix.report import Evaluated, write_report  # slow to import

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
