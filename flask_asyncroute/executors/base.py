"""The port of all executors: a bounded number of tasks, by id. What runs a task is `worker`, found by import string."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future

from ..errors import QueueFull
from ..execution import Execution
from ..outcome import Outcome
from ..snapshot import Body
from ..stores.base import Claim

logger = logging.getLogger("flask_asyncroute")

Run = Callable[["TaskExecutor", str], None]
"""Runs the task with this id for an executor, and returns when its code has ended; never raises an Exception."""

RUN = "flask_asyncroute.worker:run"
AHEAD = 20
"""How many tasks of others may wait here, beside those that start at once."""


class TaskExecutor(ABC):
    """Runs tasks of one pool in one process. Thread-safe.

    :param run: what to call with a task's id.
    :param max_workers: how many tasks run at once.
    :param queue_size: how many more may wait.
    """

    is_bound = False
    """Whether its tasks belong to this process: nobody else can run them."""
    interrupt_after: float | None = None
    """Seconds from asking a run to stop until :meth:`interrupt` may be called; None: never."""

    def __init__(self, run: Run, max_workers: int, queue_size: int) -> None:
        self._run = run
        self._max_workers = max_workers
        self._queue_size = queue_size
        self._lock = threading.Lock()
        self._taken = 0
        self._futures: dict[str, Future[None] | None] = {}
        """What waits or runs here; None: it is just being handed over."""

    def reserve(self) -> None:
        """Take a place for one task; give it back with :meth:`unreserve` or use it with :meth:`submit`.

        :raises QueueFull: where none is left.
        """
        with self._lock:
            if self._taken >= self._max_workers + self._queue_size:
                raise QueueFull(
                    f"{self._queue_size} tasks are waiting for this route, which is as many as may wait. Try again later.",
                    retry_after=5,
                )
            self._taken += 1

    def unreserve(self) -> None:
        """Give a place back."""
        with self._lock:
            self._taken -= 1

    def submit(self, task_id: str) -> None:
        """Run a task as soon as there is room, on a place that was reserved; returns at once. One that is here already, since
        its start took so long that it was taken over, is not run twice: the place is given back.

        :raises RuntimeError: where no more tasks are taken; the place is given back.
        """
        with self._lock:
            if task_id in self._futures:
                self._taken -= 1
                return
            self._futures[task_id] = None
        try:
            future = self._futures[task_id] = self._start(task_id)
        except BaseException:
            self._futures.pop(task_id)
            self.unreserve()
            raise
        future.add_done_callback(lambda _: self._futures.pop(task_id, None))

    def room(self) -> int:
        """Return how many tasks of others may be submitted now: none while no place is free, else more than would start at
        once, so that places which are free again soon do not wait for the next look; half of the queue is left to starts.
        """
        free = self.free()
        return free + min(AHEAD, self._queue_size // 2) if free else 0

    def free(self) -> int:
        """Return how many tasks would start at once if they were submitted now."""
        return max(self._max_workers - self._taken, 0)

    def holds(self, task_id: str) -> bool:
        """Return whether a task waits or runs here."""
        return task_id in self._futures

    def discard(self, task_id: str) -> bool:
        """Take a task that need not run any more out of the queue, if it has not begun; return whether it did."""
        with self._lock:
            future = self._futures.get(task_id)
            try:
                if future is None or not future.cancel():
                    return False
            except Exception:
                # An app's own Executor has futures of its own.
                logger.exception("Task %s could not be taken out of the queue of its executor.", task_id)
                return False
            self._taken -= 1
            return True

    def discard_waiting(self) -> list[str]:
        """Take all that has not begun out of the queue; return the ids."""
        return [task_id for task_id in list(self._futures) if self.discard(task_id)]

    def interrupt(self, execution: Execution) -> bool:
        """Interrupt a run that was asked to stop and did not; return whether there is nothing more to try."""
        return True

    def abandon(self, task_id: str) -> None:  # noqa: B027 - most executors have nothing to do
        """Stop counting a run whose task is over though its code is not: its place is free for another."""

    def hand_over(self, claim: Claim, body: Body | None, execution: Execution) -> Outcome | None:
        """Have a claimed task run in another process, and wait for its end; None: it is to be run here, on this thread.

        :param body: of the request, where it is large; the caller closes it.
        :return: how the run ended.
        """
        return None

    @abstractmethod
    def _start(self, task_id: str) -> Future[None]:
        """Have :meth:`_run_counted` called with the id."""

    @abstractmethod
    def close(self) -> None:
        """Take no more tasks; those that run go on."""

    def _run_counted(self, task_id: str) -> None:
        try:
            self._run(self, task_id)
        finally:
            self._leave(task_id)

    def _leave(self, task_id: str) -> None:
        with self._lock:
            self._taken -= 1
