"""What a run sends to the trackers that Accelerate knows: every update, every epoch, a table and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_synermix.engine.resume_point import ResumePoint
from timm_synermix.engine.tracker_guard import TrackerGuard
from timm_synermix.engine.tracker_start import start_tracker

if TYPE_CHECKING:
    from timm_synermix.metrics import Cohesion

_MANY_CLASSES = 1_000  # above it, W&B gets the table of classes of the last epoch alone


class RunTrackers:
    """Sends a run to its trackers, from the main process. Without trackers it does nothing.

    Losses of updates stay on the device until a line of the log waits for it anyway. In Weights & Biases the x-axis is
    the number of updates, a metric of its own: a resumed run goes on in the same run there, whatever was logged after
    its checkpoint.

    Args:
        accelerator: Created with the trackers' names.
        args: The flags.
        folder: The run's folder; local trackers write there.
        resume_from: Checkpoint the run goes on from, or None; its Weights & Biases run is continued.
    """

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, folder: str, resume_from: ResumePoint | None
    ) -> None:
        self._waiting: list[tuple[int, dict[str, Tensor], float]] = []
        self._window: dict[str, Tensor] = {}  # sums of the losses since the last update
        self._images = 0
        self.wandb_run_id: str | None = None  # for the checkpoint
        self.trackers: list[Any] = []
        if not accelerator.log_with:
            return
        names = list(map(str, accelerator.log_with))
        try:
            self.trackers = [TrackerGuard(start_tracker(name, args, folder, resume_from)) for name in names]
        except Exception as error:  # each tracker has errors of its own
            raise ValueError(f'--log-with: the trackers {", ".join(names)} cannot be started: {error}') from error
        accelerator.trackers = self.trackers  # which ends them with the training
        for tracker in self.trackers:
            if tracker.name == 'wandb' and not tracker.run.disabled:
                self.wandb_run_id = tracker.run.id

    def add_batch(self, result: Mapping[str, Tensor], count: int) -> None:
        """Note the losses of a batch of count images, on this process."""
        if self.trackers:
            for name, value in result.items():
                if value.ndim == 0:
                    self._window[name] = self._window.get(name, 0.0) + value.detach() * count
            self._images += count

    def add_update(self, update: int, lr: float) -> None:
        """Note an update: its losses are the mean over the images since the one before."""
        if self.trackers:
            self._waiting.append((update, {name: value / self._images for name, value in self._window.items()}, lr))
            self._window, self._images = {}, 0

    def send_updates(self, images_per_second: float) -> None:
        """Send what add_update noted, in one wait for the device; the rate goes with the last update."""
        if not self._waiting:
            return
        names = sorted({name for _, losses, _ in self._waiting for name in losses})
        missing = torch.full((), torch.nan)
        table = [[losses.get(name, missing).float() for name in names] for _, losses, _ in self._waiting]
        values = torch.stack([torch.stack([v.to(row[0].device) for v in row]) for row in table]).tolist()
        for (update, losses, lr), row in zip(self._waiting, values, strict=True):
            sent = {f'update/{name}': value for name, value in zip(names, row, strict=True) if name in losses}
            self._log({**sent, 'update/lr': lr}, update)
        self._log({'update/images_per_second': images_per_second}, self._waiting[-1][0])
        self._waiting = []

    def send_epoch(
        self,
        update: int,
        row: Mapping[str, float],
        cohesion: Cohesion | None,
        class_names: Sequence[str] | None,
        last: bool = False,
    ) -> None:
        """Send the row of an epoch, and where there is one its table of classes and the picture of its features.

        The metrics of cohesion are a group of their own, `cohesion/NAME`; the others have the names of summary.csv.

        Args:
            update: Number of updates so far.
            row: The row of summary.csv.
            cohesion: Of the epoch's evaluation.
            class_names: Names of the classes; default is their numbers.
            last: It is the last epoch of the run.
        """
        if not self.trackers:
            return
        measured = () if cohesion is None else cohesion.metrics
        row = {
            f'cohesion/{name.removeprefix("eval_")}' if name.removeprefix('eval_') in measured else name: value
            for name, value in row.items()
        }
        for tracker in self.trackers:
            if tracker.name == 'wandb':
                tracker.attempt(define_best, tracker.run, row)
        self._log(row, update)
        if cohesion is None:
            return
        from timm_synermix.report.feature_map import feature_map  # slow to import
        from timm_synermix.report.plots import to_array

        features = [(f'after epoch {row["epoch"]:.0f}', cohesion.features, cohesion.targets)]
        picture = to_array(feature_map(features, class_names))
        for tracker in self.trackers:
            if tracker.name == 'wandb':
                if last or len(cohesion.table['count']) <= _MANY_CLASSES:
                    tracker.log_table('classes', *class_rows_of_table(cohesion.table, class_names))
                tracker.log_images({'feature_map': [picture]})
            elif tracker.name == 'tensorboard':
                tracker.log_images({'feature_map': picture[None]}, step=update, dataformats='NHWC')
                tracker.log({'classes': markdown(*class_rows_of_table(cohesion.table, class_names))}, step=update)

    def _log(self, values: dict[str, Any], update: int) -> None:
        for tracker in self.trackers:
            if tracker.name == 'wandb':
                tracker.log({**values, 'update': update})
            else:
                tracker.log(values, step=update)


def define_best(run: Any, row: Mapping[str, float]) -> None:
    """Have the summary of a Weights & Biases run hold the best value of each metric of an epoch beside the last."""
    for name in row:
        if better := better_value(name):
            run.define_metric(name, step_metric='update', summary=f'{better},last')


def better_value(name: str) -> str | None:
    """Whether the 'max' or the 'min' of a metric is its best value; None for what is neither."""
    from timm_synermix.metrics.collection import HIGHER_IS_BETTER  # slow to import

    if name.startswith('cohesion/'):
        return 'max' if HIGHER_IS_BETTER[name.removeprefix('cohesion/')] else 'min'
    if name.endswith('loss'):
        return 'min'
    return 'max' if name.startswith('eval_') else None


def class_rows_of_table(
    table: Mapping[str, Tensor], class_names: Sequence[str] | None
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a `ClassTable`, a row for each class that has images."""
    from timm_synermix.report.plots import class_name  # slow to import

    columns = ['class', 'images', 'intra_class_distance', 'cosine_cohesion', 'nearest_class', 'nearest_class_distance']
    values = {key: value.tolist() for key, value in table.items()}
    rows = []
    for c in range(len(values['count'])):
        if values['count'][c]:
            nearest = values['nearest_class'][c]
            row: list[Any] = [class_name(c, class_names), int(values['count'][c])]
            row += [values['intra_class_distance'][c], values['cosine_cohesion'][c]]
            row += ['' if nearest < 0 else class_name(nearest, class_names), values['nearest_class_distance'][c]]
            rows.append(row)
    return columns, rows


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A table as Markdown."""
    cells = [
        [f'{cell:.4g}' if isinstance(cell, float) else str(cell).replace('|', '\\|') for cell in row] for row in rows
    ]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [columns, ['---'] * len(columns), *cells])
