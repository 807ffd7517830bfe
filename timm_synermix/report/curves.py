"""The training curves of a report, from the summary.csv of its runs."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from timm_synermix.report.evaluated import Evaluated, in_order, label
from timm_synermix.report.page import Picture, Pictures
from timm_synermix.report.plots import Line, curve, run_colours

_logger = logging.getLogger(__name__)

# Columns that share a plot, with their names in it; every other column has a plot of its own.
_TOGETHER = {
    'Loss': {'train_loss': 'training', 'eval_loss': 'evaluation'},
    'Parts of the training loss': {'train_inter_loss': 'inter-class', 'train_intra_loss': 'intra-class'},
    'Accuracy, %': {'eval_top1': 'top-1', 'eval_top5': 'top-5'},
    'Distances, in units of the features': {
        'eval_intra_class_distance': 'to the class mean',
        'eval_inter_class_distance': 'between class means',
        'eval_min_inter_class_distance': 'smallest between them',
    },
}


class Curves(NamedTuple):
    """Pictures of the curves, and the name and the colour of each run, unless there is but one."""

    pictures: list[Picture]
    legend: list[tuple[str, str]]


def draw_curves(evaluated: Sequence[Evaluated], pictures: Pictures) -> Curves:
    """A picture per column of the summary.csv files, or per group of columns that belong together."""
    names: dict[str, list[str]] = {}
    for one in evaluated:
        if one.summary:  # several checkpoints may be of the same run
            names.setdefault(one.summary, []).append(one.name)
    runs = {', '.join(names[path]): read_summary(path) for path in names}
    drawn = []
    for title, columns in _plots(runs.values()):
        lines = [
            Line(i, j, table['epoch'], table[column])
            for i, table in enumerate(runs.values())
            for j, column in enumerate(columns)
            if any(map(math.isfinite, table.get(column, ())))
        ]
        if lines:
            quantities = [columns[column] for column in columns]
            figure = curve(title, quantities, lines, len(runs))
            name = title.partition(',')[0] if title in _TOGETHER else next(iter(columns))
            drawn.append(pictures.add(figure, f'curve_{name}', f'{title} over the epochs of {", ".join(runs)}'))
    legend = list(zip(runs, run_colours(len(runs)), strict=True)) if len(runs) > 1 and drawn else []
    return Curves(drawn, legend)


def _plots(tables: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Title of each plot, and its columns with their names in the plot."""
    found = in_order(
        column
        for table in tables
        for column, values in table.items()
        if column != 'epoch' and any(map(math.isfinite, values))
    )
    for title, together in _TOGETHER.items():
        columns = {column: name for column, name in together.items() if column in found}
        if columns:
            yield title, columns
    grouped = {column for together in _TOGETHER.values() for column in together}
    for column in found:
        if column not in grouped:
            yield label(column), {column: label(column)}


def read_summary(path: str) -> dict[str, list[float]]:
    """The columns of a summary.csv, NaN for what is not a number; of an epoch that was repeated, the last row."""
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file, restval='', restkey='rest'))
    except (OSError, UnicodeError, csv.Error) as error:
        _logger.warning('The report lacks the training curves of %s: %s', path, error)
        return {}

    def number(cell: Any) -> float:
        try:
            return float(cell)
        except (TypeError, ValueError):
            return math.nan

    table = [{name: number(cell) for name, cell in row.items()} for row in rows]
    by_epoch = {row.setdefault('epoch', float(i)): row for i, row in enumerate(table)}
    names = dict.fromkeys(name for row in table for name in row if name not in ('', 'rest'))
    return {name: [row.get(name, math.nan) for row in by_epoch.values()] for name in names}
