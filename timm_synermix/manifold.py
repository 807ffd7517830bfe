"""Manifold MixUp: the inter-class mixing of hidden activations, for any timm model."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from timm_synermix.features import FeatureHook, pool_feature

_logger = logging.getLogger(__name__)

INPUT = 'input'  # the name of the layer before the first: the images themselves


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

    Draws from numpy's global generator, as timm's Mixup does: seed that differently on each rank.

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
    ) -> None:
        if not 0 < alpha < float('inf'):
            raise ValueError(f'alpha must be positive and finite, got {alpha}.')
        if not 0 <= prob <= 1:
            raise ValueError(f'prob must be in [0, 1], got {prob}.')
        self.num_classes, self.alpha, self.prob, self.label_smoothing = num_classes, alpha, prob, label_smoothing
        self.mixup_enabled = True  # as timm's Mixup: set to False to go on without mixing
        probe = LayerProbe(model, input_size, classifier)
        self.layers = default_layers(probe) if layers is None else _resolve(probe, layers)
        checkpointed = any(getattr(module, 'grad_checkpointing', False) for module in model.modules())
        if checkpointed and self.layers != [INPUT]:
            raise ValueError(
                f'layers must be {INPUT!r} alone with gradient checkpointing, which computes hidden layers a second '
                f'time without mixing, got {", ".join(self.layers)}.'
            )
        self._layer = INPUT
        self._lam: dict[str, Tensor] = {}  # of each layer, 1 for all but the drawn one
        self._rows: tuple[int, int] | None = None  # batch size and first row to mix, inside of `mixing`
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
        if self.mixup_enabled and np.random.rand() < self.prob:
            self._layer = self.layers[np.random.randint(len(self.layers))]
            lam = np.random.beta(self.alpha, self.alpha)
        # On the device: no wait, and no new graph for each value.
        self._lam = {
            name: torch.full((), lam if name == self._layer else 1.0, device=x.device) for name in (INPUT, *self.layers)
        }
        if self._layer == INPUT:
            x = mix_with_flip(x, self._lam[INPUT], len(x))
        return x, mixup_target(target, self.num_classes, lam, self.label_smoothing)

    @contextmanager
    def mixing(self, batch_size: int, first_row: int = 0) -> Iterator[None]:
        """One forward of the model on a batch, in which the drawn layer mixes the images from first_row on."""
        self._rows, self._mixed = (batch_size, first_row), False
        try:
            yield
        finally:
            self._rows = None
        if not torch.compiler.is_compiling() and not (self._mixed or self._layer == INPUT):
            raise RuntimeError(f'Manifold MixUp: the layer {self._layer} took no part in the forward of the model.')

    def _visit(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._rows is None:
            return None
        # A compiled model mixes at every layer, lam = 1 where none was drawn, so that one graph serves for all.
        if not torch.compiler.is_compiling() and name != self._layer:
            return None
        self._mixed = True
        return mix_with_flip(output, self._lam[name], *self._rows)

    def remove(self) -> None:
        """Take the hooks off the model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def mix_with_flip(output: Any, lam: Tensor, batch_size: int, first_row: int = 0) -> Any:
    """`lam h_i + (1 - lam) h_j`, where j is i in the reverse order of the rows from first_row on.

    Args:
        output: What a layer returned: a tensor, or a list or tuple, in which other things stay as they are. The first
            dimension of a tensor is the batch, or a multiple of it: then the parts of one image stand together.
        lam: Scalar.
        batch_size, first_row: Images in the batch, and the first one to mix.

    Raises:
        ValueError: A tensor is not ordered by image.
    """
    if isinstance(output, (list, tuple)):
        parts = [mix_with_flip(part, lam, batch_size, first_row) for part in output]
        return type(output)(*parts) if hasattr(output, '_fields') else type(output)(parts)
    if not isinstance(output, Tensor):
        return output
    if output.ndim == 0 or len(output) % batch_size:
        raise ValueError(f'a layer must return tensors of {batch_size} images, got one of shape {list(output.shape)}.')
    images = output if len(output) == batch_size else output.unflatten(0, (batch_size, -1))
    mixed = images[first_row:]
    mixed = (lam * mixed + (1 - lam) * mixed.flip(0)).to(output.dtype)
    if first_row:
        mixed = torch.cat([images[:first_row], mixed])
    return mixed if len(output) == batch_size else mixed.flatten(0, 1)


