"""validate.py: its flags against timm's, its numbers against timm's evaluator and plain loops."""

import argparse
import csv
import json
import os
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT, make_image_folder
from PIL import Image
from processes import run_ranks, run_script
from safetensors.torch import load_file, save_file
from sklearn.metrics import precision_recall_fscore_support
from timm.data import create_dataset, create_loader
from timm.task import ClassificationEvaluator

import validate
from timm_synermix import entry
from timm_synermix.cli.common_args import ParseKwargs
from timm_synermix.engine import loaders
from timm_synermix.engine.evaluators import LabelEvaluator
from timm_synermix.metrics.collection import METRIC_NAMES
from timm_synermix.models import factory

FLAGS = json.loads((Path(__file__).parent / 'data' / 'timm_validate_flags.json').read_text())
TIMM_COLUMNS = ['model', 'top1', 'top1_err', 'top5', 'top5_err']
MODEL_COLUMNS = ['param_count', 'img_size', 'crop_pct', 'interpolation']
COHESION = list(METRIC_NAMES)


def run_validate(monkeypatch, capsys, data, *flags):
    """Run validate.py in this process and return its results, and what it printed before them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, 'argv', ['validate.py', '--data-dir', *map(str, [data, *flags])])
    capsys.readouterr()
    entry.run(validate)
    text, _, results = capsys.readouterr().out.rpartition('--result\n')
    return json.loads(results), text


@pytest.fixture
def run(monkeypatch, capsys, image_folder):
    small = ['--device', 'cpu', '-j', '0', '-b', '4']
    return lambda *flags: run_validate(monkeypatch, capsys, image_folder, *small, *flags)[0]


@pytest.fixture
def refuse(monkeypatch, capsys, image_folder):
    """Run validate.py with flags it refuses, and return what it says."""

    def refuse(*flags, data=image_folder):
        with pytest.raises(SystemExit) as error:
            run_validate(monkeypatch, capsys, data, '--device', 'cpu', '-j', '0', *flags)
        assert error.value.code == 2
        text = capsys.readouterr().err
        errors = [line for line in text.splitlines() if ': error: ' in line]
        assert len(errors) == 1
        assert 'Traceback' not in text
        return errors[0]

    return refuse


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """Checkpoints of one folder, of a test_vit with 4 classes, as people have them."""
    folder = tmp_path_factory.mktemp('weights')
    for index, name in enumerate(['epoch-2.pth.tar', 'epoch-10.pth.tar', 'plain.pth', 'plain.safetensors']):
        torch.manual_seed(index)
        state, averaged = (timm.create_model('test_vit', num_classes=4, img_size=32).state_dict() for _ in range(2))
        if name.endswith('.safetensors'):
            save_file(state, folder / name)
        else:
            torch.save({'state_dict': state, 'state_dict_ema': averaged} if 'epoch' in name else state, folder / name)
    return folder


VIT = ['--model', 'test_vit', '--num-classes', '4', '--img-size', '32']


def reference(image_folder, path, key='state_dict', crop_pct=None):
    """Logits and targets of a checkpoint, image by image, in plain PyTorch."""
    model = timm.create_model('test_vit', num_classes=4, img_size=32).eval()
    state = load_file(path) if str(path).endswith('.safetensors') else torch.load(path, weights_only=True)
    model.load_state_dict(state.get(key, state))
    config = timm.data.resolve_model_data_config(model)
    dataset = create_dataset('', root=image_folder, split='validation')
    kwargs = {name: config[name] for name in ('mean', 'std', 'interpolation')}
    crop_pct = crop_pct or config['crop_pct']
    loader = create_loader(
        dataset, (3, 32, 32), 4, crop_pct=crop_pct, num_workers=0, device=torch.device('cpu'), **kwargs
    )
    evaluator = ClassificationEvaluator()
    batches = []
    with torch.no_grad():
        for input, target in loader:
            batches.append((model(input), target, model.forward_head(model.forward_features(input), pre_logits=True)))
            evaluator.update(*batches[-1][:2])
    return evaluator.compute(), *(torch.cat(parts) for parts in zip(*batches, strict=True))


@pytest.mark.parametrize('flag', FLAGS, ids=lambda flag: flag['names'][-1])
def test_every_flag_of_timm(flag):
    """Names, type, default, number of values and choices of timm's own flag."""
    first_long = next((name for name in flag['names'] if name.startswith('--')), flag['names'][0])
    action = next(a for a in validate.parser._actions if set(flag['names']) <= {*a.option_strings, a.dest})
    switch = flag.get('action') == 'store_true'
    assert action.dest == flag.get('dest', first_long.lstrip('-').replace('-', '_'))
    assert isinstance(action, argparse._StoreTrueAction) == switch
    assert isinstance(action, ParseKwargs) == (flag.get('action') == 'ParseKwargs')
    assert action.default == flag.get('default', False if switch else None)
    assert action.type is {'int': int, 'float': float, 'str': str, None: None}[flag.get('type')]
    assert action.nargs == flag.get('nargs', 0 if switch else None)
    assert action.const == flag.get('const', True if switch else None)
    assert action.choices == flag.get('choices')


