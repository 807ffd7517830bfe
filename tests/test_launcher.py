"""`python -m timm_synermix SCRIPT`: scripts of timm's two shapes, unedited."""

import csv
import json
import logging
import re
import sys

import pytest
import torch
import yaml
from conftest import ROOT, make_image_folder
from processes import run_ranks

from timm_synermix.launch.launcher import main

STANDINS = ROOT / 'tests' / 'standins'
TASK, LOSS = 'train_task.py', 'train_loss.py'
both = pytest.mark.parametrize('script', [TASK, LOSS])


def slow(*flags):
    return pytest.param([*flags], marks=pytest.mark.slow)


COHESION = {'eval_cosine_cohesion', 'eval_nc1', 'eval_silhouette'}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """3 classes of 9 training and 4 validation images each."""
    counts = {split: dict.fromkeys('abc', n) for split, n in (('train', 9), ('validation', 4))}
    return make_image_folder(tmp_path_factory.mktemp('launched'), counts)


class Ran:
    """What a run of a script left behind."""

    def __init__(self, folder, out, err):
        self.folder, self.out, self.err = folder, out, err

    def rows(self):
        with open(self.folder / 'summary.csv', newline='') as file:
            return list(csv.DictReader(file))

    def losses(self):
        return [row['train_loss'] for row in self.rows()]

    def checkpoint(self):
        return torch.load(self.folder / 'last.pth.tar', weights_only=False)

    def steps(self):
        """The loss of every step, from the script's log lines."""
        return [line.split('Loss: ')[1] for line in self.err.splitlines() if 'Loss: ' in line]


@pytest.fixture
def run(images, tmp_path, capsys, monkeypatch):
    """Run a script, by the launcher or by itself, in this process."""

    def run(script, *flags, launch=True, text=None, experiment='run'):
        path = STANDINS / script
        if text is not None:
            path = tmp_path / 'copies' / script
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        common = ['--data-dir', str(images), '--num-classes', '3', '--img-size', '32']
        if script.startswith('train'):
            common += ['--output', str(tmp_path), '--experiment', experiment, '--log-interval', '1']
        monkeypatch.setattr(sys, 'argv', ['-m', str(path), *common, *flags] if launch else [str(path), *common, *flags])
        monkeypatch.setattr(logging.root, 'handlers', [])  # a script adds one
        capsys.readouterr()
        if launch:
            main()
        else:
            namespace = {'__name__': 'train', '__file__': str(path)}
            exec(compile(path.read_text(), str(path), 'exec'), namespace)
            namespace['main']()
        return Ran(tmp_path / experiment, *capsys.readouterr())

    return run


def edited(script, *changes):
    """The text of a script with changes, pairs of old and new."""
    text = (STANDINS / script).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


FLAGS = [
    ("parser.add_argument('-b'", "from timm_synermix import *\nadd_synermix_args(parser)\nparser.add_argument('-b'"),
    ('loader_train = create_loader(', 'loader_train = create_synermix_loader('),
    ('        collate_fn=collate_fn,\n        batch_choice_seed=args.seed,\n', """
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        clean_interpolation=data_config['interpolation'],
        **synermix_loader_kwargs(args),
"""),
    ('        is_training=True,\n        interpolation', '        interpolation'),
    ('input, target = mixup_fn(input, target)', 'pass'),
]  # fmt: skip
SYNERMIX = 'mixup_fn=create_mixup(**mixup_args) if mixup_active else None, **synermix_task_kwargs(args)'
BY_HAND = {
    TASK: [*FLAGS, ('ClassificationTask(model=model', f'SynerMixTask({SYNERMIX}, model=model')],
    LOSS: [
        *FLAGS,
        (
            '    loader_eval = create_loader',
            f'    synermix = SynerMixForward(bare_model, {SYNERMIX})\n'
            '    batch_sampler = loader_train.batch_sampler\n'
            '    loader_train = synermix.loader(loader_train)\n    loader_eval = create_loader',
        ),
        ('    model.to(device)\n', '    model.to(device)\n    bare_model = model\n'),
        ('train_loss_fn = train_loss_fn', 'train_loss_fn = synermix.loss(train_loss_fn)  #'),
        ('        if args.distributed and hasattr', '        batch_sampler.set_epoch(epoch)\n        if 0 and hasattr'),
    ],
}


