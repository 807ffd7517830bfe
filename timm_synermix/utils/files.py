"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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
    """Rename a file, also for a machine that loses power in the next moment."""
    os.replace(source, path)
    sync(os.path.dirname(path) or '.')


def sync(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == 'nt' and os.path.isdir(path):  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == 'nt' else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
