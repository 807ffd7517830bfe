"""What timm's sweep.py and the runs that it starts agree upon: who trains, told by locks that end with the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

lock_fds: list[int] = []  # held until the process ends


def join_attempt(locks: Sequence[str], attempt_path: str, attempt: str) -> None:
    """Hold shared locks of a sweep for as long as this process lives; exit if another attempt has taken its place.

    Args:
        locks: Files to lock; waits for whoever holds one exclusively.
        attempt_path: File that holds the name of the attempt whose processes may train.
        attempt: The name of this one.
    """
    import fcntl  # not on Windows, where there is no sweep.py either

    for path in locks:
        lock_fds.append(os.open(path, os.O_RDWR))
        fcntl.flock(lock_fds[-1], fcntl.LOCK_SH)
    with open(attempt_path, encoding='utf-8') as file:
        live = file.read().strip()
    if live != attempt:
        sys.exit(f'The sweep attempt {attempt} is not the live one, it was retired. Nothing is trained.')