def default_layers(probe: LayerProbe) -> list[str]:
    """The input, and the layers at a quarter and at half of the model's depth, counted in its `feature_info`.

    For a ResNet these are the input, layer1 and layer2, the choice of SynerMix's code; for a Swin Transformer the input
    and the first two stages. Where that entry cannot be mixed the one before it is taken, then one of the model's
    blocks that `feature_info` does not list; the input alone is left, with a warning, if there is none.
    """
    found = [INPUT]
    for names in (probe.listed, probe.blocks):
        for part in (4, 2):
            depth = -(-len(names) // part)
            exact = (name for name in reversed(names[:depth]) if name not in found and probe.can_mix(name))
            found.extend(list(islice(exact, 1)))
        if len(found) > 1:
            return found
    _logger.warning('Manifold MixUp mixes the input alone: no hidden layer of this model can be mixed.')
    return found


def _resolve(probe: LayerProbe, layers: Sequence[str | int]) -> list[str]:
    """Names of the layers asked for, each once, each of which can be mixed."""
    if isinstance(layers, str) or not layers:
        raise ValueError(f'layers must be a list of at least one layer, got {layers!r}.')
    names = []
    for layer in layers:
        number = int(layer) if str(layer).isdecimal() and layer not in probe.calls else None
        if number is not None and number > len(probe.listed):
            raise ValueError(f'layers must be indices from 0 to {len(probe.listed)} for this model, got {number}.')
        name = str(layer) if number is None else [INPUT, *probe.listed][number]
        if name != INPUT and name not in probe.calls:
            there = dict.fromkeys([INPUT, *probe.listed, *probe.blocks])
            raise ValueError(f"layers: this model has no layer '{name}'; it has {', '.join(there)}, among others.")
        if name != INPUT and not probe.can_mix(name):
            raise ValueError(
                f"layers: '{name}' cannot be mixed, because what it returns is not all that the classifier learns of "
                f'an image, or is not ordered by image. Some that can: {", ".join(default_layers(probe))}.'
            )
        names.append(name)
    return list(dict.fromkeys(names))


class LayerProbe:
    """Finds the layers of a model that can be mixed, by small forwards in eval mode; the model stays as it is.

    Attributes:
        calls: How often a forward calls each module, by name, in the order in which they return.
        listed: The layers that the model's `feature_info` names, as far as they exist.
        blocks: The model's own top-level layers and blocks, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        classifier: str | Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.classifier = classifier
        weight = next(model.parameters())
        images = torch.randn(4, *input_size, generator=torch.Generator().manual_seed(0))
        self.images = images.to(weight.device, weight.dtype)
        self.calls: dict[str, int] = dict.fromkeys(dict(model.named_modules()), 0)
        order: list[str] = []
        handles = [
            module.register_forward_hook(lambda *_, name=name: order.append(name))
            for name, module in model.named_modules()
        ]
        try:
            self._run(self.images)
        finally:
            for handle in handles:
                handle.remove()
        self.calls.update(Counter(order))
        infos = getattr(model, 'feature_info', None) or []
        listed = [self._called(info['module']) for info in infos if info.get('module') in self.calls]
        self.listed = list(dict.fromkeys(filter(None, listed)))
        blocks = set(_blocks(model))
        self.blocks = [name for name in order if name in blocks]

    def _called(self, name: str) -> str | None:
        """The layer itself; the last one inside it, if a forward passes it by as it does a ModuleList."""
        while not self.calls[name]:
            children = [child for child, _ in self.model.get_submodule(name).named_children()]
            if not children:
                return None
            name = f'{name}.{children[-1]}'
        return name

    def _run(self, images: Tensor) -> Tensor:
        """The features `[N, D]` that the classifier sees, in eval mode."""
        training = {module: module.training for module in self.model.modules()}
        hook = FeatureHook(self.model, self.classifier)
        try:
            self.model.eval()
            with torch.no_grad():
                return pool_feature(hook(images)[1]).float()
        finally:
            hook.remove()
            for module, mode in training.items():
                module.training = mode

    def can_mix(self, name: str) -> bool:
        """Whether all that the classifier learns of an image passes through this layer once, ordered by image."""
        # Two numbers of images tell what is as long as the batch from what happens to be.
        return self.calls[name] == 1 and all(self._reverses(name, self.images[:size]) for size in (3, 4))

    def _reverses(self, name: str, images: Tensor) -> bool:
        """Whether the layer's output in reverse order gives the features in reverse order, whatever goes in."""
        outputs: list[Any] = []

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(copy.deepcopy(output))  # the next layer may work in place

        def reverse(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return mix_with_flip(outputs[0], torch.zeros((), device=images.device), len(images))

        try:
            expected = self._run_with(name, record, images).flip(0)
            feature = self._run_with(name, reverse, torch.full_like(images, torch.nan))
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return False  # the rest of the model does not take NaN, or the rows in another order
        tolerance = 1e-3 * (expected - expected.flip(0)).abs().max()
        return bool(((feature - expected).abs() <= tolerance).all())  # NaN is not

    def _run_with(self, name: str, hook: Callable[..., Any], images: Tensor) -> Tensor:
        handle = self.model.get_submodule(name).register_forward_hook(hook)
        try:
            return self._run(images)
        finally:
            handle.remove()


def _blocks(model: nn.Module, prefix: str = '') -> Iterator[str]:
    """Names of a model's layers, those inside of its lists and sequences instead of these."""
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from _blocks(child, f'{prefix}{name}.')
        else:
            yield prefix + name