@both
@pytest.mark.parametrize(
    'flags', [[], slow('--mixup', '0.8', '--drop', '0.2', '--no-prefetcher'), slow('--cutmix', '1')]
)
def test_losses_are_those_of_the_script_edited_by_hand(script, flags, run):
    flags = ['--synermix', '--synermix-num-mixed', '2', '--reprob', '0.5', '--no-eval', *flags]
    launched = run(script, *flags)
    by_hand = run(script, *flags, launch=False, text=edited(script, *BY_HAND[script]), experiment='by_hand')
    assert launched.steps() == by_hand.steps()
    assert len(set(launched.steps())) == 8
    weights, expected = launched.checkpoint()['state_dict'], by_hand.checkpoint()['state_dict']
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


OWN_CREATE_LOADER = """
from timm.data import create_loader as timm_loader
def create_loader(data, is_training=False, **kwargs):
    return timm_loader(data, is_training=is_training, **kwargs)


def main"""


@both
def test_a_loader_of_the_script_s_own_around_timm_s(script, run):
    """Its arguments are its own business: timm's loader, inside, is the one that is changed."""
    flags = ['--synermix', '--no-eval', '--epochs', '1']
    text = edited(script, ('\ndef main', OWN_CREATE_LOADER))
    assert run(script, *flags, text=text, experiment='own').steps() == run(script, *flags).steps()


@pytest.mark.slow
@both
def test_without_a_flag_the_script_is_what_it_was(script, run):
    flags = ['--mixup', '0.5', '--drop', '0.1', '--model-ema', '--epochs', '1']
    launched, alone = run(script, *flags), run(script, *flags, launch=False, experiment='alone')
    assert launched.steps() == alone.steps()
    assert launched.rows() == alone.rows()
    one, other = launched.checkpoint(), alone.checkpoint()
    assert one.keys() == other.keys()
    for part in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(one[part][name], other[part][name]) for name in other[part])


@both
def test_both_losses_and_cohesion_stand_in_summary_csv_and_in_the_log(script, run):
    plain = run(script, launch=False, experiment='plain')
    launched = run(script, '--synermix', '--model-ema')
    for row in launched.rows():
        assert {'train_intra_loss', 'train_inter_loss', *COHESION} <= row.keys()
        mean = 0.5 * float(row['train_intra_loss']) + 0.5 * float(row['train_inter_loss'])
        assert float(row['train_loss']) == pytest.approx(mean, rel=1e-5)
    assert launched.err.count('Intra: ') == 8  # as many as the script's own lines
    assert launched.err.count('Cohesion: ') == 4  # of the model, and of its average
    state = launched.checkpoint()
    assert state['state_dict'].keys() == state['state_dict_ema'].keys() == plain.checkpoint()['state_dict'].keys()
    assert (
        not COHESION
        & run(script, '--synermix', '--no-cohesion', '--epochs', '1', experiment='without').rows()[0].keys()
    )


@pytest.mark.slow
@both
def test_cohesion_alone_changes_no_loss(script, run):
    flags = ['--epochs', '1']
    measured, alone = run(script, '--cohesion', *flags), run(script, *flags, launch=False, experiment='alone')
    assert measured.steps() == alone.steps()
    assert COHESION <= measured.rows()[0].keys()
    assert [row['eval_top1'] for row in measured.rows()] == [row['eval_top1'] for row in alone.rows()]


