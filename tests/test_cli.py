import argparse
import datetime
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm.loss
import timm.utils
import torch
import yaml
from conftest import ROOT

import train
from timm_synermix import entry
from timm_synermix.cli.checks import UsageError
from timm_synermix.cli.common_args import ParseKwargs
from timm_synermix.cli.help import CHAPTERS
from timm_synermix.cli.loss import criterion_kwargs
from timm_synermix.cli.rules import RULES, Rule, check_values
from timm_synermix.cli.timm_args import TIMM_VERSION
from timm_synermix.cli.validate_args import create_parser as create_validate_parser
from timm_synermix.utils.checks import Range

DATA = Path(__file__).parent / 'data'
FLAGS = json.loads((DATA / 'timm_train_flags.json').read_text())
VALIDATE_FLAGS = json.loads((DATA / 'timm_validate_flags.json').read_text())
TYPES = {'int': int, 'float': float, 'str': str}


def parse(monkeypatch, *argv):
    monkeypatch.setattr('sys.argv', ['train.py', *argv])
    return train._parse_args()


def actions():
    return {action.dest: action for action in train.parser._actions}


@pytest.mark.parametrize('flag', FLAGS, ids=lambda flag: flag['names'][-1])
def test_every_flag_of_timm(flag):
    """Names, type, default, number of values and choices of timm's own flag."""
    first_long = next((name for name in flag['names'] if name.startswith('--')), flag['names'][0])
    action = next(a for a in train.parser._actions if set(flag['names']) <= {*a.option_strings, a.dest})
    assert action.dest == flag.get('dest', first_long.lstrip('-').replace('-', '_'))
    if flag.get('action') == 'store_true':
        assert isinstance(action, argparse._StoreTrueAction)
    elif flag.get('action') == 'utils.ParseKwargs':
        assert isinstance(action, ParseKwargs)
    default = flag.get('default', False if flag.get('action') == 'store_true' else None)
    assert action.default == (eval(default) if flag['names'] == ['--ratio'] else default)
    assert action.type is (TYPES[flag['type']] if 'type' in flag else None)
    if 'nargs' in flag:
        assert action.nargs == flag['nargs']
    assert action.const == flag.get('const', True if flag.get('action') == 'store_true' else None)
    assert action.choices == flag.get('choices')


def test_keyword_arguments_are_read_as_timm_reads_them():
    given = ['a=1', 'b=2.5', 'c=text', "d=[1, 'x']", 'e=None', 'f=1=2', 'g=', '']
    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    ours.add_argument('--kwargs', nargs='*', action=ParseKwargs)
    theirs.add_argument('--kwargs', nargs='*', action=timm.utils.ParseKwargs)
    assert ours.parse_args(['--kwargs', *given]) == theirs.parse_args(['--kwargs', *given])


def test_keyword_arguments_need_a_name(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '--model-kwargs', 'depth')
    assert error.value.code == 2
    assert "--model-kwargs: must be name=value, got 'depth'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('parser', 'flags'),
    [(train.parser, FLAGS), (create_validate_parser(), VALIDATE_FLAGS)],
    ids=['train', 'validate'],
)
def test_the_table_knows_which_flags_are_timm_s(parser, flags):
    known = {name for flag in flags for name in flag['names']}
    timm_s = {action.dest for action in parser._actions if known & {*action.option_strings, action.dest}}
    assert {action.dest for action in parser._actions} - timm_s - {'help'} == {
        action.dest for action in parser._actions if RULES.get(action.dest, Rule()).ours
    }


@pytest.mark.parametrize(
    ('given', 'dest'),
    [('--crop', 'crop_pct'), ('--in-', 'in_chans'), ('--rep', 'reprob'), ('--log-w', 'log_wandb'), ('--syner', None)],
)
def test_abbreviations_that_timm_knows(monkeypatch, capsys, given, dest):
    """Unique in timm's script, they are not made ambiguous by our flags."""
    if dest is None:
        with pytest.raises(SystemExit):
            parse(monkeypatch, given)
        assert 'ambiguous option' in capsys.readouterr().err
    else:
        value = [] if dest == 'log_wandb' else ['1']
        assert getattr(parse(monkeypatch, given, *value)[0], dest) == (True if dest == 'log_wandb' else 1)


