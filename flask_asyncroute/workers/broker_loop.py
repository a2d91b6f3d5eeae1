"""What the processes that serve requests do for the tasks on Celery workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from ..background import Loop
from ..engine.lifecycle import Lifecycle
from ..executors.base import TaskExecutor
from ..routes import Route
from ..stores.base import SharedTaskStore
from ..task import AsyncRouteTask
from .lost_messages import LostMessages
from .maintenance import Job
from .overdue_runs import OverdueRuns
from .recovery import Recovery

SEND_SECONDS = 0.5
END_SECONDS = 2.0


class BrokerLoop(Loop):
    """Sends messages again, and ends overdue runs.

    It has a thread of its own, because a broker that accepts connections but never responds blocks
    this thread for seconds. Maintenance must not wait for that.

    :param routes: those that Celery workers run.
    """

    def __init__(
        self, store: SharedTaskStore, lifecycle: Lifecycle, routes: Mapping[str, Route],
        executor_of: Callable[[Route], TaskExecutor], recovery: Recovery,
    ) -> None:  # fmt: skip
        super().__init__("asyncroute-celery")
        self._store = store
        self._endpoints = routes.keys()
        self._recovery = recovery
        self._messages = LostMessages(
            store, routes, cast(Any, executor_of), self.is_first, self.send_at,
            int(SEND_SECONDS * 1_000_000),
        )  # fmt: skip
        overdue = OverdueRuns(store, lifecycle, routes, executor_of, self.is_first)
        self._send_job = Job(SEND_SECONDS, self._messages.send_again)
        self._end_job = Job(END_SECONDS, overdue.end)

    def is_first(self) -> bool:
        """Return whether this process is the one that does this work."""
        return self._recovery.is_first(self._endpoints)

    def send_at(self, time_us: int) -> None:
        """Send the tasks with this start time, by the store's clock, when it has come."""
        seconds = max((time_us - self._store.now_us()) / 1_000_000, 0.0)
        self._send_job.hasten(time.monotonic() + seconds)
        self.wake()

    def send_restarted(self, task: AsyncRouteTask) -> None:
        """Send a task soon, because its worker has ended."""
        if task.endpoint in self._endpoints:
            self._messages.add(task)
            self._send_job.hasten(time.monotonic())
            self.wake()

    def _step(self) -> float:
        due = min(self._send_job.do(), self._end_job.do())
        return max(due - time.monotonic(), 0.0)
