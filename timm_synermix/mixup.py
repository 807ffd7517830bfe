"""Inter-class mixing inside the task: what it takes, timm's Mixup, and the one mode timm has in its collate only."""

from __future__ import annotations

from typing import Any, Protocol

from timm.data import Mixup
from torch import Tensor


class Mixer(Protocol):
    """What `SynerMixTask` takes as mixup_fn: `timm.data.Mixup`, and anything with its signature.

    A mixer of hidden activations has one more method, `mixing(batch_size, first_row)`: a context manager in which the
    task runs the model, that mixes what the call before it drew, see `ManifoldMixup`. With one forward for clean and
    augmented images, the augmented ones start at first_row.
    """

    def __call__(self, x: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]:
        """Images `[N, C, H, W]` and class indices `[N]` in; images and targets `[N', num_classes]` out."""


class HalfMixup(Mixup):
    """timm's 'half' mode: image i is mixed with image B - 1 - i, element by element, for the first half of a batch.

    B images in give B / 2 mixed ones. Takes the arguments of `timm.data.Mixup`, but mode.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(mode='elem', **kwargs)

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x, target = super().__call__(x, target)
        return x[: len(x) // 2], target[: len(x) // 2]


def create_mixup(mode: str = 'batch', **kwargs: Any) -> Mixup:
    """`timm.data.Mixup` in any of timm's modes: 'batch', 'pair', 'elem' or 'half'."""
    return HalfMixup(**kwargs) if mode == 'half' else Mixup(mode=mode, **kwargs)
