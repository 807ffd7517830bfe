"""The mix of images with several labels: one synthesised feature for each label that is present."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.loss import TwoWayLoss, ZlprLoss
from torch import Tensor, nn

from timm_synermix.functional import IGNORE_INDEX, class_rows, mix_rows, row_weight


class LabelMix(NamedTuple):
    """How the features of a batch are mixed, `[P]` for its P pairs of an image and a label that it bears.

    Attributes:
        image: The image of each pair.
        row, weight: The mix of the pairs, see `mix_rows`.
        row_target: The label of each row, `IGNORE_INDEX` for padding.
        target: `[P, num_classes]`, the weighted mean of the targets of the images of each row.
    """

    image: Tensor
    row: Tensor
    weight: Tensor
    row_target: Tensor
    target: Tensor


def draw_label_mix(target: Tensor, num_mixed: int = 0, generator: torch.Generator | None = None) -> LabelMix:
    """For each label c present `w_ic = u_i T_ic / sum_j u_j T_jc`, with one draw `u_i ~ U(0, 1)` for each image.

    With one label per image these are the weights, and the draws, of `row_weight`. How many pairs there are is known on
    the device only, which costs one wait.

    Args:
        target: The targets T, in `[0, 1]`, `[N, num_classes]`.
        num_mixed, generator: See `row_weight`.
    """
    u = 1.0 - torch.rand(len(target), device=target.device, generator=generator)
    image, label = target.nonzero(as_tuple=True)
    if not len(image):  # no image has a label: one row of padding
        none = torch.zeros(1, dtype=torch.int64, device=target.device)
        return LabelMix(none, none, torch.zeros_like(u[:1]), none + IGNORE_INDEX, target[:1])
    row, row_target = class_rows(label)
    weight = row_weight(row, num_mixed=num_mixed, weight=u[image] * target[image, label], generator=generator)
    return LabelMix(image, row, weight, row_target, mix_rows(target[image], row, weight))


def unmixed_labels(target: Tensor) -> LabelMix:
    """Each image as it is, with its own target."""
    image = torch.arange(len(target), device=target.device)
    return LabelMix(image, image, torch.ones_like(image, dtype=torch.float32), image, target)


def label_mean_loss(criterion: nn.Module | Callable, logits: Tensor, mix: LabelMix) -> Tensor:
    """Loss of the mixes of the labels present; 0, with a graph, where none is.

    Losses that take only 0 and 1 get the union of the mixed images' labels.

    Args:
        criterion: Mean over rows of logits and targets, `[K, num_classes]` each.
        logits: `[P, num_classes]`.
        mix: What the logits are of.
    """
    present = mix.row_target != IGNORE_INDEX
    target = mix.target[present]
    if not len(target):
        return 0.0 * logits.sum()
    if isinstance(criterion, (TwoWayLoss, ZlprLoss)):
        target = (target > 0).to(target.dtype)
    return criterion(logits[present], target)
