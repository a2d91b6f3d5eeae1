"""This process as a worker that others can see: a row in the store, a lock that dies with it, a beat for other hosts.

`runner` makes one for each app; a worker enters before it claims its first task. What others make of it is `census`'s affair.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from . import locks
from .errors import AsyncRouteError
from .locks import LockFile
from .loop import Loop
from .stores.base import Worker, Workers

logger = logging.getLogger("flask_asyncroute")

ASSERT_SECONDS = 0.2
"""How often a worker makes sure of its lock. Who finds it free and cannot see the process looks again later than this."""
BEAT_SECONDS = 10.0
RETRY_SECONDS = 1.0
LEASE_SECONDS = 30.0
"""A worker of another host counts as gone when its beat has not changed for this long."""


class Presence(Loop):
    """Lists this process as a worker of one app, from :meth:`enter` to :meth:`leave`. Thread-safe.

    After :meth:`close` alone it stays listed, and its lock held, for the sake of what it still runs.

    :param name: under which it claims tasks.
    :param endpoints: whose tasks it can run.
    """

    def __init__(self, workers: Workers, name: str, endpoints: Collection[str]) -> None:
        super().__init__("asyncroute-beat")
        self._workers = workers
        self._endpoints = frozenset(endpoints)
        self.name = name
        self.lock_file: LockFile | None = None
        """Where this host's workers keep their locks; None before entering, and where that cannot be."""
        self._number = locks.new_number()
        self._listing = threading.Lock()
        self._beat_at = time.monotonic() + BEAT_SECONDS
        self._is_listed = False

    def enter(self) -> None:
        """List this process, if it is not; returns at once where it is.

        :raises StoreUnavailable: where the store cannot be written.
        """
        if self._is_listed:
            return
        with self._listing:
            if self._is_listed or self._is_closed:
                return
            if self.lock_file is None:
                self.lock_file = self._open_lock_file()
            self._list()
            self._is_listed = True
            self.start()

    def leave(self) -> None:
        """List this process no longer: it runs nothing and will run nothing more.

        :raises StoreUnavailable: where the store cannot be written; others then find the lock free.
        """
        self.close()
        try:
            if self._is_listed:
                self._workers.leave(self.name)
        finally:
            self._is_listed = False
            if self.lock_file is not None:
                self.lock_file.release(self._number)

    def beat_soon(self) -> None:
        """Say that this process lives at the next look, and list it again where its row is gone."""
        self._beat_at = 0.0
        self.wake()

    def assert_lock(self) -> None:
        """Hold the lock, also where something in this process has read the file, and dropped the lock as it closed it."""
        if self.lock_file is not None:
            # It fails where somebody looks at this very byte, which is dropped then; the next time is soon.
            with suppress(OSError):
                self.lock_file.hold(self._number)

    def _open_lock_file(self) -> LockFile | None:
        path = self._workers.lock_path
        try:
            found = locks.lock_file(path)
            if found is not None:
                found.hold(self._number)
            return found
        except OSError as error:
            logger.warning(
                "Workers cannot keep their locks in %s (%s), so a worker that was killed is found after %.0f s instead of 2. "
                "Make the folder writable, or remove what has that name.", path, error, LEASE_SECONDS,
            )  # fmt: skip
            return None

    def _list(self) -> None:
        place = "" if self.lock_file is None else self.lock_file.name
        self._workers.enter(Worker(self.name, place, self._number, locks.this_process(), self._endpoints))

    def _step(self) -> float:
        self.assert_lock()
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + self._beat()
        return ASSERT_SECONDS

    def _beat(self) -> float:
        """Say that this process lives; return in how many seconds to say so again."""
        try:
            if not self._workers.beat(self.name):
                with self._listing:
                    if self._is_listed:
                        self._list()
            return BEAT_SECONDS
        except AsyncRouteError:
            return RETRY_SECONDS  # the store has logged why
        except Exception:
            logger.exception("This worker could not say that it lives; it tries again.")
            return RETRY_SECONDS