def test_flags_stand_in_help_in_a_config_and_in_args_yaml(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(TASK, '--help')
    assert stop.value.code == 0
    assert {'--synermix-beta', '--manifold-mixup', '--no-cohesion,'} <= set(
        capsys.readouterr().out.replace('--cohesion, ', '').replace('--no-cohesion', '--no-cohesion,').split()
    )
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump(dict(synermix=True, synermix_beta=0.3, epochs=1, cohesion=False)))
    launched = run(LOSS, '--config', str(config))
    args = yaml.safe_load((launched.folder / 'args.yaml').read_text())
    assert (args['synermix'], args['synermix_beta'], args['cohesion']) == (True, 0.3, False)
    row = launched.rows()[0]
    mean = 0.3 * float(row['train_intra_loss']) + 0.7 * float(row['train_inter_loss'])
    assert float(row['train_loss']) == pytest.approx(mean, rel=1e-5)


def test_validate_measures_cohesion(run):
    checkpoint = run(TASK, '--synermix', '--epochs', '1').folder / 'last.pth.tar'
    results = json.loads(run('validate.py', '--checkpoint', str(checkpoint), '--cohesion').out.split('--result')[1])
    assert COHESION <= {f'eval_{name}' for name in results}
    alone = json.loads(run('validate.py', '--checkpoint', str(checkpoint)).out.split('--result')[1])
    assert alone.keys() == {'model', 'top1'}
    assert alone['top1'] == results['top1']


@pytest.fixture
def refusal(run, capsys, tmp_path):
    """A run with --synermix ends with exit code 2, in one line that has the message, before any step."""

    def refusal(message, script, *flags, text=None):
        with pytest.raises(SystemExit) as stop:
            run(script, '--synermix', *flags, text=text)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if 'error: ' in line or 'Loss: ' in line]
        assert len(lines) == 1
        assert re.search(message, lines[0])
        assert not list(tmp_path.glob('run/*.csv'))

    return refusal


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--synermix-beta', '1.5'], r'--synermix-beta must be in \[0, 1\], got 1.5'),
        (['--manifold-mixup', '1', '--mixup', '0.2'], '--manifold-mixup and --mixup or --cutmix cannot be used'),
        (['--synermix-batch', 'fixed', '--synermix-supplement', 'clean'], 'fixed and --synermix-supplement clean'),
        (['--synermix-mix', 'none', '--synermix-num-mixed', '2'], '--synermix-num-mixed says how to mix'),
        (['--synermix-off-epoch', '-1'], '--synermix-off-epoch must be at least 0, got -1'),
        (['-b', '1'], 'batch_size must be at least 2'),
        (['--synermix-singletons', 'bank', '--aug-repeats', '3'], 'bank and --aug-repeats cannot be used together'),
        (['--model', 'test_vit', '--torchscript'], '--synermix and --torchscript cannot be used together'),
        (['--kd-model-name', 'resnet50'], '--synermix and --kd-model-name cannot be used together'),
    ],
)
def test_bad_flags_are_one_line(script, flags, message, run, refusal):
    added = "parser.add_argument('--torchscript', action='store_true')\nparser.add_argument('--kd-model-name')\n"
    refusal(
        message, script, *flags, text=edited(script, ("for name in ('model-ema'", added + "for name in ('model-ema'"))
    )


