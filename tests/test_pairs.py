"""Every pair of these flags trains with --synermix; a greedy cover of all pairs, which leaves out what is refused."""

import itertools
import sys

import numpy as np
import pytest
import timm

import train

SEVERAL = '--task multilabel --dataset hfds/three --num-classes 3 --target-key labels'
FACTORS = {
    'mixup': ['', '--mixup 0.5', '--cutmix 1 --mixup-mode elem', '--mixup 0.5 --regmixup', '--manifold-mixup 1'],
    'views': ['', '--aug-splits 2', '--aug-splits 2 --split-bn', '--train-img-sizes 32 48', '--no-aug', '--jsd'],
    'loss': ['', '--bce-loss', '--loss poly', '--smoothing 0'],
    'batch': ['', '--synermix-batch fixed', '--synermix-supplement clean', '--synermix-singletons bank'],
    'mix': [
        '',
        '--synermix-mix none',
        '--synermix-num-mixed 2',
        '--synermix-beta 1',
        '--synermix-fraction 0.25',
    ],
    'forward': ['', '--channels-last', '--drop 0.3 --drop-path 0.2'],
    'augment': ['', '--aa rand-m9-mstd0.5', '--reprob 0.5 --resplit', '--crop-padding 4', '--cutout 8'],
    'loader': [
        '',
        '--no-prefetcher',
        '--aug-repeats 3',
        '--in-memory',
        '--on-device --crop-padding 4 --color-jitter 0',
    ],
    'optimizer': ['', '--opt lamb', '--opt lookahead_adamw', '--clip-grad 1 --clip-mode agc'],
    'average': ['', '--model-ema', '--model-dtype bfloat16', '--amp --amp-dtype bfloat16'],
    'task': ['', '--kd-model-name TEACHER', '--kd-model-name TEACHER --kd-distill-type feature', f'{SEVERAL}'],
    'updates': ['', '--grad-accum-steps 2', '--synermix-off-epoch 1 --epochs 2', '--sched-on-updates'],
}
REFUSED = [  # the name of a flag, and what it is refused with
    ('--aug-splits', '--mixup --cutmix --manifold-mixup --no-prefetcher --crop-padding --cutout --train-img-sizes'),
    ('--jsd', '--mixup --cutmix --manifold-mixup --no-prefetcher --crop-padding --cutout --bce-loss --loss'),
    ('--no-aug', '--crop-padding --cutout'),
    ('--on-device', '--aa --reprob'),
    ('--train-img-sizes', '--crop-padding --cutout --synermix-batch'),
    ('--synermix-singletons', '--aug-repeats --synermix-mix'),
    ('--synermix-mix', '--synermix-num-mixed'),
    ('--synermix-beta', '--kd-model-name --split-bn'),
    ('--synermix-fraction', '--synermix-supplement --task'),
    ('--kd-model-name', '--manifold-mixup'),
    ('--task', '--regmixup --manifold-mixup --jsd --synermix-batch --synermix-singletons'),
]


def named(choice):
    return {word for word in choice.split() if word.startswith('--')}


def is_refused(one, other):
    return any(
        (a in named(x)) and named(y) & set(others.split())
        for a, others in REFUSED
        for x, y in ((one, other), (other, one))
    )


def pairs_of(row):
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def cover():
    """Rows, one choice of each factor, that have every pair of choices but for those that are refused."""
    generator = np.random.default_rng(0)
    every = itertools.chain.from_iterable(
        itertools.product([(f, x) for x in FACTORS[f]], [(g, y) for y in FACTORS[g]])
        for f, g in itertools.combinations(FACTORS, 2)
    )
    left = {frozenset(pair): None for pair in every if not is_refused(pair[0][1], pair[1][1])}
    rows = []
    while left:
        row = dict(sorted(next(iter(left))))
        for factor in generator.permutation([f for f in FACTORS if f not in row]).tolist():
            possible = [x for x in FACTORS[factor] if not any(is_refused(x, y) for y in row.values())]
            news = [sum(frozenset([(factor, x), item]) in left for item in row.items()) for x in possible]
            row[factor] = possible[int(np.argmax(news))]
        for pair in pairs_of(row):
            left.pop(pair, None)
        rows.append(' '.join(filter(None, (row[factor] for factor in FACTORS))))
    return rows


ROWS = cover()
SAMPLE = set(np.random.default_rng(1).choice(len(ROWS), 12, replace=False).tolist())
MARKED = [
    pytest.param(row, marks=pytest.mark.slow if k in SAMPLE else pytest.mark.exhaustive) for k, row in enumerate(ROWS)
]


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """What timm loads a teacher of 4 classes from."""
    folder = tmp_path_factory.mktemp('teacher')
    model = timm.create_model('test_resnet', num_classes=4)
    timm.models.save_for_hf(model, folder)
    return f'local-dir:{folder}'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.usefixtures('three')
@pytest.mark.parametrize('flags', MARKED)
def test_a_row_trains(run_train, teacher, flags):
    data = () if '--task' in flags else None
    flags = flags.replace('--jsd', '--aug-splits 2 --jsd-loss').replace('TEACHER', teacher)
    for row in run_train('--synermix', '--lr', '1e-3', '--warmup-epochs', '0', *flags.split(), data=data).summary():
        losses = [value for name, value in row.items() if name.startswith('train_') and name.endswith('loss')]
        assert losses
        assert np.isfinite(losses).all() or ('--synermix-off-epoch' in flags)


def test_every_pair_is_in_a_row_or_refused():
    rows = [tuple(row.replace('--jsd', '--aug-splits 2 --jsd-loss').split()) for row in ROWS]
    for f, g in itertools.combinations(FACTORS, 2):
        for pair in itertools.product(FACTORS[f], FACTORS[g]):
            words = {word for x in pair for word in x.replace('--jsd', '--jsd-loss').split()}
            assert is_refused(*pair) or any(words <= set(row) for row in rows), pair


REFUSED_PAIRS = [
    (x, y)
    for f, g in itertools.combinations(FACTORS, 2)
    for x, y in itertools.product(FACTORS[f], FACTORS[g])
    if is_refused(x, y)
]


@pytest.mark.parametrize(('one', 'other'), REFUSED_PAIRS)
def test_a_refused_pair_is_one_line_that_names_both(monkeypatch, capsys, one, other):
    flags = f'{one} {other}'.replace('--jsd', '--aug-splits 2 --jsd-loss')
    monkeypatch.setattr(sys, 'argv', ['train.py', '--synermix', '--data-dir', 'DIR', *flags.split()])
    with pytest.raises(SystemExit) as error:
        train._parse_args()
    line = capsys.readouterr().err
    assert error.value.code == 2
    assert line.count('\n') == 1
    for choice in (one, other):
        names = named(choice.replace('--jsd', '--aug-splits --jsd-loss').replace('-loss', '-loss --loss'))
        assert any(name in line for name in names)
