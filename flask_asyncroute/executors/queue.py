"""The executor of a process that leaves the tasks of a route to worker processes."""

from __future__ import annotations

import time
from collections.abc import Callable

from .base import PoolSettings, TaskExecutor, queue_full

COUNT_SECONDS = 0.5  # Minimum interval between two counts, so that starts stay fast.


class QueueTaskExecutor(TaskExecutor):
    """Runs nothing: tasks wait in the store until a worker process takes them.

    Refuses tasks if as many wait in the store as one worker process would accept.

    :param count: counts the tasks of the pool that wait in the store, up to its argument.
    """

    is_queue = True

    def __init__(self, settings: PoolSettings, count: Callable[[int], int]) -> None:
        super().__init__(settings)
        self._count = count
        self._count_at = 0.0

    def reserve(self) -> None:
        most = self._max_workers + self._queue_size
        with self._lock:
            if time.monotonic() >= self._count_at:
                self._taken = self._count(most)
                self._count_at = time.monotonic() + COUNT_SECONDS
            if self._taken >= most:
                raise queue_full(most)
            self._taken += 1

    def submit(self, task_id: str) -> None:
        """Do nothing: the task is in the store."""

    def takeover_capacity(self) -> int:
        return 0

    def close(self) -> None: ...
