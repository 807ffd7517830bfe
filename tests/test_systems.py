"""What Windows and macOS do not have, or do otherwise, simulated here."""

import enum
import io
import ntpath
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tarfile
import time
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, TrainResult, assert_same_run
from torch.utils.data import DataLoader

from timm_synermix import entry
from timm_synermix.data import dataset_factory
from timm_synermix.engine import ending
from timm_synermix.utils import files, safe_load
from timm_synermix.utils import signals as stop_signals


@pytest.fixture
def windows(monkeypatch):
    """Files as on Windows: no folder can be opened, no file replaced that is mapped; there is no fcntl."""
    for module in (files, safe_load, ending):
        monkeypatch.setattr(module, 'WINDOWS', True)
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    open_posix, replace = os.open, os.replace

    def opened(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, 'Permission denied', path)
        assert flags & os.O_ACCMODE != os.O_RDONLY or 'site-packages' in str(path)
        return open_posix(path, flags, *args, **kwargs)

    def replaced(source, path):
        if os.path.realpath(path) in Path('/proc/self/maps').read_text():
            raise PermissionError(13, 'Access is denied', path)
        replace(source, path)

    monkeypatch.setattr(files.os, 'open', opened)
    monkeypatch.setattr(files.os, 'replace', replaced)
    monkeypatch.setattr(files, '_PATIENCE', ())


# Files


def test_a_run_goes_on_on_windows(run_train, windows):
    """No checkpoint that is read is in the way of the next one; nothing is locked."""
    run_train('--synermix', '--epochs', '1')
    resumed = run_train('--synermix', '--epochs', '2', '--resume', 'auto')
    assert [row['epoch'] for row in resumed.summary()] == [0, 1]
    assert resumed.checkpoint()['epoch'] == 1
    assert not list(resumed.folder.glob('*.tmp'))
    assert files.lock_folder(str(resumed.folder)) is None


@pytest.mark.parametrize('refusals', [0, 2, 4, 5])
def test_a_file_that_somebody_looks_at_is_replaced_a_moment_later(tmp_path, monkeypatch, refusals):
    monkeypatch.setattr(files, 'WINDOWS', True)
    waited, replace = [], os.replace

    def scanned(source, path):
        if len(attempts) < refusals:
            attempts.append(path)
            raise PermissionError(13, 'Access is denied', path)
        replace(source, path)

    attempts = []
    monkeypatch.setattr(files.os, 'replace', scanned)
    monkeypatch.setattr(files.time, 'sleep', waited.append)
    path = tmp_path / 'file'
    path.write_text('old')
    if refusals <= 4:
        with files.replacing(str(path)) as temporary:
            Path(temporary).write_text('new')
    else:
        with pytest.raises(PermissionError), files.replacing(str(path)) as temporary:
            Path(temporary).write_text('new')
    assert path.read_text() == ('new' if refusals <= 4 else 'old')
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    assert waited == [0.1, 0.2, 0.5, 1.0][:refusals]


def test_elsewhere_a_refusal_is_final(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, 'replace', lambda source, path: os.stat('/nowhere'))
    monkeypatch.setattr(files.time, 'sleep', lambda seconds: pytest.fail('waited'))
    with pytest.raises(FileNotFoundError):
        files.replace(str(tmp_path / 'a'), str(tmp_path / 'b'))


@pytest.mark.parametrize(
    ('program', 'expected'),
    [(True, 'python "C:\\my code\\train.py" --synermix'), (False, "python 'C:\\my code\\train.py' --synermix")],
)
def test_the_command_that_goes_on_is_of_the_system_s_shell(monkeypatch, program, expected):
    monkeypatch.setattr(ending, 'WINDOWS', program)
    monkeypatch.setattr(sys, 'argv', ['C:\\my code\\train.py', '--synermix'])
    assert ending.command_to_continue('run') == f'{expected} --experiment run --resume auto'


