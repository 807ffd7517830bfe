"""Which layers of a model can be mixed."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from timm_synermix.features import FeatureHook, pool_feature
from timm_synermix.task.mixup import INPUT, mix_with_flip

_logger = logging.getLogger(__name__)


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


def named_layers(probe: LayerProbe, layers: Sequence[str | int]) -> list[str]:
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
