"""Every mixer holds what any must, and the checks find one that does not."""

import pytest
import torch
from mixer_checks import check_mixer
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import nn

from timm_synermix import ManifoldMixup, create_mixup
from timm_synermix.task.mixup import RegMixup


class Pooled(nn.Module):
    """A model of images with any number of channels."""

    def __init__(self, num_classes):
        super().__init__()
        self.classifier = nn.Linear(num_classes, num_classes)

    def forward(self, x):
        return self.classifier(x.mean((2, 3)))


def manifold(num_classes, **kwargs):
    model = Pooled(num_classes)
    return ManifoldMixup(model, num_classes, (num_classes, 8, 8), layers=['input'], classifier='classifier', **kwargs)


MIXUP = dict(mixup_alpha=1.0)
CUTMIX = dict(mixup_alpha=0.0, cutmix_alpha=1.0)


@pytest.mark.parametrize('kind', [MIXUP, CUTMIX, {**MIXUP, 'cutmix_alpha': 1.0}], ids=['mixup', 'cutmix', 'switch'])
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem', 'half'])
def test_timms_mixup(mode, kind):
    # in the other modes a probability is of images, not of batches
    check_mixer(lambda **kwargs: create_mixup(mode, **kind, **kwargs), writes_input=True, prob=mode == 'batch')


@pytest.mark.parametrize('kind', [MIXUP, CUTMIX], ids=['mixup', 'cutmix'])
def test_regmixup(kind):
    check_mixer(lambda **kwargs: RegMixup(Mixup(**kind, **kwargs)))


def test_manifold_mixup_of_the_input():
    check_mixer(manifold, odd=True)


def halved(x, target, mixup):
    mixed, soft = mixup(x, target)
    return mixed, soft / 2


def other_lam(x, target, mixup):
    return mixup(x, target)[0], mixup_target(target, mixup.num_classes, 0.5, mixup.label_smoothing)


def in_place(x, target, mixup):
    mixed, soft = mixup(x.clone(), target)
    return x.copy_(mixed), soft


def in_float32(x, target, mixup):
    mixed, soft = mixup(x.clone(), target)
    return (mixed if x.dtype == torch.float64 else mixed.float()), soft


def twice(x, target, mixup):
    return (
        mixup(x.clone(), target) if torch.rand(()) < mixup.mix_prob else (x, nn.functional.one_hot(target, 5).float())
    )


def never(x, target, mixup):
    return x, mixup_target(target, mixup.num_classes, 1.0, mixup.label_smoothing)


@pytest.mark.parametrize('broken', [halved, other_lam, in_place, in_float32, twice, never])
def test_a_broken_mixer_is_found(broken):
    def create(**kwargs):
        mixup = Mixup(mixup_alpha=1.0, **kwargs)
        return lambda x, target: broken(x, target, mixup)

    with pytest.raises(AssertionError):
        check_mixer(create)