def test_both_spellings_of_local_rank(monkeypatch):
    assert parse(monkeypatch, '--local-rank', '1')[0].local_rank == 1
    assert parse(monkeypatch, '--local_rank=2')[0].local_rank == 2


def held_elsewhere(path):
    """Whether another process cannot have the file for itself."""
    code = f'import fcntl, os; fcntl.flock(os.open({str(path)!r}, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)'
    return subprocess.run([sys.executable, '-c', code], capture_output=True).returncode != 0


def test_a_run_of_a_sweep_holds_its_locks(monkeypatch, tmp_path):
    """As timm's sweep.py starts it: locks that are shared, and nothing of it among the arguments of the training."""
    locks = [tmp_path / 'plan.lock', tmp_path / 'job.train']
    for path in locks:
        path.touch()
    (tmp_path / 'job.attempt').write_text('a1')
    sweep = ['--sweep-locks', *map(str, locks), '--sweep-attempt', str(tmp_path / 'job.attempt')]
    fds = train._sweep_lock_fds
    try:
        args, text = parse(monkeypatch, '--model', 'test_vit', *sweep, 'a1')
        assert len(fds) == 2
        assert all(held_elsewhere(path) for path in locks)
        with pytest.raises(SystemExit, match='a0 is not the live one, it was retired'):
            parse(monkeypatch, *sweep, 'a0')
    finally:
        for fd in fds:
            os.close(fd)
        fds.clear()
    assert not any(held_elsewhere(path) for path in locks)
    assert args.model == 'test_vit'
    assert 'sweep' not in text
    assert not [name for name in [*vars(args), *vars(train.parser.parse_args([]))] if 'sweep' in name]


def stats(tmp_path, counts=(2, 2, 4)):
    path = tmp_path / 'stats.json'
    path.write_text(json.dumps(dict(pos_counts=counts, num_samples=8)))
    return str(path)


def test_flags_that_say_the_same_as_loss(monkeypatch):
    args = parse(monkeypatch, '--bce-loss', '--bce-pos-weight', '2')[0]
    assert (args.loss, args.loss_pos_weight, args.smoothing) == ('bce', '2.0', 0.1)
    assert parse(monkeypatch, '--jsd-loss', '--aug-splits', '3')[0].loss == 'jsd'
    assert parse(monkeypatch, '--task', 'multilabel', '--num-classes', '3')[0].smoothing == 0


SEVERAL = ['--task', 'multilabel', '--num-classes', '3']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([*SEVERAL, '--bce-loss', '--loss', 'asl'], '--bce-loss and --loss asl cannot be used together'),
        (['--bce-loss', '--bce-pos-weight', '2', '--loss-pos-weight', '3'], '--bce-pos-weight and --loss-pos-weight'),
        (['--loss', 'hinge'], "--loss must be one of ce, bce, asl, poly, jsd, twoway, zlpr, db, got 'hinge'"),
        (['--loss', 'zlpr'], "--loss zlpr: Loss type 'zlpr' requires multi-label targets."),
        (
            [*SEVERAL, '--loss', 'ce'],
            "--loss ce with --task multilabel: Loss type 'ce' does not support multi-label targets",
        ),
        (['--jsd-loss'], '--loss jsd: JSD loss requires jsd_splits > 1'),
        (
            ['--loss-pos-weight', '2'],
            '--loss: Class and positive weights are only supported by bce and multi-label',
        ),
        ([*SEVERAL, '--loss', 'twoway', '--mixup', '0.5'], 'does not support Mixup/CutMix or smoothing'),
        ([*SEVERAL, '--loss', 'zlpr', '--loss-pos-weight', '2'], 'Class and positive weights are only supported'),
        (['--loss', 'asl', '--cutmix', '1'], 'Single-label ASL requires class index targets'),
        (['--loss', 'poly', '--poly-gamma', '1'], 'Poly gamma and alpha only apply to the multi-label'),
        (['--loss', 'asl', '--bce-sum'], 'only apply to the bce loss'),
        ([*SEVERAL, '--loss', 'db'], 'The db loss requires class_counts and num_samples'),
        ([*SEVERAL, '--loss-pos-weight', 'neg_pos'], "--loss-pos-weight: Class weight method 'neg_pos' requires class"),
        ([*SEVERAL, '--loss-pos-weight', 'inv_freq'], "--loss-pos-weight: Method 'inv_freq' computes class_weight"),
        ([*SEVERAL, '--loss-class-weight', 'no.json'], '--loss-class-weight: could not convert string to float'),
        (['--class-stats', 'no.json'], '--class-stats: [Errno 2] No such file or directory'),
        (['--dataset', 'hfds/x', '--target-format', 'multihot'], '--target-format multihot needs --task multilabel'),
        (['--task', 'multilabel'], '--task multilabel needs --num-classes'),
        ([*SEVERAL, '--kd-model-name', 'x'], '--task multilabel and --kd-model-name cannot be used together'),
    ],
)
def test_losses_that_timm_refuses(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, *flags)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count('\n') == 1


