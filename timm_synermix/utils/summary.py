"""Results of a run as files and lines: summary.csv, JSON, CSV."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from timm_synermix.utils.files import replacing


def summary_row(
    epoch: int,
    train_metrics: Mapping[str, float],
    eval_metrics: Mapping[str, float] | None,
    lr: float,
    cohesion: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """One row of summary.csv: timm's columns first, in timm's order, then what else the task returned, and cohesion."""
    row: dict[str, float] = {'epoch': epoch, 'train_loss': train_metrics['loss']}
    row.update({f'eval_{name}': value for name, value in (eval_metrics or {}).items()})
    row['lr'] = lr
    row.update({f'train_{name}': value for name, value in train_metrics.items() if name != 'loss'})
    row.update({f'eval_{name}': value for name, value in (cohesion or {}).items()})
    return row


def append_summary(path: str, row: Mapping[str, float]) -> None:
    """Append a row to summary.csv under its header; the header of a new file is the row's. The file is written anew.

    A column that the row lacks stays empty: the intra-class loss ends with --synermix-off-epoch. One that the file
    lacks, as after a resume with --cohesion, is added to it, empty in the rows so far.
    """
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    if os.path.exists(path):
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or ())
    names += [name for name in row if name not in names]
    with replacing(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows([*rows, row])


def trim_summary(path: str, first_epoch: int) -> None:
    """Drop the rows of summary.csv from an epoch on, which the run makes again; with epoch 0 rename the file."""
    if not os.path.exists(path):
        return
    if first_epoch == 0:
        os.replace(path, path + '.old')
        return
    with open(path, newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or ())
    with replacing(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            row for row in rows if (row.get('epoch') or '').isdecimal() and int(row['epoch']) < first_epoch
        )


def print_results(results: list[dict[str, Any]], metric: str, decreasing: bool) -> None:
    """Print the best ten epochs as JSON after a line `--result`, for scripts to read, as timm does."""

    def key(result: dict[str, Any]) -> float:
        return result.get('validation', result['train'])[metric]

    best = sorted(results, key=key, reverse=not decreasing)[:10]
    print(f'--result\n{json.dumps(finite_or_none(best), indent=4)}')


def finite_or_none(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: those become None."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(path: str, results: dict[str, Any] | list[dict[str, Any]], format: str) -> None:
    """Write one row, or a list of them, as 'csv' with a header or as 'json'."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        if format == 'json':
            json.dump(finite_or_none(results), file, indent=4)
            return
        rows = results if isinstance(results, list) else [results]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
