"""Those who wait for news of tasks, as `notifier` knows them: streams, and requests that are held until a task has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .task import AsyncRouteTask


class Follower:
    """One who waits for news, while the notifier tells it: ``clear`` it, read the store, ``wait``, and so on.

    A lock that is free where there is news: a `threading.Event` would be a kilobyte more for each stream. One thread waits.

    :param hang_up: ends the connection to its client; called while it is sent something and does not take it in time.
    """

    __slots__ = ("_hang_up", "_news", "must_be_sent_by")

    def __init__(self, hang_up: Callable[[], None] | None = None) -> None:
        self._news = threading.Lock()
        self._hang_up = hang_up
        self.must_be_sent_by: float | None = None
        """While something is sent to its client: by when (monotonic) that has to have taken it."""

    def clear(self) -> None:
        """Forget what was told so far."""
        self._news.acquire(blocking=False)

    def wait(self, seconds: float | None) -> bool:
        """Wait until there is something new since the last `clear` or wait; return whether there is.

        :param seconds: at most so many; None: without end.
        """
        return self._news.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))

    def tell(self, task: AsyncRouteTask | None = None) -> None:
        """Have it know that there is something new. By one thread at a time.

        :param task: as it is now, where that is what is new.
        """
        if self._news.locked():
            self._news.release()

    def hang_up_if_late(self, now: float) -> None:
        """End the connection where its client takes too long: the thread that sends is stuck until then."""
        by = self.must_be_sent_by  # once: the thread that sends may be through at any moment
        if self._hang_up is not None and by is not None and now >= by:
            self._hang_up()


class Waiter(Follower):
    """One who waits for a task to be as wanted, and may `take` what was told of it; a stream keeps no record."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        super().__init__()
        self._told: AsyncRouteTask | None = None

    def tell(self, task: AsyncRouteTask | None = None) -> None:
        # Of more than one, which may come the other way round, the store knows how the task is now.
        self._told = task if self._news.locked() else None
        super().tell()

    def take(self) -> AsyncRouteTask | None:
        """Return the task as it was told since the last wait; None: only the store knows. After each `wait`."""
        told, self._told = self._told, None
        return told
