"""One training in a folder: the second is refused by the first one's name, and touches nothing."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from timm_synermix.utils.files import FolderInUse, lock_folder, sync

HOLD = """
import os, sys
from timm_synermix.utils.files import lock_folder
file = lock_folder(sys.argv[1])
if os.fork() == 0:  # a loader worker, which outlives the process
    os.close(1)
    import time; time.sleep(60)
print(file is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked the folder."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b'True\n'
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_is_locked_until_its_process_ends(tmp_path, holder):
    """Even if a child of that process goes on, and though the file stays."""
    for create in (True, False):
        with pytest.raises(
            FolderInUse, match=f'{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}$'
        ):
            lock_folder(str(tmp_path), create)
    holder.kill()
    holder.wait()
    os.killpg(holder.pid, 0)  # the child is there
    lock = lock_folder(str(tmp_path))
    assert (tmp_path / '.lock').read_text() == f'process {os.getpid()} on {socket.gethostname()}\n'
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_is_taken_away_meanwhile_is_none(tmp_path, monkeypatch):
    """Its run has ended between the opening and the locking."""
    import fcntl

    (tmp_path / '.lock').touch()
    original, calls = fcntl.lockf, []

    def lockf(file, flags):
        original(file, flags)
        calls.append(os.fstat(file.fileno()).st_ino)
        if len(calls) == 1:
            os.remove(tmp_path / '.lock')
            (tmp_path / 'keeps the number of the file').touch()

    monkeypatch.setattr(fcntl, 'lockf', lockf)
    lock = lock_folder(str(tmp_path))
    assert len(calls) == 2
    assert os.fstat(lock.file.fileno()).st_ino == (tmp_path / '.lock').stat().st_ino


def test_a_folder_that_was_never_locked(tmp_path):
    assert lock_folder(str(tmp_path), create=False) is None
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def lockf(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.lockf', lockf)
    assert lock_folder(str(tmp_path)) is None
    assert 'cannot be locked (No locks available)' in caplog.text


@pytest.mark.parametrize('resume', [['--resume', 'auto'], [], ['--resume', 'last']])
def test_a_second_training_in_a_folder_is_refused(run_train, tmp_path, capsys, resume):
    run = run_train()
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(run.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == b'True\n'
        before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.folder.iterdir()}
        if 'last' in resume:
            resume = ['--resume', str(run.folder / 'last.pth.tar')]
        with pytest.raises(SystemExit) as error:
            run_train('--epochs', '2', *resume)
        assert error.value.code == 2
        text = capsys.readouterr().err
        assert f'--experiment: {run.folder} is in use by process {process.pid} on {socket.gethostname()}' in text
        assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.folder.iterdir()}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run_train('--epochs', '2', '--resume', 'auto').summary()[-1]['epoch'] == 1


def test_a_share_that_cannot_fsync_a_folder(tmp_path, monkeypatch):
    """Its files can be, and an error of theirs is one."""

    def fsync(descriptor):
        raise OSError(22, 'Invalid argument')

    monkeypatch.setattr('os.fsync', fsync)
    sync(str(tmp_path))
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='Invalid argument'):
        sync(str(tmp_path / 'file'))
