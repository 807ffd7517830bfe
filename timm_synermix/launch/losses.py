"""The losses of a script that knows nothing of two of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

import timm.loss
import torch
from torch import Tensor, nn

from timm_synermix.launch.script import LaunchError, Script

if TYPE_CHECKING:
    from timm_synermix.launch.loss_training import LossTraining


def join_losses(script: Script, training: LossTraining) -> None:
    """Let every loss take the output of both losses apart, when the model has just returned one.

    A loss is a module of timm, of torch or of the script whose forward takes two things. It is called as it is by
    everybody else, and for every other output.
    """
    for owner in {_owner_of_forward(loss) for loss in _losses(script)} - {nn.Module}:
        script.set_attribute(owner, 'forward', _joined(owner.forward, training))


def _losses(script: Script) -> Iterator[type[nn.Module]]:
    for module in (timm.loss, torch.nn.modules.loss, *script.modules()):
        for value in list(vars(module).values()):
            if isinstance(value, type) and issubclass(value, nn.Module) and _takes_two(value.forward):
                yield value


def _takes_two(forward: Callable[..., Any]) -> bool:
    """Whether a forward can be called as `forward(self, output, target)`, or with more than that."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) >= 3


def _owner_of_forward(loss: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in loss.__mro__ if 'forward' in vars(base))


def _joined(original: Callable[..., Tensor], training: LossTraining) -> Callable[..., Tensor]:
    @wraps(original)
    def forward(loss: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        synermix = training.synermix
        if synermix is None or not synermix.waiting:
            return original(loss, *args, **kwargs)
        name, flag = type(loss).__name__, training.session.flag
        if next(loss.parameters(), None) is not None:
            raise LaunchError(f'{flag}: {name} has a network in it, as for distillation, which is not supported')
        values = [*args, *kwargs.values()]
        if len(values) != 2:  # a loss around the loss
            result = original(loss, *args, **kwargs)
            if synermix.waiting or result is not training.joined:
                raise LaunchError(f'{flag}: {name} changes the loss, as for distillation, which is not supported')
            return result
        try:
            training.joined = synermix.join(training.soft(loss), *values)
        except ValueError as error:
            raise LaunchError(f'{flag}: {error}') from error
        return training.joined

    return forward
