"""Losses that are not finite: found, named, and kept from the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor

from timm_synermix.utils.distributed import HostGroup
from timm_synermix.utils.safe_load import is_sound

_logger = logging.getLogger(__name__)

_NEVER = 2**62


class NonFiniteLoss(ArithmeticError):
    """A loss was NaN or infinite. The message names the part of the loss and the update."""


class LossGuard:
    """Watches the losses of a run.

    With max_bad_steps, or on a CPU, every update is checked before it is made; with max_bad_steps it is left out if its
    loss is not finite, up to so many times, and buffers such as BatchNorm's statistics are put back. Otherwise a GPU is
    not made to wait: it notes the first bad update itself, and the run stops where the log waits for the GPU anyway.

    Looks at the loss before gradient scaling, so an update that only overflowed in scaled gradients does not count.

    Args:
        buffers: The buffers of the trained model.
        group: The processes of the run; what one of them finds holds for all.
        max_bad_steps: How many updates may be left out.
        num_bad_steps: How many were, before the run was resumed.
    """

    def __init__(
        self, buffers: Iterable[Tensor], group: HostGroup, max_bad_steps: int = 0, num_bad_steps: int = 0
    ) -> None:
        self.group = group
        self.max_bad_steps = max_bad_steps
        self.num_bad_steps = num_bad_steps
        self._buffers = list(buffers) if max_bad_steps else []
        self._good = [buffer.clone() for buffer in self._buffers]
        self._first: dict[str, Tensor] = {}  # part of the loss -> first update with a bad one

    def keep_buffers(self) -> None:
        """Note the buffers as good ones, where something else than an update has changed them."""
        self._keep(self._good, self._buffers)

    def add(self, result: Mapping[str, Tensor], update: int) -> None:
        """Note the losses of a batch of an update, on their device."""
        names = [name for name in result if name.endswith('_loss')] or ['loss']
        for name in names:
            at = torch.where(result[name].detach().isfinite(), _NEVER, update)
            self._first[name] = torch.minimum(self._first[name], at) if name in self._first else at

    def accepts(self, epoch: int, always: bool = False) -> bool:
        """Whether the update may be made; every process must call it at the same place.

        Args:
            epoch: The epoch, for the message.
            always: Wait for the device, whatever it is.

        Raises:
            NonFiniteLoss: The loss is bad, and no more updates may be left out.
        """
        names = sorted(self._first)
        if not names or not (always or self.max_bad_steps or self._first[names[0]].device.type == 'cpu'):
            return True
        first = torch.stack([self._first[name] for name in names]).tolist()
        first = [_NEVER - value for value in self.group.max([_NEVER - value for value in first])]
        if min(first) == _NEVER:
            self.keep_buffers()
            return True
        bad = ' and '.join(name for name, value in zip(names, first, strict=True) if value == min(first))
        what = f'not a finite number: {bad} of update {min(first)} of epoch {epoch}'
        if self.num_bad_steps >= self.max_bad_steps:
            raise NonFiniteLoss(what)
        self.num_bad_steps += 1
        self._first = {}
        self._keep(self._buffers, self._good)
        _logger.warning(f'Skipped an update, {self.num_bad_steps} of at most {self.max_bad_steps}: {what}.')
        return False

    @staticmethod
    @torch.no_grad()
    def check_weights(task: TrainingTask, epoch: int) -> None:
        """Raise NonFiniteLoss if a weight of the model or its moving average is not finite.

        As after bad gradients of a good loss. Nor may a buffer be: BatchNorm's variance can overflow while the loss,
        which does not use it, is good.
        """
        averages = {'moving average': task.get_eval_model(ema=True)} if task.has_ema() else {}
        for what, module in {'model': task.get_eval_model(), **averages}.items():
            state = unwrap_model(module).state_dict()
            floats = {name: value for name, value in state.items() if value.is_floating_point()}
            if torch.stack([value.isfinite().all() for value in floats.values()]).all():
                continue
            bad = next((name for name, value in floats.items() if not is_sound(value)), None)
            if bad is not None:
                raise NonFiniteLoss(f'not a finite number: a weight of the {what} in epoch {epoch}, {bad}')

    @staticmethod
    @torch.no_grad()
    def _keep(to: list[Tensor], values: list[Tensor]) -> None:
        for kept, value in zip(to, values, strict=True):
            kept.copy_(value)