def test_the_flags_timm_does_not_have():
    known = {name for flag in FLAGS for name in flag['names']}
    ours = {name for action in validate.parser._actions for name in action.option_strings} - known
    mine = {
        '--cohesion',
        '--no-cohesion',
        '--cohesion-memory',
        '--compare',
        '--features-out',
        '--report',
        '--no-use-ema',
    }
    assert ours == {'-h', '--help'} | mine


@pytest.mark.parametrize('name', ['epoch-2.pth.tar', 'plain.pth', 'plain.safetensors'])
def test_numbers_are_those_of_timms_evaluator_and_of_plain_loops(run, image_folder, weights, tmp_path, name):
    metrics = run(*VIT, '--checkpoint', weights / name, '--features-out', tmp_path / 'features.safetensors')
    expected, logits, targets, features = reference(image_folder, weights / name)
    assert {key: metrics[key] for key in expected} == dict(expected)
    assert metrics['top1'] == 100 * (logits.argmax(1) == targets).sum().item() / 10
    assert list(metrics) == [*TIMM_COLUMNS, *MODEL_COLUMNS, 'checkpoint', 'loss', *COHESION]
    assert metrics['top1_err'] == 100 - metrics['top1']
    assert (metrics['model'], metrics['img_size']) == ('test_vit', 32)
    assert metrics['checkpoint'] == str(weights / name)

    kept = load_file(tmp_path / 'features.safetensors')
    assert torch.equal(kept['targets'], targets)
    assert torch.equal(kept['features'], features)
    features = features.double()
    means = torch.stack([features[targets == c].mean(0) for c in range(4)])
    intra = (features - means[targets]).square().sum(1).mean().sqrt()
    assert metrics['intra_class_distance'] == pytest.approx(intra.item(), rel=1e-6)
    assert metrics['inter_class_distance'] == pytest.approx(torch.pdist(means).mean().item(), rel=1e-6)


@pytest.mark.parametrize('checkpoint', ['last.pth.tar', 'model_best.safetensors'])
def test_accuracy_is_that_of_training(run_train, run, checkpoint):
    trained = run_train('--synermix', '--crop-pct', '1.0')
    metrics = run('--checkpoint', trained.folder / checkpoint)
    expected = trained.results[0]['validation']
    assert {name: metrics[name] for name in ('top1', 'top5')} == {name: expected[name] for name in ('top1', 'top5')}
    assert metrics['loss'] == pytest.approx(expected['loss'], rel=1e-5)


def test_moving_average(run, image_folder, weights, caplog):
    path = weights / 'epoch-2.pth.tar'
    loss = {ema: run(*VIT, '--checkpoint', path, *['--use-ema'][:ema])['loss'] for ema in (0, 1)}
    assert loss == {
        0: reference(image_folder, path)[0]['loss'],
        1: reference(image_folder, path, 'state_dict_ema')[0]['loss'],
    }
    assert loss[0] != loss[1]
    run(*VIT, '--checkpoint', weights / 'plain.safetensors', '--use-ema')
    assert 'plain.safetensors has no moving average' in caplog.text


