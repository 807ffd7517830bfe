#!/usr/bin/env python3
"""measured_train.py, but the loss is one of normalised features: a neighbour of SynerMix that has a single forward.

    python benchmarks/normalized_losses.py LOSS MEMORY.json FLAGS OF TRAIN.PY

Logits are z_ic = cos(f_i, w_c) / 0.1, of the feature f_i of an image and the row w_c of the classifier, without its
bias, in evaluation too. LOSS is `cosine`, the cross-entropy over the classes, or `ntce` (arXiv 2605.20302), that over
the images of the batch: the class must find its image among them. For mixed images both are the mean over their two
targets, which the paper leaves open. A mixup must be on, as both take soft targets.
"""

import sys
from functools import partial
from typing import Any

import measured_train
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import Tensor, nn

import timm_synermix.engine.task
import timm_synermix.train

TEMPERATURE = 0.1
AXES = {'cosine': 1, 'ntce': 0}


class CosineLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float()), F.normalize(self.weight.float())) / TEMPERATURE


def cross_entropy(logits: Tensor, target: Tensor, axis: int) -> Tensor:
    """- mean_i sum_c t_ic log softmax(z)_ic, the softmax along an axis of the [images, classes]."""
    return -(target * F.log_softmax(logits, axis)).sum(1).mean()


def create_model(*args: Any, **kwargs: Any) -> nn.Module:
    model = timm.create_model(*args, **kwargs)
    model.get_classifier().__class__ = CosineLinear  # the same weights, drawn in the same order
    return model


def main() -> None:
    loss = partial(cross_entropy, axis=AXES[sys.argv.pop(1)])

    def create_task(model: nn.Module, criterion_kwargs: dict[str, Any], **kwargs: Any) -> ClassificationTask:
        return ClassificationTask(model, loss, **kwargs)

    timm_synermix.train.create_model = create_model
    timm_synermix.engine.task.ClassificationTask = create_task
    measured_train.main()


if __name__ == '__main__':
    main()
