"""Keep writes in memory and retry them until the store is available.

Each write checks that the task has not changed meanwhile (compare-and-set). A late write then has
no effect.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import StoreUnavailable

logger = logging.getLogger("flask_asyncroute")

FIRST_DELAY = 0.1  # seconds before the first retry; doubles after each failure
MAX_DELAY = 5.0

Write = Callable[[], object]


@dataclass(slots=True)
class _Pending:
    task_id: str
    write: Write
    then: Write
    has_failed: bool = False

    def fail(self) -> None:
        if not self.has_failed:
            self.has_failed = True
            logger.error(
                "A change of task %s could not be stored. It is retried until it succeeds.",
                self.task_id,
            )


class PendingWrites:
    """A queue of writes that are retried until they succeed. Thread-safe.

    The length of the queue has no limit except the number of tasks that ran.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()
        self._retrying = threading.Lock()
        self._delay = FIRST_DELAY
        self._retry_at = 0.0
        self.wake: Callable[[], None] = lambda: None  # called after a write was added

    def write(self, task_id: str, write: Write, then: Write = lambda: None) -> None:
        """Call ``write``, then ``then``.

        If ``write`` raises StoreUnavailable, this method returns, and :meth:`retry` calls both
        later.
        """
        pending = _Pending(task_id, write, then)
        try:
            write()
        except StoreUnavailable:
            pending.fail()
            self._add(pending)
        else:
            then()

    def keep(self, task_id: str, write: Write) -> None:
        """Queue ``write`` for :meth:`retry` without calling it now."""
        self._add(_Pending(task_id, write, lambda: None))

    @property
    def is_empty(self) -> bool:
        return not self._pending

    def retry(self, now: float) -> float:
        """Call the queued writes that are due. Return the time of the next retry.

        :param now: the current time of the monotonic clock; `math.inf` makes all writes due.
        """
        if now < self._retry_at:
            return self._retry_at
        if not self._pending:
            return math.inf
        if not self._retrying.acquire(blocking=False):
            return now + FIRST_DELAY
        try:
            for _ in range(len(self._pending)):
                pending = self._pending.popleft()
                try:
                    pending.write()
                except StoreUnavailable:
                    pending.fail()
                    # Append, so that a write that never succeeds does not block the others.
                    self._pending.append(pending)
                    self._retry_at = time.monotonic() + self._delay
                    self._delay = min(2 * self._delay, MAX_DELAY)
                    return self._retry_at
                except Exception:
                    logger.exception(
                        "A change of task %s failed and was discarded.", pending.task_id
                    )
                else:
                    if pending.has_failed:
                        logger.info(
                            "The delayed change of task %s has been stored.", pending.task_id
                        )
                self._delay = FIRST_DELAY
                pending.then()
        finally:
            self._retrying.release()
        return now + MAX_DELAY if self._pending else math.inf

    def _add(self, pending: _Pending) -> None:
        self._pending.append(pending)
        self.wake()
