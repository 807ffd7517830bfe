"""One recent feature of every class: a partner for a class that has one image in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from timm_synermix.functional import IGNORE_INDEX


class BankMix(NamedTuple):
    """What the bank adds to the rows of a mix: `mixed[r] = (1 - share_r) mixed[r] + share_r feature[r]`.

    Attributes:
        feature: For each classifier of the model, `[N, ...]`, float32.
        share: float32 `[N]`, 0 for the rows of classes that have partners in the batch.
        found: The part of the lone images that found a partner, float32 scalar; 1 if no image is alone.
    """

    feature: tuple[Tensor, ...]
    share: Tensor
    found: Tensor

    def add_to(self, mixed: Tensor, classifier: int) -> Tensor:
        """Add to the mixed features `[N, ...]` that enter one of the model's classifiers; keeps their dtype."""
        share = self.share.view(-1, *[1] * (mixed.ndim - 1))
        with_partner = torch.lerp(mixed.float(), self.feature[classifier], share).to(mixed.dtype)
        return torch.where(share > 0, with_partner, mixed)


class FeatureBank:
    """A recent clean feature of every class, detached, `O(C x D)` memory; empty at first.

    A departure from the paper, which draws a second image: it saves the extra images, at the price of a partner that
    an earlier state of the model computed and that receives no gradient. Each rank keeps its own; a checkpoint holds
    that of the main process, one of `train.py` those of all up to 1 GB.

    Args:
        num_classes: Number of classes C.
        feature_dim: Length D of a feature, if memory is asked for before there are any.

    Attributes:
        memory: Bytes that it takes.
    """

    def __init__(self, num_classes: int, feature_dim: int = 0) -> None:
        self.num_classes = num_classes
        self.memory = 4 * feature_dim * (num_classes + 1)
        self.features: tuple[Tensor, ...] = ()  # [C + 1, ...] each: the last row takes what belongs to no class
        self.filled = torch.zeros(num_classes + 1, dtype=torch.bool)

    def draw(self, row: Tensor, row_target: Tensor, generator: torch.Generator | None = None) -> BankMix | None:
        """Partners for the classes with one image, with shares `v / (u + v)`, `u, v ~ U(0, 1)`; None while empty.

        Args:
            row, row_target: The rows of a batch, `[N]`, see `class_rows`.
            generator: Generator of the random draws, on their device.
        """
        if not self.features:
            return None
        slot = self._slot(row_target)
        size = torch.zeros(len(row), device=row.device).index_add_(0, row, torch.ones(len(row), device=row.device))
        u, v = 1 - torch.rand(2, len(row), device=row.device, generator=generator)
        lone = (size == 1) & (row_target != IGNORE_INDEX)
        served = lone & self.filled[slot]
        num_lone, num_served = lone.sum(), served.sum()
        found = (num_served + (num_lone == 0)) / num_lone.clamp(min=1)
        share = torch.where(served, v / (u + v), 0.0)
        return BankMix(tuple(feature[slot] for feature in self.features), share, found)

    def update(self, features: tuple[Tensor, ...], row: Tensor, row_target: Tensor) -> None:
        """Keep a feature of each class of the batch, that of its last image; `[N, ...]` for each classifier.

        One that is not finite is not kept: gradient scaling skips its update, and the bank must not bring it back.
        """
        if not self.features:
            shapes = [(self.num_classes + 1, *feature.shape[1:]) for feature in features]
            self.features = tuple(torch.zeros(shape, device=row.device) for shape in shapes)
            self.filled = self.filled.to(row.device)
        position = torch.arange(len(row), device=row.device)
        last = torch.zeros_like(row).scatter_reduce_(0, row, position, 'amax')
        picked = [feature.detach().float()[last] for feature in features]
        finite = torch.stack([feature.isfinite().flatten(1).all(1) for feature in picked]).all(0)
        slot = torch.where(finite, self._slot(row_target), self.num_classes)
        for kept, feature in zip(self.features, picked, strict=True):
            kept.index_copy_(0, slot, feature)
            kept[-1] = 0
        self.filled[slot] = True
        self.filled[-1] = False

    def _slot(self, row_target: Tensor) -> Tensor:
        return torch.where(row_target == IGNORE_INDEX, self.num_classes, row_target)

    def state_dict(self) -> dict[str, Tensor]:
        """The bank as tensors, for a checkpoint."""
        return {'filled': self.filled, **{f'feature{i}': feature for i, feature in enumerate(self.features)}}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take over the bank of a checkpoint.

        Raises:
            ValueError: It is of another number of classes.
        """
        if len(state['filled']) != self.num_classes + 1:
            raise ValueError(f'the feature bank must be of {self.num_classes} classes, got {len(state["filled"]) - 1}.')
        self.filled = state['filled'].to(device)
        self.features = tuple(state[f'feature{i}'].to(device) for i in range(len(state) - 1))
