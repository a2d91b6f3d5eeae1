"""How long the tasks of each route take here lately, and so when it is worth while to come again.

The dispatcher tells it of every task that has ended and asks it for each ``Retry-After``. It reads no store and no clock
but for what is given.
"""

from __future__ import annotations

import math

from .task import AsyncRouteTask

WEIGHT = 0.2
"""Of the newest task in the mean: that of about ten tasks, so that it follows what changes."""
LEAST_SECONDS = 1
MOST_SECONDS = 60
"""A client that asks less often than this learns of a stop, or a failure, too late."""


class Pace:
    """A running mean for each endpoint. Thread-safe: of two ends at once one may be left out, which harms nothing."""

    def __init__(self) -> None:
        self._means_us: dict[str, float] = {}

    def note(self, task: AsyncRouteTask) -> None:
        """Take in how long a task took; does nothing for one that has not ended, or never began."""
        if task.completed_us is None or task.started_us is None or task.stopping:
            return
        took = task.completed_us - task.started_us
        mean = self._means_us.get(task.endpoint, took)
        self._means_us[task.endpoint] = mean + WEIGHT * (took - mean)

    def rest(self, task: AsyncRouteTask, now_us: int) -> int:
        """Return in how many seconds a task that has not ended may have; 1 where nothing is known of its route."""
        elapsed = 0 if task.started_us is None else now_us - task.started_us
        return _seconds(self._means_us.get(task.endpoint, 0) - elapsed)

    def place(self, endpoint: str, workers: int) -> int:
        """Return in how many seconds one of so many busy workers may be free for the next task; 1 where nothing is known."""
        return _seconds(self._means_us.get(endpoint, 0) / workers)


def _seconds(microseconds: float) -> int:
    return min(max(math.ceil(microseconds / 1_000_000), LEAST_SECONDS), MOST_SECONDS)
