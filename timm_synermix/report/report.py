"""A report of evaluated checkpoints: one HTML file that needs nothing else, and its pictures as PNG files beside it."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from timm_synermix.metrics.class_moments import ClassTable
from timm_synermix.metrics.collection import cohesion_metrics
from timm_synermix.report import plots
from timm_synermix.report.html import Pictures, format_number, html_grid, html_table, render

_logger = logging.getLogger(__name__)

_LABELS = {  # in the order of the page
    'loss': 'Loss',
    'top1': 'Top-1 accuracy, %',
    'top5': 'Top-5 accuracy, %',
    'cosine_cohesion': 'Cosine cohesion',
    'intra_class_distance': 'Intra-class distance',
    'inter_class_distance': 'Inter-class distance',
    'min_inter_class_distance': 'Smallest inter-class distance',
    'fisher_ratio': 'Fisher ratio',
    'cdnv': 'CDNV',
    'nc1': 'NC1',
    'silhouette': 'Silhouette',
    'calinski_harabasz': 'Calinski–Harabasz',
    'davies_bouldin': 'Davies–Bouldin',
    'train_loss': 'Training loss',
    'train_inter_loss': 'Training loss, inter-class',
    'train_intra_loss': 'Training loss, intra-class',
    'eval_loss': 'Evaluation loss',
    'lr': 'Learning rate',
}


@dataclass
class Evaluated:
    """A checkpoint and what its evaluation gave.

    Args:
        name: How the checkpoint is called.
        metrics: loss, top1, top5 and the cohesion metrics by name; NaN and infinite values are allowed.
        features: `[N, D]`, float32.
        targets: `[N]`, int64.
        summary: Path of the run's summary.csv.
        args: The run's arguments.
    """

    name: str
    metrics: dict[str, float]
    features: Tensor
    targets: Tensor
    summary: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


def write_report(
    folder: str,
    evaluated: Sequence[Evaluated],
    *,
    class_names: Sequence[str] | None = None,
    examples: Mapping[str, Tensor] | None = None,
    title: str = 'SynerMix report',
) -> str:
    """Write report.html, a file that needs nothing else, and its pictures as PNG files beside it.

    Args:
        folder: Where to write; made if it is missing.
        evaluated: The checkpoints, evaluated on the same images.
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
    sections = {
        'Comparison': _comparison(evaluated),
        'Training curves': _training_curves(evaluated, pictures),
        'Feature maps': _feature_maps(evaluated, class_names, pictures),
        'Cohesion of the classes': _class_cohesion(evaluated, class_names, pictures),
        'Confusion of nearest classes': _confusion(evaluated, class_names, pictures),
        'Examples': _examples(examples or {}, pictures),
        'Arguments': _arguments(evaluated),
    }
    path = os.path.join(folder, 'report.html')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(render(title, sections))
    return path


def _ordered(names: Iterable[str]) -> list[str]:
    """Names of metrics or of columns, each once, in the order of the page; those it does not know last."""
    order = list(_LABELS)

    def place(name: str) -> int:
        known = name if name in _LABELS else name.removeprefix('eval_')
        return order.index(known) if known in _LABELS else len(order)

    return sorted(dict.fromkeys(names), key=place)


def _label(name: str) -> str:
    """A name to read of a metric or of a column of summary.csv."""
    bare = name.removeprefix('eval_')
    return _LABELS.get(name) or _LABELS.get(bare) or bare.replace('_', ' ').capitalize()


def _comparison(evaluated: Sequence[Evaluated]) -> str:
    """The table of metrics, best values marked where one direction is better and the scale is the same."""
    better: dict[str, bool | None] = {'loss': False, 'top1': True, 'top5': True}
    better.update({name: metric.higher_is_better for name, metric in cohesion_metrics(2, 1).items(keep_base=True)})
    rows = []
    for name in _ordered(name for one in evaluated for name in one.metrics):
        values = [one.metrics.get(name) for one in evaluated]
        numbers = [value for value in values if value is not None and not math.isnan(value)]
        comparable = better.get(name) is not None and not name.endswith('class_distance') and len(set(numbers)) > 1
        best = (max if better.get(name) else min)(numbers) if comparable else None
        cells = [
            f'<td class="best">{format_number(v)}</td>' if best is not None and v == best else format_number(v)
            for v in values
        ]
        arrow = '' if better.get(name) is None else '\u00a0↑' if better[name] else '\u00a0↓'
        rows.append([escape(_label(name)) + arrow, *cells])
    note = (
        '<p>↑ higher is better, ↓ lower is better; the best value is marked. Distances are in units of the features, '
        'which differ from model to model, so that none of them is the best.</p>'
    )
    return (
        html_table(['Metric', *(escape(one.name) for one in evaluated)], rows, 'Comparison of the checkpoints') + note
    )


