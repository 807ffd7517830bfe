"""The feature hook: read the features that enter a model's classifier, or classify others in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Args:
        model: A timm model, or any module if classifier is given.
        classifier: Name, or names, of the classifier layers as in `model.named_modules()`; for a container its last
            Linear or Conv2d. None takes timm's own metadata.

    Raises:
        ValueError: The model has no classifier, or no module of the given name (the message lists those there are).
    """

    def __init__(self, model: nn.Module, classifier: str | Sequence[str] | None = None) -> None:
        self.model = model
        self.leaf_names = find_classifier_leaves(model, classifier)
        self._active = False
        self._transform: Callable[[Tensor], Tensor] | None = None
        self._features: list[Tensor] = []
        self._handles = [model.get_submodule(name).register_forward_pre_hook(self._visit) for name in self.leaf_names]

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
        """
        self._active, self._transform, self._features = True, transform, []
        try:
            logits = (self.model if model is None else model)(input)
            features = self._features
        finally:
            self._active, self._transform, self._features = False, None, []
        return logits, features[0] if len(features) == 1 else tuple(features)

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
        raise ValueError(
            f'{getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)} has no classifier, '
            'so there are no features to mix: it needs a Linear or Conv2d layer that returns the logits '
            '(num_classes > 0, not an encoder-only model).'
        )
    name_of = {id(module): name for name, module in modules.items()}
    return [name_of[id(leaf)] for leaf in found]


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _last_leaf(module: nn.Module) -> nn.Module | None:
    leaves = [leaf for leaf in module.modules() if _is_leaf(leaf)]
    return leaves[-1] if leaves else None


def _classifiers(model: Any) -> list[nn.Module]:
    """The classifier modules timm reports: one, a tuple of them, or a ModuleList."""
    heads = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList):
        heads = (heads,)
    return [head for head in heads or () if isinstance(head, nn.Module)]
