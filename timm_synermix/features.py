"""The feature hook: read the features that enter a model's classifier, or classify others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class FeatureHook:
    """Read, and optionally replace, the features that enter the classifier of any timm model.

    Every classifier layer of the model (its Linear or Conv2d leaves: two for a distilled DeiT, one for most) gets a
    forward-pre-hook. Calling the hook runs one ordinary forward of the model:

        hook = FeatureHook(model)
        logits, feature = hook(input)                           # logits are model(input), bit for bit
        logits, mixed = hook(input, lambda f: mix(f))           # logits of the features mix(f)

    Replacing the input of the leaves, rather than calling `classifier(feature)`, needs no knowledge of the model: it is
    exact for heads that average two classifiers, norm after the pooling or classify tokens. A forward that does not go
    through the hook, such as `model(input)` in evaluation, is untouched and keeps nothing alive. The model's
    parameters, buffers and state_dict keys are those it had; `remove()` takes the hooks away.

    A layer that wraps a Linear, as LoRA's do, is one layer if it has in_features and out_features.

    Args:
        model: A timm model, or any module if classifier is given.
        classifier: Name, or names, of the classifier layers as in `model.named_modules()`; for a container its last
            Linear or Conv2d. None takes timm's own metadata.

    Raises:
        ValueError: The model has no classifier, or no module of the given name (the message lists those there are).
        RuntimeError: From a call: the hooked layers are not those that made the logits.
    """

    def __init__(self, model: nn.Module, classifier: str | Sequence[str] | None = None) -> None:
        self.model = model
        self.leaf_names = find_classifier_leaves(model, classifier)
        self._active = False
        self._transform: Callable[[Tensor], Tensor] | None = None
        self._features: list[Tensor] = []
        self._leaves = [model.get_submodule(name) for name in self.leaf_names]
        self._handles = [leaf.register_forward_pre_hook(self._visit) for leaf in self._leaves]
        # What the model calls its classifier may be more than its last layer: the first call looks
        self._unchecked = [name for name in _containers(model, self.leaf_names) if classifier is None]

    @property
    def feature_dim(self) -> int:
        """Length D of a feature of an image, those of several classifiers joined, see `pool_feature`."""
        leaves: list[Any] = self._leaves
        return sum(int(getattr(leaf, 'in_features', None) or leaf.in_channels) for leaf in leaves)

    def _visit(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._active:
            return None
        feature = args[0] if self._transform is None else self._transform(args[0])
        self._features.append(feature)
        return (feature, *args[1:])

    def __call__(
        self,
        input: Tensor,
        transform: Callable[[Tensor], Tensor] | None = None,
        model: Callable[[Tensor], Any] | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """Run the model once and return its logits and the features its classifier saw.

        Args:
            input: Whatever the model takes, images `[N, C, H, W]`.
            transform: Applied to the features before the classifier, once per classifier leaf. It must treat them
                alike: the logits have the rows that it returns.
            model: What to call instead of the model: a compiled or wrapped form of it. The hook must be older than the
                compiled form, which does not see later ones.

        Returns:
            logits: `[N, num_classes]`; the rows are those of transform.
            feature: `[N, D]` for most models, `[N, D, 1, 1]` for a Conv2d classifier; a tuple, one per leaf, for a
                model with several.

        Raises:
            RuntimeError: The classifier was replaced since the hook was made, is not what runs, or is more than the
                layer with the hook.
        """
        eager = not torch.compiler.is_compiling()
        if eager and not all(map(self._is_in_place, self.leaf_names, self._leaves)):
            raise RuntimeError(self._unseen('was replaced, by reset_classifier or a wrapper'))
        looks = eager and bool(self._unchecked) and model in (None, self.model)
        self._active, self._transform, self._features = True, transform, []
        try:
            with self._watching() if looks else nullcontext():
                logits = (self.model if model is None else model)(input)
            features = self._features
        finally:
            self._active, self._transform, self._features = False, None, []
        if len(features) < len(self._leaves):
            raise RuntimeError(self._unseen('was not seen'))
        return logits, features[0] if len(features) == 1 else tuple(features)

    def _is_in_place(self, name: str, leaf: nn.Module) -> bool:
        try:
            return self.model.get_submodule(name) is leaf
        except AttributeError:
            return False

    def _unseen(self, what: str) -> str:
        return (
            f'The classifier of {type(self.model).__name__}, {", ".join(self.leaf_names)}, {what}: '
            'make the FeatureHook (or the task that holds it) after changes to the model '
            'such as reset_classifier, LoRA or quantisation, and before torch.compile.'
        )

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Compare what a container returns with what its last layer does."""
        outputs: dict[str, Any] = {}

        def note(name: str) -> Any:
            return self.model.get_submodule(name).register_forward_hook(lambda *args: outputs.update({name: args[2]}))

        handles = [note(name) for name in (*self._unchecked, *self.leaf_names)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for container in self._unchecked:
            leaf = next(name for name in self.leaf_names if name.startswith(f'{container}.'))
            if container in outputs and leaf in outputs and not _same(outputs[container], outputs[leaf]):
                raise RuntimeError(
                    f'The classifier {container} of {type(self.model).__name__} is more than its last layer {leaf}, so '
                    'the features before it are not those of the images. A layer that wraps a Linear must have '
                    'in_features and out_features; or name the layer that makes the logits with classifier=.'
                )
        self._unchecked = []

    def remove(self) -> None:
        """Take the hooks off the model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def pool_feature(feature: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The features of a `FeatureHook` as one vector per image, `[N, D]`.

    Positions of a feature map `[N, D, H, W]` or tokens `[N, T, D]` are averaged, several classifiers' features joined.
    """
    if isinstance(feature, tuple):
        return torch.cat([pool_feature(part) for part in feature], dim=1)
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature


def find_classifier_leaves(model: nn.Module, classifier: str | Sequence[str] | None = None) -> list[str]:
    """Names of the Linear or Conv2d layers that turn features into logits, one per classifier of the model.

    timm's metadata (`pretrained_cfg['classifier']`) names them; a classifier that only `get_classifier()` knows, such
    as the second head of LeViT, contributes its last layer. See `FeatureHook` for arguments and errors.
    """
    modules = dict(model.named_modules())
    if classifier is not None:
        names = [classifier] if isinstance(classifier, str) else list(classifier)
        for name in names:
            if name not in modules or _last_leaf(modules[name]) is None:
                raise ValueError(
                    f"classifier must name a Linear or Conv2d layer of {type(model).__name__}, got '{name}'. "
                    f'There are: {", ".join(name for name in modules if _is_leaf(modules[name]))}.'
                )
        leaves = [_last_leaf(modules[name]) for name in names]
    else:
        config = getattr(model, 'pretrained_cfg', None) or {}
        listed = config.get('classifier') or ()
        names = [listed] if isinstance(listed, str) else list(listed)
        leaves = [modules[name] for name in names if name in modules and _is_leaf(modules[name])]
        for head in _classifiers(model):
            if not any(module in leaves for module in head.modules()):
                leaves.append(_last_leaf(head))
    found = [leaf for leaf in leaves if leaf is not None]
    if not found:
        raise ValueError(_no_classifier(model))
    name_of = {id(module): name for name, module in modules.items()}
    return [name_of[id(leaf)] for leaf in found]


def _no_classifier(model: Any) -> str:
    name = (getattr(model, 'default_cfg', None) or {}).get('architecture', type(model).__name__)
    layers = [name for name, module in model.named_modules() if _is_leaf(module)]
    if hasattr(model, 'get_classifier') or hasattr(model, 'default_cfg') or not layers:
        return (
            f'{name} has no classifier, so there are no features to mix: '
            'it needs a Linear or Conv2d layer that returns the logits (num_classes > 0, not an encoder-only model).'
        )
    return (
        f"{name} does not say which layer is its classifier, as timm's models do: name it with classifier=, "
        f'one of {"..., " if len(layers) > 5 else ""}{", ".join(layers[-5:])}.'
    )


def _is_leaf(module: nn.Module) -> bool:
    """A layer from features to logits; a wrapper of one, such as LoRA's, counts as one."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or (
        hasattr(module, 'in_features') and hasattr(module, 'out_features')
    )


def _last_leaf(module: nn.Module) -> nn.Module | None:
    if _is_leaf(module):
        return module
    leaves = [leaf for child in module.children() if (leaf := _last_leaf(child)) is not None]
    return leaves[-1] if leaves else None


def _containers(model: nn.Module, leaf_names: Sequence[str]) -> list[str]:
    """The classifiers that the model names which are more than a layer, of which one is hooked."""
    heads = [head for head in _classifiers(model) if not _is_leaf(head)]
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return [name for name in names if name and sum(leaf.startswith(f'{name}.') for leaf in leaf_names) == 1]


def _same(one: Any, other: Any) -> bool:
    return one is other or (torch.is_tensor(one) and torch.is_tensor(other) and torch.equal(one, other))


def _classifiers(model: Any) -> list[nn.Module]:
    """The classifier modules timm reports: one, a tuple of them, or a ModuleList."""
    heads = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList):
        heads = (heads,)
    return [head for head in heads or () if isinstance(head, nn.Module)]
