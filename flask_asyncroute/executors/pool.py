"""An elastic pool of daemon threads behind the `concurrent.futures.Executor` interface.

Unlike the standard one it shrinks again, keeps a minimum, replaces threads that hang, and never holds up the
interpreter's exit: daemon threads are not joined.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from ..context import apart
from ..errors import TaskAborted

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")
IDLE_SECONDS = 10.0


class ElasticThreadPool(Executor):
    """Calls functions on threads, each in an empty context.

    :param min_workers: threads that are kept once they were needed.
    :param max_workers: the most threads at once; as many more may linger in calls that were abandoned.
    :param idle_seconds: after which a thread over the minimum ends.
    """

    def __init__(self, name: str, min_workers: int, max_workers: int, idle_seconds: float = IDLE_SECONDS) -> None:
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
        """Call ``fn(*args, **kwargs)`` on a thread of the pool as soon as there is one.

        :raises RuntimeError: after :meth:`shutdown`.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise RuntimeError(f"The pool {self._name} takes no more calls: it was shut down.")
            call = (future, partial(fn, *args, **kwargs))
            self._calls.append(call)
            try:
                self._serve_waiting()
            except RuntimeError:
                # The system has no more threads. Those that there are will come to it; without any, nobody would.
                if not self._threads:
                    self._calls.remove(call)
                    raise
        return future

    def abandon(self, future: Future[Any]) -> bool:
        """Stop counting the thread that is in this call, so that another may take its place; return whether it does so.

        At most ``max_workers`` threads linger.
        """
        with self._changed:
            thread = self._busy.get(future)
            if thread is None or len(self._lingering) >= self._max_workers:
                return False
            self._lingering.add(thread)
            try:
                self._serve_waiting()
            except RuntimeError:
                logger.warning("The pool %s could not replace a thread: the system has no more.", self._name)
            return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls and end the threads when they are done.

        :param wait: whether to return only then.
        :param cancel_futures: whether to cancel the calls that wait.
        """
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

    def _serve_waiting(self) -> None:
        """Wake or start a thread for the newest call. Under the lock."""
        if self._idle >= len(self._calls):
            self._changed.notify()
        elif self._calls and len(self._threads) - len(self._lingering) < self._max_workers:
            self._started += 1
            thread = threading.Thread(target=self._work, name=f"asyncroute-{self._name}-{self._started}", daemon=True)
            thread.start()
            self._threads.add(thread)

    def _work(self) -> None:
        """Take calls until there is no need for this thread."""
        thread = threading.current_thread()
        try:
            while True:
                try:
                    if not self._work_once(thread):
                        return
                except TaskAborted:
                    # Raised into this thread by somebody who did not look what it runs. The pool must not lose a thread to it.
                    logger.warning("A thread of the pool %s was interrupted between two tasks.", self._name)
        finally:
            with self._changed:
                self._retire(thread)

    def _retire(self, thread: threading.Thread) -> bool:
        """Count a thread no more. Under the lock that decided it: a call that comes now must not rely on it."""
        self._threads.discard(thread)
        self._lingering.discard(thread)
        return False

    def _work_once(self, thread: threading.Thread) -> bool:
        with self._changed:
            if len(self._threads) - len(self._lingering) > self._max_workers:
                return self._retire(thread)
            while not self._calls:
                if self._is_closed:
                    return self._retire(thread)
                self._idle += 1
                try:
                    is_woken = self._changed.wait(self._idle_seconds)
                finally:
                    self._idle -= 1
                if not is_woken and not self._calls and len(self._threads) - len(self._lingering) > self._min_workers:
                    return self._retire(thread)
            future, call = self._calls.popleft()
            self._busy[future] = thread
        try:
            if future.set_running_or_notify_cancel():
                try:
                    result = apart(call)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
        finally:
            with self._changed:
                del self._busy[future]
                self._lingering.discard(thread)
        return True