def criterion(monkeypatch, *flags):
    return timm.loss.create_classification_loss(multi_label=True, **criterion_kwargs(parse(monkeypatch, *flags)[0], 3))


def test_losses_have_the_arguments_of_their_flags(monkeypatch, tmp_path):
    counted = ['--class-stats', stats(tmp_path)]
    bce = [*SEVERAL, *counted, '--loss-pos-weight', 'neg_pos', '--loss-class-weight', 'inv_freq']
    loss = criterion(monkeypatch, *bce, '--loss-weight-power', '0.5', '--loss-weight-max', '1.1')
    assert type(loss).__name__ == 'BinaryCrossEntropy'
    torch.testing.assert_close(loss.pos_weight, torch.tensor([3.0, 3.0, 1.0]).sqrt().clamp(max=1.1))
    weight = torch.tensor([4.0, 4.0, 2.0]).sqrt()
    torch.testing.assert_close(loss.weight, (weight / weight.mean()).clamp(max=1.1))
    effective = criterion(monkeypatch, *bce[:-1], 'effective_num', '--loss-weight-beta', '0.5').weight
    weight = torch.tensor([0.5 / (1 - 0.5**n) for n in (2, 2, 4)])
    torch.testing.assert_close(effective, weight / weight.mean())
    assert criterion(monkeypatch, *SEVERAL, '--loss', 'asl', '--loss-pos-weight', '1,2,3').pos_weight.tolist() == [
        1,
        2,
        3,
    ]
    poly = criterion(monkeypatch, *SEVERAL, '--loss', 'poly', '--poly-gamma', '2', '--poly-epsilon', '-1')
    assert (poly.gamma, poly.epsilon) == (2, -1)
    assert type(criterion(monkeypatch, *SEVERAL, *counted, '--loss', 'db')).__name__ == 'DistributionBalancedLoss'
    for flag, values in (('--loss-class-weight', ['1,2']), ('--loss-pos-weight', ['1,2'])):
        with pytest.raises(ValueError, match=f'{flag} has 2 entries but the model has 3 classes'):
            criterion(monkeypatch, *SEVERAL, flag, *values)
    with pytest.raises(ValueError, match='--class-stats has 2 entries but the model has 3 classes'):
        criterion(monkeypatch, *SEVERAL, '--loss', 'db', '--class-stats', stats(tmp_path, [1, 2]))


def test_the_losses_are_timm_s():
    assert RULES['loss'].values == timm.loss.LOSS_TYPES


def config(tmp_path, **values):
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(values) if values else '')
    return str(path)


