"""Files that are written whole or not at all, and folders that one process writes to."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_logger = logging.getLogger(__name__)

WINDOWS = sys.platform == 'win32'
_LOCK = '.lock'
_PATIENCE = (0.1, 0.2, 0.5, 1.0)  # seconds


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """The path of a temporary file, which becomes `path` in one step when the block ends, on the disk by then."""
    temporary = path + '.tmp'
    try:
        yield temporary
        sync(temporary)
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def replace(source: str, path: str) -> None:
    """Rename a file, also over another, and for a machine that loses power in the next moment.

    Windows refuses that while somebody has one of them open: a virus scanner looks at what is new, for a moment.
    """
    for seconds in _PATIENCE if WINDOWS else ():
        try:
            os.replace(source, path)
            break
        except PermissionError:
            time.sleep(seconds)
    else:
        os.replace(source, path)
    sync(os.path.dirname(path) or '.')


def sync(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    if WINDOWS and os.path.isdir(path):  # it cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # it flushes what may be written to
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise  # some network shares know no fsync of a folder
    finally:
        os.close(descriptor)


class FolderInUse(ValueError):
    """Another process has locked a folder. The message names both."""


class FolderLock:
    """A folder that is locked for this process, until it ends or releases the lock.

    Args:
        path: The file in the folder which has the lock.
        file: The same, open.
    """

    def __init__(self, path: str, file: TextIO) -> None:
        self.path, self.file = path, file
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()

    def release(self) -> None:
        """Unlock the folder, and take the file away."""
        if not self.file.closed:
            with suppress(OSError):
                os.remove(self.path)
            self.file.close()


def lock_folder(folder: str, create: bool = True) -> FolderLock | None:
    """Lock a folder for this process, by an advisory lock of its file `.lock`.

    Args:
        folder: The folder.
        create: Lock it also if there is no such file; otherwise nothing is written then.

    Returns:
        None if the folder's file system cannot lock, on Windows, or without create.

    Raises:
        FolderInUse: Another process has the lock.
    """
    path = os.path.join(folder, _LOCK)
    if WINDOWS or not (create or os.path.exists(path)):
        return None
    import fcntl  # not on Windows

    while True:
        try:
            file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115
        except OSError:  # whoever writes to the folder will say so
            return None
        try:
            # Of the process, unlike flock: loader workers, which may live on for a moment, do not have it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise FolderInUse(f'{folder} is in use by {holder or "another process"}') from error
            _logger.warning(f'{folder} cannot be locked ({error.strerror}): take care that one run at a time uses it.')
            return None
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return FolderLock(path, file)
        file.close()  # its run has ended just now, and has taken the file away
