"""What a run tells its user of an epoch: log lines or a progress bar, and its mean losses."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_logger = logging.getLogger(__name__)

_BAR = '{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}'

_TRAIN_NAMES = {'loss': 'Loss', 'intra_loss': 'Intra', 'inter_loss': 'Inter'}


class LossMeter:
    """Sample-weighted means of the scalars a task returns, kept on the device until they are read."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        self._count = 0  # images
        # float64 keeps a long epoch's sum exact; Apple's GPUs have none
        self._dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64

    def update(self, result: Mapping[str, Tensor], count: int) -> None:
        """Add the scalars of one batch of count samples."""
        self._last = {name: value.detach() for name, value in result.items() if value.ndim == 0}
        for name, value in self._last.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.to(self._dtype) * count
        self._count += count

    def last(self) -> dict[str, float]:
        """The scalars of the last batch on this process."""
        return {name: value.item() for name, value in self._last.items()}

    def mean(self) -> dict[str, float]:
        """The means so far on this process."""
        return {name: value.item() / self._count for name, value in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far on this process, for a checkpoint."""
        return {'sums': {name: value.item() for name, value in self._sums.items()}, 'count': self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the sums of a checkpoint."""
        device = self.accelerator.device
        self._sums = {name: torch.tensor(v, dtype=self._dtype, device=device) for name, v in state['sums'].items()}
        self._count = state['count']

    def reduce(self) -> dict[str, float]:
        """The means so far over all processes; every process must call it."""
        names = list(self._sums)
        if not names:  # every update was left out
            return {'loss': math.nan}
        count = torch.tensor(self._count, device=self.accelerator.device, dtype=self._dtype)
        totals = torch.stack([*(self._sums[name] for name in names), count])
        *sums, all_images = self.accelerator.reduce(totals, reduction='sum').tolist()
        return {name: value / all_images for name, value in zip(names, sums, strict=True)}


class TrainProgress:
    """Progress of one training epoch: timm's log lines, or for a person at a terminal a bar, while it is entered.

    Args:
        args: log_interval, rank and world_size are read.
        epoch: Index of the epoch.
        updates: Optimizer updates in the epoch.
        first: The update to begin with, in an epoch that goes on.
    """

    def __init__(self, args: argparse.Namespace, epoch: int, updates: int, first: int = 0) -> None:
        self.args, self.epoch, self.updates, self.first = args, epoch, updates, first
        self.start = self.mark = time.time()
        self.samples = self.interval_samples = self.interval_updates = 0
        self.data_time = 0.0
        self.rate = 0.0  # images per second of the last interval that was reported
        self.meter: LossMeter | None = None
        self.bar: tqdm | None = None
        self.bar_refreshed = 0.0
        self._shown = ExitStack()

    def __enter__(self) -> TrainProgress:
        if self.args.rank == 0 and sys.stderr.isatty():
            bar = tqdm(total=self.updates, initial=self.first, desc=f'Train {self.epoch}', bar_format=_BAR, leave=False)
            self._shown.enter_context(logging_redirect_tqdm())  # lines of the log come above the bar
            self.bar = self._shown.enter_context(bar)
        return self

    def __exit__(self, *exc: object) -> None:
        self._shown.close()

    def update(self, update: int, samples: int, data_time: float, meter: LossMeter, lr: float) -> bool:
        """Note one optimizer update. Returns whether it was reported, as every log_interval-th and the last are."""
        self.meter = meter
        self.samples += samples * self.args.world_size
        self.interval_samples += samples * self.args.world_size
        self.interval_updates += 1
        self.data_time += data_time
        report = update % self.args.log_interval == 0 or update == self.updates - 1
        if report:
            self.rate = self.interval_samples / max(time.time() - self.mark, 1e-9)
        if self.bar is not None:
            self._update_bar(self.bar, meter)
        elif self.args.rank == 0 and report:
            self._log(update, meter, lr)
        if report:
            self.mark, self.interval_samples, self.interval_updates = time.time(), 0, 0
        return report

    def _update_bar(self, bar: tqdm, meter: LossMeter) -> None:
        bar.update()
        now = time.time()
        if now - self.bar_refreshed > 1:  # reading the losses waits for the device: once a second is enough
            self.bar_refreshed = now
            losses = ' '.join(f'{_train_name(name)} {value:#.3g}' for name, value in meter.mean().items())
            bar.set_postfix_str(f'{losses} {self.samples / (now - self.start):.0f} img/s')

    def _log(self, update: int, meter: LossMeter, lr: float) -> None:
        now = time.time()
        last, mean = meter.last(), meter.mean()
        rate = self.samples / (now - self.start)
        losses = '  '.join(f'{_train_name(name)}: {last[name]:#.3g} ({mean[name]:#.3g})' for name in last)
        interval, done = now - self.mark, update + 1 - self.first
        _logger.info(
            f'Train: {self.epoch} [{update:>4d}/{self.updates} '
            f'({100.0 * (update + 1) / self.updates:>3.0f}%)]  {losses}  '
            f'Time: {interval / self.interval_updates:.3f}s, {self.interval_samples / interval:>7.2f}/s  '
            f'({(now - self.start) / done:.3f}s, {rate:>7.2f}/s)  '
            f'LR: {lr:.3e}  Data: {self.data_time / done:.3f}'
        )

    def close(self) -> None:
        """End the epoch: take the bar away and leave a line of rate, time and mean losses."""
        self._shown.close()
        if self.args.rank == 0:
            seconds = time.time() - self.start
            means = {} if self.meter is None else self.meter.mean()
            losses = ''.join(f'  {_train_name(name)}: {value:#.3g}' for name, value in means.items())
            _logger.info(f'Train: {self.epoch} done in {seconds:.1f}s, {self.samples / seconds:.1f} images/s{losses}')


def _train_name(name: str) -> str:
    """What a person is told for a scalar of the task."""
    return _TRAIN_NAMES.get(name, name)
