"""A run that is stopped and resumed ends as one that was never stopped, to the last bit."""

import os
import shlex
import signal

import pytest
import torch
from conftest import Kill, assert_same_run
from timm.scheduler import PlateauLRScheduler

from timm_synermix import SynerMixTask
from timm_synermix.engine.resume import resume_schedule, schedule_state
from timm_synermix.engine.resume_point import ResumePoint
from timm_synermix.utils.distributed import HostGroup
from timm_synermix.utils.signals import Stopped, StopRequest

VARIANTS = {
    'plain': ['--mixup', '0.5', '--cutmix', '1', '--reprob', '0.5', '--aa', 'rand-m9-mstd0.5', '--drop', '0.3'],
    'plain no prefetcher': ['--mixup', '0.5', '--no-prefetcher', '--reprob', '0.5', '--opt', 'adamw', '--lr', '1e-3'],
    'splits': ['--aug-splits', '2', '--jsd-loss', '--aa', 'augmix-m5-w4-d2', '--resplit', '--reprob', '0.5'],
    'sizes': ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--synermix'],
    'synermix': [
        '--synermix',
        '--mixup',
        '0.5',
        '--reprob',
        '0.5',
        '--drop-path',
        '0.3',
        '--model-ema',
    ],
    'bank': ['--synermix', '--synermix-singletons', 'bank', '--manifold-mixup', '1', '--opt', 'lookahead_adamw'],
    'clean': ['--synermix', '--synermix-supplement', 'clean', '--aug-repeats', '2', '--grad-accum-steps', '2'],
    'plateau': ['--synermix', '--sched', 'plateau', '--patience-epochs', '0', '--warmup-epochs', '0', '--model-ema'],
    'fraction': ['--synermix', '--synermix-fraction', '0.25', '--opt', 'lamb', '--mixup', '0.5', '--reprob', '0.5'],
    'updates': ['--synermix', '--synermix-batch', 'fixed', '--sched-on-updates', '--synermix-off-epoch', '2'],
}


