"""A few images as a model sees them in training, to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_synermix.task.mixup import Mixer
from timm_synermix.utils.layout import EACH_TWICE, Layout


def example_images(
    loader: Any, mixup_fn: Mixer | None, data_config: dict[str, Any], layout: Layout = EACH_TWICE, count: int = 8
) -> dict[str, Tensor]:
    """Images of the first batch of a training loader: clean, augmented and mixed, as far as it has them.

    Mixing that an off-epoch has ended is shown all the same.

    Args:
        loader: Yields input, normalised, and target `[N]`.
        mixup_fn: Mixes images and class indices; None for nothing. What mixes hidden layers leaves the images alone.
        data_config: Its mean and std undo the normalisation.
        layout: Of the input.
        count: Images of each kind.

    Returns:
        Float32 images `[count, C, H, W]` in `[0, 1]`, on the CPU.
    """
    input, target = next(iter(loader))
    examples = {}
    if num_clean := layout.num_clean(len(input), len(target)):
        examples['clean'] = input[:num_clean]
        input = input[num_clean:]
        target = target[: len(input)]
    examples['mixed' if target.ndim > 1 else 'augmented'] = input.clone()  # soft targets are mixed already
    if mixup_fn is not None and target.ndim == 1:
        enabled = getattr(mixup_fn, 'mixup_enabled', True)
        mixup_fn.mixup_enabled = True  # type: ignore[attr-defined]
        examples['mixed'] = mixup_fn(input, target)[0][-len(input) :]  # RegMixup has the unmixed ones before them
        mixup_fn.mixup_enabled = enabled  # type: ignore[attr-defined]
    mean, std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    return {name: (images[:count].float().cpu() * std + mean).clamp(0, 1) for name, images in examples.items()}
