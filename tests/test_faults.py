"""Processes that die or are stopped, one of several too. The long tests: make test-slow."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import processes
import pytest
import torch
from conftest import ROOT, TrainResult, assert_same_run, make_image_folder
from processes import run_ranks, run_script
from test_launch import TORCHRUN, flags, launch
from torch import distributed as dist

import train
from timm_synermix.data.dataset_factory import create_dataset
from timm_synermix.engine.loaders import run_facts
from timm_synermix.engine.loss_guard import LossGuard, NonFiniteLoss
from timm_synermix.utils.distributed import HostGroup
from timm_synermix.utils.signals import Stopped, StopRequest

# Runs train.py, whose n-th call of a function sends a signal to one of its processes, as RANK:NAME:N:SIGNAL says.
FAULT = """
import os, sys, train
from timm_synermix import entry
rank, name, n, signum = os.environ['FAULT'].split(':')
if rank == os.environ.get('RANK', '0'):
    original, calls = getattr(train, name), []
    def fail(*args, **kwargs):
        calls.append(None)
        if len(calls) == int(n):
            os.kill(os.getpid(), int(signum))
        return original(*args, **kwargs)
    setattr(train, name, fail)
entry.run(train)
"""


# Runs train.py with another learning rate in each process.
DIFFERENT = """
import os, sys, train
from timm_synermix import entry
sys.argv += ['--lr', ['0.1', '0.2'][int(os.environ['RANK'])]]
entry.run(train)
"""


# A run that is started again and again.
RESUMED = ['--mixup', '0.5', '--model-ema', '--recovery-interval', '1', '--resume', 'auto']


def result(folder):
    return TrainResult(folder, '--result\n[]')


@pytest.fixture
def fault_script(tmp_path):
    (tmp_path / 'fault.py').write_text(FAULT)
    return tmp_path / 'fault.py'


@pytest.mark.slow
def test_a_rank_dies_and_another_is_stopped(image_folder, tmp_path, fault_script):
    """The launch ends within a minute and goes on; in the end nothing tells it from one that was left alone."""
    extra = [*RESUMED, '-b', '4', '--epochs', '3', '--synermix-singletons', 'bank', '-j', '1']

    def run(folder, fault=None):
        start = time.time()
        script = ROOT / 'train.py' if fault is None else fault_script
        command = [*TORCHRUN, script, *flags(image_folder, tmp_path / folder), *extra]
        process = launch(command, **({} if fault is None else {'FAULT': fault}))
        return process, time.time() - start

    whole, _ = run('whole')
    assert whole.returncode == 0, whole.stderr[-3000:]
    process, seconds = run('apart', f'1:update_weights:5:{signal.SIGKILL}')  # in the second of three steps an epoch
    assert process.returncode != 0
    assert 'Stopped: another process of the run has ended. The last good checkpoint is ' in process.stderr
    assert seconds < 60
    process, seconds = run('apart', f'1:evaluate_model:2:{signal.SIGTERM}')  # rank 0 is told by rank 1
    assert process.returncode != 0
    assert seconds < 60
    assert 'Interrupted. The last good checkpoint is ' in process.stderr
    process, _ = run('apart')
    assert process.returncode == 0, process.stderr[-3000:]
    assert_same_run(result(tmp_path / 'apart' / 'run'), result(tmp_path / 'whole' / 'run'))


def start(image_folder, tmp_path, *extra):
    """train.py in a process group of its own, with its log in a file."""
    (tmp_path / 'log').write_text('')
    return processes.start(run_script, ROOT / 'train.py', *flags(image_folder, tmp_path), *extra, log=tmp_path / 'log')


def exit_code(process, timeout):
    process.join(timeout)
    return process.exitcode  # None: it has not ended


def wait_for(path, pattern, process, timeout=120):
    deadline = time.time() + timeout
    while time.time() < deadline and process.is_alive():
        if re.search(pattern, path.read_text()):
            return
        time.sleep(0.02)
    raise AssertionError(f'no {pattern} in {path.read_text()}')


@pytest.mark.slow
def test_sigterm_to_the_process_and_all_of_its_workers(image_folder, tmp_path):
    """As batch systems send it."""
    process = start(image_folder, tmp_path, '--epochs', '10000', '-j', '2')
    try:
        wait_for(tmp_path / 'log', 'Train: 1 done', process)
        os.killpg(process.pid, signal.SIGTERM)
        assert exit_code(process, 60) == 143
    finally:
        process.kill()
    text = (tmp_path / 'log').read_text()
    assert 'SIGTERM: finishing this step' in text
    assert 'Interrupted. The last good checkpoint is ' in text
    assert 'Traceback' not in text
    assert list((tmp_path / 'run').glob('recovery-*.pth.tar'))


@pytest.mark.slow
def test_sigusr1_to_the_process_and_all_of_its_workers(image_folder, tmp_path):
    """As Slurm sends it ahead of the limit of a job."""
    command = [sys.executable, ROOT / 'train.py', *flags(image_folder, tmp_path), '--epochs', '10000', '-j', '2']
    with open(tmp_path / 'log', 'w') as log:  # started as a user does: a forked process ends otherwise
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 120
        while 'Train: 1 done' not in (tmp_path / 'log').read_text() and time.time() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(timeout=60) == 138
    finally:
        process.kill()
    text = (tmp_path / 'log').read_text()
    assert text.count('SIGUSR1: finishing this step') == 1
    assert 'Traceback' not in text
    assert list((tmp_path / 'run').glob('recovery-*.pth.tar'))


@pytest.mark.slow
def test_twenty_kills_of_a_whole_run(image_folder, tmp_path):
    """kill -9 of the process and its workers, at any moment; every time it goes on."""
    extra = [*RESUMED, '--epochs', '60', '-j', '2']
    (tmp_path / 'whole').mkdir()
    process = start(image_folder, tmp_path / 'whole', *extra)
    wait_for(tmp_path / 'whole' / 'log', 'Train: ', process)
    begun = time.time()
    assert exit_code(process, 300) == 0
    longest = (time.time() - begun) / 30  # so that the run is not done after twenty of them, on any machine
    generator, kills = random.Random(0), 0
    for _ in range(40):
        process = start(image_folder, tmp_path, *extra)
        try:
            wait_for(tmp_path / 'log', 'Train: |Nothing to do', process)
            if exit_code(process, generator.random() * longest) == 0:
                break
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        kills += 1
        assert exit_code(process, 60) == -signal.SIGKILL, (tmp_path / 'log').read_text()
        if kills == 20:
            assert exit_code(start(image_folder, tmp_path, *extra), 300) == 0
            break
    assert kills == 20
    assert_same_run(result(tmp_path / 'run'), result(tmp_path / 'whole' / 'run'))


@pytest.mark.slow
@pytest.mark.parametrize('where', ['Train: 2', 'Test', 'Cohesion'])
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_within_ten_seconds(image_folder, tmp_path, where, signum):
    root = make_image_folder(tmp_path / 'images', {'train': {'a': 9, 'b': 9}, 'validation': {'a': 1500, 'b': 1500}})
    command = [sys.executable, ROOT / 'train.py', *flags(root, tmp_path), '--epochs', '10000', '-j', '2']
    with open(tmp_path / 'log', 'w') as log:  # started as a user does: a forked process ends otherwise
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 120
        while where not in (tmp_path / 'log').read_text():
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        sent = time.time()
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
        assert time.time() - sent < 10
    finally:
        process.kill()
    assert 'Traceback' not in (tmp_path / 'log').read_text()


# Ranks that do not belong together


def checks_until_stopped(rank):
    """Of fast steps, in how many checks processes agree, and after how many more of them a signal is followed."""
    group, agreed = HostGroup(), []
    original = group.max
    group.max = lambda values: agreed.append(1) or original(values)
    with StopRequest(group) as stop:
        for _ in range(100):
            stop.check()
        few = len(agreed)
        stop.check(now=True)
        assert len(agreed) == few + 1
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        done = []
        with suppress(Stopped):
            for number in range(100):
                stop.check()
                done.append(number)
    return few, len(done)


def compare_ranks(root, results):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    try:
        found = []
        lr, workers = ['--lr', str(0.1 * (1 + rank))], ['-j', str(rank)]
        for argv, split in [([], 'train'), (lr, 'train'), (workers, 'train'), ([], ['train', 'other'][rank])]:
            args = train.parser.parse_args(argv)
            try:
                HostGroup().check_same(run_facts(args, create_dataset('', root=f'{root}/{split}', split='x'), None))
                found.append('')
            except ValueError as error:
                found.append(str(error))
        found.append(HostGroup().max([rank, -rank]))
        with StopRequest(HostGroup()) as stop:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                stop.check()
            except Stopped as stopped:
                found.append(str(stopped))
        found.append(checks_until_stopped(rank))
        guard = LossGuard([], HostGroup(), max_bad_steps=1)
        for update in range(3):  # rank 1 alone has a bad loss; both leave the update out
            guard.add({'loss': torch.tensor(1.0), 'intra_loss': torch.tensor([1.0, float('nan')][rank])}, update)
            try:
                found.append(guard.accepts(0))
            except NonFiniteLoss as error:
                found.append(str(error))
                break
        torch.save(found, f'{results}/{rank}')
    finally:
        dist.destroy_process_group()


def test_ranks_that_disagree_are_refused(tmp_path):
    counts = {'a': 3, 'b': 2}
    make_image_folder(tmp_path / 'data', {'train': counts, 'other': {'a': 2, 'b': 3}})
    run_ranks(compare_ranks, str(tmp_path / 'data'), str(tmp_path), folder=tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first == second
    same, lr, workers, data, largest, stopped, (few, late), *losses = first
    assert same == workers == ''
    assert lr == '--lr must be the same in all processes, got 0.1 on rank 0, 0.2 on rank 1'
    assert data.startswith('the training set must be the same in all processes, got 5 images with labels of checksum')
    assert largest == [1, 0]
    assert stopped == 'SIGTERM'
    assert 6 <= few < 20
    assert late < 16
    assert losses == [False, 'not a finite number: intra_loss of update 1 of epoch 0']


@pytest.mark.slow
def test_a_launch_of_two_recipes_is_refused(image_folder, tmp_path):
    script = tmp_path / 'differ.py'
    script.write_text(DIFFERENT)
    process = launch([*TORCHRUN, script, *flags(image_folder, tmp_path)])
    assert process.returncode != 0
    assert '--lr must be the same in all processes, got 0.1 on rank 0, 0.2 on rank 1' in process.stderr
    assert not (tmp_path / 'run').exists()