def test_a_console_without_a_letter_shows_its_number(monkeypatch):
    """Windows writes to files by a code page of 256 letters."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='cp1252'))
    entry.run(Namespace(main=lambda: print('a ↑ é', flush=True)))
    assert written.getvalue().split() == [b'a', b'\\u2191', b'\xe9']


# Class names


def test_classes_of_a_tar_file_have_the_names_of_their_folders(tmp_path, monkeypatch, image_folder):
    """A tar file has '/' on Windows too: training and validation have the same names, in the same order."""

    def names(split, folders):
        path = tmp_path / f'{split}.tar'
        with tarfile.open(path, 'w') as archive:
            for folder in folders:
                for image in sorted((image_folder / split / folder).iterdir())[:2]:
                    archive.add(image, f'{split}/{"more/" if folder == "b" else ""}{folder}/{image.name}')
        dataset = dataset_factory.create_dataset('', root=str(path), split=split)
        return dataset.reader.class_name_to_idx, [int(target) for target in dataset.reader.targets]

    expected = {split: names(split, 'cab') for split in ('train', 'validation')}
    assert expected['train'][0] == {'a': 0, 'b': 1, 'c': 2}
    from timm.data.readers import reader_image_in_tar

    monkeypatch.setattr(reader_image_in_tar, 'os', types.SimpleNamespace(path=ntpath))
    raw = reader_image_in_tar.ReaderImageInTar(str(tmp_path / 'train.tar'))
    assert set(raw.class_name_to_idx) == {'train/a', 'train/more/b', 'train/c'}  # what timm makes of it
    assert {split: names(split, 'cab') for split in ('train', 'validation')} == expected


# Signals


def test_the_signals_are_those_that_the_system_has(monkeypatch):
    """Windows has SIGBREAK, and none that stops but it, SIGINT and SIGTERM."""
    stub = types.ModuleType('signal')
    stub.Signals = enum.IntEnum('Signals', dict(SIGINT=2, SIGTERM=15, SIGBREAK=21))
    monkeypatch.setitem(sys.modules, 'signal', stub)
    of_windows = runpy.run_path(stop_signals.__file__)
    assert {number.name for number in of_windows['STOP_SIGNALS']} == {'SIGINT', 'SIGTERM', 'SIGBREAK'}
    handled = {}
    stub.signal = lambda signum, handler: handled.setdefault(int(signum), handler) and 'before'
    request = of_windows['StopRequest'](Namespace(size=1, max=lambda values: values))
    with request:
        request.check()
        handled[21](21, None)
        with pytest.raises(of_windows['Stopped'], match='SIGBREAK'):
            request.check()


@pytest.mark.skipif(sys.platform != 'linux', reason='of Linux, which has all of them')
@pytest.mark.parametrize(('given', 'method'), [(None, 'fork'), ('forkserver', 'forkserver'), ('spawn', 'spawn')])
def test_workers_are_forked_where_nothing_else_is_asked_for(given, method):
    """As by default before Python 3.14, which starts them from a server that has imported nothing."""
    code = f"""if True:
        import multiprocessing, types
        from timm_synermix import entry
        multiprocessing.context._default_context._default_context = multiprocessing.get_context('forkserver')
        if {given!r}:
            multiprocessing.set_start_method({given!r})
        entry.run(types.SimpleNamespace(main=lambda: print(multiprocessing.get_start_method())))
    """
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == method


TO_WORKERS = [
    '--synermix --aa rand-m9 --reprob 0.2',
    '--synermix --aug-splits 3 --in-memory',
    '--synermix --synermix-fraction 0.5 --crop-padding 4 --cutout 8',
    '--synermix --train-img-sizes 32 48 --aug-repeats 2',
    '--mixup 0.2 --no-prefetcher',
]


@pytest.mark.parametrize('flags', TO_WORKERS)
def test_what_workers_need_can_be_sent_to_them(run_train, monkeypatch, flags):
    """Where they are not forked, everything goes through pickle."""
    sent, init = [], DataLoader.__init__

    def keep(self, *args, **kwargs):
        init(self, *args, **kwargs)
        sent.append(self)

    monkeypatch.setattr(DataLoader, '__init__', keep)
    run_train(*flags.split())
    assert sent
    for loader in sent:
        whole = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        assert len(whole[0]) == len(loader.dataset)


OF_SYSTEM = f"""
import multiprocessing, signal, sys
system, method = sys.argv[1:3]
if system == 'macos':
    del signal.sigwaitinfo
