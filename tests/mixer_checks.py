"""What any mixer of images must hold to be a mixup_fn of `SynerMixTask`; docs/integrate.md says how to hold yours.

Image i is 1 in the channel of its class and 0 elsewhere, so a mixed image says by itself what it is made of: the mean
of its pixels is the target that it must have.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from timm_synermix.task.mixup import Mixer


def images_of(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images `[N, num_classes, 8, 8]` that are 1 in the channel of their class."""
    channels = torch.nn.functional.one_hot(target, num_classes).to(dtype)
    return channels[:, :, None, None].expand(-1, -1, 8, 8).clone()


def check_mixer(
    create: Callable[..., Mixer], num_classes: int = 5, writes_input: bool = False, prob: bool = True, odd: bool = False
) -> None:
    """Assert that targets are what the pixels are, for whatever batch, and that nothing else changes.

    Args:
        create: Makes the mixer; takes num_classes, label_smoothing and, with prob, prob.
        num_classes: Number of classes.
        writes_input: It may mix in place, as timm's does.
        prob: It can leave batches unmixed.
        odd: It takes batches of odd size; else it must refuse them with a message.
    """
    generator = torch.Generator().manual_seed(0)
    for size in (2, 6, 12):
        for smoothing in (0.0, 0.1):
            _check_targets(create, torch.randint(num_classes, (size,), generator=generator), num_classes, smoothing)
    _check_input(create, num_classes, writes_input)
    _check_odd(create, num_classes, odd)
    if prob:
        _check_prob(create, num_classes)


def _check_targets(create: Callable[..., Mixer], target: Tensor, num_classes: int, smoothing: float) -> None:
    mixer = create(num_classes=num_classes, label_smoothing=smoothing)
    different = 0
    for order in (torch.arange(len(target)), torch.randperm(len(target))):
        for _ in range(5):
            mixed, soft = mixer(images_of(target[order], num_classes), target[order])
            assert soft.shape == (len(mixed), num_classes)
            torch.testing.assert_close(soft.sum(1), torch.ones_like(soft.sum(1)), rtol=1e-5, atol=1e-5)
            share = mixed.mean((2, 3))
            expected = share * (1 - smoothing) + smoothing / num_classes
            torch.testing.assert_close(soft.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)
            different += bool(((share > 1e-6) & (share < 1 - 1e-6)).any())
    assert different or len(target.unique()) == 1, 'nothing was mixed in ten calls'


def _check_input(create: Callable[..., Mixer], num_classes: int, writes_input: bool) -> None:
    target = torch.arange(num_classes).repeat(2)
    mixer = create(num_classes=num_classes, label_smoothing=0.0)
    for dtype in (torch.float32, torch.float16):
        x = images_of(target, num_classes, dtype)
        before, classes = x.clone(), target.clone()
        mixed, soft = mixer(x, target)
        assert mixed.dtype == dtype
        assert mixed.device == soft.device == x.device
        assert torch.equal(target, classes)
        assert writes_input or torch.equal(x, before), 'the input was changed'


def _check_odd(create: Callable[..., Mixer], num_classes: int, odd: bool) -> None:
    target = torch.arange(num_classes).repeat(2)[:5]
    mixer = create(num_classes=num_classes, label_smoothing=0.0)
    if odd:
        mixed, soft = mixer(images_of(target, num_classes), target)
        torch.testing.assert_close(soft.double(), mixed.mean((2, 3)), rtol=1e-4, atol=1e-5)
        return
    with pytest.raises((ValueError, AssertionError), match='even'):
        mixer(images_of(target, num_classes), target)


def _check_prob(create: Callable[..., Mixer], num_classes: int) -> None:
    """A third is a third: a probability applied twice would leave a ninth."""
    target = torch.arange(num_classes).repeat(2)
    mixer = create(num_classes=num_classes, label_smoothing=0.0, prob=1 / 3)
    np.random.seed(0)
    draws = 300
    mixed = 0
    for _ in range(draws):
        _, soft = mixer(images_of(target, num_classes), target)
        mixed += bool(((soft > 1e-3) & (soft < 1 - 1e-3)).any())
    assert abs(mixed / draws - 1 / 3) < 4 * (2 / 9 / draws) ** 0.5, f'{mixed} of {draws} batches were mixed'
