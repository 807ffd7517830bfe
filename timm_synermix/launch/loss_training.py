"""A script whose loop says `loss_fn(model(input), target)`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import timm.optim
import torch
from torch import Tensor, nn

from timm_synermix.launch.losses import join_losses
from timm_synermix.launch.script import LaunchError
from timm_synermix.launch.train_loader import TrainLoader
from timm_synermix.launch.training import Training
from timm_synermix.task import SynerMixForward

if TYPE_CHECKING:
    from timm_synermix.launch.session import Session


class LossTraining(Training):
    """A script with a model and a loss, `loss_fn(model(input), target)`: timm's own before December 2025."""

    def __init__(self, session: Session) -> None:
        self.synermix: SynerMixForward | None = None
        self.joined: Tensor | None = None  # the last loss
        self.optimized: nn.Module | None = None  # the model that the script has made an optimizer for
        super().__init__(session)
        join_losses(session.script, self)
        for function in (timm.optim.create_optimizer, timm.optim.create_optimizer_v2):
            session._wrap(function, self._create_optimizer)

    def is_about_output(self, error: Exception) -> bool:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        return self.synermix is not None and any(map(self.synermix.is_output, frames[-1].f_locals.values()))

    def check_model(self, module: nn.Module) -> None:
        if self.synermix is not None and module is not self.synermix.model and torch.is_grad_enabled():
            raise LaunchError(
                f'{self.session.flag}: two models are trained, {len(self.session.models)} were made, not one'
            )

    def _create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        self.optimized = next((m for m in self.session.models if any(m is value for value in given)), self.optimized)
        return original(*args, **kwargs)

    def create_loader(self, original: Callable[..., Any], arguments: dict[str, Any]) -> TrainLoader:
        loader = super().create_loader(original, arguments)
        model = self.optimized or next((m for m in reversed(self.session.models) if m.training), self.session.models[0])
        try:
            self.synermix = SynerMixForward(model, **self.task_kwargs(model))
        except ValueError as error:
            raise LaunchError(f'{self.session.flag}: {error}') from error
        return loader

    def begin(self, epoch: int, num_batches: int) -> None:
        assert self.synermix is not None
        task = self.synermix.task
        task.synermix_enabled = not self.is_off(epoch)
        if not task.num_batches:  # a script that resumes does not know of it
            task.num_batches = epoch * num_batches
        self.synermix.losses = {}

    def hand_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        assert self.synermix is not None
        return self.synermix.hand_out(input, target)

    def losses(self) -> Mapping[str, Tensor]:
        assert self.synermix is not None
        return self.synermix.losses

    def end(self) -> None:
        assert self.synermix is not None
        self.synermix.forget()

    @property
    def in_step(self) -> bool:
        return self.synermix is not None and self.synermix.in_step

    @property
    def waits_for_loss(self) -> bool:
        return self.synermix is not None and self.synermix.waiting
