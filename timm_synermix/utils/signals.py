"""Signals as a wish to stop, which all processes of a run follow at the same place."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from timm_synermix.utils.distributed import HostGroup

_logger = logging.getLogger(__name__)

_SECONDS, _CHECKS = 2.0, 16  # between two agreements of the processes, at most, if the steps stay as long as they were


# Those that the system has. SIGUSR1 is what Slurm can send ahead of a job's time limit. SIGBREAK is of Windows:
# Ctrl-Break, a console that is closed.
STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGBREAK') if name in signal.Signals.__members__
)


class Stopped(Exception):
    """A run was asked to stop.

    Attributes:
        signum: The signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """While it is entered, the first of the signals that stop is noted, and a second one is obeyed at once.

    Several processes agree in a few of their checks alone, as many as two seconds have, because each waits for all.

    Args:
        group: The processes that stop together when one of them is asked to.
    """

    def __init__(self, group: HostGroup) -> None:
        self.group = group
        self._signum = 0
        self._previous: dict[int, Any] = {}
        self._checks, self._due = 0, 1  # since the processes agreed, and those in which they do not
        self._agreed = time.monotonic()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from it alone
            for signum in STOP_SIGNALS:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        _logger.info(f'{signal.Signals(signum).name}: finishing this step, then saving. Again to stop at once.')
        for again, handler in self._previous.items():
            signal.signal(again, handler)

    def check(self, now: bool = False) -> None:
        """Raise Stopped if any process was asked to stop; every process must call it at the same place.

        Args:
            now: Agree in this check, not in one of the next ones.
        """
        self._checks += 1
        if self.group.size > 1 and self._checks < self._due and not now:
            return
        waited = round(1e3 * (time.monotonic() - self._agreed))
        signum, milliseconds = self.group.max([self._signum, waited])
        each = milliseconds / 1e3 / self._checks
        self._due = max(1, min(_CHECKS, 2 * self._due, int(_SECONDS / max(each, 1e-3))))
        self._checks, self._agreed = 0, time.monotonic()
        if signum:
            raise Stopped(signum)
