"""What a report says about each class: its cohesion, its nearest class, and which classes get confused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timm_synermix.metrics.class_moments import ClassTable
from timm_synermix.report.evaluated import Evaluated
from timm_synermix.report.page import Picture, Pictures, Table, cells, format_number
from timm_synermix.report.plots import class_name, cohesion_bars, confusion_matrix


def class_table(one: Evaluated) -> dict[str, Tensor]:
    """`ClassTable` of a checkpoint, with as many classes as it has targets for."""
    metric = ClassTable(
        num_classes=int(one.targets.max()) + 1 if len(one.targets) else 1,
        feature_dim=one.features.shape[1],
        sync_on_compute=False,  # one process writes the report
    )
    metric.update(one.features, one.targets)
    # torchmetrics makes scalars of tensors with one element
    return {name: value.reshape(-1) for name, value in metric.compute().items()}


def describe_classes(
    evaluated: Sequence[Evaluated], class_names: Sequence[str] | None, pictures: Pictures
) -> tuple[list[Picture], Table]:
    """Bars of the best and worst classes of each checkpoint, and a table of all classes."""
    tables = [class_table(one) for one in evaluated]
    charts = []
    for i, (one, table) in enumerate(zip(evaluated, tables, strict=True)):
        figure = cohesion_bars(one.name, table['cosine_cohesion'], class_names)
        alt = f'Cosine cohesion of the tightest and the loosest classes of {one.name}'
        charts.append(pictures.add(figure, f'cohesion_{i}', alt))
    rows = []
    for c in torch.cat([one.targets.cpu() for one in evaluated]).unique().tolist():
        texts = [class_name(c, class_names)]
        for table in tables:
            known = c < len(table['count']) and table['nearest_class'][c] >= 0
            texts.append(format_number(table['cosine_cohesion'][c].item() if c < len(table['count']) else None))
            texts.append(class_name(int(table['nearest_class'][c]), class_names) if known else '–')
        rows.append(cells(texts))
    header = [name for one in evaluated for name in (f'{one.name}: cohesion', 'nearest class')]
    return charts, Table('Cohesion and nearest class of every class', ['Class', *header], rows)


def nearest_mean(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the M images with finite features `[N, D]` their class, and the class whose mean is nearest, both `[M]`."""
    features, targets = features.cpu().double(), targets.cpu()
    kept = features.isfinite().all(1)
    features, targets = features[kept], targets[kept]
    if not len(targets):
        return targets, targets
    classes, index, count = targets.unique(return_inverse=True, return_counts=True)
    means = features.new_zeros(len(classes), features.shape[1]).index_add_(0, index, features) / count[:, None]
    return targets, classes[torch.cat([torch.cdist(part, means).argmin(1) for part in features.split(4096)])]


def most_confused(targets: Tensor, nearest: Tensor) -> list[tuple[int, int]]:
    """Pairs of a class and the class that its images are wrongly nearest to, the most frequent first."""
    pairs = torch.stack([targets, nearest], dim=1)[targets != nearest]
    pairs, count = pairs.unique(dim=0, return_counts=True)
    return [(a, b) for a, b in pairs[count.argsort(descending=True, stable=True)].tolist()]


def describe_confusion(
    evaluated: Sequence[Evaluated], class_names: Sequence[str] | None, pictures: Pictures
) -> list[dict[str, Any]]:
    """For each checkpoint, which classes lie so near to each other that images fall to the wrong mean."""
    found: list[dict[str, Any]] = []
    for i, one in enumerate(evaluated):
        targets, nearest = nearest_mean(one.features, one.targets)
        pairs = most_confused(targets, nearest)
        right = format_number(100 * (targets == nearest).double().mean().item())
        found.append({'name': one.name, 'right': right, 'pairs': pairs})
        if pairs:
            found[-1]['pairs'] = [
                {
                    'first': class_name(a, class_names),
                    'second': class_name(b, class_names),
                    'percent': f'{100 * share_of(a, b, targets, nearest):.0f}',
                }
                for a, b in pairs[:5]
            ]
            classes = list(dict.fromkeys(c for pair in pairs[:40] for c in pair))[:15]
            share = torch.tensor(
                [[share_of(a, b, targets, nearest) for b in classes] for a in classes], dtype=torch.float64
            )
            names = [class_name(c, class_names) for c in classes]
            alt = f'Confusion of the classes {", ".join(names)} by {one.name}, in per cent of the images of a class'
            figure = confusion_matrix(one.name, share, names)
            found[-1]['matrix'] = pictures.add(figure, f'confusion_{i}', alt, min_width=28)
    return found


def share_of(a: int, b: int, targets: Tensor, nearest: Tensor) -> float:
    """The share of the images of class a that are nearest to the mean of class b."""
    return (nearest[targets == a] == b).double().mean().item()
