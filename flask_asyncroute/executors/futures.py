"""Runs tasks on an Executor of the app's own, as long as its threads are in this process. A stop only asks."""

from __future__ import annotations

import weakref
from concurrent.futures import Executor, Future
from itertools import count

from ..context import apart
from ..errors import ConfigurationError
from .base import Run, TaskExecutor

_numbers = count(1)
_adapters: weakref.WeakValueDictionary[int, FutureTaskExecutor] = weakref.WeakValueDictionary()


class FutureTaskExecutor(TaskExecutor):
    """Hands each task to ``executor.submit``. How many run at once is the executor's affair; only the sum is bounded."""

    is_bound = True

    def __init__(self, executor: Executor, run: Run, max_workers: int, queue_size: int) -> None:
        super().__init__(run, max_workers, queue_size)
        self._executor = executor
        self._number = next(_numbers)
        _adapters[self._number] = self

    def close(self) -> None:
        """The executor belongs to the app, which shuts it down."""

    def _start(self, task_id: str) -> Future[None]:
        return self._executor.submit(_run_here, self._number, task_id)


def _run_here(number: int, task_id: str) -> None:
    """Run a task on the adapter it came from: plain values, so that executors that copy what they are given take it too."""
    adapter = _adapters.get(number)
    if adapter is None:
        raise ConfigurationError(
            "The app's own Executor ran a task outside the process that submitted it. Only executors with threads in the "
            'same process will do; for other processes use executor="process".'
        )
    apart(lambda: adapter._run_counted(task_id))