def _read_summary(path: str) -> dict[str, list[float]]:
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


def _training_curves(evaluated: Sequence[Evaluated], pictures: Pictures) -> str:
    """A picture per column of the summary.csv files, with a line per run."""
    names: dict[str, list[str]] = {}
    for one in evaluated:
        if one.summary:  # several checkpoints may be of the same run
            names.setdefault(one.summary, []).append(one.name)
    runs = [(', '.join(names[path]), _read_summary(path)) for path in names]
    groups: dict[str, list[str]] = {'Losses': [], 'Accuracy': [], 'Cohesion': [], 'Schedule': []}
    for name in _ordered(name for _, columns in runs for name in columns if name != 'epoch'):
        lines = [(run, columns.get('epoch', []), columns.get(name, [])) for run, columns in runs]
        if not any(math.isfinite(value) for _, _, values in lines for value in values):
            continue
        kind = 'Cohesion' if name.startswith('eval_') else 'Schedule'
        kind = 'Losses' if name.endswith('loss') else 'Accuracy' if name.startswith('eval_top') else kind
        alt = f'{_label(name)} over the epochs of {", ".join(run for run, _ in runs)}'
        groups[kind].append(pictures.add(plots.curve(_label(name), lines), f'curve_{name}', alt))
    return '\n'.join(f'<h3>{kind}</h3>\n{html_grid(charts)}' for kind, charts in groups.items() if charts)


def _feature_maps(evaluated: Sequence[Evaluated], class_names: Sequence[str] | None, pictures: Pictures) -> str:
    figure = plots.feature_map([(one.name, one.features, one.targets) for one in evaluated], class_names)
    alt = f'Features of {", ".join(one.name for one in evaluated)} in a plane, coloured by class'
    same = len({one.features.shape[1] for one in evaluated}) == 1
    compared = (
        'and all are seen from the same side, so that the panels compare' if same else 'each seen from its own side'
    )
    note = (
        '<p>Every dot is an image, every colour a class, at most ten of them. The features of each checkpoint are '
        f'centred and scaled to the same spread, {compared}.</p>'
    )
    return note + pictures.add(figure, 'feature_maps', alt, min_width=18 * min(3, len(evaluated)))


def _class_table(one: Evaluated) -> dict[str, Tensor]:
    """`ClassTable` of a checkpoint, with as many classes as it has targets for."""
    metric = ClassTable(
        num_classes=int(one.targets.max()) + 1 if len(one.targets) else 1,
        feature_dim=one.features.shape[1],
        sync_on_compute=False,  # one process writes the report
    )
    metric.update(one.features, one.targets)
    # torchmetrics makes scalars of tensors with one element
    return {name: value.reshape(-1) for name, value in metric.compute().items()}


def _class_cohesion(evaluated: Sequence[Evaluated], class_names: Sequence[str] | None, pictures: Pictures) -> str:
    """Bars of the best and worst classes of each checkpoint, and a table of all classes."""
    tables = [_class_table(one) for one in evaluated]
    charts = []
    for i, (one, table) in enumerate(zip(evaluated, tables, strict=True)):
        figure = plots.cohesion_bars(one.name, table['cosine_cohesion'], class_names)
        alt = f'Cosine cohesion of the tightest and the loosest classes of {one.name}'
        charts.append(pictures.add(figure, f'cohesion_{i}', alt))
    rows = []
    for c in torch.cat([one.targets.cpu() for one in evaluated]).unique().tolist():
        cells = []
        for table in tables:
            known = c < len(table['count']) and table['nearest_class'][c] >= 0
            nearest = escape(plots.class_name(int(table['nearest_class'][c]), class_names)) if known else '–'
            cells += [format_number(table['cosine_cohesion'][c].item() if c < len(table['count']) else None), nearest]
        rows.append([escape(plots.class_name(c, class_names)), *cells])
    header = [name for one in evaluated for name in (f'{escape(one.name)}: cohesion', 'nearest class')]
    everything = html_table(['Class', *header], rows, 'Cohesion and nearest class of every class')
    note = (
        '<p>Cosine cohesion, the mean cosine of the images of a class to its direction: the ten tightest and the ten '
        'loosest classes. The nearest class is the one whose mean is nearest.</p>'
    )
    folded = f'<details><summary>Every class, and its nearest class</summary>{everything}</details>'
    return f'{note}{html_grid(charts)}\n{folded}'


