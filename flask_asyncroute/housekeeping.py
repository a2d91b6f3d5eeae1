"""One thread per process for all that is to be done in the store: progress to write, outcomes that it could not take yet,
tasks whose retention is over, and what else `runner` has done from time to time.

It may have to wait for the store; what is due by the clock is `timekeeping`'s.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import signals
from .dispatcher import Dispatcher
from .errors import StoreUnavailable
from .execution import Execution
from .lifecycle import Lifecycle
from .loop import Loop
from .removal import HEARD_SECONDS
from .stores.base import TaskStore
from .task import now_us

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

REPORT_SECONDS = 0.1
"""Progress of one task is written at most this often."""
LONGEST_SLEEP = 30.0
STORE_RETRY_SECONDS = 1.0
PAGE = 500
HEARD_US = int(HEARD_SECONDS * 1_000_000)


class Housekeeper(Loop):
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
        super().__init__("asyncroute-housekeeper")
        self._app = app
        self._store = store
        self._lifecycle = lifecycle
        self._dispatcher = dispatcher
        self._report_after = 0.0
        """When the store is to be tried again with progress; there is no hurry with it."""
        self._calls: deque[_Call] = deque()
        self._jobs = [Job(interval, self._sweep), *jobs]

    def call(self, work: Callable[[], None]) -> threading.Event:
        """Have the thread do this once, as soon as it can; return what is set when it has.

        Where there is no thread it is done here and now.
        """
        call = _Call(work)
        if self.is_running:
            self._calls.append(call)
            self.wake()
        else:
            call()
        return call.done

    def _step(self) -> float:
        """Do what is due; return in how many seconds to look again."""
        works: list[Callable[[], float]] = []
        works += [partial(self._report, execution) for execution, _ in list(self._dispatcher.running.values())]
        works += [self._calls.popleft().do for _ in range(len(self._calls))]
        for job in self._jobs:
            # Before each: a view that computes leaves a job little of the processor, and an outcome must not wait for all.
            works += [lambda: self._lifecycle.unwritten.retry(time.monotonic()), job.do]
        due = min([time.monotonic() + LONGEST_SLEEP, *(work() for work in works)])
        return max(due - time.monotonic(), 0.0)

    def _report(self, execution: Execution) -> float:
        """Write what one run has to tell, its events at once and its progress when it is time to; return when to look again."""
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
            # Each try may take seconds; there is no hurry with progress.
            self._report_after = time.monotonic() + STORE_RETRY_SECONDS
            logger.error("What task %s has reported could not be stored yet: %s", execution.task_id, error)
            return self._report_after
        except Exception:
            logger.exception("Task %s could not be attended to; it is tried again.", execution.task_id)
            return now + 1.0
        return math.inf

    def _sweep(self) -> None:
        """Remove tasks whose retention is over."""
        while True:
            outlived = self._store.outlived(now_us() - HEARD_US, PAGE)
            for task_id in outlived:
                self._lifecycle.purge(task_id)
            if len(outlived) < PAGE:
                return


class _Call:
    """Work that is done once."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done = threading.Event()

    def __call__(self) -> None:
        try:
            self._work()
        finally:
            self.done.set()

    def do(self) -> float:
        try:
            self()
        except Exception:
            logger.exception("Housekeeping (%s) failed.", _name(self._work))
        return math.inf


class Job:
    """Work that is done every so many seconds; it may raise, and is then done again at its time.

    That the store is away is logged once, until the work is done again: it is known by then, and may last.
    """

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self.seconds = seconds
        self.work = work
        self.due = time.monotonic() + seconds
        self._is_held_up = False

    def do(self) -> float:
        """Do it, if it is time to; return when the next is."""
        if self.due <= time.monotonic():
            try:
                self.work()
                self._is_held_up = False
            except StoreUnavailable as error:
                if not self._is_held_up:
                    logger.error("Housekeeping (%s) waits for the store: %s", _name(self.work), error)
                self._is_held_up = True
            except Exception:
                logger.exception("Housekeeping (%s) failed; it is tried again.", _name(self.work))
            self.due = time.monotonic() + self.seconds
        return self.due


def _name(work: Callable[[], None]) -> str:
    """Return the name of a function, of a partial that of what it calls."""
    return str(getattr(getattr(work, "func", work), "__name__", work))
