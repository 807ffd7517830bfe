"""The trainable compute of a SynerMix step, in one module."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from timm_synermix.features import FeatureHook
from timm_synermix.functional import mix_rows
from timm_synermix.task.feature_bank import BankMix
from timm_synermix.task.gather import gather_rows, own_share
from timm_synermix.task.main_norm import main_norm_alone
from timm_synermix.task.mixup import Mixer


class SynerMixModule(nn.Module):
    """All the trainable compute of a SynerMix step in one forward, as DDP, compile and EMA want it.

    Args:
        model: The model to train.
        trainable: What runs on the augmented images: the model, or a module around it with more to train, such as
            timm's `FeatureDistillationTrainableModule`. None for the model.
        classifier: See `FeatureHook`.
        gather_rows: Mix the features of all ranks, each rank's padded to this number of rows; 0 for its own alone.
        mixup_fn: Mixes in the forward of the model if it has a method `mixing`, see `ManifoldMixup`.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: nn.Module | None = None,
        classifier: str | Sequence[str] | None = None,
        gather_rows: int = 0,
        mixup_fn: Mixer | None = None,
    ) -> None:
        super().__init__()
        self.trainable = model if trainable is None else trainable
        # Registered once: an average over a state_dict that has the model twice would move it twice.
        self._model_name = next(name for name, module in self.trainable.named_modules() if module is model)
        self.gather_rows = gather_rows
        self.mixup_fn = mixup_fn
        self.hook = FeatureHook(model, classifier)

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return self.trainable.get_submodule(self._model_name)

    def forward(
        self,
        clean: Tensor | None,
        augmented: Tensor | None,
        row: Tensor,
        weight: Tensor,
        bank: BankMix | None = None,
        image: Tensor | None = None,
    ) -> tuple[Tensor | None, Any, tuple[Tensor, ...]]:
        """Logits of the synthesised features of the clean images, and what trainable makes of the augmented images.

        Args:
            clean: `[N, C, H, W]`, or None to skip its forward.
            augmented: `[N', C, H, W]`, or None to skip its forward.
            row, weight: The mix of the clean features, see `mix_rows`: `[N]`, or of all ranks' `gather_rows`.
            bank: Partners from a `FeatureBank`.
            image: The image that each row and weight is of, see `LabelMix`; None for one each.

        Returns:
            Intra-class logits, rows as in `class_rows` (of gathered ones the `own_share`), those of several classifiers
            averaged as in evaluation; the output of trainable, of a model its logits `[N', num_classes]`; None for what
            was skipped. And the clean features before the mix, detached, for each classifier of the model.
        """
        features: list[Tensor] = []

        def mix(feature: Tensor) -> Tensor:
            features.append(feature.detach())
            if image is not None:
                feature = feature[image]
            if self.gather_rows:
                feature = gather_rows(feature, self.gather_rows)
            mixed = mix_rows(feature, row, weight)
            if self.gather_rows:
                mixed = own_share(mixed)
            return mixed if bank is None else bank.add_to(mixed, len(features) - 1)

        intra_logits: Any = None
        output = None
        if clean is not None:
            with main_norm_alone(self.model):
                intra_logits, _ = self.hook(clean, mix)
            if isinstance(intra_logits, tuple):  # a distilled model in training hands out both heads
                intra_logits = torch.stack(intra_logits).mean(0)
        if augmented is not None:
            mixing = getattr(self.mixup_fn, 'mixing', None)
            with nullcontext() if mixing is None else mixing(len(augmented)):
                output = self.trainable(augmented)
        return intra_logits, output, tuple(features)


class _Output(nn.Module):
    """Stands in a task for what it trains, and hands out what that has made of the batch already."""

    value: Any = None

    def forward(self, input: Tensor) -> Any:
        return self.value


def take_trainable(task: Any) -> nn.Module:
    """What a task trains; the task is left with a stand-in."""
    trainable, task.trainable_module = task.get_trainable_module(), _Output()
    return trainable
