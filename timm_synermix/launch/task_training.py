"""A script whose loop says `task(input, target)['loss']`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import timm.task
import torch
from torch import Tensor, nn

from timm_synermix.launch.script import LaunchError
from timm_synermix.launch.training import Training
from timm_synermix.task import SynerMixTask

if TYPE_CHECKING:
    from timm_synermix.launch.session import Session


class TaskTraining(Training):
    """A script with a task, `task(input, target)['loss']`: timm's own since December 2025."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.task: SynerMixTask | None = None
        self._in_forward = False
        self._target: Tensor | None = None
        self._losses: dict[str, Tensor] = {}
        session.script.replace(timm.task.ClassificationTask, self._task_class())

    def _task_class(self) -> type:
        training = self

        class LaunchedTask(SynerMixTask):
            """A SynerMixTask with the arguments of timm's ClassificationTask."""

            def __init__(self, model: nn.Module, criterion: Any = None, criterion_kwargs: Any = None, **kwargs: Any):
                try:
                    super().__init__(
                        model, training.soft(criterion), criterion_kwargs, **training.task_kwargs(model), **kwargs
                    )
                except ValueError as error:
                    raise LaunchError(f'{training.session.flag}: {error}') from error
                training.task = self

            def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
                training.check(target)
                training._in_forward = True
                try:
                    result = super().forward(input, target)
                finally:
                    training._in_forward = False
                training._losses = {name: value.detach() for name, value in result.items() if value.ndim == 0}
                return result

        LaunchedTask.__name__ = 'SynerMixTask'
        return LaunchedTask

    @property
    def in_step(self) -> bool:
        return self._in_forward

    def check(self, target: Tensor) -> None:
        """Refuse a batch that is not the loader's."""
        expected = self._target
        if expected is None or (target is not expected and not torch.equal(target, expected.to(target.device))):
            raise LaunchError('the batch of a step must be that of the training loader, and its target unchanged')

    def begin(self, epoch: int, num_batches: int) -> None:
        if self.task is None:
            raise LaunchError(f'ClassificationTask (of timm.task) was not used by {self.session.script.path}')
        self.task.synermix_enabled = not self.is_off(epoch)

    def hand_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self._target, self._losses = target, {}
        return input, target

    def losses(self) -> Mapping[str, Tensor]:
        return self._losses

    def end(self) -> None:
        self._target = None
