"""What a report is given, and how it names things."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

LABELS = {  # in the order of the page
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
        model: Name of the model.
        shown: Which epoch of its run it is, and why that one is shown.
        summary: Path of the run's summary.csv.
        args: The run's arguments.
    """

    name: str
    metrics: dict[str, float]
    features: Tensor
    targets: Tensor
    model: str = ''
    shown: str = ''
    summary: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of metrics or of columns, each once, in the order of the page; those it does not know last."""
    order = list(LABELS)

    def place(name: str) -> int:
        bare = name.removeprefix('eval_')
        return order.index(bare) if bare in LABELS else len(order)

    return sorted(dict.fromkeys(names), key=place)


def label(name: str) -> str:
    """A name to read of a metric or of a column of summary.csv."""
    bare = name.removeprefix('eval_')
    return LABELS.get(bare) or bare.replace('_', ' ').capitalize()