def test_a_folder_of_checkpoints(run, image_folder, weights, tmp_path):
    rows = run(*VIT, '--checkpoint', weights, '--results-file', tmp_path / 'results.csv')
    names = [os.path.basename(row['checkpoint']) for row in rows]
    order = ['epoch-2.pth.tar', 'epoch-10.pth.tar', 'plain.pth', 'plain.safetensors']
    top1 = {name: reference(image_folder, weights / name)[0]['top1'] for name in order}
    assert {name: row['top1'] for name, row in zip(names, rows, strict=True)} == top1
    assert names == sorted(order, key=lambda name: (-top1[name], order.index(name)))
    with (tmp_path / 'results.csv').open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(rows[0])
    assert [{key: type(rows[0][key])(value) for key, value in row.items()} for row in table] == rows


def test_a_checkpoint_that_fails_does_not_stop_the_others(run, weights, tmp_path, caplog):
    (tmp_path / 'bad.pth').write_bytes(b'no checkpoint')
    (tmp_path / 'cut.safetensors').write_bytes(b'\xff' * 20)
    torch.save(5, tmp_path / 'five.pth')
    (tmp_path / 'good.pth').symlink_to(weights / 'plain.pth')
    (tmp_path / 'notes.txt').write_text('no checkpoint either')
    rows = run(*VIT, '--checkpoint', tmp_path)
    assert [row['checkpoint'] for row in rows] == [str(tmp_path / 'good.pth')]
    assert '3 of 4 could not be evaluated: bad.pth, cut.safetensors, five.pth' in caplog.text

    (tmp_path / 'good.pth').unlink()
    with pytest.raises(SystemExit) as error:
        run(*VIT, '--checkpoint', tmp_path)
    assert error.value.code == 1


@pytest.fixture
def no_download(monkeypatch):
    """Pretrained weights stay where they are."""

    def create_model(name, pretrained=False, **kwargs):
        created.append((name, pretrained))
        if 'vit2' in name:
            raise OSError('no connection')
        return timm.create_model(name, **kwargs)

    created = []
    monkeypatch.setattr(validate, 'create_model', create_model)
    return created


@pytest.mark.parametrize('kind', ['wildcard', 'file', 'name'])
def test_pretrained_models(run, no_download, tmp_path, caplog, kind):
    (tmp_path / 'names.txt').write_text('test_vit.r160_in1k\n\ntest_vit2\ntest_vit3.r160_in1k\n')
    pattern = {'wildcard': 'test_vit*', 'file': tmp_path / 'names.txt', 'name': 'test_vit3'}[kind]
    flags = ['--num-classes', '4', '--results-format', 'json', '--results-file', tmp_path / 'results.json']
    results = run('--model', pattern, *flags)
    assert json.loads((tmp_path / 'results.json').read_text()) == results
    assert all(pretrained for _, pretrained in no_download)
    assert 'without --checkpoint the classifier is random' in caplog.text
    if kind == 'name':
        assert results['model'] == 'test_vit3'
        assert 'checkpoint' not in results
        return
    good = {'test_vit.r160_in1k', 'test_vit3.r160_in1k'}
    assert {row['model'] for row in results} >= good
    assert 'test_vit2' in re.findall('could not be evaluated: (.*)', caplog.text)[-1]
    assert [row['top1'] for row in results] == sorted((row['top1'] for row in results), reverse=True)


def test_all_is_every_pretrained_model_of_imagenet_1k(run, monkeypatch, no_download):
    listed = []
    monkeypatch.setattr(timm, 'list_models', lambda *args, **kwargs: listed.append(kwargs) or ['test_vit'])
    assert [row['model'] for row in run('--model', 'all', '--num-classes', '4')] == ['test_vit']
    assert listed[0]['pretrained']
    assert '*_in21k' in listed[0]['exclude_filters']


def make_run(folder, weights, **args):
    """The folder of a training run of a test_vit."""
    folder.mkdir()
    for name in ('model_best.pth.tar', 'last.pth.tar'):
        (folder / name).symlink_to(weights / ('epoch-2.pth.tar' if 'best' in name else 'epoch-10.pth.tar'))
    saved = dict(model='test_vit', num_classes=4, img_size=32, crop_pct=0.5, model_kwargs={}, mixup=0.4, lr=0.1)
    (folder / 'args.yaml').write_text(yaml.safe_dump({**saved, **args}))
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_top1\n0,1.5,20.0\n1,1.2,30.0\n')
    return folder


