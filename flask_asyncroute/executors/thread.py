"""An elastic thread pool, and the executors that run tasks on it.

Unlike `ThreadPoolExecutor`, the pool ends idle threads above a minimum, replaces threads that hang,
and does not delay the interpreter's exit.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from ..background import when_gone
from ..errors import TaskAborted
from .base import PoolSettings, TaskExecutor
from .execution import Execution
from .interruption import interrupt

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")
IDLE_SECONDS = 10.0


class ElasticThreadPool(Executor):
    """Calls functions on daemon threads, each in an empty context (:mod:`contextvars`).

    :param min_workers: number of threads that do not end when they are idle.
    :param max_workers: maximum number of threads. Threads whose calls were abandoned are not
        counted. The pool can have ``max_workers`` of these, too.
    :param idle_seconds: seconds after which an idle thread above the minimum ends.
    """

    def __init__(
        self, name: str, min_workers: int, max_workers: int, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._name = name
        self._min_workers = min_workers
        self._max_workers = max_workers
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition(threading.Lock())
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._busy: dict[Future[Any], threading.Thread] = {}
        self._lingering: set[threading.Thread] = set()
        self._is_closed = False
        self._started = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call a function on the next free thread.

        :raises RuntimeError: after :meth:`shutdown`, or if the first thread cannot be started.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise RuntimeError(
                    f"The pool {self._name} no longer accepts calls, because it was shut down."
                )
            call = (future, partial(fn, *args, **kwargs))
            self._calls.append(call)
            try:
                self._wake_or_start_thread()
            except RuntimeError:
                # The system has no more threads. An existing thread will take the call later.
                if not self._threads:
                    self._calls.remove(call)
                    raise
        return future

    def abandon(self, future: Future[Any]) -> bool:
        """Stop counting the thread that is running a call, so that the pool can start another
        thread.

        :param future: the call, as :meth:`submit` returned it.
        :return: False if no thread is running the call, or too many calls have already been
            abandoned.
        """
        with self._changed:
            thread = self._busy.get(future)
            if thread is None or len(self._lingering) >= self._max_workers:
                return False
            self._lingering.add(thread)
            try:
                self._wake_or_start_thread()
            except RuntimeError:
                logger.warning(
                    "The pool %s could not replace a hanging thread: no thread can be started.",
                    self._name,
                )
            return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end the threads after their calls; see `concurrent.futures`."""
        with self._changed:
            self._is_closed = True
            if cancel_futures:
                for future, _ in self._calls:
                    future.cancel()
                self._calls.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        if wait:
            for thread in threads:
                thread.join()

    def _counted(self) -> int:
        return len(self._threads) - len(self._lingering)

    def _wake_or_start_thread(self) -> None:
        # The caller holds the lock.
        if self._idle >= len(self._calls):
            self._changed.notify()
        elif self._calls and self._counted() < self._max_workers:
            self._started += 1
            name = f"asyncroute-{self._name}-{self._started}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.add(thread)

    def _work(self) -> None:
        thread = threading.current_thread()
        try:
            is_needed = True
            while is_needed:
                try:
                    is_needed = self._work_once(thread)
                except TaskAborted:
                    # Code outside this package raised the exception in this thread between tasks.
                    # Keep the thread.
                    logger.warning(
                        "A thread of the pool %s was interrupted between two tasks.", self._name
                    )
        finally:
            with self._changed:
                self._retire(thread)

    def _retire(self, thread: threading.Thread) -> bool:
        # Keep the lock between the decision that the thread ends and this call. Otherwise a new
        # call could wait for the thread.
        self._threads.discard(thread)
        self._lingering.discard(thread)
        return False

    def _work_once(self, thread: threading.Thread) -> bool:
        """Wait for a call and run it. Return whether this thread must continue."""
        with self._changed:
            if self._counted() > self._max_workers:
                return self._retire(thread)
            while not self._calls:
                if self._is_closed:
                    return self._retire(thread)
                self._idle += 1
                try:
                    is_woken = self._changed.wait(self._idle_seconds)
                finally:
                    self._idle -= 1
                if not is_woken and not self._calls and self._counted() > self._min_workers:
                    return self._retire(thread)
            future, call = self._calls.popleft()
            self._busy[future] = thread
        try:
            if future.set_running_or_notify_cancel():
                try:
                    result = Context().run(call)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
        finally:
            with self._changed:
                del self._busy[future]
                self._lingering.discard(thread)
        return True


class PooledTaskExecutor(TaskExecutor):
    """Runs tasks on an elastic thread pool.

    :param min_threads: number of threads that do not end when they are idle.
    """

    def __init__(self, settings: PoolSettings, min_threads: int) -> None:
        super().__init__(settings)
        self._pool = ElasticThreadPool(settings.name, min_threads, settings.max_workers)
        when_gone(self, self._pool.shutdown, False)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _start(self, task_id: str) -> Future[None]:
        return self._pool.submit(self._run_counted, task_id)


class ThreadTaskExecutor(PooledTaskExecutor):
    """Runs views on threads.

    Views that do not stop are interrupted, and threads that hang are replaced.
    """

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings, settings.min_workers)
        self.interrupt_after = settings.interrupt_after
        self._abandoned: set[str] = set()

    def interrupt(self, execution: Execution) -> bool:
        return interrupt(execution)

    def abandon(self, task_id: str) -> None:
        with self._lock:
            future = self._futures.get(task_id)
            if future is not None and task_id not in self._abandoned and self._pool.abandon(future):
                self._abandoned.add(task_id)
                self._taken -= 1

    def _leave(self, task_id: str) -> None:
        with self._lock:
            if task_id in self._abandoned:
                self._abandoned.discard(task_id)
            else:
                self._taken -= 1
