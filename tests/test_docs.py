"""What a user copies from the documentation works: code, commands, flags, links; and its numbers are those measured."""

import argparse
import importlib
import json
import operator
import re
import shlex
import statistics
from functools import cache, partial, reduce
from itertools import islice

import matplotlib
import numpy as np
import pytest
import scipy.stats
import timm
import torch
from conftest import ROOT
from PIL import Image
from timm.data import resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from torch.utils.data import DistributedSampler

import train
import validate
from timm_synermix import (
    SupplementBatchSampler,
    SynerMixTask,
    add_manifold_mixup_args,
    add_synermix_args,
    create_synermix_loader,
    intra_class_weight,
)
from timm_synermix.data.dataset_factory import create_dataset

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), ROOT / 'hparams' / 'README.md']
    if path.name != 'CHANGELOG.md'
)
every_page = pytest.mark.parametrize('page', PAGES)


@cache
def text_of(page):
    return (ROOT / page).read_text()


CARD = text_of('docs/method.md')


# Python


def snippets(page, section=''):
    """The Python code of a page, or of a section of it, named by how its heading begins."""
    text = text_of(page)
    if section:
        (text,) = re.findall(rf'^## {section}.*?(?=^## |\Z)', text, re.MULTILINE | re.DOTALL)
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


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
        train_loss_fn=SoftTargetCrossEntropy(),
        mixup_active=True,
        mixup_args=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=1.0, mode='batch', label_smoothing=0.1, num_classes=4),
    )


@pytest.mark.parametrize('prefetcher', [True, False])
def test_three_changes_to_timm_s_script(timm_script, prefetcher):
    flags, loader, task, off, one_after_the_other = snippets('docs/integrate.md', 'A copy')
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
    flags, loader, task, *_ = snippets('docs/integrate.md', 'A copy')
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
    for snippet in snippets('docs/integrate.md', 'A bare'):
        exec(snippet, scope)
    assert scope['loss'].isfinite()
    feature = scope['hook'](scope['clean'])[1]
    by_hand = scope['model'].get_classifier()(
        scope['intra_class_mix'](feature, scope['target'], weight=scope['weight'])[0]
    )
    torch.testing.assert_close(scope['logits'], by_hand)  # the two ways agree where both apply


