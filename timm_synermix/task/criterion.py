"""Criteria of the intra-class loss: class indices, padding, and a recipe's own soft targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.data.mixup import one_hot
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy
from torch import Tensor, nn

from timm_synermix.functional import IGNORE_INDEX
from timm_synermix.task.mixup import Mixer


def intra_class_criterion(
    criterion: nn.Module | Callable, mixup_fn: Mixer | None, multi_label: bool = False
) -> nn.Module | Callable:
    """A recipe's own criterion as the loss of logits `[K, num_classes]` and class indices `[K]`.

    Args:
        criterion: Takes class indices without mixup_fn, soft targets with it.
        mixup_fn: Its label_smoothing, if it has one, is that of the soft targets.
        multi_label: The targets are of several labels, `[K, num_classes]`.
    """
    if mixup_fn is None:
        return skipping_padding(criterion)
    on_soft_target = _on_soft_labels if multi_label else _on_soft_target
    return partial(on_soft_target, criterion, getattr(mixup_fn, 'label_smoothing', 0.0))


def skipping_padding(criterion: nn.Module | Callable) -> nn.Module | Callable:
    """A criterion of class indices, or torch's for timm's cross-entropy: the same loss, but it can skip padding.

    Of JSD's, which compares splits of an image, that is the cross-entropy in it.
    """
    if isinstance(criterion, JsdCrossEntropy):
        criterion = criterion.cross_entropy_loss
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return nn.CrossEntropyLoss(label_smoothing=criterion.smoothing)
    return criterion


def _on_soft_target(criterion: Callable, label_smoothing: float, logits: Tensor, target: Tensor) -> Tensor:
    off_value = label_smoothing / logits.shape[1]
    return criterion(logits, one_hot(target, logits.shape[1], 1.0 - label_smoothing + off_value, off_value))


def _on_soft_labels(criterion: Callable, label_smoothing: float, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits, target * (1.0 - label_smoothing) + 0.5 * label_smoothing)


def class_mean_loss(criterion: nn.Module | Callable, logits: Tensor, row_target: Tensor) -> Tensor:
    """Mean of a criterion over the rows that hold a class.

    Cross-entropy skips the padding by itself. Another criterion gets the rows of the classes present alone, which takes
    one wait for the device to learn how many there are.

    Args:
        criterion: Mean over rows of logits `[K, num_classes]` and class indices `[K]`.
        logits: `[N, num_classes]`.
        row_target: int64 `[N]`, `IGNORE_INDEX` for padding.
    """
    if isinstance(criterion, nn.CrossEntropyLoss):
        return criterion(logits, row_target)
    present = row_target != IGNORE_INDEX
    return criterion(logits[present], row_target[present])