OWN_LOADER = """
def own_loader(dataset, batch_size, collate_fn=None, **kwargs):
    loader = create_loader(dataset, batch_size=batch_size, is_training=False, **{
        k: v for k, v in kwargs.items() if k in ('input_size', 'use_prefetcher', 'device', 'num_workers')})
    return loader


def main"""
CHANGED = {
    'its own loader': (
        [('loader_train = create_loader(', 'loader_train = own_loader('), ('\ndef main', OWN_LOADER)],
        'must be that of the training loader|do not come from the training loader of timm.data.create_loader',
    ),
    'its own mixup': (
        [
            ('import torch\n', 'import torch\nfrom timm.data.mixup import mixup_target\n'),
            ('            if mixup_fn is not None:', '            target = mixup_target(target, 3)\n            if 0:'),
        ],
        'target',
    ),
    'another collate_fn': (
        [('        collate_fn=collate_fn', '        collate_fn=torch.utils.data.default_collate')],
        "collate_fn must be timm's FastCollateMixup or none, got function",
    ),
    'flags of SynerMix': (
        [("parser.add_argument('-b'", "parser.add_argument('--synermix')\nparser.add_argument('-b'")],
        'has flags of SynerMix itself',
    ),
}
CHANGED_LOSS = {
    'distillation': (
        [
            (
                '\ndef main',
                """
class Distillation(torch.nn.Module):
    def __init__(self, loss, teacher, weight):
        super().__init__()
        self.loss, self.teacher, self.weight = loss, teacher, weight

    def forward(self, input, output, target):
        return self.loss(output, target) + (self.weight * output.square().mean() if self.weight else 0)


def main""",
            ),
            ('train_loss_fn = train_loss_fn', 'train_loss_fn = Distillation(train_loss_fn, model, 0.5)  #'),
            ('loss = loss_fn(output, target)\n            (', 'loss = loss_fn(input, output, target)\n            ('),
        ],
        'Distillation has a network in it',
    ),
    'a function': (
        [
            (
                'loss = loss_fn(output, target)\n            (',
                'loss = torch.nn.functional.cross_entropy(output, target)\n            (',
            )
        ],
        'the output of the model did not reach its loss, which was looked for among',
    ),
    'accuracy while it trains': (
        [
            (
                '        losses_m.update(loss.item(), input.size(0))\n        if need_update',
                '        utils.accuracy(output, target)\n        if need_update',
            )
        ],
        'in training the output of the model has the rows of both losses',
    ),
    'more than the loss': (
        [
            (
                'loss = loss_fn(output, target)\n            (',
                'loss = loss_fn(output, target) + output.square().mean()\n            (',
            )
        ],
        'the output of the model must go into its loss and nowhere else',
    ),
}
NEITHER = """
import argparse
import torch

parser = argparse.ArgumentParser()
for flag in (
    '--model', '--data-dir', '--num-classes', '--img-size', '--epochs', '--output', '--experiment', '--log-interval'
):
    parser.add_argument(flag)


def main():
    parser.parse_args()
    print('trains')
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('script', 'name'), [*((s, n) for s in (TASK, LOSS) for n in CHANGED), *((LOSS, n) for n in CHANGED_LOSS)]
)
def test_what_a_launcher_cannot_do_is_said_and_nothing_trains(script, name, refusal):
    changes, message = {**CHANGED, **CHANGED_LOSS}[name]
    flags = ['--no-prefetcher'] if name == 'its own mixup' else []
    refusal(message, script, *flags, text=edited(script, *changes))


def test_a_script_with_neither_structure_is_told_what_was_looked_for(refusal):
    refusal(
        r'create_model \(of timm.models\) was looked for in .*copies/train.py, and is not there',
        'train.py',
        text=NEITHER,
    )


LIKE_THIS = {
    'an alias': [
        ('create_loader, resolve', 'create_loader as loader_of, resolve'),
        (' = create_loader(', ' = loader_of('),
    ],
    'a package': [
        ('import torch\n', 'import torch\nimport timm.data\n'),
        ('create_model(args', 'timm.models.create_model(args'),
        (' = create_loader(', ' = timm.data.create_loader('),
    ],
    'stars': [
        ('from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy', 'from timm.loss import *'),
        ('from timm import utils\n', 'from timm import utils\nfrom timm.data import *\n'),
    ],
    'inside of a function': [
        (
            '    collate_fn = mixup_fn = None\n',
            '    from timm.data import create_loader, Mixup\n    collate_fn = mixup_fn = None\n',
        )
    ],
    'one known parse': [
        ('    args = parser.parse_args(remaining)', '    args, _ = parser.parse_known_args(remaining)')
    ],
    'main with arguments': [
        ('def main():', 'def main(args, args_text):'),
        ('    args, args_text = _parse_args()\n', ''),
        ('    main()\n', '    main(*_parse_args())\n'),
    ],
}


def parser_in_a_function(script):
    """The text of a script that makes its parser when it parses."""
    head, begin, rest = (STANDINS / script).read_text().partition("parser = argparse.ArgumentParser(description='Tr")
    flags, parse, rest = rest.partition('\n\n\ndef _parse_args():\n')
    made = '    ' + (begin + flags).replace('\n', '\n    ') + '\n    return parser'
    return f'{head}def make_parser():\n{made}{parse}    parser = make_parser()\n{rest}'


@pytest.mark.slow
@both
@pytest.mark.parametrize('name', [*LIKE_THIS, 'a parser in a function'])
def test_names_are_found_where_the_script_has_them(script, name, run):
    flags = ['--synermix', '--mixup', '0.3', '--no-eval', '--epochs', '1']
    text = edited(script, *LIKE_THIS[name]) if name in LIKE_THIS else parser_in_a_function(script)
    usual, other = run(script, *flags), run(script, *flags, text=text, experiment='other')
    assert other.steps() == usual.steps()
    assert 'train_intra_loss' in other.rows()[0]


OPTIONS = {
    'everything of a loop': ['--amp', '--grad-accum-steps', '3', '--clip-grad', '0.5', '--model-ema', '--mixup', '0.4'],
    'repeated augmentation': ['--aug-repeats', '3', '-b', '12'],
    'CutMix': ['--cutmix', '1'],
    'second images clean alone': ['--synermix-supplement', 'clean', '-b', '4'],
    'a fraction': ['--synermix-fraction', '0.5'],
    'a bank': ['--synermix-singletons', 'bank', '-b', '4'],
    'beta 1': ['--synermix-beta', '1'],
    'beta 0': ['--synermix-beta', '0', '--mixup', '0.4'],
    'without the prefetcher': ['--no-prefetcher', '--cutmix', '1', '--synermix-supplement', 'clean', '-b', '4'],
    'compiled': ['--torchcompile', 'eager', '--mixup', '0.4', '--synermix-batch', 'fixed'],
}


@pytest.mark.slow
@both
@pytest.mark.parametrize('option', OPTIONS)
def test_options_are_those_of_the_script_edited_by_hand(script, option, run):
    flags = ['--synermix', '--no-eval', *OPTIONS[option]]
    by_hand = run(script, *flags, launch=False, text=edited(script, *BY_HAND[script]), experiment='by_hand')
    launched = run(script, *flags)
    assert launched.steps() == by_hand.steps()
    weights, expected = launched.checkpoint(), by_hand.checkpoint()
    for part in ('state_dict', 'state_dict_ema'):
        assert weights.get(part, {}).keys() == expected.get(part, {}).keys()
        assert all(torch.equal(weights[part][name], expected[part][name]) for name in expected.get(part, {}))


@pytest.mark.slow
@both
def test_evaluation_of_a_compiled_model_is_measured(script, run):
    compiled = run(script, '--synermix', '--torchcompile', 'eager', '--model-ema').rows()
    eager = run(script, '--synermix', '--model-ema', experiment='eager').rows()
    for row, expected in zip(compiled, eager):
        for name in (*COHESION, 'train_intra_loss', 'eval_loss'):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3), name


@pytest.mark.slow
@both
def test_synermix_and_mixup_end_at_their_epochs(script, run):
    flags = ['--synermix', '--no-eval', '--mixup', '1', '--epochs', '3', '--smoothing', '0']
    on = run(script, *flags, experiment='on')
    off = run(script, *flags, '--synermix-off-epoch', '1', '--mixup-off-epoch', '2')
    assert [row['train_intra_loss'] != 'nan' for row in off.rows()] == [True, False, False]
    assert off.steps()[:4] == on.steps()[:4]
    row = off.rows()[2]
    assert row['train_inter_loss'] == pytest.approx(row['train_loss'])


@pytest.mark.slow
@both
def test_a_resumed_run_goes_on_where_it_was(script, run):
    flags = ['--synermix', '--no-eval', '--model-ema']
    whole = run(script, *flags, experiment='whole')
    begun = run(script, *flags, '--epochs', '1')
    resumed = run(script, *flags, '--resume', str(begun.folder / 'last.pth.tar'))
    assert begun.steps() + resumed.steps() == whole.steps()
    assert [row['epoch'] for row in resumed.rows()] == ['0', '1']
    weights, expected = resumed.checkpoint()['state_dict_ema'], whole.checkpoint()['state_dict_ema']
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@both
def test_manifold_mixup_alone_and_with_synermix(script, run):
    flags = ['--manifold-mixup', '1', '--manifold-mixup-layers', 'input', '--no-eval', '--epochs', '1']
    alone, both_of_them = run(script, *flags), run(script, *flags, '--synermix', experiment='both')
    assert 'train_intra_loss' in both_of_them.rows()[0]
    assert len({*alone.steps(), *both_of_them.steps()}) == len(alone.steps()) + len(both_of_them.steps())


@pytest.mark.slow
@both
def test_w_and_b_gets_the_row_of_summary_csv(script, run, monkeypatch):
    import wandb

    logged = []
    monkeypatch.setattr(wandb, 'init', lambda **kwargs: None)
    monkeypatch.setattr(wandb, 'log', logged.append)
    launched = run(script, '--synermix', '--log-wandb', '--epochs', '1')
    assert [row.keys() for row in logged] == [row.keys() for row in launched.rows()]
    assert {'train_intra_loss', 'train_inter_loss', *COHESION} <= logged[0].keys()


@both
def test_losses_are_those_of_train_py(script, run, run_train, images):
    """As long as no step draws random numbers: train.py seeds before each, other scripts do not."""
    flags = ['--synermix', '--reprob', '0.3', '--seed', '5', '--lr', '0.05']
    launched = run(script, *flags, '--epochs', '1').rows()[0]
    flags += [
        '--remode',
        'const',
        '--opt',
        'sgd',
        '--momentum',
        '0.9',
        '--weight-decay',
        '0',
        '--warmup-epochs',
        '0',
        '--sched',
        'none',
    ]
    data = ('--data-dir', str(images), '--num-classes', '3')
    ours = run_train(*flags, '--model', 'test_resnet', data=data, experiment='ours').summary()[0]
    for name in ('train_loss', 'train_intra_loss', 'train_inter_loss', 'eval_loss', 'eval_cosine_cohesion'):
        assert float(launched[name]) == pytest.approx(ours[name], rel=1e-4), name


def launch(*argv):
    sys.argv = ['-m', *argv]
    main()


@pytest.mark.slow
def test_two_processes(images, tmp_path):
    losses = []
    for script in (TASK, LOSS):
        flags = [
            '--data-dir',
            images,
            '--num-classes',
            '3',
            '--img-size',
            '32',
            '--synermix',
            '--mixup',
            '0.3',
            '-b',
            '4',
        ]
        flags += ['--grad-accum-steps', '2', '--model-ema', '--aug-repeats', '2', '--synermix-gather', '--amp']
        run_ranks(
            launch, str(STANDINS / script), *map(str, flags), '--output', str(tmp_path), '--experiment', script,
            folder=tmp_path / f'logs of {script}',
        )  # fmt: skip
        ran = Ran(tmp_path / script, '', '')
        assert COHESION | {'train_intra_loss'} <= ran.rows()[0].keys()
        assert not any(name.startswith('module.') for name in ran.checkpoint()['state_dict'])
        losses.append([(row['train_loss'], row['train_intra_loss'], row['eval_nc1']) for row in ran.rows()])
    assert losses[0] == losses[1]