def test_what_a_run_says_of_its_model_and_images(run, image_folder, weights, tmp_path, caplog):
    folder = make_run(tmp_path / 'run', weights)
    row = run('--checkpoint', folder / 'last.pth.tar')
    assert row['loss'] == reference(image_folder, folder / 'last.pth.tar', crop_pct=0.5)[0]['loss']
    assert 'from its args.yaml, crop_pct 0.5, img_size 32, model test_vit, num_classes 4' in caplog.text
    row = run('--checkpoint', folder / 'last.pth.tar', '--crop-pct', '0.9')
    assert row['loss'] == reference(image_folder, folder / 'last.pth.tar', crop_pct=0.9)[0]['loss']


def test_a_run_is_evaluated_as_it_evaluated_itself(run, monkeypatch, weights, tmp_path):
    """At the image size and crop of training, where a model has others for tests."""
    seen = []
    original = factory.resolve_input_data_config

    def spy(*args, **kwargs):
        seen.append(kwargs['use_test_size'])
        return original(*args, **kwargs)

    monkeypatch.setattr(factory, 'resolve_input_data_config', spy)
    run('--checkpoint', make_run(tmp_path / 'run', weights) / 'last.pth.tar')
    run(*VIT, '--checkpoint', weights / 'plain.pth')
    assert seen == [False, True]


def test_compare(monkeypatch, capsys, image_folder, weights, tmp_path):
    a, b = make_run(tmp_path / 'a', weights), make_run(tmp_path / 'longer-than-most', weights, crop_pct=1.0)
    paths = [f'{a}/', b, b / 'last.pth.tar']
    rows, text = run_validate(monkeypatch, capsys, image_folder, '--device', 'cpu', '-j', '0', '--compare', *paths)
    expected = [
        reference(image_folder, weights / name, crop_pct=crop_pct)[0]
        for name, crop_pct in (('epoch-2.pth.tar', 0.5), ('epoch-2.pth.tar', 1.0), ('epoch-10.pth.tar', 1.0))
    ]
    assert [row['top1'] for row in rows] == [row['top1'] for row in expected]
    assert [row['loss'] for row in rows] == pytest.approx([row['loss'] for row in expected], rel=1e-6)
    header, *lines = text.splitlines()
    names = ['a', 'longer-than-most', os.path.join('longer-than-most', 'last.pth.tar')]
    assert header.split() == names
    assert [line.split()[0] for line in lines] == ['top1', 'top5', *COHESION]
    for line in lines:  # right-aligned under the names
        name, *values = line.split()[:4]
        assert [float(value) for value in values] == pytest.approx([row[name] for row in rows], rel=1e-4)
        for column, value in zip(names, values, strict=True):
            end = header.index(f' {column}', 26) + 1 + len(column)
            assert line[:end].endswith(f' {value}')
    assert 'cdnv' in text
    assert next(line for line in lines if line.startswith('cdnv')).endswith('lower is better')


def test_report(run, monkeypatch, weights, tmp_path):
    """What the report is given; what it makes of it has tests of its own."""
    report = pytest.importorskip('timm_synermix.report')
    seen = {}
    monkeypatch.setattr(report, 'write_report', lambda *args, **kwargs: seen.update(args=args, **kwargs) or 'path')
    a, b = make_run(tmp_path / 'a', weights), make_run(tmp_path / 'b', weights, hflip=1.0, scale=[1.0, 1.0])
    rows = run('--compare', a, b, '--report', tmp_path / 'report')
    folder, evaluated = seen['args']
    assert folder == str(tmp_path / 'report')
    assert [one.name for one in evaluated] == ['a', 'b']
    assert [one.metrics for one in evaluated] == [
        {name: row[name] for name in ('top1', 'top5', 'loss', *COHESION)} for row in rows
    ]
    assert [one.features.shape for one in evaluated] == [(10, 64)] * 2
    assert evaluated[0].targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3]
    assert [one.summary for one in evaluated] == [str(a / 'summary.csv'), str(b / 'summary.csv')]
    assert evaluated[1].args['hflip'] == 1.0
    assert seen['class_names'] == ['a', 'b', 'c', 'lone']
    assert list(seen['examples']) == ['clean', 'augmented', 'mixed']
    clean, augmented, mixed = seen['examples'].values()
    for images in (clean, augmented, mixed):
        assert images.shape == (8, 3, 32, 32)
        assert images.min() >= 0
        assert images.max() <= 1
    assert not torch.equal(clean, augmented)
    # Between two augmented images
    ratio = (mixed - augmented).flatten(1).norm(dim=1) / (augmented.flip(0) - augmented).flatten(1).norm(dim=1)
    assert 0 < ratio.max() <= 1 + 1e-5


