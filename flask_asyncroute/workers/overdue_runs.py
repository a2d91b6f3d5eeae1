"""Ends the runs in Celery workers that can no longer end themselves, because their code holds the
GIL or the broker was down when they were stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..engine.dispatcher import TIMED_OUT
from ..engine.lifecycle import Lifecycle
from ..executors.base import TaskExecutor
from ..executors.registry import CELERY_WORKER
from ..routes import Route
from ..stores.base import SharedTaskStore
from ..task import AsyncRouteTask, State, now_us

GRACE_SECONDS = 5.0
"""Seconds after a timeout or stop until other processes end the run. The clocks of two machines may
differ by less.
"""


@dataclass(eq=False)
class OverdueRuns:
    """Finds the runs in all Celery workers of an app. Only one process does this: the one for which
    ``is_first`` is true.
    """

    store: SharedTaskStore
    lifecycle: Lifecycle
    routes: Mapping[str, Route]
    executor_of: Callable[[Route], TaskExecutor]
    is_first: Callable[[], bool]

    def end(self) -> None:
        """Abort the tasks whose timeout has expired, and kill the code of aborted tasks."""
        if not self.is_first():
            return
        for name in self.store.workers.owners():
            if name.startswith(CELERY_WORKER):
                for task in self.store.workers.held(name):
                    self._end(task)

    def _end(self, task: AsyncRouteTask) -> None:
        due_us = task.expires_us if task.state is State.RUNNING else task.completed_us
        if due_us is None or now_us() - due_us < GRACE_SECONDS * 1_000_000:
            return
        aborted: AsyncRouteTask | None = task
        if task.state is State.RUNNING:
            aborted = self.lifecycle.abort(task, TIMED_OUT)
        route = self.routes.get(task.endpoint)
        if aborted is not None and route is not None:
            self.executor_of(route).cancel(aborted)
