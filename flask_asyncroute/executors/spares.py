"""Children that are kept ready, so that a task need not wait for its process to load the app."""

from __future__ import annotations

import threading
from collections import deque

from .children import Child, ForkServer


class Spares:
    """Gives children, and keeps some ready from the first on. Thread-safe.

    :param server: starts them.
    :param count: how many to keep ready.
    """

    def __init__(self, server: ForkServer, count: int) -> None:
        self._server = server
        self._count = count
        self._lock = threading.Lock()
        self._ready: deque[Child] = deque()
        self._is_closed = False

    def take(self) -> Child:
        """Return a child that is ready, or else a new one; it is the caller's from here on.

        :raises OSError: where none can be started.
        """
        while True:
            with self._lock:
                if not self._ready:
                    break
                child = self._ready.popleft()
            if not child.is_gone():
                return child
            child.drop()
        return self._server.start()

    def refill(self) -> None:
        """Start as many as are missing."""
        with self._lock:
            while not self._is_closed and len(self._ready) < self._count:
                try:
                    self._ready.append(self._server.start())
                except OSError:
                    # Tasks start their own, and tell what is wrong.
                    return

    def close(self) -> None:
        """Let the children go."""
        with self._lock:
            self._is_closed = True
            ready, self._ready = self._ready, deque()
        for child in ready:
            child.drop()
