"""This process as a worker that others can see: a row in the store, a lock that dies with it, a beat for other hosts.

`runner` makes one for each app; a worker enters before it claims its first task. What others make of it is `census`'s affair.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Collection
from contextlib import suppress

from . import locks
from .errors import AsyncRouteError
from .finalizers import when_gone
from .locks import LockFile
from .stores.base import Worker, Workers

logger = logging.getLogger("flask_asyncroute")

ASSERT_SECONDS = 0.2
"""How often a worker makes sure of its lock. Who finds it free and cannot see the process looks again later than this."""
BEAT_SECONDS = 10.0
RETRY_SECONDS = 1.0
LEASE_SECONDS = 30.0
"""A worker of another host counts as gone when its beat has not changed for this long."""


class Presence:
    """Lists this process as a worker of one app, from :meth:`enter` to :meth:`leave`. Thread-safe.

    :param name: under which it claims tasks.
    :param endpoints: whose tasks it can run.
    """

    def __init__(self, workers: Workers, name: str, endpoints: Collection[str]) -> None:
        self._workers = workers
        self._endpoints = frozenset(endpoints)
        self.name = name
        self.lock_file: LockFile | None = None
        """Where this host's workers keep their locks; None before entering, and where that cannot be."""
        self._number = locks.new_number()
        self._lock = threading.Lock()
        self._beat_at = time.monotonic() + BEAT_SECONDS
        self._is_listed = False
        self._is_closed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self) -> None:
        """List this process, if it is not; returns at once where it is.

        :raises StoreUnavailable: where the store cannot be written.
        """
        if self._is_listed:
            return
        with self._lock:
            if self._is_listed or self._is_closed:
                return
            if self.lock_file is None:
                self.lock_file = self._open_lock_file()
            self._list()
            self._is_listed = True
            when_gone(self, self._wake.set)
            arguments = (weakref.ref(self), self._wake)
            self._thread = threading.Thread(target=_beat, args=arguments, name="asyncroute-beat", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread. The process stays listed, and its lock held, for the sake of what it still runs."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

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

    def _step(self) -> None:
        """Do what is due."""
        self.assert_lock()
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + self._beat()

    def _beat(self) -> float:
        """Say that this process lives; return in how many seconds to say so again."""
        try:
            if not self._workers.beat(self.name):
                with self._lock:
                    if self._is_listed:
                        self._list()
            return BEAT_SECONDS
        except AsyncRouteError:
            return RETRY_SECONDS  # the store has logged why
        except Exception:
            logger.exception("This worker could not say that it lives; it tries again.")
            return RETRY_SECONDS


def _beat(reference: weakref.ref[Presence], wake: threading.Event) -> None:
    """Run the thread. It holds its presence weakly, so that an app that is dropped ends it."""
    while not wake.wait(ASSERT_SECONDS):
        presence = reference()
        if presence is None or presence._is_closed:
            return
        presence._step()
        del presence
