"""Runs tasks on an elastic pool of threads of this process: the default."""

from __future__ import annotations

from concurrent.futures import Future

from ..execution import Execution
from ..finalizers import when_gone
from .base import Run, TaskExecutor
from .interruption import interrupt
from .pool import ElasticThreadPool


class ThreadTaskExecutor(TaskExecutor):
    """Runs up to ``max_workers`` tasks at once, interrupts those that do not stop, and replaces threads that hang."""

    def __init__(
        self, name: str, run: Run, min_workers: int, max_workers: int, queue_size: int, interrupt_after: float | None
    ) -> None:
        super().__init__(run, max_workers, queue_size)
        self.interrupt_after = interrupt_after
        self._pool = ElasticThreadPool(name, min_workers, max_workers)
        when_gone(self, self._pool.shutdown, False)
        self._abandoned: set[str] = set()

    def interrupt(self, execution: Execution) -> bool:
        return interrupt(execution)

    def abandon(self, task_id: str) -> None:
        with self._lock:
            future = self._futures.get(task_id)
            if future is not None and task_id not in self._abandoned and self._pool.abandon(future):
                self._abandoned.add(task_id)
                self._taken -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _start(self, task_id: str) -> Future[None]:
        return self._pool.submit(self._run_counted, task_id)

    def _leave(self, task_id: str) -> None:
        with self._lock:
            if task_id in self._abandoned:
                self._abandoned.discard(task_id)
            else:
                self._taken -= 1
