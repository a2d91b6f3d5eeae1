"""Ends the runs in Celery workers that can no longer end themselves, because their code holds the
GIL or the broker was down when they were stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..engine.dispatcher import TIMED_OUT
from ..engine.lifecycle import Lifecycle
from ..executors.base import TaskExecutor
from ..executors.registry import CELERY_WORKER
from ..routes import Route
from ..stores.base import SharedTaskStore
from ..task import AsyncRouteTask, State, now_us

GRACE_SECONDS = 8.0
"""Seconds that a run may be overdue before another process ends it.

Longer than the interval at which a worker tries to store an outcome after the store was down.
"""


@dataclass(eq=False)
class OverdueRuns:
    """Finds the runs in all Celery workers of an app. Not thread-safe.

    Only one process does this: the one for which ``is_first`` is true.
    """

    store: SharedTaskStore
    lifecycle: Lifecycle
    routes: Mapping[str, Route]
    executor_of: Callable[[Route], TaskExecutor]
    is_first: Callable[[], bool]
    _since: dict[tuple[str, int], float] = field(default_factory=dict)
    """For each overdue run, by task id and epoch: the monotonic time when it was first seen."""
    _checked_at: float = -math.inf

    def end(self) -> None:
        """Abort the tasks whose timeout has expired, and kill the code of aborted tasks."""
        if not self.is_first():
            return
        overdue = {
            (task.id, task.epoch): task
            for name in self.store.workers.owners()
            if name.startswith(CELERY_WORKER)
            for task in self.store.workers.held(name)
            if _is_overdue(task)
        }
        now = time.monotonic()
        if now - self._checked_at >= GRACE_SECONDS:
            self._since.clear()  # the store was down, perhaps also for the worker
        self._checked_at = now
        self._since = {run: self._since.get(run, now) for run in overdue}
        for run, task in overdue.items():
            if now - self._since[run] >= GRACE_SECONDS:
                self._end(task)

    def _end(self, task: AsyncRouteTask) -> None:
        aborted: AsyncRouteTask | None = task
        if task.state is State.RUNNING:
            aborted = self.lifecycle.abort(task, TIMED_OUT)
        route = self.routes.get(task.endpoint)
        if aborted is not None and route is not None:
            self.executor_of(route).cancel(aborted)


def _is_overdue(task: AsyncRouteTask) -> bool:
    if task.state is State.RUNNING:
        return task.expires_us is not None and task.expires_us <= now_us()
    return task.stopping
