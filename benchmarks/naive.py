"""SynerMix as one would write it down: what this package has to beat.

A Python loop over the classes, two decodes of every file, two full forwards, and one backward pass of the sum.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


def mix(feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One synthesised feature for each class, `[K, D]`, and the classes `[K]`."""
    mixed, classes = [], target.unique()
    for c in classes:
        members = feature[target == c]
        weight = torch.rand(len(members), device=feature.device)
        weight = weight / weight.sum()
        mixed.append((weight[:, None] * members).sum(0))
    return torch.stack(mixed), classes


def loss(model: Any, clean: Tensor, augmented: Tensor, target: Tensor, beta: float) -> Tensor:
    """Both losses, of all activations at once."""
    feature = model.forward_head(model.forward_features(clean), pre_logits=True)
    mixed, classes = mix(feature, target)
    intra = F.cross_entropy(model.get_classifier()(mixed), classes)
    inter = F.cross_entropy(model(augmented), target)
    return beta * intra + (1 - beta) * inter


class PairDataset(Dataset):
    """Clean and augmented view of every image, the file read for each."""

    def __init__(self, dataset: Dataset, clean: Callable, augmented: Callable) -> None:
        self.dataset, self.clean, self.augmented = dataset, clean, augmented

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, target = self.dataset[index]
        again, _ = self.dataset[index]
        return self.clean(image), self.augmented(again), target