def test_config_is_a_set_of_defaults(monkeypatch, tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('lr: 3e-4\nepochs: "7"\nsynermix: true\nscale: [0.5, 1]\nmodel_kwargs: {a: 1}\nexperiment: 12\n')
    args, text = parse(monkeypatch, '-c', str(path), '--epochs', '9')
    assert (args.lr, args.epochs, args.synermix, args.scale) == (3e-4, 9, True, [0.5, 1.0])
    assert args.model_kwargs == {'a': 1}
    assert args.experiment == '12'
    assert yaml.safe_load(text) == vars(args)


def test_args_yaml_is_itself_a_config(monkeypatch, tmp_path):
    args, text = parse(
        monkeypatch, 'images', '--torchcompile', '--mixup', '0.2', '--synermix', '--mean', '0.5', '0.4', '0.3'
    )
    (tmp_path / 'args.yaml').write_text(text)
    again, _ = parse(monkeypatch, '-c', str(tmp_path / 'args.yaml'))
    assert {**vars(again), 'config': ''} == vars(args)


def test_a_flag_with_an_optional_value_may_be_true(monkeypatch, tmp_path):
    assert parse(monkeypatch, '-c', config(tmp_path, torchcompile=True))[0].torchcompile == 'inductor'


def test_synermix_flags_without_synermix_warn(monkeypatch, caplog):
    parse(monkeypatch, '--synermix-num-mixed', '2')
    assert '--synermix-num-mixed has no effect without --synermix' in caplog.text


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('epochs', 'many', "epochs in .*: invalid int value: 'many'"),
        ('epochs', 1.5, "epochs in .*: invalid int value: '1.5'"),
        ('epochs', True, "epochs in .*: invalid int value: 'True'"),
        ('epochs', datetime.date(2026, 1, 2), "epochs in .*: invalid int value: '2026-01-02'"),
        ('epochs', 10**30, '--epochs must be a number that fits 64 bits or float32, got 10'),
        ('lr', 'fast', "lr in .*: invalid float value: 'fast'"),
        ('lr', [0.1], r'lr in .* must be a single value, got \[0.1\]'),
        ('experiment', ['a'], r"experiment in .* must be a single value, got \['a'\]"),
        ('scale', 0.5, 'scale in .* must be a list of single values, got 0.5'),
        ('scale', [[0.5], 1], r'scale in .* must be a list of single values, got \[\[0.5\], 1\]'),
        ('decay_milestones', [1, 'x'], "decay_milestones in .*: invalid int value: 'x'"),
        ('input_size', [3, 224], r'input_size in .* must be a list of 3 single values, got \[3, 224\]'),
        ('input_size', 224, 'input_size in .* must be a list of 3 single values, got 224'),
        ('synermix', 'yes', "synermix in .* must be true or false, got 'yes'"),
        ('synermix_batch', 'both', "synermix_batch in .*: invalid choice: 'both'"),
        ('train_size_schedule', 'cosine', "train_size_schedule in .*: invalid choice: 'cosine'"),
        ('model_kwargs', 'a=1', 'model_kwargs in .* must be a mapping'),
    ],
)
def test_wrong_types_in_a_config_are_errors(monkeypatch, tmp_path, capsys, key, value, message):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '-c', config(tmp_path, **{key: value}))
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize('text', ['- a\n- b\n', 'a: [', None])
def test_a_config_that_is_none(monkeypatch, tmp_path, capsys, text):
    path = tmp_path / 'config.yaml'
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '-c', str(path))
    assert error.value.code == 2
    assert '--config: ' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('base', 'message'),
    [
        ('config.yaml', 'config.yaml is a base of itself'),
        ('other.yaml', 'cannot read'),
        (['a.yaml'], "base in .* must be the name of a file, got ['a.yaml']"),
        ('', "must be the name of a file, got ''"),
        (False, 'must be the name of a file, got False'),
    ],
)
def test_a_base_that_is_none(monkeypatch, tmp_path, capsys, base, message):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '-c', config(tmp_path, base=base))
    assert error.value.code == 2
    assert re.search(message.replace('[', r'\['), capsys.readouterr().err)


def test_bases_may_have_bases(monkeypatch, tmp_path, caplog):
    """The nearer value counts; an unknown key is named with its file."""
    (tmp_path / 'deeper').mkdir()
    (tmp_path / 'far.yaml').write_text('lr: 0.1\nepochs: 7\nmodel: far\nnonsense: 1\n')
    (tmp_path / 'deeper' / 'near.yaml').write_text('base: ../far.yaml\nepochs: 8\nmodel: near\n')
    args, _ = parse(monkeypatch, '-c', config(tmp_path, base='deeper/near.yaml', model='own'), '--lr', '0.3')
    assert (args.lr, args.epochs, args.model) == (0.3, 8, 'own')
    assert 'far.yaml' in caplog.text
    assert "unknown key 'nonsense'" in caplog.text


