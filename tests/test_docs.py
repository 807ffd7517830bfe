"""The code in the documentation runs."""

import argparse
import importlib
import json
import re
import statistics

import matplotlib
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DistributedSampler

from timm_synermix import (
    SupplementBatchSampler,
    SynerMixTask,
    add_manifold_mixup_args,
    add_synermix_args,
    create_synermix_loader,
    intra_class_weight,
)
from timm_synermix.cli.train_args import create_parsers
from timm_synermix.data.dataset_factory import create_dataset


def snippets(path):
    return re.findall(r'```python\n(.*?)```', (ROOT / path).read_text(), re.DOTALL)


@pytest.fixture
def timm_script(image_folder):
    """What timm's train.py has at hand where the snippets go, on a few images."""
    parser = argparse.ArgumentParser()
    model = timm.create_model('test_resnet', num_classes=4)
    args = argparse.Namespace(
        batch_size=8, reprob=0.5, scale=[0.5, 1], color_jitter=0.4, train_interpolation='random', seed=1,
        workers=0, distributed=False, prefetcher=True, rank=0,
    )  # fmt: skip
    return dict(
        parser=parser,
        args=args,
        model=model,
        device=torch.device('cpu'),
        dataset_train=create_dataset('', root=str(image_folder), split='train'),
        data_config=resolve_data_config(dict(img_size=32), model=model),
        criterion_kwargs=dict(smoothing=0.1),
        mixup_active=True,
        mixup_args=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=1.0, mode='batch', label_smoothing=0.1, num_classes=4),
    )


@pytest.mark.parametrize('prefetcher', [True, False])
def test_three_changes_to_timm_s_script(timm_script, prefetcher):
    flags, loader, task, off, one_after_the_other = snippets('docs/integrate.md')[:5]
    exec(flags, timm_script)
    given = ['--synermix', '--synermix-singletons', 'keep', '--synermix-num-mixed', '2', '--synermix-off-epoch', '1']
    timm_script['args'] = args = timm_script['parser'].parse_args(given, namespace=timm_script['args'])
    args.prefetcher, args.mixup_off_epoch = prefetcher, 2
    timm_script['mixup_fn'] = 'timm_s own'
    exec(loader, timm_script)
    exec(task, timm_script)
    task, loader = timm_script['task'], timm_script['loader_train']
    assert task.num_mixed == 2
    assert not loader.batch_sampler.batch_sampler.supplement
    assert timm_script['mixup_fn'] is None
    losses = {'intra_loss', 'inter_loss'}
    for epoch in range(3):
        timm_script['epoch'] = epoch
        timm_script['dataset_train'].set_epoch(epoch)
        exec(off, timm_script)
        assert loader.batch_sampler.epoch == epoch
        for input, target in loader:
            result = task(input, target)
            result['loss'].backward()
            assert losses & result.keys() == (losses if epoch == 0 else {'inter_loss'})
        assert task.mixup_fn.mixup_enabled == (epoch < 2)
    task.trainable_module.zero_grad()
    exec(one_after_the_other, dict(task=task, input=input, target=target))
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters())


def test_without_the_flag_nothing_changes(timm_script):
    flags, loader, task, _ = snippets('docs/integrate.md')[:4]
    exec(flags, timm_script)
    timm_script['args'] = timm_script['parser'].parse_args([], namespace=timm_script['args'])
    exec(loader, timm_script)
    exec(task, timm_script)
    assert 'loader_train' not in timm_script
    assert 'task' not in timm_script


def test_bare_loop(image_folder):
    loader = create_synermix_loader(
        create_dataset('', root=str(image_folder), split='train'), 32, 8, num_workers=0, device=torch.device('cpu')
    )
    scope = dict(batches=[(*x.chunk(2), y) for x, y in loader])
    for snippet in snippets('docs/integrate.md')[7:]:
        exec(snippet, scope)
    assert scope['loss'].isfinite()
    feature = scope['hook'](scope['clean'])[1]
    by_hand = scope['model'].get_classifier()(
        scope['intra_class_mix'](feature, scope['target'], weight=scope['weight'])[0]
    )
    torch.testing.assert_close(scope['logits'], by_hand)  # the two ways agree where both apply


