import argparse
import json
import re
from pathlib import Path

import pytest
import timm.utils
import yaml

import train
from timm_synermix.cli.timm_args import ParseKwargs

FLAGS = json.loads((Path(__file__).parent / 'data' / 'timm_train_flags.json').read_text())
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


def test_the_flags_timm_1_0_31_adds():
    added = {'stop_epoch': int, 'save_epochs': int, 'loss': None, 'task': None, 'lr_decay_fn': None}
    for dest, kind in added.items():
        assert actions()[dest].type is kind
    assert actions()['save_epochs'].nargs == '+'


def test_nothing_of_timm_is_hidden_by_ours():
    known = {name for flag in FLAGS for name in flag['names']}
    ours = {name for action in train.parser._actions for name in action.option_strings} - known
    timm_1_0_31 = {'--stop-epoch', '--save-epochs', '--loss', '--task', '--lr-decay-fn', '--lr-stable-timescale'}
    assert ours - timm_1_0_31 - {'-h', '--help'} == {
        '--crop-padding',
        '--cutout',
        '--in-memory',
        '--freeze',
        '--synermix',
        '--synermix-beta',
        '--synermix-num-mixed',
        '--synermix-singletons',
        '--synermix-supplement',
        '--synermix-batch',
        '--synermix-gather',
        '--manifold-mixup',
        '--manifold-mixup-layers',
        '--cohesion',
        '--no-cohesion',
        '--log-with',
        '--report',
        '--synermix-forward',
        '--synermix-interval',
        '--synermix-off-epoch',
        '--strict-data',
        '--max-bad-steps',
    }


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


def test_unknown_config_keys_are_named(monkeypatch, tmp_path, caplog):
    parse(monkeypatch, '-c', config(tmp_path, lerning_rate=1.0))
    assert "unknown key 'lerning_rate'" in caplog.text


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('epochs', 'many', "epochs in .* must be an integer, got 'many'"),
        ('epochs', 1.5, 'must be an integer, got 1.5'),
        ('epochs', True, 'must be an integer, got True'),
        ('lr', 'fast', "lr in .* must be a number, got 'fast'"),
        ('lr', [0.1], r'lr in .* must be a single value, got \[0.1\]'),
        ('scale', 0.5, 'scale in .* must be a list, got 0.5'),
        ('input_size', [3, 224], 'must be a list of 3 values'),
        ('synermix', 'yes', "synermix in .* must be true or false, got 'yes'"),
        ('synermix_forward', 'both', "must be one of separate, fused, got 'both'"),
        ('train_size_schedule', 'cosine', 'must be one of constant, progressive'),
        ('model_kwargs', 'a=1', 'must be a mapping'),
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


OUT_OF_SCOPE = [
    ['--kd-model-name', 'resnet18'],
    ['--jsd-loss'],
    ['--loss', 'jsd'],
    ['--aug-splits', '3'],
    ['--split-bn', '--resplit'],
    ['--variable-batch-loss-scale', 'sqrt'],
    ['--train-img-sizes', '32', '64'],
    ['--task', 'multilabel'],
    ['--torchscript'],
    ['--naflex-loader'],
]


@pytest.mark.parametrize('flags', OUT_OF_SCOPE, ids=lambda flags: flags[0])
def test_what_synermix_cannot_be_used_with(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '--synermix', *flags)
    assert error.value.code == 2
    message = capsys.readouterr().err
    flag = '--jsd-loss' if flags == ['--loss', 'jsd'] else flags[0]
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
        (['--synermix', '-b', '1'], '--batch-size must be at least 2 with --synermix, got 1'),
        (['--mixup', '1', '-b', '7'], '--batch-size must be even with --mixup or --cutmix, got 7'),
        (['--synermix-singletons', 'drop'], "invalid choice: 'drop'"),
        (['--resume', 'auto'], '--resume auto needs --experiment'),
        (['--stop-epoch', '0'], '--stop-epoch must be at least 1, got 0'),
        (['--clip-mode', 'max'], '--clip-mode must be one of norm, value, agc, got max'),
        (['--amp', '--amp-dtype', 'float8'], '--amp-dtype must be one of float16, bfloat16, got float8'),
        (['--amp', '--model-dtype', 'bfloat16'], '--amp needs a float32 model'),
        (['--mixup-mode', 'all'], '--mixup-mode must be one of batch, pair, elem, half, got all'),
        (['--grad-accum-steps', '0'], '--grad-accum-steps must be at least 1, got 0'),
        (['--scale', '0.5'], '--scale must be two values, the lower one first, got [0.5]'),
        (['--cutmix-minmax', '0.9', '0.1'], '--cutmix-minmax must be two values, the lower one first'),
        (['--interpolation', 'best'], '--interpolation must be one of nearest,'),
        (['--split-bn'], '--split-bn needs --aug-splits'),
        (['--smoothing', '2'], '--smoothing must be in [0, 1], got 2.0'),
        (['--log-interval', '0'], '--log-interval must be at least 1, got 0'),
        (['--mixup', 'nan'], '--mixup must be at least 0, got nan'),
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


def test_help_lists_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, '--help')
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(flag['names'][0] in text for flag in FLAGS)