def test_values_of_a_config_that_survive(monkeypatch, tmp_path):
    """What a command line cannot say, or says in another way."""
    values = dict(
        synermix=False, pretrained=False, cohesion=False, torchcompile=None, aa=None, wandb_tags=[], dist_bn='',
        experiment='-dash', mean=[-1, '-1e-3', 0.5], lr_noise=[0.1], epochs=7.0, decay_epochs=7, seed='3',
        model_kwargs={'depth': -1, 'nested': {'a': [1]}}, opt_kwargs={}, wandb_project=datetime.date(2026, 1, 2),
    )  # fmt: skip
    args = parse(monkeypatch, '-c', config(tmp_path, **values))[0]
    changed = dict(mean=[-1.0, -1e-3, 0.5], epochs=7, seed=3, wandb_project='2026-01-02')
    assert {name: getattr(args, name) for name in values} == {**values, **changed}
    assert isinstance(args.decay_epochs, float)


def test_args_yaml_of_timm(monkeypatch, tmp_path):
    """timm writes the default of every flag, among them null and []."""
    defaults = {flag['names'][-1].lstrip('-').replace('-', '_'): flag.get('default') for flag in FLAGS}
    defaults['ratio'] = [0.75, 4 / 3]
    given = parse(monkeypatch, '-c', config(tmp_path, **{n: v for n, v in defaults.items() if n in actions()}))[0]
    assert {**vars(given), 'config': ''} == vars(parse(monkeypatch)[0])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'experiment: caf\xe9', 'cannot read'),
        (b'epochs: 2026-13-45', 'cannot read .* month must be in 1..12'),
        (b'epochs: ' + b'9' * 5000, 'cannot read'),
        (b'[' * 1000, 'cannot read'),
        (b'a: &a [1,1,1,1,1,1,1,1,1,1]\n' + b''.join(
            b'%c: &%c [%s]\n' % (b, b, b','.join([b'*%c' % (b - 1)] * 10)) for b in b'bcdefghij'
        ), 'must hold at most 10000 values'),
        (b'mean: &a [*a]', 'must hold at most 10000 values'),
    ],
    ids=['latin-1', 'no date', 'huge', 'deep', 'aliases', 'circle'],
)  # fmt: skip
def test_a_config_that_cannot_be_read_is_one_line(monkeypatch, tmp_path, capsys, content, message):
    path = tmp_path / 'config.yaml'
    path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '-c', str(path))
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert re.search(f'--config: .*{message}', text)
    assert text.count('\n') == 1
    assert len(text) < 1000


@pytest.mark.parametrize(
    ('key', 'meant'),
    [
        ('synermx', 'synermix'),
        ('batch-size', 'batch_size'),
        ('smoothng', 'smoothing'),
        ('modelema', 'model_ema'),
        ('synermix_weight_of_the_loss', 'synermix_'),
        ('Synermix', 'synermix'),
    ],
)
def test_a_misspelt_key_is_an_error(monkeypatch, tmp_path, capsys, key, meant):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '-c', config(tmp_path, **{key: 1}))
    assert error.value.code == 2
    assert re.search(f"unknown key '{key}' in .*config.yaml, did you mean {meant}", capsys.readouterr().err)


@pytest.mark.parametrize('key', ['epoch', 'amp_impl', 'pretrained_cfg_overlay', 'not_an_arg', 7])
def test_other_unknown_keys_are_left_out(monkeypatch, tmp_path, caplog, key):
    args = parse(monkeypatch, '-c', config(tmp_path, **{'lr': 0.5, str(key): 1}))[0]
    assert args.lr == 0.5
    assert f"unknown key '{key}'" in caplog.text


def test_no_flag_is_forgotten_in_the_table():
    flags = {action.dest for parser in (train.parser, create_validate_parser()) for action in parser._actions}
    assert RULES.keys() == flags - {'help'}


@pytest.mark.parametrize('parser', [train.parser, create_validate_parser()], ids=['train', 'validate'])
def test_the_table_fits_the_flags(parser):
    """A number has a range, choices are those of the parser, and defaults are allowed."""
    for action in parser._actions:
        rule = RULES.get(action.dest, Rule())
        numeric = action.type in (int, float)
        assert numeric == isinstance(rule.values, Range) or action.dest == 'num_gpu', action.dest
        if action.choices is not None and rule.values is not None:
            assert action.choices == rule.values
        assert rule.needs is None or rule.needs in RULES
    check_values(argparse.Namespace(**{action.dest: action.default for action in parser._actions}))


