"""Register this process as a worker, with a row in the store, a file lock and a heartbeat.

A heartbeat is a regular write to the row. It shows other processes that this process is alive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from ..background import Loop
from ..errors import AsyncRouteError
from ..stores.base import Worker, Workers
from . import process_lock
from .app_identity import Views
from .process_lock import LockFile

logger = logging.getLogger("flask_asyncroute")

ASSERT_SECONDS = 0.2  # interval of `assert_lock`; less than `recovery.CONFIRM_SECONDS`
BEAT_SECONDS = 10.0
RETRY_SECONDS = 1.0
LEASE_SECONDS = 30.0
"""Seconds without a heartbeat after which a worker on another host is considered dead."""


class Heartbeat(Loop):
    """Registers this process as a worker of one app, until :meth:`leave`. Thread-safe.

    After :meth:`close`, the process stays registered and keeps its lock, because tasks can still be
    running.
    """

    def __init__(
        self, workers: Workers, name: str, endpoints: Collection[str], views: Views | None = None
    ) -> None:
        super().__init__("asyncroute-beat")
        self._workers = workers
        self._endpoints = frozenset(endpoints)
        self.views = views or {}  # for other processes; see `app_identity`
        self.name = name
        self.lock_file: LockFile | None = None  # None before `enter`, or if opening failed
        self._number = process_lock.new_number()
        self._listing = threading.Lock()
        self._next_beat_at = time.monotonic() + BEAT_SECONDS
        self._is_listed = False
        self._has_warned = False

    def enter(self) -> None:
        """Register this process unless it is registered.

        :raises StoreUnavailable: if the store cannot be used.
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
        """Unregister this process and release its lock.

        :raises StoreUnavailable: if the row could not be removed. The lock is released anyway.
        """
        self.close()
        try:
            if self._is_listed:
                self._workers.leave(self.name)
        finally:
            self._is_listed = False
            if self.lock_file is not None:
                self.lock_file.release(self._number)

    def send_soon(self) -> None:
        """Send a heartbeat now. If the row of this process is missing, it is created again."""
        self._next_beat_at = 0.0
        self.wake()

    def assert_lock(self) -> None:
        """Lock the file again if the lock was lost."""
        # The lock is lost if other code of this process closes the file.
        if self.lock_file is not None:
            # Locking fails while another process tests the byte. The next attempt follows soon.
            with suppress(OSError):
                self.lock_file.hold(self._number)

    def _open_lock_file(self) -> LockFile | None:
        path = self._workers.lock_path
        try:
            found = process_lock.lock_file(path)
            if found is not None:
                found.hold(self._number)
            return found
        except OSError as error:
            if self._has_warned:
                return None
            self._has_warned = True
            logger.warning(
                "The lock file %s cannot be used (%s), so killed workers are detected after %.0f s "
                "instead of 2 s. Make its folder writable. If something else has this name, remove "
                "it.",
                path, error, LEASE_SECONDS,
            )  # fmt: skip
            return None

    def _list(self) -> None:
        file_name = "" if self.lock_file is None else self.lock_file.name
        process = process_lock.this_process()
        self._workers.enter(
            Worker(
                self.name, file_name, self._number, process, self._endpoints, views=self.views
            )
        )  # fmt: skip

    def _step(self) -> float:
        self.assert_lock()
        if time.monotonic() >= self._next_beat_at:
            self._next_beat_at = time.monotonic() + self._beat()
        return ASSERT_SECONDS

    def _beat(self) -> float:
        try:
            if not self._workers.beat(self.name):
                with self._listing:
                    if self._is_listed:
                        self._list()
            return BEAT_SECONDS
        except AsyncRouteError:
            pass  # the store has logged the error
        except Exception:
            logger.exception("The heartbeat of this worker failed; it is sent again in a second.")
        return RETRY_SECONDS
