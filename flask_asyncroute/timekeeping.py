"""One thread per process for what is due by the clock: time that is up, interruptions, progress that climbs by itself.

It never waits for the store, so that a timeout holds whatever that does. It calls the dispatcher and the executors.
"""

from __future__ import annotations

import logging
import time

from .dispatcher import Dispatcher
from .execution import Execution
from .executors.base import TaskExecutor
from .loop import Loop

logger = logging.getLogger("flask_asyncroute")

RETRY_SECONDS = 0.01
"""Between two looks whether a thread can be interrupted."""
LONGEST_SLEEP = 30.0


class Timekeeper(Loop):
    """Attends to all runs of this process."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__("asyncroute-timekeeper")
        self._dispatcher = dispatcher

    def _step(self) -> float:
        due = time.monotonic() + LONGEST_SLEEP
        for execution, executor in list(self._dispatcher.running.values()):
            try:
                due = min(due, self._attend(execution, executor, time.monotonic()))
            except Exception:
                logger.exception("Task %s could not be attended to; it is tried again.", execution.task_id)
                due = min(due, time.monotonic() + 1.0)
        return max(due - time.monotonic(), 0.0)

    def _attend(self, execution: Execution, executor: TaskExecutor, now: float) -> float:
        """Do what is due for one run; return when to look at it again."""
        due = now + LONGEST_SLEEP
        if execution.interrupt_at is not None:
            if execution.interrupt_at <= now:
                execution.interrupt_at = None if executor.interrupt(execution) else now + RETRY_SECONDS
            due = min(due, execution.interrupt_at or due)
        if execution.deadline is not None and not execution.is_expired and not execution.stop.is_set():
            if execution.deadline <= now:
                self._dispatcher.expire(execution)
                return now
            due = min(due, execution.deadline)
        step = execution.climb(now)
        return due if step is None else min(due, step)