def test_a_range_says_what_it_is():
    assert [str(Range(1)), str(Range(0, above=True)), str(Range(0, 1)), str(Range(0, 1, above=True)), str(Range())] == [
        'at least 1', 'above 0', 'in [0, 1]', 'in (0, 1]', 'a finite number'
    ]  # fmt: skip
    nan, inf = float('nan'), float('inf')
    for values, good, bad in [
        (Range(1), [1, 1e9], [0, nan, inf]),
        (Range(0, above=True), [1e-9], [0, -1, nan]),
        (Range(0, 1), [0, 1], [-1e-9, 1.01, nan]),
        (Range(), [-1e9, 10**400], [nan, inf, -inf]),
    ]:
        for value in good:
            values.check('x', value)
        for value in bad:
            with pytest.raises(ValueError, match=f'^x must be {re.escape(str(values))}, got {value}$'):
                values.check('x', value)


OUT_OF_SCOPE = [
    ['--torchscript'],
    ['--naflex-loader'],
]


@pytest.mark.parametrize('flags', OUT_OF_SCOPE, ids=lambda flags: flags[0])
def test_what_synermix_cannot_be_used_with(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '--synermix', *flags)
    assert error.value.code == 2
    message = capsys.readouterr().err
    flag = flags[0]
    assert message.count('\n') == 1
    assert flag in message
    assert '--synermix' in message or flag == '--naflex-loader'
    if flag != '--naflex-loader':
        parse(monkeypatch, *flags)  # on its own it is fine


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--synermix', '--synermix-beta', '1.5'], '--synermix-beta must be in [0, 1], got 1.5'),
        (['--synermix', '--synermix-beta', 'nan'], 'got nan'),
        (['--synermix', '--synermix-num-mixed', '-1'], '--synermix-num-mixed must be at least 0, got -1'),
        (
            ['--synermix', '--synermix-mix', 'none', '--synermix-num-mixed', '2'],
            "--synermix-num-mixed says how to mix, and cannot be used with --synermix-mix 'none'",
        ),
        (['--synermix', '-b', '1'], '--batch-size with --synermix must be at least 2, got 1'),
        (['--mixup', '1', '-b', '7'], '--batch-size must be even with --mixup or --cutmix, got 7'),
        (['--synermix-singletons', 'drop'], "invalid choice: 'drop'"),
        (['--resume', 'auto'], '--resume auto needs --experiment'),
        (['--stop-epoch', '0'], '--stop-epoch must be at least 1, got 0'),
        (['--clip-mode', 'max'], "--clip-mode must be one of norm, value, agc, got 'max'"),
        (['--amp', '--amp-dtype', 'float8'], "--amp-dtype must be one of float16, bfloat16, got 'float8'"),
        (['--amp', '--model-dtype', 'bfloat16'], '--amp needs a float32 model'),
        (['--mixup-mode', 'all'], "--mixup-mode must be one of batch, pair, elem, half, got 'all'"),
        (['--grad-accum-steps', '0'], '--grad-accum-steps must be at least 1, got 0'),
        (['--scale', '0.5'], '--scale must be two values, the lower one first, got [0.5]'),
        (['--cutmix-minmax', '0.9', '0.1'], '--cutmix-minmax must be two values, the lower one first'),
        (['--interpolation', 'best'], '--interpolation must be one of nearest,'),
        (['--split-bn'], '--split-bn needs --aug-splits'),
        (
            ['--synermix', '--synermix-batch', 'fixed', '--train-img-sizes', '32', '48'],
            '--synermix-batch fixed and --train-img-sizes cannot be used together',
        ),
        (
            ['--synermix', '--train-img-sizes', '32', '32', '--train-batch-sizes', '8', '4'],
            '--train-img-sizes must differ from each other with --synermix, got [32, 32]',
        ),
        *(
            (
                ['--synermix', '--task', 'multilabel', '--num-classes', '9', *other.split()],
                f'--task multilabel and {other} cannot be used together',
            )
            for other in ('--synermix-batch fixed', '--synermix-singletons bank', '--synermix-gather')
        ),
        (['--report', *SEVERAL], '--report and --task multilabel cannot be used together'),
        (
            ['--manifold-mixup', '1', '--task', 'multilabel', '--num-classes', '9'],
            '--manifold-mixup and --task multilabel cannot be used together',
        ),
        (['--manifold-mixup', '1', '--aug-splits', '2'], '--manifold-mixup and --aug-splits cannot be used together'),
        (
            ['--manifold-mixup', '1', '--split-bn', '--resplit'],
            '--manifold-mixup and --split-bn cannot be used together',
        ),
        (['--smoothing', '2'], '--smoothing must be in [0, 1], got 2.0'),
        (['--tta', '2'], '--tta must be in [0, 1], got 2'),
        (['--log-interval', '0'], '--log-interval must be at least 1, got 0'),
        (['--mixup', 'nan'], '--mixup must be at least 0, got nan'),
        (
            ['--target-key', 'x'],
            '--target-key needs --dataset hfds/, hfids/, tfds/ or wds/NAME, got a folder of images',
        ),
        (['--aug-splits', '3', '--no-prefetcher'], '--aug-splits and --no-prefetcher cannot be used together'),
        (['--aa', 'wild'], '--aa wild: Unknown AA policy wild'),
        (
            ['--train-batch-sizes', '8', '4'],
            '--train-batch-sizes must have a value for each of the 0',
        ),
        (['--torchcompile', 'gcc'], '--torchcompile must be one of'),
        (['--torchcompile', '--torchcompile-mode', 'x'], '--torchcompile-mode must be one of default,'),
        (['--no-such-flag'], 'unrecognized arguments: --no-such-flag'),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, *flags)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count('\n') == 1