def _nearest_mean(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the M images with finite features `[N, D]` their class, and the class whose mean is nearest, both `[M]`."""
    features, targets = features.cpu().double(), targets.cpu()
    kept = features.isfinite().all(1)
    features, targets = features[kept], targets[kept]
    if not len(targets):
        return targets, targets
    classes, index, count = targets.unique(return_inverse=True, return_counts=True)
    means = features.new_zeros(len(classes), features.shape[1]).index_add_(0, index, features) / count[:, None]
    return targets, classes[torch.cat([torch.cdist(part, means).argmin(1) for part in features.split(4096)])]


def _most_confused(targets: Tensor, nearest: Tensor) -> list[tuple[int, int]]:
    """Pairs of a class and the class that its images are wrongly nearest to, the most frequent first."""
    pairs = torch.stack([targets, nearest], dim=1)[targets != nearest]
    pairs, count = pairs.unique(dim=0, return_counts=True)
    return [(a, b) for a, b in pairs[count.argsort(descending=True, stable=True)].tolist()]


def _confusion(evaluated: Sequence[Evaluated], class_names: Sequence[str] | None, pictures: Pictures) -> str:
    """For each checkpoint, which classes lie so near to each other that images fall to the wrong mean."""
    charts = []
    for i, one in enumerate(evaluated):
        targets, nearest = _nearest_mean(one.features, one.targets)
        pairs = _most_confused(targets, nearest)
        right = format_number(100 * (targets == nearest).double().mean().item())
        found = f'<h3>{escape(one.name)}</h3><p>{right} % of the images are nearest to the mean of their own class.</p>'
        if pairs:
            found += _confused_pairs(pairs[:5], targets, nearest, class_names)
            classes = list(dict.fromkeys(c for pair in pairs[:40] for c in pair))[:15]
            share = _shares(classes, targets, nearest)
            names = [plots.class_name(c, class_names) for c in classes]
            alt = f'Confusion of the classes {", ".join(names)} by {one.name}, in per cent of the images of a class'
            found += pictures.add(plots.confusion_matrix(one.name, share, names), f'confusion_{i}', alt, min_width=28)
        charts.append(f'<div>{found}</div>')
    note = (
        '<p>Each image goes to the class whose mean is nearest to its features. Shown are the classes that get '
        'confused most: rows are the classes of the images, columns the classes they went to.</p>'
    )
    return note + html_grid(charts, 'wide')


def _shares(classes: Sequence[int], targets: Tensor, nearest: Tensor) -> Tensor:
    """`[K, K]`, in row a and column b the share of the images of class a that are nearest to the mean of class b."""
    chosen = torch.tensor(classes)
    return torch.stack([(nearest[targets == c][:, None] == chosen).double().mean(0) for c in classes])


def _confused_pairs(
    pairs: Sequence[tuple[int, int]], targets: Tensor, nearest: Tensor, class_names: Sequence[str] | None
) -> str:
    items = []
    for a, b in pairs:
        first, second = (escape(plots.class_name(c, class_names)) for c in (a, b))
        share = (nearest[targets == a] == b).double().mean().item()
        items.append(f'<li>{first} → {second}: {100 * share:.0f} %</li>')
    return f'<ul>{"".join(items)}</ul>'


def _examples(examples: Mapping[str, Tensor], pictures: Pictures) -> str:
    rows = {name: images for name, images in examples.items() if len(images)}
    if not rows:
        return ''
    alt = f'Rows of images: {", ".join(rows)}'
    note = '<p>Images as the model sees them, the same image in the same column.</p>'
    return note + pictures.add(plots.image_rows(rows), 'examples', alt, kind='photo', min_width=30)


def _arguments(evaluated: Sequence[Evaluated]) -> str:
    """The arguments that differ between the runs, and the others folded."""
    differing, same = [], []
    for name in sorted({name for one in evaluated for name in one.args}):
        values = [escape(str(one.args[name])) if name in one.args else '–' for one in evaluated]
        if len(set(values)) > 1:
            differing.append([escape(name), *values])
        else:
            same.append([escape(name), values[0]])
    found = ''
    if differing:
        header = ['Argument', *(escape(one.name) for one in evaluated)]
        found += '<p>Arguments that differ between the runs:</p>'
        found += html_table(header, differing, 'Arguments that differ', 'text')
    if same:
        table = html_table(['Argument', 'Value'], same, 'Arguments that are the same in all runs', 'text')
        what = 'All arguments' if len(evaluated) == 1 else 'Arguments that are the same in all runs'
        found += f'<details><summary>{what} ({len(same)})</summary>{table}</details>'
    return found
