"""Runs a task inside the request that starts it: for tests, and for routes that are quick after all."""

from __future__ import annotations

from concurrent.futures import Future

from ..context import apart
from .base import TaskExecutor


class ImmediateTaskExecutor(TaskExecutor):
    """Returns from :meth:`submit` when the task has ended. Each request brings its own thread, so nothing ever waits."""

    is_bound = True

    def reserve(self) -> None:
        """There is always a place."""

    def unreserve(self) -> None:
        """There is nothing to give back."""

    def submit(self, task_id: str) -> None:
        """Run the task and return when it has ended."""
        self._start(task_id)

    def close(self) -> None:
        """There is nothing to close."""

    def _start(self, task_id: str) -> Future[None]:
        apart(lambda: self._run(self, task_id))
        done: Future[None] = Future()
        done.set_result(None)
        return done
