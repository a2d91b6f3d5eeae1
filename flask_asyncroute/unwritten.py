"""What the store could not be told yet of tasks of this process: kept in memory, and written when it can be.

`lifecycle` puts it here; `housekeeping` tries again. Each of these writes is a compare-and-set, so that one that comes late,
twice or in another order does no harm.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .errors import StoreUnavailable

logger = logging.getLogger("flask_asyncroute")

FIRST_WAIT = 0.1
LONGEST_WAIT = 5.0
"""Seconds between two tries: from the first to this, each twice the one before."""

Write = Callable[[], object]


@dataclass(slots=True)
class _Left:
    """One write that is still to be made, and what is to be done after it."""

    task_id: str
    write: Write
    then: Write
    has_failed: bool = False

    def fail(self) -> None:
        """Take note that the store could not be used; it is told of once."""
        if not self.has_failed:
            self.has_failed = True
            logger.error(
                "What became of task %s could not be stored. It is kept, and tried again until it is.", self.task_id
            )


class Unwritten:
    """Writes now or later. Thread-safe. What is left is as much as the tasks that ran, so nothing bounds it but that."""

    def __init__(self) -> None:
        self._left: deque[_Left] = deque()
        self._retrying = threading.Lock()
        self._wait = FIRST_WAIT
        self._again_at = 0.0
        self.wake: Callable[[], None] = lambda: None
        """Called when something is left; must see to it that :meth:`retry` is called, and return at once."""

    def write(self, task_id: str, write: Write, then: Write = lambda: None) -> None:
        """Call ``write``, again and again where the store cannot be used, and then ``then``.

        :param write: may raise :exc:`StoreUnavailable`; anything else that it raises at once is raised here.
        """
        left = _Left(task_id, write, then)
        try:
            write()
        except StoreUnavailable:
            left.fail()
            self._keep(left)
        else:
            then()

    def keep(self, task_id: str, write: Write, then: Write = lambda: None) -> None:
        """As :meth:`write`, later only: returns at once."""
        self._keep(_Left(task_id, write, then))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left."""
        return not self._left

    def retry(self, now: float) -> float:
        """Write what is left, if it is time to and nobody else is at it; return when to try again.

        :param now: by the monotonic clock.
        """
        if now < self._again_at:
            return self._again_at
        if not self._left:
            return math.inf
        if not self._retrying.acquire(blocking=False):
            return now + FIRST_WAIT
        try:
            return self._retry(now)
        finally:
            self._retrying.release()

    def _retry(self, now: float) -> float:
        for _ in range(len(self._left)):
            left = self._left.popleft()
            try:
                left.write()
            except StoreUnavailable:
                # To the end, so that one that can never be written keeps no others from it.
                left.fail()
                self._left.append(left)
                self._again_at = time.monotonic() + self._wait
                self._wait = min(2 * self._wait, LONGEST_WAIT)
                return self._again_at
            except Exception:
                logger.exception("What became of task %s cannot be stored.", left.task_id)
            else:
                if left.has_failed:
                    logger.info("What became of task %s is stored now.", left.task_id)
            self._wait = FIRST_WAIT
            left.then()
        return now + LONGEST_WAIT if self._left else math.inf

    def _keep(self, left: _Left) -> None:
        self._left.append(left)
        self.wake()
