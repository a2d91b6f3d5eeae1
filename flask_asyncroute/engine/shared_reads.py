"""Read data from the store once for all event streams that need it.

Here, a feed is a selection of events that several streams can send, such as the events of one task.
The store numbers all changes in increasing order.
"""

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
"""A selection of events: a task id and the name of an `Sse` group; None: all tasks or groups."""


class Page(Protocol):
    @property
    def change(self) -> int: ...


P = TypeVar("P", bound=Page)
IDLE_SECONDS = 60.0


class SharedReads(Loop):
    """Calls functions that read the store, and caches the results until a change. Thread-safe."""

    # All streams share one thread, because a thread per stream would need one connection per stream
    # after a change, and 15 KiB of malloc's cache.

    def __init__(self) -> None:
        super().__init__("asyncroute-reader")
        self._reads: dict[Hashable, Future[Any]] = {}
        self._feeds: dict[Feed, int] = {}  # number of open streams per feed
        self._feeds_lock = threading.Lock()
        self._heads: dict[Feed, tuple[int, Callable[[int], Page]]] = {}
        """For each feed, the number of the last change that was read, and the function that reads
        later events.
        """
        self._queue: deque[tuple[Future[Any] | None, Callable[[], Any]]] = deque()
        """The functions that the thread must call. The future, if any, receives the result."""

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return the result of ``read``, from the cache if possible.

        Calls with an equal key share one result until :meth:`forget` or :meth:`drop`. The next call
        then starts a new read, even if the earlier read still runs. An error of ``read`` is raised
        and is not cached.
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
        """Return the events of a feed after a change number, from the cache if possible.

        :param since: a change number, passed to ``read``.
        :param read: reads the events. It must not reference a stream. :meth:`read_ahead` calls it
            later.
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
        """Read and cache the new events of the given tasks. Call this before waking the streams."""
        # Otherwise the woken streams would wait again, for the read.
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
        """Within the block, let :meth:`read_ahead` read the new events of ``feed``."""
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
        """Call ``function`` later on the thread of this object. It must not raise exceptions."""
        self.start()
        self._queue.append((None, function))
        self.wake()
        if self._is_closed:
            self._step()

    def drop(self, key: Hashable) -> None:
        self._reads.pop(key, None)

    def forget(self) -> None:
        """Clear the cache. Call this after each commit, before waking streams."""
        # Cached results lack the committed change.
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
