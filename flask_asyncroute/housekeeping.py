"""One thread per process that finds what is due: time that is up, interruptions, progress to write, tasks whose retention
is over, and what else `runner` has done from time to time.

It calls the dispatcher, the lifecycle and the executors; it decides nothing itself.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import signals
from .dispatcher import Dispatcher
from .errors import StoreUnavailable
from .execution import Execution
from .executors.base import TaskExecutor
from .finalizers import when_gone
from .lifecycle import Lifecycle
from .stores.base import TaskStore
from .task import now_us

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

REPORT_SECONDS = 0.1
"""Progress of one task is written at most this often."""
RETRY_SECONDS = 0.01
"""Between two looks whether a thread can be interrupted."""
LONGEST_SLEEP = 30.0
STORE_RETRY_SECONDS = 1.0
LONG_SECONDS = 0.05
"""What takes longer than this may have had others wait."""
PAGE = 500


class Housekeeper:
    """Runs what is due, on one daemon thread that starts with the first :meth:`start`.

    :param interval: seconds between two sweeps.
    :param jobs: what else is to be done, each with the seconds between two times.
    """

    def __init__(
        self,
        app: Flask,
        store: TaskStore,
        lifecycle: Lifecycle,
        dispatcher: Dispatcher,
        interval: float,
        jobs: Sequence[Job] = (),
    ) -> None:
        self._app = app
        self._store = store
        self._lifecycle = lifecycle
        self._dispatcher = dispatcher
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._report_after = 0.0
        """When the store is to be tried again with progress; there is no hurry with it."""
        self._calls: deque[Callable[[], None]] = deque()
        self._jobs = [Job(interval, self._sweep), *jobs]

    def start(self) -> None:
        """Start the thread, if it does not run yet."""
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._is_closed:
                    when_gone(self, self._wake.set)
                    arguments = (weakref.ref(self), self._wake)
                    self._thread = threading.Thread(
                        target=_keep, args=arguments, name="asyncroute-housekeeper", daemon=True
                    )
                    self._thread.start()

    def wake(self) -> None:
        """Look at once for what is due: something has changed."""
        self._wake.set()

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    def call(self, work: Callable[[], None]) -> threading.Event:
        """Have the thread do this once, as soon as it can; return what is set when it has.

        Where there is no thread it is done here and now.
        """
        done = threading.Event()

        def do() -> None:
            try:
                work()
            finally:
                done.set()

        if self._thread is None:
            do()
        else:
            self._calls.append(do)
            self._wake.set()
        return done

    def _step(self) -> float:
        """Do what is due; return in how many seconds to look again.

        What is due by the clock comes first, and again after everything that may wait for the store.
        """
        due = self._attend_all()
        works: list[Callable[[], float]] = []
        works += [partial(self._report, execution) for execution, _ in list(self._dispatcher.running.values())]
        works += [partial(self._do, self._calls.popleft()) for _ in range(len(self._calls))]
        works.append(lambda: self._lifecycle.unwritten.retry(time.monotonic()))
        works += [job.do for job in self._jobs]
        for work in works:
            began = time.monotonic()
            due = min(due, work())
            if time.monotonic() - began > LONG_SECONDS:
                due = min(due, self._attend_all())
        return max(due - time.monotonic(), 0.0)

    def _attend_all(self) -> float:
        """Do what is due by the clock for all that runs here; return when to look again. Never waits for the store."""
        due = time.monotonic() + LONGEST_SLEEP
        for execution, executor in list(self._dispatcher.running.values()):
            try:
                due = min(due, self._attend(execution, executor, time.monotonic()))
            except Exception:
                logger.exception("Task %s could not be attended to; it is tried again.", execution.task_id)
                due = min(due, time.monotonic() + 1.0)
        return due

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

    def _report(self, execution: Execution) -> float:
        """Write the progress of one run, if there is any and it is time to; return when to look again."""
        now = time.monotonic()
        if not execution.has_report:
            return math.inf
        due = max(execution.reported_at + REPORT_SECONDS, self._report_after)
        if due > now:
            return due
        execution.reported_at = now
        try:
            signals.progress_reported.send(self._app, execution=execution)
        except StoreUnavailable as error:
            # Each try may take seconds; there is no hurry with progress.
            self._report_after = time.monotonic() + STORE_RETRY_SECONDS
            logger.error("The progress of task %s could not be stored: %s", execution.task_id, error)
            return self._report_after
        except Exception:
            logger.exception("Task %s could not be attended to; it is tried again.", execution.task_id)
            return now + 1.0
        return math.inf

    @staticmethod
    def _do(work: Callable[[], None]) -> float:
        try:
            work()
        except Exception:
            logger.exception("Housekeeping (%s) failed.", getattr(work, "__name__", work))
        return math.inf

    def _sweep(self) -> None:
        """Remove tasks whose retention is over."""
        while True:
            outlived = self._store.outlived(now_us(), PAGE)
            for task_id in outlived:
                self._lifecycle.purge(task_id)
            if len(outlived) < PAGE:
                return


class Job:
    """Work that is done every so many seconds; it may raise, and is then done again at its time."""

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self.seconds = seconds
        self.work = work
        self.due = time.monotonic() + seconds

    def do(self) -> float:
        """Do it, if it is time to; return when the next is."""
        if self.due <= time.monotonic():
            try:
                self.work()
            except Exception:
                logger.exception("Housekeeping (%s) failed; it is tried again.", self.work.__name__)
            self.due = time.monotonic() + self.seconds
        return self.due


def _keep(reference: weakref.ref[Housekeeper], wake: threading.Event) -> None:
    """Run the thread. It holds its housekeeper weakly, so that an app that is dropped ends it."""
    while True:
        # Before the look whether it is closed: what is set from here on is not taken back.
        wake.clear()
        keeper = reference()
        if keeper is None or keeper._is_closed:
            return
        seconds = keeper._step()
        del keeper
        wake.wait(seconds)
