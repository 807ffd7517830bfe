"""A tracker whose trouble is its own: a run goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_logger = logging.getLogger(__name__)


class TrackerGuard:
    """A tracker of Accelerate; its first exception is one line of the log, and from then on it is sent nothing.

    Args:
        tracker: Any of Accelerate's trackers. Its other attributes are those of the guard.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._failed = False

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Send numbers or text."""
        self.attempt(self._tracker.log, *args, **kwargs)

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Send pictures."""
        self.attempt(self._tracker.log_images, *args, **kwargs)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Send a table."""
        self.attempt(self._tracker.log_table, *args, **kwargs)

    def finish(self) -> None:
        """Let the tracker finish what it has."""
        self.attempt(self._tracker.finish)

    def attempt(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call what asks something of the tracker, unless that has failed before."""
        if self._failed:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # each tracker has errors of its own
            self._failed = True
            reason = (str(error) or type(error).__name__).splitlines()[0]
            _logger.warning(f'The tracker {self._tracker.name} has failed, the run goes on without it: {reason}')

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)
