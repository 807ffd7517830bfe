"""The training loader of a launched script: it knows the epoch, and keeps the books of both losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from timm_synermix.utils.wrapped import WrappedLoader

if TYPE_CHECKING:
    from timm_synermix.launch.training import Training

_logger = logging.getLogger(__name__)

_LOG_NAMES = {'intra_loss': 'Intra', 'inter_loss': 'Inter'}


class TrainLoader(WrappedLoader):
    """A `create_synermix_loader` in a loop that does not know of it; in all else the loader itself.

    A pass over the loader is the epoch that the script has set, by `set_epoch` of the data set, of the sampler or of
    the batch sampler; if it has set none, the one after that of the last pass.

    Attributes:
        epoch_losses: The mean losses of the last pass, by name, over all processes.
    """

    def __init__(self, loader: Any, training: Training) -> None:
        super().__init__(loader)
        self._training = training
        self._last_epoch: int | None = None
        self.epoch_losses: dict[str, float] = {}

    @property
    def sampler(self) -> Any:
        """What has `set_epoch`, where a script looks for it."""
        draws = self._loader.batch_sampler
        return draws if hasattr(draws, 'set_epoch') else self._loader.sampler

    @property
    def mixup_enabled(self) -> bool:
        """As of timm's loader; scripts set it to False at --mixup-off-epoch."""
        return True

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._training.set_mixup_enabled(enabled)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self._next_epoch()
        self._training.begin(epoch, len(self))
        means = _Means()
        self.epoch_losses = dict.fromkeys(self.epoch_losses, math.nan)  # until its end: the loop may leave before
        for batch, (input, target) in enumerate(self._loader):
            yield self._training.hand_out(input, target)
            losses = self._training.losses()
            means.add(losses, len(target))
            self._log(epoch, batch, losses, means)
        self._training.end()  # not by an error, which is explained by the batch it comes from
        self.epoch_losses = means.over_processes()

    def _next_epoch(self) -> int:
        draws = self._loader.batch_sampler
        known = hasattr(draws, 'set_epoch')
        epoch: int = draws.epoch if known else self._last_epoch or 0
        if self._last_epoch is None:
            epoch = max(epoch, self._training.start_epoch())
        elif epoch == self._last_epoch:
            epoch += 1
        if known:
            draws.set_epoch(epoch)
        self._last_epoch = epoch
        return epoch

    def _log(self, epoch: int, batch: int, losses: Mapping[str, Tensor], means: _Means) -> None:
        """A line at the script's --log-interval, of this process's losses."""
        args = self._training.args
        accumulate = max(1, getattr(args, 'grad_accum_steps', 1) or 1)
        update, rest = divmod(batch, accumulate)
        last = batch + 1 == len(self)
        if not losses or getattr(args, 'rank', 0) != 0 or not (last or rest + 1 == accumulate):
            return
        if last or update % getattr(args, 'log_interval', 50) == 0:
            mean = means.of_process()
            values = '  '.join(f'{_LOG_NAMES[n]}: {losses[n]:#.3g} ({mean[n]:#.3g})' for n in _LOG_NAMES if n in losses)
            _logger.info(f'SynerMix: {epoch} [{update:>4d}/{-(-len(self) // accumulate)}]  {values}')


class _Means:
    """Means over images."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(_LOG_NAMES, 0)

    def add(self, losses: Mapping[str, Tensor], count: int) -> None:
        for name in _LOG_NAMES:
            if name in losses:
                # float64 keeps a long epoch's sum exact; Apple's GPUs have none
                loss = losses[name].to(torch.float32 if losses[name].device.type == 'mps' else torch.float64)
                self._sums[name] = self._sums.get(name, 0.0) + loss * count
                self._counts[name] += count

    def of_process(self) -> dict[str, float]:
        return {name: self._sums[name].item() / self._counts[name] for name in self._sums}

    def over_processes(self) -> dict[str, float]:
        """NaN for a loss that there was not; every process must call it."""
        sums = [float(self._sums.get(name, 0.0)) for name in _LOG_NAMES]
        some = next(iter(self._sums.values()), torch.zeros(0, dtype=torch.float64))  # on the device
        totals = torch.tensor([*sums, *self._counts.values()], dtype=some.dtype, device=some.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        sums, counts = totals.tolist()[: len(sums)], totals.tolist()[len(sums) :]
        return {name: s / n if n else math.nan for name, s, n in zip(_LOG_NAMES, sums, counts, strict=True)}
