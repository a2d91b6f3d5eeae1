"""The interface of all executors. An executor runs a limited number of tasks, identified by id. The
dispatcher reserves slots, submits and cancels tasks; the runner passes the function that runs one.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..errors import QueueFull
from ..snapshot import Body
from ..stores.base import Claim
from ..task import AsyncRouteTask
from .execution import Execution
from .outcome import Outcome

logger = logging.getLogger("flask_asyncroute")

Run = Callable[["TaskExecutor", str], None]
"""Runs the task with this id, and returns when its code has ended. Never raises an Exception."""

MAX_AHEAD = 20  # Maximum number of other processes' tasks to queue here.


class ChildSettings(NamedTuple):
    """Settings with which a child process runs tasks of an app; sent to it as JSON."""

    app: str  # the import path of the app or its factory; see `app_loader`
    values: dict[str, Any]  # configuration values that replace those of the child
    own: list[str]  # keys for which the child keeps its own values
    max_result: int  # maximum size of a result, in bytes
    modules: Sequence[str] = ()  # imported before the app


class Host(Protocol):
    """The part of a `workers.runner.Runner` that an executor needs."""

    @property
    def celery(self) -> Any: ...

    def child_settings(self) -> ChildSettings: ...


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """The arguments of an executor."""

    name: str  # a part of the thread names
    run: Run
    max_workers: int  # maximum number of tasks that run at once
    queue_size: int  # maximum number of tasks that wait
    min_workers: int = 1  # threads or children kept ready after the first task
    interrupt_after: float | None = None  # seconds between a stop and `interrupt`; None: never
    option: str | Executor = "thread"  # the ``executor`` option of the route
    is_bound: bool = False  # only this process can run the tasks
    celery: Mapping[str, Any] = field(default_factory=dict)  # where Celery sends the tasks
    host: Host | None = None  # an executor must not keep a reference to it


class TaskExecutor(ABC):
    """Runs tasks of one pool in one process. Thread-safe."""

    interrupt_after: float | None = None
    is_queue: bool = False
    """Whether tasks only wait in the store, for worker processes to take them at once."""

    def __init__(self, settings: PoolSettings) -> None:
        self.is_bound = settings.is_bound
        self.runs_inline = False
        self._run = settings.run
        self._max_workers = settings.max_workers
        self._queue_size = settings.queue_size
        self._lock = threading.Lock()
        self._taken = 0
        self._futures: dict[str, Future[None] | None] = {}
        """Futures of the waiting and running tasks, by id; None while :meth:`_start` has not
        returned.
        """

    def reserve(self) -> None:
        """Reserve a slot for one task; then call :meth:`submit` or :meth:`release`.

        :raises QueueFull: if no slot is free.
        """
        with self._lock:
            if self._taken >= self._max_workers + self._queue_size:
                raise queue_full(self._queue_size)
            self._taken += 1

    def release(self) -> None:
        """Release a reserved slot."""
        with self._lock:
            self._taken -= 1

    def submit(self, task_id: str) -> None:
        """Run a task in a reserved slot as soon as possible; return at once. If this process has
        already taken over and submitted the task, only release the slot.

        :raises RuntimeError: after :meth:`close`; the slot is released.
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
            self.release()
            raise
        future.add_done_callback(lambda _: self._futures.pop(task_id, None))

    def takeover_capacity(self) -> int:
        """Return how many tasks of other processes this process can take over now: 0 if no slot is
        free, else the free slots plus half of the queue (at most :data:`MAX_AHEAD`), so that the
        next tasks are already queued when slots become free.
        """
        free = self.free()
        return free + min(MAX_AHEAD, self._queue_size // 2) if free else 0

    def free(self) -> int:
        """Return how many tasks would start at once if they were submitted now."""
        return max(self._max_workers - self._taken, 0)

    def holds(self, task_id: str) -> bool:
        """Return whether a task is waiting or running in this executor."""
        return task_id in self._futures

    def discard(self, task_id: str) -> bool:
        """Remove a task from the queue; return False if the task has started or is unknown."""
        with self._lock:
            future = self._futures.get(task_id)
            try:
                if future is None or not future.cancel():
                    return False
            except Exception:
                # The app's own Executor can have futures whose cancel() raises.
                logger.exception(
                    "Task %s could not be removed from the queue of its executor.", task_id
                )
                return False
            self._taken -= 1
            return True

    def discard_waiting(self) -> list[str]:
        """Empty the queue; return the ids of the tasks that were waiting in it."""
        return [task_id for task_id in list(self._futures) if self.discard(task_id)]

    def cancel(self, task: AsyncRouteTask) -> None:  # noqa: B027 - most executors run tasks in this process
        """Stop the code of a task that perhaps runs on another system, without waiting for its end.

        :param task: the record after the abort, which is already stored.
        """

    def interrupt(self, execution: Execution) -> bool:
        """Interrupt a run that has not stopped by itself; return False if this must be called again
        soon.
        """
        return True

    def abandon(self, task_id: str) -> None:  # noqa: B027 - most executors have nothing to do
        """Release the slot of a run whose task has ended although its code is still running."""

    def hand_over(self, claim: Claim, body: Body | None, execution: Execution) -> Outcome | None:
        """Run a claimed task in another process and wait for its end.

        :param body: the request body if it is large; the caller closes it.
        :return: the outcome, or None if the caller must run the task on this thread.
        """
        return None

    def _start(self, task_id: str) -> Future[None]:
        """Schedule a call of :meth:`_run_counted` with the task's id."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Accept no more tasks. Running tasks continue."""

    def _run_counted(self, task_id: str) -> None:
        try:
            self._run(self, task_id)
        finally:
            self._leave(task_id)

    def _leave(self, task_id: str) -> None:
        self.release()


def queue_full(waiting: int) -> QueueFull:
    return QueueFull(
        f"The queue of this route is full: {waiting} tasks are waiting. Try again later.",
        retry_after=5,
    )