def test_mixers(image_folder):
    model = timm.create_model('test_resnet', num_classes=10)
    scope = dict(model=model, SynerMixTask=SynerMixTask, torch=torch)
    for snippet in snippets('docs/integrate.md')[5:7]:
        exec(snippet, scope)
        result = scope['task'](torch.randn(8, 3, 32, 32), torch.tensor([1, 1, 4, 4]))
        assert result['loss'].isfinite()
    _, soft = scope['mix_squares'](torch.randn(4, 3, 8, 8), torch.arange(4))
    assert soft.sum(1).tolist() == [1.0] * 4


def test_readme_code():
    (snippet,) = snippets('README.md')
    exec(snippet, {})


def test_readme_names_every_synermix_flag_and_what_is_left_out():
    text = (ROOT / 'README.md').read_text()
    parser = argparse.ArgumentParser()
    add_synermix_args(parser)
    add_manifold_mixup_args(parser)
    for action in parser._actions[1:]:
        assert f'`{action.option_strings[0]}' in text, action.option_strings
    assert '--naflex-loader' in text


def test_links_in_the_documents_lead_somewhere():
    for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        for target in re.findall(r'\]\((?!http)([^)#]+)', path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_every_test_that_the_reliability_table_names_exists():
    text = (ROOT / 'docs/reliability.md').read_text()
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    named = set(re.findall(r'`(test_\w+)`', text))
    assert len(named) > 30
    for name in named:
        assert f'def {name}(' in tests, name
    for row in re.findall(
        r'^\| (?!\*\*|exit|case|what|---|\d)(.*)\|$', text.partition('and its test')[2], re.MULTILINE
    ):
        assert '`test_' in row.rpartition('|')[2], row


CARD = (ROOT / 'docs/method.md').read_text()


@pytest.fixture(scope='module')
def method_card():
    """What the code blocks of the method card leave behind, run one after the other."""
    torch.manual_seed(0)
    scope = {}
    for snippet in snippets('docs/method.md'):
        exec(snippet, scope)
        if 'torch.tensor([1.0, 3.0, 0.5])' in snippet:
            scope['given_draws'] = scope['mixed']
    return scope


def rows_of_table(text, first_cell):
    """The cells of the rows below the header that begins with a cell, without backticks."""
    (table,) = re.findall(rf'^\| {re.escape(first_cell)} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)', text, re.MULTILINE)
    return [[cell.strip().replace('`', '') for cell in row.strip('|').split('|')] for row in table.splitlines()]


def test_method_card_code(method_card):
    torch.testing.assert_close(method_card['given_draws'], torch.tensor([[1.0, 1.0], [3.0, 0.0]]))
    assert method_card['mixed_target'].tolist() == [0, 3, 5, 9, -100, -100, -100, -100]
    torch.testing.assert_close(
        method_card['loss'], 0.1 * method_card['intra_loss'] + 0.9 * method_card['inter_loss'], rtol=0, atol=1e-6
    )
    assert method_card['task'].beta == 0.1
    assert method_card['task'].num_batches == 23  # 22 of the digits, and the one in parts
    assert all(p.grad.isfinite().all() for p in method_card['model'].parameters())


def test_method_card_names_what_exists():
    modules = {path.stem for path in (ROOT / 'timm_synermix').glob('*.py')}
    in_table = set()
    for step, _, where in rows_of_table(CARD, 'step'):
        names = re.findall(r'\b(\w+)\.(\w+)', where)
        assert names, step
        in_table.update(names)
    assert len(in_table) > 9
    names = in_table | {
        (module, name) for module, name in re.findall(r'`(\w+)\.(\w+)', CARD) if module in modules and name != 'py'
    }
    for module, name in names:
        assert hasattr(importlib.import_module(f'timm_synermix.{module}'), name), (module, name)


def test_method_card_knows_the_flags_and_their_defaults():
    _, parser = create_parsers()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    of_other_scripts = {'--seeds', '--jobs'}
    assert set(re.findall(r'(?<![\w-])--[a-z][a-z-]+', CARD)) - of_other_scripts <= actions.keys()
    documented = {}
    for flags, default, *_ in rows_of_table(CARD, 'flag'):
        for option in flags.split(', '):
            documented[option] = default
            expected = actions[option].default
            if expected is not None and expected is not False:
                assert default.split(',')[0] == str(expected), option
    synermix = argparse.ArgumentParser(add_help=False)
    add_synermix_args(synermix)
    add_manifold_mixup_args(synermix)
    missing = {action.option_strings[0] for action in synermix._actions} - documented.keys()
    assert missing == {'--synermix'}


def test_method_card_numbers_of_a_batch(method_card):
    rows = rows_of_table(CARD, 'classes C')
    assert [(int(c), int(b)) for c, b, *_ in rows] == [(c, b) for c in (10, 100, 1000) for b in (64, 128, 256, 1024)]
    generator = np.random.default_rng(0)
    for row in rows:
        num_classes, batch_size = int(row[0]), int(row[1])
        present, per_class, lone = method_card['per_batch'](batch_size, num_classes)
        written = [f'{present:.1f}', f'{per_class:.2f}', f'{lone:.1f}', f'{100 * lone / batch_size:.0f} %']
        assert row[2:] == written, row
        counts = generator.multinomial(batch_size, [1 / num_classes] * num_classes, size=400)
        assert (counts > 0).sum(1).mean() == pytest.approx(present, rel=0.02)
        assert (counts == 1).sum(1).mean() == pytest.approx(lone, rel=0.04, abs=0.1)
    targets = np.repeat(np.arange(100), 50)
    sampler = SupplementBatchSampler(DistributedSampler(targets, num_replicas=1, rank=0), targets, 128)
    assert f'{sampler.expected_supplements():.1f}' == next(row[4] for row in rows if row[:2] == ['100', '128'])


def test_method_card_deviation_of_a_mix():
    (header,) = re.findall(r'^\| images n (.*)\|$', CARD, re.MULTILINE)
    (deviations,) = rows_of_table(CARD, 'images n | ' + ' | '.join(header.strip('| ').split(' | ')))
    generator = torch.Generator().manual_seed(0)
    for n, deviation in zip(header.strip('| ').split(' | '), deviations[1:]):
        target = torch.arange(5000).repeat_interleave(int(n))
        weight = intra_class_weight(target, generator=generator).view(5000, int(n))
        assert weight.square().sum(1).mean().sqrt().item() == pytest.approx(float(deviation), abs=0.01), n


def test_method_card_has_the_figures_of_the_benchmarks():
    benchmarks = (ROOT / 'docs/benchmarks.md').read_text()
    measured = {row[0]: row for row in rows_of_table(benchmarks, 'run')}
    rows = rows_of_table(CARD, 'run')
    assert len(rows) == len(measured)
    for name, _, step, top1 in rows:
        assert [step, top1] == [measured[name][1], measured[name][3]], name


def results_of(name):
    """The results in a file of benchmarks/results, by run."""
    content = json.loads((ROOT / 'benchmarks' / 'results' / f'{name}.json').read_text())
    runs = {}
    for result in content['results'] if isinstance(content, dict) else content:
        runs.setdefault(result['run'], []).append(result)
    return runs


def test_the_tables_of_results_are_those_of_the_runs():
    """Every cell is the mean, and after ± the standard deviation, of the raw results."""
    columns = {
        'top-1 %': 'eval_top1',
        'cosine cohesion': 'eval_cosine_cohesion',
        'CDNV': 'eval_cdnv',
        'NC1': 'eval_nc1',
        'silhouette': 'eval_silhouette',
        'seconds': 'seconds',
        'k-NN %': 'knn',
        'few-shot %': 'few_shot',
        'corrupted %': 'corrupted',
        'ECE %': 'ece',
    }
    text = (ROOT / 'docs' / 'results.md').read_text()
    tables = re.findall(r'^\| run \| seeds \| (.*) \|\n\|[ -|]*\n((?:\|.*\n)+)', text, re.MULTILINE)
    for name, (header, rows) in zip(('methods', 'beta', 'caltech101', 'finetune', 'downstream'), tables, strict=True):
        results = results_of(name)
        for row in rows.splitlines():
            run, seeds, *cells = row.strip('| ').split(' | ')
            assert int(seeds) == len(results[run]), (name, run)
            for column, cell in zip(header.split(' | '), cells, strict=True):
                values = [result[columns[column]] for result in results[run]]
                expected = [statistics.mean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
                for written, value in zip(cell.split(' ± '), expected, strict=True):
                    decimals = len(written.partition('.')[2])
                    assert float(written) == pytest.approx(value, abs=0.5001 * 10**-decimals), (name, run, column)


def test_what_is_said_of_synermix_is_what_was_measured():
    """The gains in the README, the method card and docs/results.md."""
    results = results_of('methods')
    mean = {run: statistics.mean(result['eval_top1'] for result in values) for run, values in results.items()}
    gains = {
        ('SynerMix (MixUp)', 'MixUp'): 5.6,
        ('SynerMix (Manifold MixUp)', 'Manifold MixUp'): 2.6,
        ('SynerMix-Intra', 'none'): 1.8,
        ('none, twice the epochs', 'none'): 3.1,
        ('MixUp, twice the epochs', 'MixUp'): 5.3,
    }
    for (one, other), gain in gains.items():
        assert f'{mean[one] - mean[other]:.1f}' == f'{gain}'
    for name in ('README.md', 'docs/method.md', 'docs/results.md'):
        text = ' '.join((ROOT / name).read_text().split())
        assert re.search(r'5\.6 (points above MixUp|and \+2\.6 points)', text), name


def test_the_ranges_of_steps_are_those_of_the_rows():
    """The first table of docs/benchmarks.md sums up the medians of the five networks in float32."""
    benchmarks = (ROOT / 'docs/benchmarks.md').read_text()
    medians = {}
    for name, ratio in re.findall(
        r'^\| ([^|]+) \| [^|]+, float32 \| plain step \| ([\d.]+) \|', benchmarks, re.MULTILINE
    ):
        medians.setdefault('SynerMix' if name == 'exact' else f'SynerMix, {name}', []).append(float(ratio))
    compared = 0
    for name, step, *_ in rows_of_table(benchmarks, 'run'):
        if name in medians:
            assert len(medians[name]) == 5
            low, high = map(float, step.split(' to '))
            assert (low, high) == pytest.approx((min(medians[name]), max(medians[name])), abs=0.051), name
            compared += 1
    assert compared == 8


def test_method_card_names_tests_that_exist():
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    rows = rows_of_table(CARD, "[the paper's code](https://github.com/wxitxy/synermix)")
    assert len(rows) > 9
    for row in rows:
        assert f'def {row[-1]}(' in tests, row


def test_method_card_links_to_headings_that_exist():
    for path, heading in re.findall(r'\]\((?!http)([^)#]*)#([^)]+)\)', CARD):
        text = (ROOT / 'docs' / path).read_text() if path else CARD
        headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
        assert heading in {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings}, heading


def test_method_figure(tmp_path, monkeypatch):
    matplotlib.use('agg')
    monkeypatch.syspath_prepend(ROOT / 'examples')
    draw = importlib.import_module('method_figure').draw
    draw(tmp_path / 'method.png')
    committed = ROOT / 'docs/images/method.png'
    assert committed.stat().st_size < 150_000
    with Image.open(tmp_path / 'method.png') as drawn, Image.open(committed) as image:
        assert drawn.size == image.size == (1600, 784)
        images = [np.asarray(part.convert('L'), dtype=float) for part in (drawn, image)]
    assert np.abs(images[0] - images[1]).mean() < 2  # of 255; other versions of matplotlib may place text otherwise