def fast(*names):
    """The variants; all but these are in `make test-slow`."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


STOPPED = fast('plain', 'synermix')
KILLED = fast('plain', 'synermix', 'bank', 'fraction', 'plateau')  # asks more than a stop between two epochs
PLATEAU = 'ignore:PlateauLRScheduler is deprecated:FutureWarning'


@pytest.fixture(scope='module')
def finished():
    return {}


@pytest.fixture
def never_stopped(run_train, finished):
    """A run of these flags that was never stopped. There is one for all tests of this file."""

    def get(*flags):
        if flags not in finished:
            finished[flags] = run_train(*flags, experiment='whole')
        return finished[flags]

    return get


def flags_of(variant):
    return [*VARIANTS[variant], '--epochs', '4', '--warmup-epochs', '1', '--lr', '0.01', '--recovery-interval', '1']


@pytest.mark.filterwarnings(PLATEAU)
@pytest.mark.parametrize('name', STOPPED)
def test_a_stop_between_epochs(run_train, never_stopped, name):
    flags = flags_of(name)
    run_train(*flags, '--stop-epoch', '2', '-j', '2')
    assert_same_run(run_train(*flags, '--resume', 'auto'), never_stopped(*flags))


@pytest.mark.filterwarnings(PLATEAU)
@pytest.mark.parametrize('name', KILLED)
def test_a_kill_in_the_middle_of_an_epoch(run_train, never_stopped, stop_at, tmp_path, name):
    """The last recovery checkpoint is one update old: that update is made again."""
    flags = flags_of(name)
    again = stop_at('update_weights', 8 if '--grad-accum-steps' not in flags else 4, signal.SIGKILL)
    with pytest.raises(Kill):
        run_train(*flags)
    again()
    assert list(tmp_path.glob('run/recovery-*-0.pth.tar'))  # after the first update of an epoch that has more
    assert_same_run(run_train(*flags, '--resume', 'auto', '-j', '2'), never_stopped(*flags))


@pytest.mark.parametrize(
    ('signum', 'where', 'n'),
    [
        (signal.SIGINT, 'update_weights', 4),
        (signal.SIGTERM, 'update_weights', 4),
        (signal.SIGINT, 'evaluate_model', 3),
        (signal.SIGTERM, 'evaluate_model', 3),
        (signal.SIGINT, 'append_summary', 1),
        (signal.SIGTERM, 'append_summary', 1),
        (signal.SIGUSR1, 'update_weights', 4),
    ],
)
def test_a_signal_is_followed_at_once_and_costs_nothing(
    run_train, never_stopped, stop_at, caplog, tmp_path, signum, where, n
):
    flags = ['--synermix', '--mixup', '0.5', '--model-ema', '--epochs', '3']
    again = stop_at(where, n, signum)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        run_train(*flags)
    assert error.value.code == 128 + signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert f'{signum.name}: finishing this step' in caplog.text
    said = caplog.text.partition('To go on: ')[2].splitlines()[0]
    assert shlex.split(said)[:2] == ['python', 'train.py']
    assert said.endswith(' --experiment run --resume auto')
    assert f' --output {tmp_path} ' in said
    again()
    caplog.set_level('INFO')
    assert_same_run(run_train(*flags, '--resume', 'auto'), never_stopped(*flags))


@pytest.mark.parametrize('flags', [['--val-split', ''], ['--val-interval', '1000']])
def test_a_signal_is_followed_where_nothing_is_evaluated(run_train, stop_at, flags):
    """Epochs of a single update."""
    flags = ['--synermix', '-b', '20', '--epochs', '9', *flags]
    whole = run_train(*flags, experiment='whole')
    again = stop_at('update_weights', 4, signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        run_train(*flags)
    assert error.value.code == 143
    again()
    resumed = run_train(*flags, '--resume', 'auto')
    assert resumed.checkpoint()['saver']['run'] == whole.checkpoint()['saver']['run']
    for name, value in whole.checkpoint()['state_dict'].items():
        assert torch.equal(value, resumed.checkpoint()['state_dict'][name])


def test_a_skipped_update_before_a_resume(run_train, stop_at, monkeypatch):
    """The first update of a run that goes on in the middle of an epoch is left out, and is to be logged."""
    flags = ['--synermix', '--epochs', '1', '--recovery-interval', '1', '--max-bad-steps', '1', '--log-interval', '1']
    again = stop_at('update_weights', 2, signal.SIGKILL)
    with pytest.raises(Kill):
        run_train(*flags)
    again()
    original, calls = SynerMixTask._losses, []

    def losses(self, draw):
        calls.append(None)
        result = original(self, draw)
        return {name: value * float('nan') for name, value in result.items()} if len(calls) == 1 else result

    monkeypatch.setattr(SynerMixTask, '_losses', losses)
    assert 0 < run_train(*flags, '--resume', 'auto').summary()[0]['train_loss'] < 10


@pytest.mark.filterwarnings(PLATEAU)
def test_the_plateau_is_remembered():
    """The best metric so far and how long ago it was."""

    def create():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return PlateauLRScheduler(optimizer, patience_t=5, mode='max')

    scheduler, resumed = create(), create()
    for epoch, metric in enumerate([0.7, 0.9, 0.8], 1):
        scheduler.step(epoch, metric)
    point = ResumePoint('x', {'saver': {'run': {'schedule': schedule_state(scheduler)}}}, epoch=3, batch=1)
    resume_schedule(resumed, [0.25], point, 3, 9)
    assert (resumed.lr_scheduler.best, resumed.lr_scheduler.num_bad_epochs) == (0.9, 1)
    assert resumed.optimizer.param_groups[0]['lr'] == 0.25


def test_workers_change_nothing(run_train):
    cases = [(VARIANTS['plain'], '1'), (VARIANTS['synermix'], '2'), ([*VARIANTS['synermix'], '--no-prefetcher'], '1')]
    for flags, workers in cases:
        none, some = (run_train(*flags, '--epochs', '2', '-j', j, experiment=f'workers{j}') for j in ('0', workers))
        assert_same_run(some, none)
        seed = run_train(*flags, '--epochs', '1', '--seed', '1', experiment='seed')
        assert seed.summary()[0]['train_loss'] != none.summary()[0]['train_loss']


def test_a_file_is_resumed_in_its_folder(run_train, never_stopped):
    flags = ['--synermix', '--epochs', '3']
    stopped = run_train(*flags, '--stop-epoch', '2')
    (stopped.folder / 'last.pth.tar').unlink()
    assert_same_run(run_train(*flags, '--resume', str(stopped.folder / 'checkpoint-1.pth.tar')), never_stopped(*flags))


def test_a_second_signal_is_obeyed_at_once():
    # A test run in the background has inherited that SIGINT is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest(HostGroup()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Stopped, match='SIGINT'):
                stop.check()
    finally:
        signal.signal(signal.SIGINT, previous)
