"""The background threads of a process. `Maintenance` does the work that uses the store: progress,
pending writes, retention and recovery. `Timekeeper` enforces timeouts.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from flask import Flask

from .. import signals
from ..background import Loop
from ..engine.dispatcher import Dispatcher
from ..engine.lifecycle import Lifecycle
from ..errors import StoreUnavailable
from ..executors.base import TaskExecutor
from ..executors.execution import Execution

logger = logging.getLogger("flask_asyncroute")

REPORT_SECONDS = 0.1  # minimum interval between writes of a task's progress
STORE_RETRY_SECONDS = 1.0
RETRY_SECONDS = 0.01  # interval between attempts to interrupt a thread
LONGEST_SLEEP = 30.0


class Job:
    """Work to repeat every ``seconds``. While the store is unavailable, only one error is
    logged.
    """

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self.seconds = seconds
        self.work = work
        self.due = time.monotonic() + seconds
        self._is_waiting = False
        self._lock = threading.Lock()

    def do(self) -> float:
        """Do the work if it is due; return when the work is due next."""
        if self.due > time.monotonic():
            return self.due
        self.due = math.inf
        try:
            self.work()
            self._is_waiting = False
        except StoreUnavailable as error:
            if not self._is_waiting:
                logger.error(
                    "Background job %s is waiting for the store: %s", _name(self.work), error
                )
            self._is_waiting = True
        except Exception:
            logger.exception("Background job %s failed; it will be retried.", _name(self.work))
        # `hasten` can have set an earlier time meanwhile.
        self.hasten(time.monotonic() + self.seconds)
        return self.due

    def hasten(self, due: float) -> None:
        """Do the work at this monotonic time at the latest. Thread-safe."""
        with self._lock:
            self.due = min(self.due, due)


class Maintenance(Loop):
    def __init__(
        self, app: Flask, lifecycle: Lifecycle, dispatcher: Dispatcher, jobs: Sequence[Job]
    ) -> None:
        super().__init__("asyncroute-housekeeper")
        self._app = app
        self._lifecycle = lifecycle
        self._dispatcher = dispatcher
        self._report_after = 0.0  # when to write progress again after a store outage
        self._calls: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._jobs = jobs

    def call(self, work: Callable[[], None]) -> threading.Event:
        """Run ``work`` once on the background thread; if that thread is not running, on the calling
        thread.

        :return: an event that is set when ``work`` has ended.
        """
        done = threading.Event()
        if self.is_running:
            self._calls.append((work, done))
            self.wake()
        else:
            _do_once(work, done)
        return done

    def do_all(self) -> threading.Event:
        """Do the work of all jobs now, whether or not it is due. Otherwise like :meth:`call`."""

        def work() -> None:
            for job in self._jobs:
                job.hasten(time.monotonic())
                job.do()

        return self.call(work)

    def _step(self) -> float:
        runs = list(self._dispatcher.running.values())
        works: list[Callable[[], float]] = [partial(self._report, run) for run, _ in runs]
        works += [partial(_do_once, *self._calls.popleft()) for _ in range(len(self._calls))]
        pending_writes = self._lifecycle.pending_writes
        works.append(lambda: pending_writes.retry(time.monotonic()))
        for job in self._jobs:
            # Retry pending writes also after each job, not once per round: a job can take long
            # while a view keeps the processor busy.
            works += [job.do, lambda: pending_writes.retry(time.monotonic())]
        due = min([time.monotonic() + LONGEST_SLEEP, *(work() for work in works)])
        return max(due - time.monotonic(), 0.0)

    def _report(self, execution: Execution) -> float:
        """Store a run's events and progress if they are due; return when to call again."""
        if not execution.has_events and not execution.has_report:
            return math.inf
        now = time.monotonic()
        progress_at = execution.reported_at + REPORT_SECONDS if execution.has_report else math.inf
        due = self._report_after if execution.has_events else max(progress_at, self._report_after)
        if due > now:
            return due
        try:
            self._lifecycle.write_events(execution)
            if progress_at > now:
                return progress_at
            execution.reported_at = now
            signals.progress_reported.send(self._app, execution=execution)
        except StoreUnavailable as error:
            self._report_after = time.monotonic() + STORE_RETRY_SECONDS
            logger.error(
                "Progress or events of task %s could not be stored; they will be retried: %s",
                execution.task_id,
                error,
            )
            return self._report_after
        except Exception:
            logger.exception(
                "Progress or events of task %s could not be handled; they will be retried.",
                execution.task_id,
            )
            return now + 1.0
        return math.inf


class Timekeeper(Loop):
    """Times out the runs of this process, and interrupts runs that do not stop.

    This thread never waits for the store, so timeouts are punctual even if the store is slow.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__("asyncroute-timekeeper")
        self._dispatcher = dispatcher
        self._due = math.inf  # when the next step is due; inf during a step

    def begin(self, execution: Execution) -> None:
        """Schedule the timeout of a run whose deadline was just set."""
        if execution.deadline is not None and execution.deadline < self._due:
            self.wake()

    def _step(self) -> float:
        self._due = math.inf
        due = time.monotonic() + LONGEST_SLEEP
        for execution, executor in list(self._dispatcher.running.values()):
            try:
                due = min(due, self._attend(execution, executor, time.monotonic()))
            except Exception:
                logger.exception(
                    "The timeout or stop of task %s could not be handled; it will be retried.",
                    execution.task_id,
                )
                due = min(due, time.monotonic() + 1.0)
        self._due = due
        return max(due - time.monotonic(), 0.0)

    def _attend(self, execution: Execution, executor: TaskExecutor, now: float) -> float:
        """Time out, interrupt or advance a run if that is due; return when to call again."""
        due = now + LONGEST_SLEEP
        if execution.interrupt_at is not None:
            if execution.interrupt_at <= now:
                is_done = executor.interrupt(execution)
                execution.interrupt_at = None if is_done else now + RETRY_SECONDS
            due = min(due, execution.interrupt_at or due)
        deadline = execution.deadline
        if deadline is not None and not execution.is_expired and not execution.stop.is_set():
            if deadline <= now:
                self._dispatcher.expire(execution)
                return now
            due = min(due, deadline)
        step = execution.advance_by_time(now)
        return due if step is None else min(due, step)


def _do_once(work: Callable[[], None], done: threading.Event) -> float:
    try:
        work()
    except Exception:
        logger.exception("Background job %s failed.", _name(work))
    finally:
        done.set()
    return math.inf


def _name(work: Callable[[], None]) -> str:
    return str(getattr(getattr(work, "func", work), "__name__", work))
