"""Manifold MixUp: the inter-class mixing of hidden activations, for any timm model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from timm_synermix.task.layer_probe import LayerProbe, default_layers, named_layers
from timm_synermix.task.mixup import INPUT, mix_with_flip
from timm_synermix.utils.checks import FRACTION, Range


class ManifoldMixup:
    """Mix the images of a batch, or their activations after a hidden layer, with those of the flipped batch.

    For each batch one of the layers is chosen uniformly, and `lam ~ Beta(alpha, alpha)`. After that layer
    `h_i <- lam h_i + (1 - lam) h_{N-1-i}`, and the targets are mixed alike. It is a mixup_fn of `SynerMixTask`, with or
    without SynerMix:

        mixup_fn = ManifoldMixup(model, num_classes=100, input_size=(3, 224, 224), alpha=1.0)
        task = SynerMixTask(model, mixup_fn=mixup_fn)

    A hidden layer can be mixed if everything that the classifier learns of an image passes through it, batch first.
    That is checked here, once, with a few small forwards in eval mode: NaN images go in, and the layer's output, put
    back in reverse order, must give the reversed features. Layers inside a residual branch fail, and are refused.

    Args:
        model: A timm model, as `FeatureHook` takes; mixing adds idle forward hooks to the layers.
        num_classes: Number of classes.
        input_size: `(C, H, W)` of the images.
        alpha: Parameter of the Beta distribution, positive.
        layers: What to mix: 'input', names as in `model.named_modules()`, or indices: 0 is the input, i > 0 the i-th
            entry of the model's `feature_info`. None: see `default_layers`.
        prob: Share of the batches that are mixed, in [0, 1].
        label_smoothing: As in `timm.data.Mixup`.
        classifier: See `FeatureHook`.
        generator: Generator of the random draws: whether, where and how much to mix. None uses numpy's global one, as
            timm's Mixup does: seed that differently on each rank.

    Raises:
        ValueError: alpha or prob is out of range, the model has no classifier, a layer does not exist or cannot be
            mixed, or a hidden layer is asked for with gradient checkpointing, which computes it a second time, outside
            the forward.

    Source: Manifold MixUp (Verma et al., arXiv 1806.05236); layers as in SynerMix's code for ResNets. For Swin
    and MobileNetV3 that has others, and mixes the images in half of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        input_size: tuple[int, int, int],
        *,
        alpha: float = 1.0,
        layers: Sequence[str | int] | None = None,
        prob: float = 1.0,
        label_smoothing: float = 0.0,
        classifier: str | Sequence[str] | None = None,
        generator: np.random.Generator | None = None,
    ) -> None:
        Range(0, above=True).check('alpha', alpha)
        FRACTION.check('prob', prob)
        self.num_classes, self.alpha, self.prob, self.label_smoothing = num_classes, alpha, prob, label_smoothing
        self.generator = generator
        self.mixup_enabled = True  # as timm's Mixup: set to False to go on without mixing
        probe = LayerProbe(model, input_size, classifier)
        self.layers = default_layers(probe) if layers is None else named_layers(probe, layers)
        checkpointed = any(getattr(module, 'grad_checkpointing', False) for module in model.modules())
        if checkpointed and self.layers != [INPUT]:
            raise ValueError(
                f'layers must be {INPUT!r} alone with gradient checkpointing, which computes hidden layers a second '
                f'time without mixing, got {", ".join(self.layers)}.'
            )
        self._layer = INPUT
        self._lam: dict[str, Tensor] = {}  # of each layer, 1 for all but the drawn one
        self._batch_size: int | None = None  # inside of `mixing`
        self._mixed = False
        self._handles = [
            model.get_submodule(name).register_forward_hook(partial(self._visit, name))
            for name in self.layers
            if name != INPUT
        ]

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a layer and lam for this batch.

        Args:
            x: Images `[N, C, H, W]`.
            target: Class indices, int64 `[N]`.

        Returns:
            The images, mixed if the layer is the input, and the mixed targets, float `[N, num_classes]`. A hidden layer
            is mixed by the forward of the model inside of `mixing`.
        """
        self._layer, lam = INPUT, 1.0
        random: Any = np.random if self.generator is None else self.generator
        if self.mixup_enabled and random.random() < self.prob:
            self._layer = self.layers[random.choice(len(self.layers))]
            lam = random.beta(self.alpha, self.alpha)
        # On the device: no wait, and no new graph for each value.
        self._lam = {
            name: torch.full((), lam if name == self._layer else 1.0, device=x.device) for name in (INPUT, *self.layers)
        }
        if self._layer == INPUT:
            x = mix_with_flip(x, self._lam[INPUT], len(x))
        return x, mixup_target(target, self.num_classes, lam, self.label_smoothing)

    @contextmanager
    def mixing(self, batch_size: int) -> Iterator[None]:
        """One forward of the model on a batch, in which the drawn layer mixes the images."""
        self._batch_size, self._mixed = batch_size, False
        try:
            yield
        finally:
            self._batch_size = None
        if not torch.compiler.is_compiling() and not (self._mixed or self._layer == INPUT):
            raise RuntimeError(f'Manifold MixUp: the layer {self._layer} took no part in the forward of the model.')

    def _visit(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._batch_size is None:
            return None
        # A compiled model mixes at every layer, lam = 1 where none was drawn, so that one graph serves for all.
        if not torch.compiler.is_compiling() and name != self._layer:
            return None
        self._mixed = True
        return mix_with_flip(output, self._lam[name], self._batch_size)

    def remove(self) -> None:
        """Take the hooks off the model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