def test_the_report_itself(run, weights, tmp_path):
    pytest.importorskip('timm_synermix.report')
    run(*VIT, '--checkpoint', weights / 'plain.pth', '--report', tmp_path / 'report')
    assert (tmp_path / 'report' / 'report.html').stat().st_size > 10_000


def test_valid_labels(run, image_folder, weights, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=7, img_size=32)
    save_file(model.state_dict(), tmp_path / 'seven.safetensors')
    (tmp_path / 'labels.txt').write_text('6\n0\n3\n2\n\n')
    flags = ['--model', 'test_vit', '--num-classes', '7', '--img-size', '32']
    row = run(*flags, '--checkpoint', tmp_path / 'seven.safetensors', '--valid-labels', tmp_path / 'labels.txt')
    state = model.state_dict()
    state.update({name: state[name][[6, 0, 3, 2]] for name in ('head.weight', 'head.bias')})
    save_file(state, tmp_path / 'four.safetensors')
    expected = reference(image_folder, tmp_path / 'four.safetensors')[0]
    assert row['loss'] == pytest.approx(expected['loss'], rel=1e-6)
    assert row['top1'] == expected['top1']


@pytest.fixture
def imagenet(tmp_path):
    """10 images with ImageNet's names in 6 classes, and their reassessed labels: several, one or none."""
    names = [f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, 11)]
    for i, name in enumerate(names):
        folder = tmp_path / 'images' / 'validation' / f'n{i % 6}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 100).convert('RGB').save(folder / name, format='jpeg')
    labels = [[0, 1, 2], [], [3], [4, 5], [0], [1], [], [2, 3, 4, 5], [0, 5], [1]]
    (tmp_path / 'real.json').write_text(json.dumps(labels))
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=6, img_size=32)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    return tmp_path, labels


def test_real_labels(monkeypatch, capsys, imagenet):
    folder, labels = imagenet
    flags = ['--model', 'test_vit', '--num-classes', '6', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '4']
    flags += ['--checkpoint', folder / 'weights.safetensors', '--no-cohesion']
    correct = {1: 0, 5: 0}
    dataset = create_dataset('', root=folder / 'images', split='validation')
    outputs, update = [], LabelEvaluator.update
    monkeypatch.setattr(LabelEvaluator, 'update', lambda *args: outputs.append(args[1]) or update(*args))
    row, _ = run_validate(monkeypatch, capsys, folder / 'images', *flags, '--real-labels', folder / 'real.json')
    for name, logits in zip(dataset.filenames(basename=True), torch.cat(outputs), strict=True):
        allowed = labels[int(name[15:23]) - 1]
        for k in correct:
            correct[k] += bool(set(allowed) & set(logits.topk(k).indices.tolist()))
    assert (row['top1'], row['top5']) == (correct[1] / 8 * 100, correct[5] / 8 * 100)  # two images have no label


@pytest.mark.parametrize('average', ['micro', 'macro', 'weighted'])
def test_precision_recall_and_f1(run, image_folder, weights, average):
    row = run(*VIT, '--checkpoint', weights / 'plain.pth', '--metrics-avg', average, '--no-cohesion')
    _, logits, targets, _ = reference(image_folder, weights / 'plain.pth')
    expected = precision_recall_fscore_support(targets, logits.argmax(1), average=average, zero_division=0)[:3]
    names = [f'{average}_{name}' for name in ('precision', 'recall', 'f1_score')]
    assert [row[name] for name in names] == pytest.approx([100 * value for value in expected], rel=1e-6)
    assert list(row) == [*TIMM_COLUMNS, *names, *MODEL_COLUMNS, 'checkpoint', 'loss']