def test_mixers():
    model = timm.create_model('test_resnet', num_classes=10)
    scope = dict(model=model, SynerMixTask=SynerMixTask, torch=torch)
    for snippet in snippets('docs/integrate.md', 'Manifold'):
        exec(snippet, scope)
        result = scope['task'](torch.randn(8, 3, 32, 32), torch.tensor([1, 1, 4, 4]))
        assert result['loss'].isfinite()
    _, soft = scope['mix_squares'](torch.randn(4, 3, 8, 8), torch.arange(4))
    assert soft.sum(1).tolist() == [1.0] * 4


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # Lightning's advice on workers and loggers
def test_lightning(image_folder, tmp_path, monkeypatch):
    lightning = pytest.importorskip('lightning')
    monkeypatch.chdir(tmp_path)
    quiet = dict(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(lightning, 'Trainer', partial(lightning.Trainer, **quiet))
    scope = dict(
        dataset=create_dataset('', root=str(image_folder), split='train'),
        model=timm.create_model('test_resnet', num_classes=4),
        device=torch.device('cpu'),
    )
    (snippet,) = snippets('docs/integrate.md', 'PyTorch Lightning')
    snippet = snippet.replace('input_size=224, batch_size=64', 'input_size=32, batch_size=8, num_workers=0')
    exec(snippet, scope)
    steps = 2 * len(scope['loader'])
    assert scope['trainer'].global_step == steps
    assert scope['trainer'].model.synermix.task.num_batches == steps
    assert {'loss', 'intra_loss', 'inter_loss'} <= scope['trainer'].callback_metrics.keys()


@pytest.mark.parametrize(('page', 'section'), [('README.md', 'Your own loop'), ('docs/integrate.md', 'A loop that')])
def test_a_loop(image_folder, page, section):
    """On a few small images, which the loop has as dataset."""
    model = timm.create_model('test_resnet', num_classes=100)
    scope = dict(
        dataset=create_dataset('', root=str(image_folder), split='train'),
        model=model,
        num_classes=100,
        device=torch.device('cpu'),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (loop,) = snippets(page, section)
    exec(loop.replace('input_size=224', 'input_size=32, num_workers=0'), scope)
    task = scope['task'] if 'task' in scope else scope['synermix'].task
    assert task.num_batches == 1
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert not torch.equal(before['conv1.0.weight'], model.state_dict()['conv1.0.weight'])


def test_readme_loads_a_checkpoint(tmp_path, monkeypatch):
    """The line of README, on a file with as many classes as the command above it trains."""
    (line,) = re.findall(r'^ {4}(timm\.create_model.*)$', text_of('README.md'), re.MULTILINE)
    (command,) = (command for command in commands('README.md') if '--num-classes' in command)
    args = train.parser.parse_args(command[command.index('train.py') + 1 :])
    weights = timm.create_model('test_resnet', num_classes=args.num_classes).state_dict()
    file = tmp_path / re.search(r"checkpoint_path='(.*?)'", line)[1]
    file.parent.mkdir(parents=True)
    torch.save({'state_dict': weights}, file)
    monkeypatch.chdir(tmp_path)
    assert eval(line.replace(args.model, 'test_resnet')).num_classes == args.num_classes


@pytest.fixture(scope='module')
def method_card():
    """What the code blocks of the method card leave behind, run one after the other; loops end after two batches."""
    torch.manual_seed(0)
    scope = dict(islice=islice)
    for snippet in snippets('docs/method.md'):
        exec(snippet.replace(' in loader:', ' in islice(loader, 2):'), scope)
        if 'torch.tensor([1.0, 3.0, 0.5])' in snippet:
            scope['given_draws'] = scope['mixed']
    return scope


def test_method_card_code(method_card):
    torch.testing.assert_close(method_card['given_draws'], torch.tensor([[1.0, 1.0], [3.0, 0.0]]))
    assert method_card['mixed_target'].tolist() == [0, 3, 5, 9, -100, -100, -100, -100]
    torch.testing.assert_close(
        method_card['loss'], 0.1 * method_card['intra_loss'] + 0.9 * method_card['inter_loss'], rtol=0, atol=1e-6
    )
    assert method_card['task'].beta == 0.1
    assert method_card['task'].num_batches == 3  # two of the digits, and the one in parts
    assert all(p.grad.isfinite().all() for p in method_card['model'].parameters())


# Commands, flags, files and links


def commands(page):
    """Every command of a page as words: in indented and fenced blocks, and in backticks."""
    text = re.sub(r'```\w+\n.*?```', '', text_of(page), flags=re.DOTALL)  # Python, YAML, ...
    lines = re.sub(r'\\\n\s*', ' ', text).splitlines()
    starts = r'(?:\$ )?(?:make|python|torchrun|accelerate launch|timm-synermix-\w+) [^`]*'
    found = [line.strip() for line in lines if re.match(rf'(?: {{4,}})?{starts}$', line)]
    found += re.findall(rf'`({starts})`', ' '.join(lines))
    return [[word for word in shlex.split(command, comments=True) if word != '...'] for command in found]


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


PARSERS = {'train': train.parser, 'validate': validate.parser}


def test_commands_are_found():
    assert ['make', 'test'] in commands('README.md')
    assert sum(len(commands(page)) for page in PAGES) > 20


@every_page
def test_commands_are_understood(page):
    """Targets of make exist; flags are taken with the values that follow, and none becomes the folder of images."""
    targets = re.findall(r'^([\w-]+):', text_of('Makefile'), re.MULTILINE)
    for command in commands(page):
        if command[0] == 'make':
            assert {word for word in command[1:] if '=' not in word} <= set(targets), command
            for name, _, value in (word.partition('=') for word in command[1:] if '=' in word):
                assert f'$({name})' in text_of('Makefile'), command
                assert name != 'GRID' or (ROOT / value).exists(), command
            continue
        script = next((i for i, word in enumerate(command) if re.search(r'\b(train|validate)(\.py)?$', word)), None)
        if script is None:  # another script of the repository
            file = next((word for word in command if word.endswith('.py')), None)
            if file is not None:
                flags = [word for word in command[: [*command, '--'].index('--')] if word.startswith('--')]
                assert all(f"'{flag}'" in text_of(file) for flag in flags), command
            continue
        parser = PARSERS[re.search(r'(train|validate)', command[script].rpartition('/')[2])[1]]
        assert not parser.parse_args(command[script + 1 :]).data, command


@every_page
def test_every_flag_exists(page):
    known = reduce(operator.or_, map(options, PARSERS.values())) | {'--cpu'}  # accelerate launch
    known |= set(re.findall(r"'(--[\w-]+)'", ''.join(map(text_of, glob('benchmarks/*.py')))))
    known |= {'--result'}  # a line of output
    of_launchers = re.compile(r'^.*(torchrun|accelerate launch|tensorboard|hf upload|#SBATCH|scancel).*$', re.MULTILINE)
    named = re.findall(r'(?<![\w-])--[a-z][\w-]*', of_launchers.sub('', text_of(page)))
    assert {name for name in named if '_' not in name and not name.endswith('-')} - known == set()


def glob(pattern):
    return [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]


@every_page
def test_every_file_of_the_repository_exists(page):
    folders = 'timm_synermix|hparams|benchmarks|examples|tests|docs'
    for name in re.findall(rf'(?<![\w./-])(?:{folders})/[\w./-]+\.\w+', text_of(page)):
        assert 'NAME' in name or (ROOT / name).exists(), name


@every_page
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r'\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)', text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if heading:
            headings = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
            assert heading in {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings}, heading


@every_page
def test_every_test_that_is_named_exists(page):
    tests = ''.join(map(text_of, glob('tests/test_*.py')))
    for name in re.findall(r'\btest_\w+\b(?!\.py)', text_of(page)):
        assert f'def {name}(' in tests or (ROOT / 'tests' / f'{name}.py').exists() or name in timm.list_models(), name


def test_every_case_of_the_reliability_table_has_a_test():
    table = text_of('docs/reliability.md').partition('and its test')[2]
    rows = re.findall(r'^\| (?!\*\*|exit|case|what|---|\d)(.*)\|$', table, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        assert '`test_' in row.rpartition('|')[2], row


def test_readme_is_read_in_a_minute():
    assert len(text_of('README.md').splitlines()) <= 120


def test_the_picture_of_the_house_has_every_part():
    """One line for each part of the package, and no other; a file that a line names is there."""
    (tree,) = re.findall(r'^ {4}timm_synermix/\n((?: {6}.*\n)+)', text_of('docs/design.md'), re.MULTILINE)
    named = [name for line in tree.splitlines() for name in re.split(r' {2,}', line.strip())[0].split(', ')]
    package = ROOT / 'timm_synermix'
    parts = [f'{path.name}/' for path in package.iterdir() if (path / '__init__.py').exists()]
    parts += [path.name for path in package.glob('*.py') if path.stem not in ('__init__', '__main__', 'entry')]
    assert sorted(named) == sorted(parts)


def test_the_design_names_what_exists():
    """Files of the package, and classes and functions in backticks."""
    text = text_of('docs/design.md')
    package = ''.join(map(text_of, glob('timm_synermix/**/*.py')))
    for name in re.findall(r'`([\w/]+\.py)`', text):
        assert (ROOT / 'timm_synermix' / name).exists() or (ROOT / name).exists(), name
    names = re.findall(r'`(?:[A-Z]\w*\.)?([a-z]+_\w+|[A-Z][a-z]+[A-Z]\w+)`', text)
    assert len(names) > 10
    for name in names:
        assert re.search(rf'\b{name}\b', package) or hasattr(torch, name), name


def rows_of_table(text, first_cell):
    """The cells of the rows below the headers that begin with a cell, without backticks."""
    tables = re.findall(rf'^\| {re.escape(first_cell)} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)', text, re.MULTILINE)
    assert tables
    rows = ''.join(tables).splitlines()
    return [[cell.strip().replace('`', '') for cell in row.strip('|').split('|')] for row in rows]


def test_method_card_names_what_exists():
    names = [name for _, _, where in rows_of_table(CARD, 'step') for name in re.findall(r'\b[a-z]\w*\.[\w.]+', where)]
    assert len(names) > 9
    for name in names:
        module, _, attribute = name.rpartition('.')
        assert hasattr(importlib.import_module(f'timm_synermix.{module}'), attribute), name


def test_method_card_knows_the_flags_and_their_defaults():
    actions = {option: action for action in train.parser._actions for option in action.option_strings}
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


# Numbers


def test_method_card_numbers_of_a_batch(method_card):
    rows = [[row[0].replace(',', ''), *row[1:]] for row in rows_of_table(CARD, 'classes C')]
    some = [(int(c), int(b)) for c, b, *_ in rows if int(c) <= 1000]
    assert some == [(c, b) for c in (10, 100, 1000) for b in (64, 128, 256, 1024)]
    generator = np.random.default_rng(0)
    for row in rows:
        num_classes, batch_size = int(row[0]), int(row[1])
        present, per_class, lone = method_card['per_batch'](batch_size, num_classes)
        written = [f'{present:.1f}', f'{per_class:.2f}', f'{lone:.1f}', f'{100 * lone / batch_size:.0f} %']
        assert row[2:] == written, row
        if num_classes > 1000:  # too many to draw
            continue
        counts = generator.multinomial(batch_size, [1 / num_classes] * num_classes, size=400)
        assert (counts > 0).sum(1).mean() == pytest.approx(present, rel=0.02)
        assert (counts == 1).sum(1).mean() == pytest.approx(lone, rel=0.04, abs=0.1)
    targets = np.repeat(np.arange(100), 50)
    sampler = SupplementBatchSampler(DistributedSampler(targets, num_replicas=1, rank=0), targets, 128)
    expected = next(float(row[4]) for row in rows if row[:2] == ['100', '128'])
    assert sampler.cost().partners == pytest.approx(expected, abs=2)


def test_method_card_deviation_of_a_mix():
    (header,) = re.findall(r'^\| images n (.*)\|$', CARD, re.MULTILINE)
    (deviations,) = rows_of_table(CARD, 'images n | ' + ' | '.join(header.strip('| ').split(' | ')))
    generator = torch.Generator().manual_seed(0)
    for n, deviation in zip(header.strip('| ').split(' | '), deviations[1:]):
        target = torch.arange(5000).repeat_interleave(int(n))
        weight = intra_class_weight(target, generator=generator).view(5000, int(n))
        assert weight.square().sum(1).mean().sqrt().item() == pytest.approx(float(deviation), abs=0.01), n


def results_of(name):
    """The results in a file of benchmarks/results, by run."""
    content = json.loads((ROOT / 'benchmarks' / 'results' / f'{name}.json').read_text())
    runs = {}
    for result in content['results'] if isinstance(content, dict) else content:
        runs.setdefault(result['run'], []).append(result)
    return runs


COLUMNS = {
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


def tables_of(first):
    """The tables of trainings in the documents, by their first column: page, name of the results, and rows by column.

    The command above a table, in the same section, names the results: those of a grid, of downstream.py, or of
    `make reproduce`, whose grid is `methods`.
    """
    for page in PAGES:
        for section in re.split(r'^#+ ', text_of(page), flags=re.MULTILINE):
            for table in re.finditer(rf'^\| ({first} \|.*) \|\n\|[- |]+\|\n((?:\|.*\n)+)', section, re.MULTILINE):
                above = section[: table.start()]
                command = re.findall(
                    r'^ {4}.*(?:grids/(\w+)\.yaml|benchmarks/(downstream)|make reproduce DATA)', above, re.M
                )
                columns = table[1].split(' | ')
                rows = [dict(zip(columns, row.strip('| ').split(' | '), strict=True)) for row in table[2].splitlines()]
                yield page, ''.join(command[-1]) or 'methods' if command else None, rows


TABLES, DIFFERENCES = list(tables_of('run')), list(tables_of('difference'))


def test_the_tables_of_trainings_are_found():
    assert {'methods', 'beta', 'caltech101', 'finetune', 'downstream', 'variants'} <= {name for _, name, _ in TABLES}


@pytest.mark.parametrize(('page', 'name', 'rows'), TABLES, ids=[f'{page}-{name}' for page, name, _ in TABLES])
def test_a_table_is_that_of_the_runs(page, name, rows):
    """Its command stands above it. Each cell is the mean, and after ± the standard deviation, of the raw results."""
    results = results_of(name)
    compared = 0
    for row in rows:
        found = results[row['run']]
        assert int(row.get('seeds', len(found))) == len(found)
        for column in COLUMNS.keys() & row.keys():
            values = [result[COLUMNS[column]] for result in found if COLUMNS[column] in result]
            if row[column] == '-':
                assert not values, (row['run'], column)
                continue
            expected = [statistics.mean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
            for written, value in zip(row[column].split(' ± '), expected, strict=True):
                decimals = len(written.partition('.')[2])
                assert float(written) == pytest.approx(value, abs=0.5001 * 10**-decimals), (row['run'], column)
                compared += 1
    assert compared >= len(rows)


@pytest.mark.parametrize(('page', 'name', 'rows'), DIFFERENCES, ids=[f'{page}-{name}' for page, name, _ in DIFFERENCES])
def test_a_difference_is_that_of_the_runs(page, name, rows):
    """Seed by seed; after ± half of Student's 95 % interval, as scipy has it."""
    results = results_of(name)
    for row in rows:
        one, two = ({r['seed']: r for r in results[run]} for run in row['difference'].split(' - '))
        seeds = sorted(one.keys() & two.keys())
        assert int(row['seeds']) == len(seeds)
        for column in COLUMNS.keys() & row.keys():
            values = [[run[seed][COLUMNS[column]] for seed in seeds] for run in (one, two)]
            interval = scipy.stats.ttest_rel(*values).confidence_interval()
            expected = (interval.high + interval.low) / 2, (interval.high - interval.low) / 2
            for written, value in zip(row[column].split(' ± '), expected, strict=True):
                decimals = len(written.partition('.')[2])
                assert float(written) == pytest.approx(value, abs=0.5001 * 10**-decimals), (row['difference'], column)
        if row.get('times the seconds', '-') != '-':
            ratios = [one[seed]['seconds'] / two[seed]['seconds'] for seed in seeds if 'seconds' in one[seed]]
            assert float(row['times the seconds']) == pytest.approx(statistics.median(ratios), abs=0.00501), row


def test_the_gains_are_those_measured():
    gains = {
        ('long', 'SynerMix (MixUp)', 'MixUp'): ('README.md', 'docs/method.md', 'docs/results.md'),
        ('long', 'SynerMix (MixUp), fraction 0.125', 'MixUp'): ('docs/results.md',),
        ('long', 'MixUp and clean images', 'MixUp'): ('README.md', 'docs/method.md', 'docs/results.md'),
        ('long', 'MixUp, 2.1 times the epochs', 'MixUp'): ('README.md', 'docs/method.md', 'docs/results.md'),
        ('long', 'CutMix', 'MixUp'): ('docs/method.md', 'docs/results.md'),
        ('methods', 'SynerMix (MixUp)', 'MixUp'): ('docs/method.md', 'docs/results.md'),
        ('methods', 'SynerMix (Manifold MixUp)', 'Manifold MixUp'): ('docs/method.md', 'docs/results.md'),
        ('methods', 'SynerMix-Intra', 'none'): ('docs/method.md', 'docs/short_trainings.md'),
        ('methods', 'none, twice the epochs', 'none'): ('docs/short_trainings.md',),
        ('methods', 'MixUp, twice the epochs', 'MixUp'): ('docs/short_trainings.md',),
    }
    for (name, *runs), pages in gains.items():
        one, other = ({r['seed']: r['eval_top1'] for r in results_of(name)[run]} for run in runs)
        gain = statistics.mean(one[seed] - other[seed] for seed in one.keys() & other.keys())
        for page in pages:
            assert f'{gain:.1f}' in text_of(page), (name, *runs, page)


def test_the_intervals_are_those_of_the_seeds():
    """Where a page says `A points (95 % interval B to C)` it speaks of SynerMix (MixUp) and MixUp."""
    runs = results_of('long')
    one, other = ({r['seed']: r['eval_top1'] for r in runs[run]} for run in ('SynerMix (MixUp)', 'MixUp'))
    low, high = scipy.stats.ttest_rel(
        *([run[seed] for seed in sorted(one)] for run in (one, other))
    ).confidence_interval()
    for page in ('README.md', 'docs/results.md'):
        (found,) = re.findall(r'([\d.]+) points\b[^(]*\(95 % interval ([\d.]+) to ([\d.]+)', text_of(page))
        assert found == (f'{(low + high) / 2:.1f}', f'{low:.1f}', f'{high:.1f}'), page


def test_the_shares_of_the_gain_are_those_of_the_seeds():
    """What a fraction keeps of SynerMix's gain over MixUp: `A (B to C) of the gain`, by Fieller's interval of a ratio.

    It holds the shares r for which the differences, less r times SynerMix's, have 0 in their own interval.
    """
    runs = results_of('long')
    names = ('SynerMix (MixUp)', 'SynerMix (MixUp), fraction 0.125', 'MixUp')
    written = re.findall(r'([\d.]+) \(([\d.]+) to\s+([\d.]+)\) of the gain', text_of('docs/results.md'))
    for column, found in zip(('eval_top1', 'eval_cosine_cohesion'), written, strict=True):
        all_images, fraction, mixup = (
            np.array([r[column] for r in sorted(runs[name], key=lambda r: r['seed'])]) for name in names
        )
        shares = np.arange(0, 4, 0.001)
        rest = (fraction - mixup) - shares[:, None] * (all_images - mixup)
        inside = shares[scipy.stats.ttest_1samp(rest, 0, axis=1).pvalue > 0.05]
        share = (fraction - mixup).mean() / (all_images - mixup).mean()
        assert [float(value) for value in found] == pytest.approx([share, inside[0], inside[-1]], abs=0.0051), column


def test_method_card_has_the_figures_of_the_benchmarks():
    measured = {row[0]: row for row in rows_of_table(text_of('docs/benchmarks.md'), 'run')}
    rows = rows_of_table(CARD, 'run')
    assert {name for name, *_ in rows} == measured.keys()
    for name, _, step, top1 in rows:
        assert [step, top1] == [measured[name][1], measured[name][3]], name


def test_the_ranges_of_steps_are_those_of_the_rows():
    """The first table of docs/benchmarks.md sums up the medians of the five networks in float32."""
    benchmarks = text_of('docs/benchmarks.md')
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
    assert compared


def test_method_figure(tmp_path, monkeypatch):
    """The picture of the method card is what its script draws, but for where a matplotlib puts text."""
    matplotlib.use('agg')
    monkeypatch.syspath_prepend(ROOT / 'examples')
    importlib.import_module('method_figure').draw(tmp_path / 'method.png')
    files = (tmp_path / 'method.png', ROOT / 'docs/images/method.png')
    drawn, committed = (np.asarray(Image.open(file).convert('L').resize((400, 196)), dtype=float) for file in files)
    assert np.abs(drawn - committed).mean() < 2  # of 255
