"""Flags that are only passed on reach the place where timm acts on them, each with a value that is not its default."""

import sys

import pytest
import timm
import torch
from conftest import SMALL

import train
from timm_synermix.data.jitter import JitterToTensor
from timm_synermix.engine import train_loader


@pytest.fixture
def build(monkeypatch, tmp_path, image_folder):
    """The run of these flags, before its first update."""

    def build(*flags):
        data = ['--data-dir', str(image_folder), '--num-classes', '4', '--output', str(tmp_path), '--experiment', 'x']
        monkeypatch.setattr(sys, 'argv', ['train.py', *SMALL, *data, *flags])
        return train.build(*train._parse_args())

    return build


def words(given):
    return [word for flag in given for word in flag.split()]


AUGMENTATION = {
    '--train-crop-mode rkrc': ('train_crop_mode', 'rkrc'),
    '--scale 0.3 0.9': ('scale', [0.3, 0.9]),
    '--ratio 0.8 1.2': ('ratio', [0.8, 1.2]),
    '--hflip 0.1': ('hflip', 0.1),
    '--vflip 0.2': ('vflip', 0.2),
    '--color-jitter 0.3': ('color_jitter', 0.3),
    '--color-jitter-prob 0.6': ('color_jitter_prob', 0.6),
    '--grayscale-prob 0.15': ('grayscale_prob', 0.15),
    '--gaussian-blur-prob 0.25': ('gaussian_blur_prob', 0.25),
    '--aa rand-m5': ('auto_augment', 'rand-m5'),
    '--reprob 0.7': ('re_prob', 0.7),
    '--remode const': ('re_mode', 'const'),
    '--recount 2': ('re_count', 2),
    '--train-interpolation nearest': ('interpolation', 'nearest'),
    '--mean 0.1 0.2 0.3': ('mean', (0.1, 0.2, 0.3)),
    '--std 0.4 0.5 0.6': ('std', (0.4, 0.5, 0.6)),
    '--workers 1': ('num_workers', 1),
    '--worker-seeding part': ('worker_seeding', 'part'),
    '--no-prefetcher': ('use_prefetcher', False),
    '--model-dtype bfloat16': ('img_dtype', torch.bfloat16),
}


@pytest.mark.parametrize('synermix', [True, False])
def test_augmentation(monkeypatch, build, synermix):
    seen = {}
    name = 'create_synermix_loader' if synermix else 'create_loader'
    original = getattr(train_loader, name)
    monkeypatch.setattr(train_loader, name, lambda *args, **kwargs: seen.update(kwargs) or original(*args, **kwargs))
    build(*(['--synermix'] if synermix else []))
    unset = {name: seen[name] for name, _ in AUGMENTATION.values()}
    build(*(['--synermix'] if synermix else []), *words(AUGMENTATION))
    expected = dict(AUGMENTATION.values())
    assert {name: seen[name] for name in expected} == expected
    assert not [name for name in expected if expected[name] == unset[name]]


def test_small_image_augmentation(build):
    """Without SynerMix, and the augmented view with it."""
    for flags in ([], ['--synermix']):
        dataset = build('--crop-padding', '2', '--cutout', '8', *flags).loaders.train.dataset.dataset
        steps = getattr(dataset.transform, 'augmented', dataset.transform).transforms
        (crop,) = (step for step in steps if type(step).__name__ == 'RandomCrop')
        (cutout,) = (step for step in steps if type(step).__name__ == 'Cutout')
        assert (crop.padding, cutout.length) == (2, 8)


@pytest.mark.parametrize('flags', [[], ['--synermix'], ['--crop-padding', '2'], ['--synermix', '--crop-padding', '2']])
def test_jitter_is_by_numpy(build, flags):
    transform = build(*flags).loaders.train.dataset.dataset.transform
    assert isinstance(getattr(transform, 'augmented', transform).transforms[-1], JitterToTensor)


MODEL = {
    '--drop 0.1': ('drop_rate', 0.1),
    '--drop-path 0.2': ('drop_path_rate', 0.2),
    '--drop-block 0.3': ('drop_block_rate', 0.3),
    '--gp max': ('global_pool', 'max'),
    '--bn-momentum 0.4': ('bn_momentum', 0.4),
    '--bn-eps 0.5': ('bn_eps', 0.5),
    '--in-chans 1': ('in_chans', 1),
    '--pretrained': ('pretrained', True),
    '--model-kwargs stem_size=24': ('stem_size', 24),
}


def test_the_model(monkeypatch, build):
    seen = {}

    def create_model(name, **kwargs):
        seen.update(kwargs)
        return timm.create_model(name, num_classes=4, in_chans=kwargs['in_chans'])

    monkeypatch.setattr(train, 'create_model', create_model)
    build(*words(MODEL))
    expected = dict(MODEL.values())
    assert {name: seen[name] for name in expected} == expected
    build('--drop-connect', '0.6')
    assert seen['drop_path_rate'] == 0.6


def test_what_is_made_of_the_model(build):
    flags = ['--head-init-scale', '0', '--head-init-bias', '-2', '--model-dtype', 'bfloat16', '--channels-last']
    model = build(*flags).trained.model
    assert not model.classifier.weight.any()
    assert (model.classifier.bias == -2).all()
    assert model.conv_stem.weight.dtype == torch.bfloat16
    assert model.blocks[1][0].conv_exp.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.grad_checkpointing
    assert build('--grad-checkpointing').trained.model.grad_checkpointing


def test_optimizer_average_and_checkpoints(build):
    flags = words(['--opt sgd --momentum 0.7 --weight-decay 0.1', '--opt-kwargs nesterov=False', '--lr 3'])
    run = build(*flags, '--model-ema', '--model-ema-decay', '0.3', '--model-ema-warmup', '--checkpoint-hist', '4')
    group = run.trained.optimizer.param_groups[-1]
    assert [group[name] for name in ('momentum', 'weight_decay', 'nesterov', 'initial_lr')] == [0.7, 0.1, False, 3]
    average = run.trained.task.get_trainable_module(ema=True)
    assert (average.decay, average.use_warmup) == (0.3, True)
    assert run.keeper.saver.max_history == 4
    assert not run.keeper.saver.decreasing
    assert build('--eval-metric', 'loss').keeper.saver.decreasing


def test_manifold_mixup(build):
    flags = ['--manifold-mixup', '0.3', '--mixup-prob', '0.4', '--smoothing', '0.2', '--manifold-mixup-layers', 'input']
    mixup_fn = build(*flags).trained.mixup_fn
    assert (mixup_fn.alpha, mixup_fn.prob, mixup_fn.label_smoothing) == (0.3, 0.4, 0.2)
    assert mixup_fn.layers == ['input']
