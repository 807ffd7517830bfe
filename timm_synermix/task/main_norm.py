"""The BatchNorm that a model with one for each augmentation split evaluates with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from timm.layers import SplitBatchNorm2d
from torch import Tensor, nn


def split_norms(model: nn.Module) -> list[SplitBatchNorm2d]:
    """The layers of a model that have a BatchNorm for each split."""
    return [module for module in model.modules() if isinstance(module, SplitBatchNorm2d)]


@contextmanager
def main_norm_alone(model: nn.Module) -> Iterator[None]:
    """Let each `SplitBatchNorm2d` of a model in training normalise with its main BatchNorm alone, as in evaluation.

    That one is the first split's, by the statistics of the whole batch. A model without them stays as it is.
    """
    norms = split_norms(model)
    for norm in norms:
        norm.forward = MethodType(_main_forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _main_forward(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    output = nn.BatchNorm2d.forward(norm, input)
    for name in ('drop', 'act'):  # of a timm BatchNormAct2d, which has become this one
        if hasattr(norm, name):
            output = getattr(norm, name)(output)
    return output
