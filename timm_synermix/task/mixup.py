"""Inter-class mixing inside the task: what it takes, timm's Mixup, and the one mode timm has in its collate only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

INPUT = 'input'  # the name of the layer before the first: the images themselves


class Mixer(Protocol):
    """What `SynerMixTask` takes as mixup_fn: `timm.data.Mixup`, and anything with its signature.

    A mixer of hidden activations has one more method, `mixing(batch_size)`: a context manager in which the task runs
    the model, that mixes what the call before it drew, see `ManifoldMixup`.
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


class RegMixup:
    """RegMixup: the unmixed images beside the mixed ones, so that a mean loss is the mean of both losses.

    N images in give 2 N, the unmixed ones first, their targets smoothed as the mixer's are:
    `L_inter = (CE(unmixed) + CE(mixed)) / 2`.

    Args:
        mixup: `timm.data.Mixup`, in a mode that gives as many images as it gets.

    Raises:
        ValueError: It mixes half of a batch away.

    Source: arXiv 2206.14502, with eta 1; half of the paper's sum, which is a factor of the learning rate.
    """

    def __init__(self, mixup: Mixup) -> None:
        if isinstance(mixup, HalfMixup):
            raise ValueError("mixup must not be in mode 'half', which has fewer targets than images.")
        self.mixup = mixup

    @property
    def label_smoothing(self) -> float:
        return self.mixup.label_smoothing

    @property
    def mixup_enabled(self) -> bool:
        return self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.mixup.mixup_enabled = enabled

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        mixed, mixed_target = self.mixup(x.clone(), target)  # it mixes in place
        if not self.mixup_enabled:  # then it has mixed nothing, and once is enough
            return mixed, mixed_target
        unmixed_target = mixup_target(target, self.mixup.num_classes, 1.0, self.label_smoothing)
        return torch.cat([x, mixed]), torch.cat([unmixed_target.to(mixed_target.dtype), mixed_target])


def create_mixup(mode: str = 'batch', **kwargs: Any) -> Mixup:
    """`timm.data.Mixup` in any of timm's modes: 'batch', 'pair', 'elem' or 'half'."""
    return HalfMixup(**kwargs) if mode == 'half' else Mixup(mode=mode, **kwargs)


def mix_with_flip(output: Any, lam: Tensor, batch_size: int) -> Any:
    """`lam h_i + (1 - lam) h_j`, where j is i in the reverse order of the rows.

    Args:
        output: What a layer returned: a tensor, or a list or tuple, in which other things stay as they are. The first
            dimension of a tensor is the batch, or a multiple of it: then the parts of one image stand together.
        lam: Scalar.
        batch_size: Images in the batch.

    Raises:
        ValueError: A tensor is not ordered by image.
    """
    if isinstance(output, (list, tuple)):
        parts = [mix_with_flip(part, lam, batch_size) for part in output]
        return type(output)(*parts) if hasattr(output, '_fields') else type(output)(parts)
    if not isinstance(output, Tensor):
        return output
    if output.ndim == 0 or len(output) % batch_size:
        raise ValueError(f'a layer must return tensors of {batch_size} images, got one of shape {list(output.shape)}.')
    images = output if len(output) == batch_size else output.unflatten(0, (batch_size, -1))
    mixed = (lam * images + (1 - lam) * images.flip(0)).to(output.dtype)
    return mixed if len(output) == batch_size else mixed.flatten(0, 1)