sys.path.insert(0, {str(ROOT)!r})
import train  # in workers too, which import this file anew
if __name__ == '__main__':
    multiprocessing.set_start_method(method)
    del sys.argv[1:3]
    from timm_synermix import entry
    entry.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(('system', 'method'), [('macos', 'spawn'), ('linux', 'forkserver')])
def test_workers_that_are_not_forked(run_train, image_folder, tmp_path, system, method):
    """SIGTERM to the whole group of processes saves, and the run that goes on has the same bits."""
    flags = ['--synermix', '--epochs', '3', '--seed', '3']
    whole = run_train(*flags, experiment='whole')
    (tmp_path / 'of_system.py').write_text(OF_SYSTEM)
    data = ['--data-dir', str(image_folder), '--num-classes', '4']
    more = ['-j', '2', '--log-interval', '1', '--output', str(tmp_path), '--experiment', method, '--resume', 'auto']
    command = [sys.executable, str(tmp_path / 'of_system.py'), system, method, *data, *SMALL, *flags, *more]
    log = tmp_path / 'log'
    with open(log, 'w') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.time() + 300
        while 'Train: 0' not in log.read_text() and time.time() < deadline and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(120) == 143, log.read_text()
    assert 'DataLoader worker' not in log.read_text()
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(TrainResult(tmp_path / method, ended.stdout), whole)


WORKER = f"""
import multiprocessing, signal, sys, time
system, method = sys.argv[1:]
if system == 'macos':
    del signal.sigwaitinfo
sys.path.insert(0, {str(ROOT)!r})
from timm_synermix.data.sample_loader import shielded

def work(ready):
    shielded(None, 0)
    ready.set()
    time.sleep(60)

if __name__ == '__main__':
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,))
    worker.start()
    ready.wait()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    print(worker.pid, flush=True)
    sys.stdin.readline()
    worker.terminate()
    worker.join(10)
    print(worker.exitcode, flush=True)
    worker.kill()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('system', 'method', 'ended'),
    [('linux', 'fork', 0), ('linux', 'forkserver', 0), ('linux', 'spawn', 0), ('macos', 'spawn', -signal.SIGTERM)],
)
def test_a_worker_ends_by_its_parent_alone(tmp_path, system, method, ended):
    """Not by a signal to all processes of the group, or to the worker."""
    (tmp_path / 'worker.py').write_text(WORKER)
    command, pipe = [sys.executable, str(tmp_path / 'worker.py'), system, method], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        worker = int(process.stdout.readline())
        for signum in (signal.SIGTERM, signal.SIGINT):
            if method == 'forkserver':  # the server would end
                os.kill(worker, signum)
            else:
                os.killpg(process.pid, signum)
        time.sleep(0.5)
        os.kill(worker, 0)  # it is there
        exitcode, _ = process.communicate('\n', timeout=60)
    assert int(exitcode) == ended


def test_a_file_is_read_whole_on_windows(tmp_path, monkeypatch):
    torch.save({'state_dict': {'a': torch.ones(3)}}, tmp_path / 'w.pth')
    for windows in (False, True):
        monkeypatch.setattr(safe_load, 'WINDOWS', windows)
        content = safe_load.load_content(str(tmp_path / 'w.pth'))
        assert (str(tmp_path / 'w.pth') in Path('/proc/self/maps').read_text()) == (not windows)
        assert content['state_dict']['a'].tolist() == [1, 1, 1]
        del content
