"""Executors whose tasks run in the process that started them: inside the request, or on the app's
own `concurrent.futures.Executor`.
"""

from __future__ import annotations

import weakref
from concurrent.futures import Executor, Future
from contextvars import Context
from itertools import count

from ..errors import ConfigurationError
from .base import PoolSettings, TaskExecutor

_numbers = count(1)
_adapters: weakref.WeakValueDictionary[int, FutureTaskExecutor] = weakref.WeakValueDictionary()


class FutureTaskExecutor(TaskExecutor):
    """Runs tasks on the app's own `Executor`, which decides how many run at once. Limits only the
    total of running and waiting tasks.
    """

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings)
        assert isinstance(settings.option, Executor)
        self._executor = settings.option
        self._number = next(_numbers)
        _adapters[self._number] = self

    def close(self) -> None:
        """Do nothing: the app shuts its Executor down."""

    def _start(self, task_id: str) -> Future[None]:
        return self._executor.submit(_run_here, self._number, task_id)


def _run_here(number: int, task_id: str) -> None:
    """Run a task for the `FutureTaskExecutor` with this number.

    Some Executors copy their arguments, so the object itself cannot be passed.
    """
    adapter = _adapters.get(number)
    if adapter is None:
        raise ConfigurationError(
            "The app's own Executor ran a task outside the process that submitted it. Use an "
            'Executor with threads in that process, or executor="process".'
        )
    Context().run(adapter._run_counted, task_id)


class ImmediateTaskExecutor(TaskExecutor):
    """Runs each task inside :meth:`submit`, on the request's thread. No task waits."""

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__(settings)
        self.runs_inline = True

    def reserve(self) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, task_id: str) -> None:
        Context().run(self._run, self, task_id)
