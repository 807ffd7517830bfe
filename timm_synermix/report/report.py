"""A report of evaluated checkpoints: one HTML file that needs nothing else, and its pictures as PNG files beside it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import timm_synermix
from timm_synermix.metrics.collection import cohesion_metrics
from timm_synermix.report.classes import describe_classes, describe_confusion
from timm_synermix.report.curves import draw_curves
from timm_synermix.report.evaluated import Evaluated, in_order, label
from timm_synermix.report.feature_map import feature_map
from timm_synermix.report.page import Cell, Picture, Pictures, Table, cells, format_number, render
from timm_synermix.report.plots import image_rows

_MAX_DRAWN = 10  # classes of a feature map


def write_report(
    folder: str,
    evaluated: Sequence[Evaluated],
    *,
    data: str = '',
    class_names: Sequence[str] | None = None,
    examples: Mapping[str, Tensor] | None = None,
    title: str = 'SynerMix report',
) -> str:
    """Write report.html, a file that needs nothing else, and its pictures as PNG files beside it.

    Args:
        folder: Where to write; made if it is missing.
        evaluated: The checkpoints, evaluated on the same images.
        data: Name of the data set.
        class_names: Names of the classes; default is their numbers.
        examples: Rows of images as the model sees them by name, `[M, C, H, W]` in `[0, 1]`.
        title: Heading of the page.

    Returns:
        Path of report.html.
    """
    if not evaluated:
        raise ValueError('evaluated must hold at least one checkpoint, got none.')
    os.makedirs(folder, exist_ok=True)
    pictures = Pictures(folder)
    curves = draw_curves(evaluated, pictures)
    cohesion, classes = describe_classes(evaluated, class_names, pictures)
    differing, common = arguments(evaluated)
    page = render(
        title=title,
        version=timm_synermix.__version__,
        result=main_result(evaluated),
        facts=facts(evaluated, data),
        num_checkpoints=len(evaluated),
        comparison=comparison(evaluated),
        **_feature_map(evaluated, class_names, pictures),
        examples=_examples(examples or {}, pictures),
        curves=curves.pictures,
        legend=curves.legend,
        cohesion=cohesion,
        classes=classes,
        confusion=describe_confusion(evaluated, class_names, pictures),
        differing=differing,
        common=common,
    )
    path = os.path.join(folder, 'report.html')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(page)
    return path


def main_result(evaluated: Sequence[Evaluated]) -> str:
    """The accuracy in one sentence, of the most accurate checkpoint and of those it is compared with."""
    known = [one for one in evaluated if math.isfinite(one.metrics.get('top1', math.nan))]
    if not known:
        return ''
    best, *others = sorted(known, key=lambda one: -one.metrics['top1'])
    top1 = best.metrics['top1']
    share = f'{top1:.2f} % of {len(best.targets):,} images'
    if not others:
        return f'{best.name} classifies {share} right.'
    equal = [one.name for one in known if one.metrics['top1'] == top1]
    behind = [
        f'{top1 - one.metrics["top1"]:.2f} points more than {one.name}' for one in others if one.name not in equal
    ]
    who = f'{best.name} is' if len(equal) == 1 else f'{_listed(equal)} are'
    return f'{who} the most accurate, with {share} right{", " + _listed(behind) if behind else ""}.'


def _listed(names: Sequence[str]) -> str:
    """Names as they are listed in a sentence."""
    return ' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))


def facts(evaluated: Sequence[Evaluated], data: str) -> list[tuple[str, list[str]]]:
    """What the head of the page says of what was evaluated, a line for each checkpoint where they differ."""

    def lines(texts: list[str]) -> list[str]:
        if len(set(texts)) == 1:
            return texts[:1]
        return [f'{one.name}: {text}' for one, text in zip(evaluated, texts, strict=True)]

    images = [f'{len(one.targets):,} of {len(one.targets.unique()):,} classes' for one in evaluated]
    found = [
        ('Data set', [data]),
        ('Model', lines([one.model for one in evaluated])),
        ('Shown', lines([one.shown for one in evaluated])),
        ('Images', lines(images)),
        ('Date', [time.strftime('%Y-%m-%d')]),
    ]
    return [(name, texts) for name, texts in found if any(texts)]


def comparison(evaluated: Sequence[Evaluated]) -> Table:
    """The table of metrics, best values marked where one direction is better and the scale is the same."""
    better: dict[str, bool | None] = {'loss': False, 'top1': True, 'top5': True}
    better.update({name: metric.higher_is_better for name, metric in cohesion_metrics(2, 1).items(keep_base=True)})
    rows = []
    for name in in_order(name for one in evaluated for name in one.metrics):
        direction = None if name.endswith('class_distance') else better.get(name)  # units differ from model to model
        values = [one.metrics.get(name) for one in evaluated]
        numbers = {value for value in values if value is not None and not math.isnan(value)}
        best = None
        if direction is not None and len(numbers) > 1:
            best = max(numbers) if direction else min(numbers)
        arrow = {None: '', True: '\u00a0↑', False: '\u00a0↓'}[direction]
        found = [Cell(format_number(value), best is not None and value == best) for value in values]
        rows.append([Cell(label(name) + arrow), *found])
    return Table('Comparison of the checkpoints', ['Metric', *(one.name for one in evaluated)], rows)


def _feature_map(
    evaluated: Sequence[Evaluated], class_names: Sequence[str] | None, pictures: Pictures
) -> dict[str, Any]:
    figure = feature_map([(one.name, one.features, one.targets) for one in evaluated], class_names, _MAX_DRAWN)
    alt = f'Features of {", ".join(one.name for one in evaluated)} in a plane, coloured by class'
    num_classes = len(torch.cat([one.targets.cpu() for one in evaluated]).unique())
    return {
        'feature_map': pictures.add(figure, 'feature_maps', alt, min_width=18 * min(3, len(evaluated))),
        'num_classes': num_classes,
        'drawn': min(_MAX_DRAWN, num_classes),
        'same_length': len({one.features.shape[1] for one in evaluated}) == 1,
    }


def _examples(examples: Mapping[str, Tensor], pictures: Pictures) -> Picture | None:
    rows = {name: images for name, images in examples.items() if len(images)}
    if not rows:
        return None
    alt = f'Rows of images: {", ".join(rows)}'
    return pictures.add(image_rows(rows), 'examples', alt, is_chart=False, min_width=30)


def arguments(evaluated: Sequence[Evaluated]) -> tuple[Table | None, Table | None]:
    """The arguments that differ between the runs, and the others."""
    differing, same = [], []
    for name in sorted({name for one in evaluated for name in one.args}):
        values = [str(one.args[name]) if name in one.args else '–' for one in evaluated]
        if len(set(values)) > 1:
            differing.append(cells([name, *values]))
        else:
            same.append(cells([name, values[0]]))
    what = 'All arguments' if len(evaluated) == 1 else 'Arguments that are the same in all runs'
    header = ['Argument', *(one.name for one in evaluated)]
    return (
        Table('Arguments that differ', header, differing, is_text=True) if differing else None,
        Table(what, ['Argument', 'Value'], same, is_text=True) if same else None,
    )