@pytest.mark.parametrize(
    'flags',
    [
        ['--no-prefetcher'],
        ['--channels-last', '--pin-mem', '--fast-norm'],
        ['--torchcompile', 'eager'],
        pytest.param(['--aot-autograd'], marks=pytest.mark.slow),
        ['--reparam'],
        ['--test-pool'],
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.filterwarnings('ignore:.*pin_memory.*:UserWarning')
def test_other_ways_to_the_same_numbers(run, weights, flags):
    common = [*VIT, '--checkpoint', weights / 'plain.pth']
    expected, row = run(*common), run(*common, *flags)
    assert row == {
        name: value if isinstance(value, str) else pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }


@pytest.mark.filterwarnings('ignore:.*torch.jit.*')
def test_torchscript_goes_without_cohesion(run, weights, caplog):
    common = [*VIT, '--checkpoint', weights / 'plain.pth']
    row, expected = run(*common, '--torchscript'), run(*common, '--no-cohesion')
    assert row == {**expected, 'loss': pytest.approx(expected['loss'], rel=1e-5)}
    assert 'hides its features' in caplog.text


@pytest.mark.parametrize(
    'flags',
    [['--amp', '--amp-dtype', 'bfloat16'], ['--model-dtype', 'bfloat16']],
    ids=['amp', 'model-dtype'],
)
@pytest.mark.parametrize('loader', [[], ['--no-prefetcher']], ids=['prefetcher', 'plain'])
def test_lower_precision(run, weights, flags, loader):
    common = [*VIT, '--checkpoint', weights / 'plain.pth']
    loss, expected = run(*common, *flags, *loader)['loss'], run(*common)['loss']
    assert loss == pytest.approx(expected, rel=0.05)
    assert abs(loss - expected) > 1e-6


def test_images_larger_than_trained_on_are_pooled(run, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', num_classes=4)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    flags = ['--model', 'test_efficientnet', '--num-classes', '4', '--checkpoint', tmp_path / 'model.safetensors']
    row = run(*flags, '--img-size', '224', '--test-pool')
    assert row['crop_pct'] == 1.0
    assert row['img_size'] == 224
    assert row['cosine_cohesion'] > 0


def test_images(run, weights, image_folder, monkeypatch):
    """The flags of the images reach timm's loader."""
    seen = {}

    def spy(dataset, **kwargs):
        seen.update(kwargs)
        return create_loader(dataset, **kwargs)

    monkeypatch.setattr(loaders, 'create_loader', spy)
    flags = ['--crop-pct', '0.7', '--crop-mode', 'squash', '--crop-border-pixels', '1', '--interpolation', 'nearest']
    run(*VIT, *flags, '--mean', '0.1', '0.2', '0.3', '--std', '0.5', '--checkpoint', weights / 'plain.pth')
    expected = dict(crop_pct=0.7, crop_mode='squash', crop_border_pixels=1, interpolation='nearest', batch_size=4)
    expected |= dict(mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, input_size=(3, 32, 32), num_workers=0)
    assert {name: seen[name] for name in expected} == expected


def test_train_size(run, no_download):
    sizes = [
        run('--model', 'test_vit', '--num-classes', '4', *flags)['img_size'] for flags in ([], ['--img-size', '32'])
    ]
    assert sizes == [160, 32]


def test_retry_with_smaller_batches(run, weights, monkeypatch, caplog, capsys):
    evaluate, tried = validate.evaluate, []

    def short_of_memory(accelerator, model, loader, *args, **kwargs):
        tried.append(loader.loader.batch_size)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError('out of memory')
        return evaluate(accelerator, model, loader, *args, **kwargs)

    monkeypatch.setattr(validate, 'evaluate', short_of_memory)
    common = [*VIT, '--checkpoint', weights / 'plain.pth']
    with pytest.raises(SystemExit) as error:
        run(*common)
    assert error.value.code == 1
    assert 'OutOfMemoryError: out of memory' in capsys.readouterr().err
    tried.clear()
    assert run(*common, '--retry')['top1'] >= 0
    assert tried == [4, 3, 2]
    assert 'trying again with --batch-size 2' in caplog.text


def test_progress_is_logged(run, weights, caplog):
    caplog.set_level('INFO')
    run(*VIT, '--checkpoint', weights / 'plain.pth', '--log-freq', '2')
    assert re.findall(r'Test: \[ *(\d+)/3\]', caplog.text) == ['0', '2']


def in_two_processes(folder, *flags):
    """The results of validate.py in two processes, whose stdout and stderr are one file."""
    run_ranks(run_script, ROOT / 'validate.py', *flags, folder=folder)
    first, second = ((folder / f'rank{rank}.log').read_text() for rank in (0, 1))
    assert first.count('--result') == 1
    assert '--result' not in second
    results, _ = json.JSONDecoder().raw_decode(first.rpartition('--result\n')[2])
    return results


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, weights, tmp_path):
    """An odd number of images, of which a sampler repeats one."""
    images = make_image_folder(tmp_path / 'images', {'validation': {'a': 4, 'b': 2, 'c': 2, 'd': 1}})
    flags = [*VIT, '--data-dir', images, '--checkpoint', weights / 'plain.pth', '--metrics-avg', 'macro']
    flags += ['--device', 'cpu', '-j', '0', '-b', '2', '--features-out']
    one = run(*flags, tmp_path / 'one.safetensors')
    report = ['--report', tmp_path / 'report']
    two = in_two_processes(tmp_path / 'logs', *flags, tmp_path / 'two.safetensors', *report)
    assert (tmp_path / 'report' / 'report.html').exists()
    exact = [name for name in one if name not in ('loss', *COHESION)]
    assert {name: two[name] for name in exact} == {name: one[name] for name in exact}
    assert {name: two[name] for name in COHESION} == pytest.approx({name: one[name] for name in COHESION}, rel=1e-5)
    assert two['loss'] == pytest.approx(one['loss'], rel=1e-6)
    kept = [load_file(tmp_path / f'{name}.safetensors') for name in ('one', 'two')]
    assert torch.equal(kept[0]['targets'], kept[1]['targets'])
    torch.testing.assert_close(kept[0]['features'], kept[1]['features'])


def test_real_labels_in_two_processes(monkeypatch, capsys, imagenet, tmp_path):
    folder, _ = imagenet
    (folder / 'images' / 'validation' / 'n3' / 'ILSVRC2012_val_00000010.JPEG').unlink()  # an odd number
    (folder / 'real.json').write_text(json.dumps(json.loads((folder / 'real.json').read_text())[:9]))
    flags = ['--model', 'test_vit', '--num-classes', '6', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '2']
    flags += ['--checkpoint', folder / 'weights.safetensors', '--real-labels', folder / 'real.json']
    one, _ = run_validate(monkeypatch, capsys, folder / 'images', *flags)
    two = in_two_processes(tmp_path / 'logs', '--data-dir', folder / 'images', *flags)
    assert (two['top1'], two['top5']) == (one['top1'], one['top5'])


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model', 'resnet81'], "--model must be a timm model, got 'resnet81'"),
        (['--model', 'test_vit', '--num-classes', '3'], '--num-classes must cover all 4 classes of the validation set'),
        (['--model', 'zzz*'], "--model: no pretrained model matches 'zzz*'"),
        (['--model', 'test_vit*', '--checkpoint', __file__], "--model must be one model with --checkpoint, got 'test_"),
        (['--checkpoint', '/nowhere.pth'], "--checkpoint must be a file of weights, got '/nowhere.pth'"),
        ([*VIT, '--checkpoint', __file__], '--checkpoint: '),
        (
            ['--checkpoint', Path(__file__).parent],
            '--checkpoint: there is no .pth.tar, .pth, .safetensors in the folder',
        ),
        (['--compare', '/nowhere.pth'], "--compare must be a file of weights, got '/nowhere.pth'"),
        (['--compare', Path(__file__).parent], 'has none of model_best.pth.tar, model_best.safetensors, last.pth.tar'),
        (['--compare', __file__, __file__], '--compare names a checkpoint twice'),
        (['--compare', __file__, '--checkpoint', __file__], '--compare and --checkpoint cannot be used together'),
        (['--compare', __file__, '--features-out', 'x'], '--features-out takes one checkpoint, got 1'),
        (['--results-file', '/nowhere/x.csv'], '--results-file must be in a folder that exists'),
        (['--results-file', '/proc/x.csv'], "--results-file must be a file that can be written, got '/proc/x.csv'"),
        (['--report', '/proc'], "--report must be a folder to write to, got '/proc'"),
        (['--features-out', '/nowhere/x'], "--features-out must be in a folder that exists, got '/nowhere/x'"),
        (['--report', __file__], '--report must be a folder'),
        (['--results-format', 'xml'], "--results-format must be one of csv, json, got 'xml'"),
        (['--naflex-loader'], '--naflex-loader and --naflex-max-seq-len are not supported'),
        (['--num-gpu', '2'], '--num-gpu must be 1, got 2; for more GPUs: torchrun --nproc_per_node N validate.py'),
        (['--tf-preprocessing'], '--tf-preprocessing needs the package tensorflow'),
        (['--torchcompile-mode', 'x'], '--torchcompile-mode needs --torchcompile'),
        (['--torchscript', '--torchcompile'], 'not allowed with argument'),
        (['--torchscript', '--report', 'x'], '--report and --torchscript cannot be used together'),
        (['--amp'], '--amp on the CPU needs --amp-dtype bfloat16, got float16'),
        (['--amp', '--model-dtype', 'bfloat16'], '--amp needs a float32 model, got --model-dtype bfloat16'),
        (['--model-dtype', 'int8'], "--model-dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (['--crop-mode', 'round'], "--crop-mode must be one of center, squash, border, got 'round'"),
        (['--crop-pct', '0'], '--crop-pct must be in [0.01, 10], got 0.0'),
        (['-b', '0'], '--batch-size must be at least 1, got 0'),
        (['--log-freq', '0'], '--log-freq must be at least 1, got 0'),
        (['--fuser', 'nvfuser2'], "--fuser must be one of te, old, nvfuser, got 'nvfuser2'"),
        (['--device', 'cuda'], '--device cuda: there is no CUDA device here; --device cpu runs on the CPU'),
        (['--real-labels', '/nowhere'], "--real-labels must be a file that exists, got '/nowhere'"),
        (['--real-labels', __file__, '--valid-labels', __file__], 'cannot be used together: real labels are of all'),
        ([*VIT, '--real-labels', __file__], '--real-labels: cannot read'),
        ([*VIT, '--valid-labels', __file__], '--valid-labels must be a file of class indices, one a line'),
        (['--metrics-avg', 'samples'], "invalid choice: 'samples'"),
    ],
)
def test_bad_input(refuse, no_download, monkeypatch, flags, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert message in refuse(*flags)


def test_labels_that_do_not_fit(refuse, no_download, tmp_path):
    path = tmp_path / 'labels'
    path.write_text('0\n1\n2\n4\n')
    assert '--valid-labels must be below the 4 classes, got 4' in refuse(*VIT, '--valid-labels', path)
    path.write_text('0\n1\n2\n')
    assert 'must cover all 4 classes of the validation set, got 3' in refuse(*VIT, '--valid-labels', path)
    path.write_text('[[0]]')
    assert 'has labels of another number of images than 10' in refuse(*VIT, '--real-labels', path)
    path.write_text(json.dumps([[0]] * 10))
    assert "needs ImageNet's validation images under their names" in refuse(*VIT, '--real-labels', path)


@pytest.mark.parametrize(
    ('text', 'message'),
    [('- a', 'must be a mapping'), ('a: [', 'cannot read'), ('img_size: big', "invalid int value: 'big'")],
)
def test_bad_run_arguments(refuse, weights, tmp_path, text, message):
    folder = make_run(tmp_path / 'run', weights)
    (folder / 'args.yaml').write_text(text)
    error = refuse('--checkpoint', folder / 'last.pth.tar')
    assert message in error
    assert 'args.yaml' in error


@pytest.mark.parametrize('kind', ['--checkpoint', '--compare'])
def test_missing_data_are_told_before_any_model_is_built(refuse, monkeypatch, weights, tmp_path, kind):
    monkeypatch.setattr(validate, 'create_model', lambda *args, **kwargs: pytest.fail('a model was built'))
    error = refuse(*VIT, kind, weights if kind == '--checkpoint' else weights / 'plain.pth', data=tmp_path / 'nowhere')
    assert '--data-dir must be a folder or tar file that exists' in error
