"""Removing tasks that have ended, once whoever follows them in any process has had the time to read so.

A request asks for it by `purge`; the housekeeper, for retention, keeps to the same time.
"""

from __future__ import annotations

import time

from .errors import TaskUnfinished
from .lifecycle import Lifecycle
from .stores.base import TaskStore
from .task import AsyncRouteTask, now_us

HEARD_SECONDS = 0.3
"""After which who follows a task has read that it ended: longer than the notifier's slowest look."""


def purge(store: TaskStore, lifecycle: Lifecycle, task: AsyncRouteTask) -> bool:
    """Remove a task; return whether it was still there. Until :data:`HEARD_SECONDS` after its end this waits.

    :raises TaskUnfinished: where it has not ended, or its code is still stopping.
    """
    current: AsyncRouteTask | None = task
    while current is not None:
        if not current.is_completed or current.stopping:
            raise TaskUnfinished(
                "Only a task whose code has ended can be removed: "
                + (
                    "its code is still stopping."
                    if current.is_completed
                    else f"its State is {current.state}; stop it first."
                ),
                task_id=current.id,
                retry_after=1,
            )
        time.sleep(HEARD_SECONDS - seconds_since_end(current))
        if lifecycle.purge(current.id):
            return True
        current = store.get(current.id)
    return False


def seconds_since_end(task: AsyncRouteTask) -> float:
    """Return how long ago a task ended, :data:`HEARD_SECONDS` at most; the clock of who ended it may be another."""
    assert task.completed_us is not None
    return min(max((now_us() - task.completed_us) / 1_000_000, 0.0), HEARD_SECONDS)
