"""Several labels per image: targets, losses and metrics are timm's, in training and in validation."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same_run

import validate
from timm_synermix.task.synermix import SynerMixTask

DATA = ('--dataset', 'hfds/three', '--num-classes', '3')
SEVERAL = ['--task', 'multilabel', '--warmup-epochs', '0', '--no-aug', '--opt', 'adamw', '--lr', '0.003']


pytestmark = pytest.mark.usefixtures('three')


@pytest.fixture
def train_three(run_train, tmp_path):
    def run(*flags, target='labels', **kwargs):
        (tmp_path / 'stats.json').write_text(json.dumps(dict(pos_counts=[16, 16, 16], num_samples=32)))
        flags = [str(tmp_path / 'stats.json') if flag == 'STATS' else flag for flag in flags]
        return run_train('--target-key', target, *flags, data=DATA, **kwargs)

    return run


LOSSES = {
    'default': [],
    'bce': ['--loss', 'bce', '--class-stats', 'STATS', '--loss-pos-weight', 'neg_pos', '--loss-class-weight', '1,2,3'],
    'asl': ['--loss', 'asl', '--loss-pos-weight', '2'],
    'poly': ['--loss', 'poly', '--poly-gamma', '2', '--poly-epsilon', '-1'],
    'twoway': ['--loss', 'twoway'],
    'zlpr': ['--loss', 'zlpr'],
    'db': ['--loss', 'db', '--class-stats', 'STATS'],
    'mixup': ['--mixup', '0.2', '--cutmix', '1', '--smoothing', '0.1'],
}


@pytest.mark.parametrize('name', LOSSES)
def test_two_epochs_with_each_loss(train_three, name):
    """It learns, and reports timm's metrics in per cent."""
    first, second = train_three(*SEVERAL, *LOSSES[name], '--epochs', '2').summary()
    assert second['train_loss'] < first['train_loss']
    assert 'eval_top1' not in first
    for metric in ('eval_map', 'eval_micro_f1', 'eval_macro_f1', 'eval_sample_f1'):
        assert 0 <= second[metric] <= 100


MORE = {
    'default': ['--synermix-supplement', 'clean'],
    'twoway': ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4'],
    'mixup': [],
}


@pytest.mark.parametrize('name', MORE)
def test_synermix_with_several_labels(train_three, name):
    """A resumed run ends as a whole one; the metrics are timm's, and there is no cohesion."""
    flags = [*SEVERAL, *LOSSES[name], *MORE[name], '--synermix', '--epochs', '2', '--model-ema']
    run = train_three(*flags, experiment='whole')
    _, second = run.summary()
    beta = 0.1 if name == 'mixup' else 0.5
    whole = beta * second['train_intra_loss'] + (1 - beta) * second['train_inter_loss']
    assert second['train_loss'] == pytest.approx(whole, rel=1e-4)
    assert 0 <= second['eval_map'] <= 100
    assert not any('cohesion' in column for column in second)
    train_three(*flags, '--stop-epoch', '1')
    assert_same_run(train_three(*flags, '--resume', 'auto'), run)


def test_a_vector_and_a_list_of_labels_are_the_same_targets(train_three):
    """A multi-hot vector read as a list of classes would be something else: every image would have classes 0 and 1."""
    runs = [
        train_three(*SEVERAL, experiment='list'),
        train_three(*SEVERAL, '--target-format', 'multihot', target='multihot', experiment='vector'),
        train_three(*SEVERAL, target='multihot', experiment='wrong'),
    ]
    losses = [run.summary()[0]['train_loss'] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_validation_says_what_training_said(train_three, tmp_path, monkeypatch, capsys):
    """The task and the threshold of the run come from its args.yaml."""
    run = train_three(*SEVERAL, '--epochs', '2', '--multilabel-threshold', '0.4')
    flags = [*DATA[:2], '--target-key', 'labels', '--device', 'cpu', '-j', '0', '-b', '8']
    flags += ['--checkpoint', str(run.folder / 'last.pth.tar')]
    monkeypatch.setattr('sys.argv', ['validate.py', *flags, '--results-file', str(tmp_path / 'results.csv')])
    validate.main()
    row = json.loads(capsys.readouterr().out.rpartition('--result\n')[2])
    assert 'top1' not in row
    for name in ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1'):
        assert row[name] == pytest.approx(run.summary()[-1][f'eval_{name}'], abs=1e-4)
    given = [*flags, '--task', 'multilabel', '--num-classes', '3', '--model', 'test_efficientnet', '--img-size', '32']
    by_hand = validate.validate(
        validate.parser.parse_args([*given, '--use-train-size', '--multilabel-threshold', '0.4'])
    )
    assert by_hand['map'] == row['map']


@pytest.mark.parametrize('flags', [['--metrics-avg', 'micro'], ['--report', 'x'], ['--features-out', 'x']])
def test_what_validation_of_several_labels_has_not(train_three, monkeypatch, flags):
    run = train_three(*SEVERAL)
    given = [*DATA[:2], '--target-key', 'labels', '--device', 'cpu', '-j', '0']
    monkeypatch.setattr('sys.argv', ['validate.py', *given, '--checkpoint', str(run.folder / 'last.pth.tar'), *flags])
    monkeypatch.chdir(run.folder)
    with pytest.raises((SystemExit, ValueError)):
        validate.main()


@pytest.mark.parametrize(
    'flags',
    [['--loss', 'poly', '--poly-epsilon', '1'], ['--loss', 'asl'], ['--loss', 'bce', '--loss-class-weight', '1,2,3']],
    ids=lambda flags: flags[1],
)
def test_the_losses_with_synermix(train_three, flags, monkeypatch):
    """With one class per image both parts have the loss of the flags."""
    tasks = []
    monkeypatch.setattr(SynerMixTask, '__init__', noting(SynerMixTask.__init__, tasks))
    run = train_three('--synermix', *flags, target='label')
    (row,) = run.summary()
    assert np.isfinite([row['train_loss'], row['train_intra_loss'], row['train_inter_loss'], row['eval_top1']]).all()
    (task,) = tasks
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = task.criterion(logits, target)
    assert expected != torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(task.intra_criterion(logits, target), expected)
    assert yaml.safe_load((run.folder / 'args.yaml').read_text())['loss'] == flags[1]


def noting(init, tasks):
    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        tasks.append(self)

    return noted
