"""How many requests of one process may be held open at once: streams and waits."""

from __future__ import annotations

import threading


class Places:
    """Counts. Thread-safe; nobody waits for a place.

    :param most: ``ASYNCROUTE_MAX_STREAMS``.
    """

    def __init__(self, most: int) -> None:
        self._left = most
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take a place; return whether there was one."""
        with self._lock:
            if self._left <= 0:
                return False
            self._left -= 1
            return True

    def give_back(self) -> None:
        """Give back a place that was taken."""
        with self._lock:
            self._left += 1
