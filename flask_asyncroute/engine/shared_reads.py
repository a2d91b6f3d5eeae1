"""Reads data from the store once for all event streams that need it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from ..background import Loop
from ..errors import StoreUnavailable

T = TypeVar("T")
Feed = tuple[str | None, str | None]
"""Selects events: a task id (None: all tasks) and an `Sse` group (None: all groups)."""


class Page(Protocol):
    @property
    def change(self) -> int: ...


P = TypeVar("P", bound=Page)
IDLE_SECONDS = 60.0


class SharedReads(Loop):
    """Reads on one thread, and caches the results until the next change. Thread-safe.

    All streams share the thread, because a thread per stream would need one connection per stream
    after a change, and 15 KiB of malloc's cache.
    """

    def __init__(self) -> None:
        super().__init__("asyncroute-reader")
        self._reads: dict[Hashable, Future[Any]] = {}
        self._feeds: dict[Feed, int] = {}  # number of open streams per feed
        self._feeds_lock = threading.Lock()
        self._heads: dict[Feed, tuple[int, Callable[[int], Page]]] = {}
        """Per feed, the change number read up to, and the function that reads later events."""
        self._queue: deque[tuple[Future[Any] | None, Callable[[], Any]]] = deque()
        """Functions for the thread to call, each with the future for its result, if any."""

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return the result of ``read``, or raise its error.

        Calls with an equal key share one result until :meth:`forget` or :meth:`drop`. The next call
        then starts a new read, even if the earlier read still runs. Errors are not cached.
        """
        self.start()
        reads = self._reads
        found = reads.get(key)
        if found is None:
            mine: Future[Any] = Future()
            found = reads.setdefault(key, mine)
            if found is mine:
                self._queue.append((mine, read))
                self.wake()
                if self._is_closed:
                    self._step()
        try:
            result: T = found.result()
        except BaseException:
            self.drop(key)  # so that the next call retries
            raise
        return result

    def page(self, feed: Feed, since: int, read: Callable[[int], P]) -> P:
        """Return ``read(since)``, shared as by :meth:`get`; remember the feed's newest position for
        :meth:`read_ahead`.

        :param read: returns the events after a change number; must not reference a stream.
        """
        page = self.get((feed, since), partial(read, since))
        self._advance(feed, page, read)
        return page

    def _advance(self, feed: Feed, page: Page, read: Callable[[int], Page]) -> None:
        head = self._heads.get(feed)
        if head is None or page.change > head[0]:
            with self._feeds_lock:
                if feed in self._feeds:
                    self._heads[feed] = page.change, read

    def read_ahead(self, task_ids: Collection[str]) -> None:
        """Read the next page of each feed with events of one of these tasks. Call this before
        waking the streams, so that they do not wait a second time, for the read.
        """
        for feed, (since, read) in list(self._heads.items()):
            if feed[0] is not None and feed[0] not in task_ids:
                continue
            future: Future[Any] = Future()
            if self._reads.setdefault((feed, since), future) is not future:
                continue
            try:
                page = read(since)
            except BaseException as error:
                # Leave other reads to the streams, because each could take seconds to fail.
                future.set_exception(error)
                self.drop((feed, since))
                return
            future.set_result(page)
            self._advance(feed, page, read)

    @contextmanager
    def reading(self, feed: Feed) -> Iterator[None]:
        """Let :meth:`read_ahead` read ``feed`` while a ``with following(feed)`` block is active."""
        with self._feeds_lock:
            self._feeds[feed] = self._feeds.get(feed, 0) + 1
        try:
            yield
        finally:
            with self._feeds_lock:
                self._feeds[feed] -= 1
                if not self._feeds[feed]:
                    del self._feeds[feed]
                    self._heads.pop(feed, None)

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function``, which must not raise, on this object's thread."""
        self.start()
        self._queue.append((None, function))
        self.wake()
        if self._is_closed:
            self._step()

    def drop(self, key: Hashable) -> None:
        self._reads.pop(key, None)

    def forget(self) -> None:
        """Drop all results. Call this after each commit, before streams wake: older results lack
        the change.
        """
        self._reads = {}

    def close(self) -> None:
        """End the thread. Later reads run on the calling threads."""
        super().close()
        self._step()

    def _step(self) -> float:
        outage: StoreUnavailable | None = None
        with suppress(IndexError):  # another thread can empty the queue during close()
            while True:
                future, read = self._queue.popleft()
                if future is None:
                    read()
                    continue
                try:
                    if outage is not None:
                        # Each further read could take seconds to fail, and so block streams for
                        # minutes.
                        raise outage
                    future.set_result(read())
                except BaseException as error:  # otherwise the streams would wait forever
                    future.set_exception(error)
                    if isinstance(error, StoreUnavailable):
                        outage = error
        return IDLE_SECONDS
