"""Command lines that are drawn: a run, the same run stopped and resumed, its checkpoint in timm and in validate.py.

A line either trains, and then all of that agrees, or it ends with one line and exit code 2 and leaves nothing behind.
"""

import random

import pytest
import timm
import torch
from conftest import assert_same_run
from test_run_numbers import said_by_validate

# One of each group, or none: what a recipe may say.
GROUPS = {
    'mixing': [
        '--mixup 0.4',
        '--cutmix 1',
        '--mixup 0.3 --cutmix 1 --mixup-mode elem',
        '--mixup 0.3 --mixup-mode half',
        '--mixup 0.3 --mixup-prob 0.5 --mixup-off-epoch 1',
        '--manifold-mixup 1',
        '--regmixup --mixup 5',
    ],
    'synermix': [
        '--synermix',
        '--synermix --synermix-beta 0.3 --synermix-num-mixed 2',
        '--synermix --synermix-batch fixed',
        '--synermix --synermix-supplement clean',
        '--synermix --synermix-singletons bank',
        '--synermix --synermix-singletons keep',
        '--synermix --synermix-fraction 0.25',
        '--synermix --synermix-off-epoch 1',
        '--synermix --synermix-mix none',
        '--synermix --aug-repeats 2',
    ],
    'optimizer': [
        '--opt adamw --lr 1e-3',
        '--opt lamb --lr 1e-3',
        '--opt lion --lr 1e-4',
        '--opt lookahead_sgd --lr 0.01',
        '--opt nadamw --lr 1e-3 --layer-decay 0.7',
        '--opt sgd --lr 0.02 --weight-decay 1e-3',
    ],
    'schedule': [
        '--sched step --decay-epochs 1 --decay-rate 0.5',
        '--sched poly --warmup-epochs 1',
        '--sched tanh',
        '--sched none',
        '--sched-on-updates',
    ],
    'update': [
        '--grad-accum-steps 2',
        '--clip-grad 0.5',
        '--clip-grad 0.01 --clip-mode agc',
        '--grad-accum-steps 3 --clip-grad 0.1 --clip-mode value',
    ],
    'average': [
        '--model-ema --model-ema-decay 0.6',
        '--model-ema --model-ema-force-cpu',
        '--model-ema-warmup --model-ema',
    ],
    'precision': ['--amp --amp-dtype bfloat16', '--channels-last', '--model-dtype bfloat16'],
    'augmentation': [
        '--aa rand-m9-mstd0.5-inc1 --reprob 0.3',
        '--aa v0',
        '--no-aug',
        '--crop-padding 2 --cutout 6',
        '--crop-padding 2 --cutout 6 --color-jitter 0 --on-device',
        '--color-jitter 0.2 --vflip 0.5 --scale 0.5 1',
        '--no-prefetcher --reprob 0.5 --remode pixel',
        '--train-crop-mode rkrc',
    ],
    'regularisation': ['--drop 0.2', '--smoothing 0', '--drop-path 0.1', '--bce-loss', '--loss poly --poly-epsilon 1'],
    'data': ['--in-memory', '--epoch-repeats 2', '--in-chans 1', '--class-map MAP', '-j 1', '-b 5', '-b 6'],
    'run': [
        '--seed 7',
        '--recovery-interval 1',
        '--save-epochs 1',
        '--eval-metric loss',
        '--no-cohesion',
        '--cohesion',
    ],
}
# What stands for what people get wrong; a line has one of these now and then.
WRONG = [
    '--synermix-beta 1.5 --synermix',
    '--mixup 0.2 -b 7',
    '--opt adamv',
    '--num-classes 2',
    '--aug-splits 1',
    '--torchscript --synermix',
    '--pretrained-path nothing.pth',
    '--synermix --synermix-fraction 2',
    '--stop-epoch 9',
    '--aa rand-m9-what5',
    '--img-size 0',
]
DRAWN, IN_SLOW = 220, 12


def line_of(seed):
    generator = random.Random(seed)
    groups = sorted(generator.sample(sorted(GROUPS), generator.randint(2, 6)))
    parts = [generator.choice(GROUPS[group]) for group in groups]
    if generator.random() < 0.15:
        parts.append(generator.choice(WRONG))
    return ' '.join(parts)


def assert_refused(error, folder, capsys, line):
    assert error.code == 2, line
    text = capsys.readouterr().err.strip().splitlines()
    assert ': error: ' in text[-1], line
    assert 'Traceback' not in '\n'.join(text), line
    assert not folder.exists(), line


def assert_loads_in_timm(run, line):
    """The weights that the row of the best epoch is of, strictly."""
    flags = line.split()
    kwargs = dict(in_chans=1) if '--in-chans' in flags else {}
    path = str(run.folder / 'model_best.pth.tar')
    model = timm.create_model('test_efficientnet', num_classes=4, checkpoint_path=path, **kwargs)
    state = run.checkpoint('model_best')
    expected = state.get('state_dict_ema') or state['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), (line, name)


@pytest.mark.parametrize(
    'seed',
    [pytest.param(seed, marks=pytest.mark.slow if seed < IN_SLOW else pytest.mark.exhaustive) for seed in range(DRAWN)],
)
@pytest.mark.filterwarnings('default')  # of libraries that such a line happens to use
def test_a_drawn_command_line(run_train, monkeypatch, capsys, tmp_path, seed):
    (tmp_path / 'map.txt').write_text('\n'.join(['lone', 'c', 'a', 'b']))
    line = line_of(seed).replace('MAP', str(tmp_path / 'map.txt'))
    flags = ['--epochs', '2', '--warmup-epochs', '0', *line.split()]
    try:
        whole = run_train(*flags, experiment='whole')
    except SystemExit as error:
        assert_refused(error, tmp_path / 'whole', capsys, line)
        return
    assert [row['epoch'] for row in whole.summary()] == [0, 1]
    run_train(*flags, '--stop-epoch', '1')
    assert_same_run(run_train(*flags, '--resume', 'auto'), whole)
    assert_loads_in_timm(whole, line)
    said = said_by_validate(monkeypatch, capsys, '--checkpoint', whole.folder / 'last.pth.tar')
    row = whole.summary()[-1]
    for name in ('loss', 'top1', 'top5'):
        assert said[name] == pytest.approx(row[f'eval_{name}'], rel=2e-6, abs=1e-6), (line, name)


def test_the_lines_differ():
    lines = [line_of(seed) for seed in range(DRAWN)]
    assert len(set(lines)) > 0.95 * DRAWN
    assert {option for options in GROUPS.values() for option in options} <= {
        option for line in lines for options in GROUPS.values() for option in options if option in line
    }