def test_what_is_found_to_be_wrong_while_the_run_is_built(run_train, tmp_path, capsys):
    for flags, message in [
        (['--opt', 'adamw', '--opt-betas', '0.9'], '--opt adamw --opt-betas [0.9]: '),
        (['--opt-kwargs', 'no_such=1'], "--opt sgd --opt-kwargs {'no_such': 1}: "),
        (['--sched', 'wsd', '--decay-epochs', '9'], '--sched wsd: wsd schedule requires'),
        (['--device-modules', 'no_such_module'], "--device-modules: No module named 'no_such_module'"),
    ]:
        with pytest.raises((SystemExit, UsageError)) as error:
            run_train(*flags)
        assert message in str(error.value) + capsys.readouterr().err
        assert not (tmp_path / 'run').exists()


def test_an_empty_text_is_as_if_not_given(monkeypatch, tmp_path):
    args = parse(monkeypatch, '--gp', '', '--aa', '', '--val-split', '', '-c', config(tmp_path, target_key=''))[0]
    assert (args.gp, args.aa, args.target_key, args.val_split) == (None, None, None, '')


def help_of(parser, capsys, *argv):
    with pytest.raises(SystemExit) as error:
        parser.parse_args([*argv])
    out, err = capsys.readouterr()
    assert error.value.code == (0 if out else 2)
    return out or err


PARSERS = {'train': train.parser, 'validate': create_validate_parser()}


@pytest.mark.parametrize(('script', 'flags'), [('train', FLAGS), ('validate', VALIDATE_FLAGS)], ids=list(PARSERS))
def test_all_help_lists_every_flag(capsys, script, flags):
    text = help_of(PARSERS[script], capsys, '--help', 'all')
    assert all(flag['names'][-1] in text for flag in flags)
    assert all(action.option_strings[-1] in text for action in PARSERS[script]._actions if action.option_strings)


@pytest.mark.parametrize('script', PARSERS)
def test_help_is_two_screens_at_most(monkeypatch, capsys, script):
    """Of the 80 x 24 characters that a terminal has at least."""
    monkeypatch.setenv('COLUMNS', '80')
    text = help_of(PARSERS[script], capsys, '-h')
    lines = text.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith('usage: ')
    assert not lines[1]
    chapters = re.findall(r'^(\w+) \(--help (\w+): (\d+) flags\):$', text, re.MULTILINE)
    assert [name for name, _, _ in chapters][:3] == ['SynerMix', 'data', 'model']
    numbers = [int(number) for _, _, number in chapters]
    assert sum(numbers) == len(PARSERS[script]._actions)  # every flag has one place
    for _, word, number in chapters:
        own = help_of(PARSERS[script], capsys, '--help', word)
        assert len(re.findall(r'^  (?:-|data )', own, re.MULTILINE)) == int(number)


