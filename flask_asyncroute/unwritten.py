"""What the store could not be told yet of tasks of this process: kept in memory, and written when it can be.

`lifecycle` puts it here; `housekeeping` tries again. Each of these writes is a compare-and-set, so that one that comes late,
twice or in another order does no harm.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from .errors import StoreUnavailable

logger = logging.getLogger("flask_asyncroute")

FIRST_WAIT = 0.1
LONGEST_WAIT = 5.0
"""Seconds between two tries: from the first to this, each twice the one before."""

Write = Callable[[], object]


class Unwritten:
    """Writes now or later. Thread-safe. What is left is as much as the tasks that ran, so nothing bounds it but that."""

    def __init__(self) -> None:
        self._left: deque[tuple[str, Write, Write]] = deque()
        self._wait = FIRST_WAIT
        self._again_at = 0.0
        self.wake: Callable[[], None] = lambda: None
        """Called when something is left; must see to it that :meth:`retry` is called, and return at once."""

    def write(self, task_id: str, write: Write, then: Write = lambda: None) -> None:
        """Call ``write``, again and again where the store cannot be used, and then ``then``.

        :param write: may raise :exc:`StoreUnavailable`; anything else that it raises at once is raised here.
        """
        try:
            write()
        except StoreUnavailable:
            logger.error(
                "What became of task %s could not be stored. It is kept, and tried again until it is.", task_id
            )
            self.keep(task_id, write, then)
        else:
            then()

    def keep(self, task_id: str, write: Write, then: Write = lambda: None) -> None:
        """As :meth:`write`, later only."""
        self._left.append((task_id, write, then))
        self.wake()

    def retry(self, now: float) -> float:
        """Write what is left, if it is time to; return when to try again. Called by one thread.

        :param now: by the monotonic clock.
        """
        if now < self._again_at:
            return self._again_at
        for _ in range(len(self._left)):
            task_id, write, then = self._left.popleft()
            try:
                write()
            except StoreUnavailable:
                # To the end, so that one that can never be written keeps no others from it.
                self._left.append((task_id, write, then))
                self._again_at = time.monotonic() + self._wait
                self._wait = min(2 * self._wait, LONGEST_WAIT)
                return self._again_at
            except Exception:
                logger.exception("What became of task %s cannot be stored.", task_id)
            else:
                logger.info("What became of task %s is stored now.", task_id)
            self._wait = FIRST_WAIT
            then()
        return now + LONGEST_WAIT if self._left else float("inf")
