"""What must hold for every timm model: shared by the tests of a few families and of all."""

from unittest.mock import patch

import timm
import torch
from torch import nn

from timm_synermix import FeatureHook, ManifoldMixup
from timm_synermix.features import find_classifier_leaves


def create(name, batch_size=5):
    """A model in eval mode with 7 classes, and images of a small size that it takes."""
    model = timm.create_model(name, num_classes=7).eval()
    config = model.pretrained_cfg
    size = config['input_size'][-1]
    if not config.get('fixed_input_size'):
        size = config['min_input_size'][-1] if config.get('min_input_size') else min(size, 224)
    x = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))
    for leaf in find_classifier_leaves(model):  # some start at zero, and give all images the same logits
        nn.init.normal_(model.get_submodule(leaf).weight, std=0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:  # without statistics of the images those of some deep networks fade
        for norm in norms:
            norm.train().momentum = 1.0
        with torch.no_grad():
            model(x)
    return model.eval(), x


def check_feature_hook(model, x):
    """Logits are the model's own; permuted features give permuted logits; gradients reach the first layer."""
    with torch.no_grad():
        expected = model(x)
        hook = FeatureHook(model)
        logits, feature = hook(x)
    assert torch.equal(logits, expected)
    features = feature if isinstance(feature, tuple) else (feature,)
    assert len(features) == len(hook.leaf_names)
    assert all(len(f) == len(x) for f in features)

    order = torch.roll(torch.arange(len(x)), 1)
    permuted, _ = hook(x, lambda f: f[order])
    assert_close(permuted.detach(), expected[order])
    torch.nn.functional.cross_entropy(permuted, torch.arange(len(x))).backward()
    first = next(p for p in model.parameters() if p.requires_grad)
    assert first.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    hook.remove()
    return features


def check_manifold_mixup(model, x, layers=None):
    """lam = 0 at any layer gives the logits of the reversed batch, and its targets."""
    mixup_fn = ManifoldMixup(model, 7, tuple(x.shape[1:]), layers=layers)
    target = torch.arange(len(x))
    with torch.no_grad(), always_zero():
        plain = model(x)
        layers = mixup_fn.layers
        for layer in layers:
            mixup_fn.layers = [layer]
            mixed, soft = mixup_fn(x, target)
            with mixup_fn.mixing(len(x)):
                logits = model(mixed)
            assert_close(logits, plain.flip(0))
            assert torch.equal(soft, torch.nn.functional.one_hot(target.flip(0), 7).float())
        assert torch.equal(model(x), plain)  # outside of `mixing` nothing is mixed
    return layers


def always_zero():
    """Manifold MixUp's draws: always mix, always the first layer, lam = 0."""
    return patch.multiple('numpy.random', random=lambda: 0.0, choice=lambda n: 0, beta=lambda a, b: 0.0)


def assert_close(logits, expected):
    """Equal but for the order of additions, and different from logits in another order."""
    spread = (expected - expected.flip(0)).abs().max()
    assert spread > 0
    error = (logits - expected).abs().max()
    assert error <= 1e-4 * spread, f'{error:.2g} of {spread:.2g}'