def test_what_the_page_of_help_shows_is_a_flag():
    known = {action.dest for parser in PARSERS.values() for action in parser._actions}
    shown = [flag for chapter in CHAPTERS.values() for flag in chapter.front]
    assert len(shown) == len(set(shown))
    assert set(shown) <= known


def test_help_of_a_group(capsys):
    text = help_of(train.parser, capsys, '--help', 'MixUp')
    assert re.findall(r'^(\S.*):$', text, re.MULTILINE) == ['Manifold MixUp', 'RegMixup', 'MixUp and CutMix']
    assert '--regmixup' in text
    assert '--synermix-beta' not in text
    assert '--help must be all or of SynerMix, data,' in help_of(train.parser, capsys, '--help', 'nothing')


QUICK = [
    ('train', ['--mixup-mode', 'all'], "--mixup-mode must be one of batch, pair, elem, half, got 'all'"),
    ('train', ['--loss', 'l2'], '--loss must be one of'),
    ('train', ['--synermix', '--synermix-beta', '2', '--aa', 'rand-m9'], '--synermix-beta must be'),
    ('train', ['--resume', 'auto'], '--resume auto needs --experiment'),
    ('train', ['--task', 'multilabel'], '--task multilabel needs --num-classes'),
    ('train', ['--bogus'], 'unrecognized arguments: --bogus'),
    ('validate', ['--interpolation', 'none'], '--interpolation must be one of'),
    ('validate', ['--num-gpu', '2'], '--num-gpu must be 1, got 2'),
]


@pytest.mark.parametrize(('script', 'flags', 'message'), QUICK, ids=lambda value: ' '.join(value[:2]))
def test_wrong_values_are_told_before_torch_is_imported(monkeypatch, capsys, script, flags, message):
    monkeypatch.setattr('sys.argv', [f'{script}.py', *flags])
    for name in ('torch', 'timm', 'accelerate'):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it gets an ImportError
    with pytest.raises(SystemExit) as error:
        getattr(entry, script)()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_warnings_about_flags_come_once(monkeypatch, caplog):
    """The flags are read before the script is imported, and by the script."""
    monkeypatch.setattr('sys.argv', ['train.py', '--synermix-num-mixed', '2'])
    monkeypatch.setattr(train, 'build', lambda *args: sys.exit())
    with pytest.raises(SystemExit):
        entry.train()
    assert caplog.text.count('--synermix-num-mixed has no effect without --synermix') == 1


def test_the_page_of_flags_is_what_the_flags_are():
    page = runpy.run_path(str(ROOT / 'docs' / 'make_flags.py'))['page']()
    assert page == (ROOT / 'docs' / 'flags.md').read_text(), 'make docs'
    for parser in (train.parser, create_validate_parser()):
        assert all(f'`{action.option_strings[-1]}' in page for action in parser._actions if action.option_strings[1:])


def test_what_a_newer_timm_has_is_said_in_lines():
    differences = runpy.run_path(str(ROOT / 'tests' / 'newest_timm.py'))['differences']
    lines = differences({'f': {'a': '1', 'b': '', 'c': ''}}, {'f': {'a': '2', 'c': '', 'd': '3'}, 'g': {'e': ''}})
    assert sorted(lines) == [
        'f: a was 1 by default, and is 2', 'f: b is gone', 'f: d is new, by default 3', 'g: e is new'
    ]  # fmt: skip


def test_pages_name_the_version_of_timm_whose_flags_these_are():
    """But for those that say what was measured with."""
    pages = [ROOT / 'README.md', ROOT / 'hparams' / 'README.md', ROOT / 'pyproject.toml', *(ROOT / 'docs').glob('*.md')]
    measured = {'benchmarks.md', 'results.md', 'short_trainings.md'}
    text = '\n'.join(page.read_text() for page in pages if page.name not in measured)
    assert set(re.findall(r'timm(?: |>=)(\d+\.\d+\.\d+)', text)) == {TIMM_VERSION}
