"""Who is waiting for news of a task, in this process: told at once of what is written here, and by one watcher thread of
what other processes write.

It hears of local changes by signal, asks the store for the others, and changes nothing itself.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import signals
from .finalizers import when_gone
from .stores.base import TaskStore
from .task import AsyncRouteTask

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

POLL_SECONDS = 0.05
LINGER_SECONDS = 2.0
"""How long the watcher goes on after the last one who was waiting: somebody else will wait soon."""
IDLE_SECONDS = 60.0
"""How often an idle watcher looks whether its app is still there."""

Listener = Callable[[AsyncRouteTask], None]


class Notifier:
    """Passes on changed tasks. Thread-safe; one per process and app.

    :param listener: hears of every change that anybody makes while :meth:`watch` is in force.
    """

    def __init__(self, app: Flask, store: TaskStore, listener: Listener) -> None:
        self._store = store
        self._listener = listener
        self._lock = threading.Lock()
        self._waiting: dict[str, list[threading.Event]] = {}
        self._watching = 0
        self._is_polling = False
        self._since = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        # Weak, unlike other receivers: the signal must not keep this object alive once its app is gone.
        signals.task_changed.connect(self.on_task_changed, sender=app)

    def on_task_changed(self, sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        """Pass on a change that this process made. The receiver of `task_changed`."""
        self._publish(task)

    def watch(self) -> None:
        """Begin to follow what other processes write; whatever is committed from here on is heard of.

        :raises StoreUnavailable: where the store cannot be read.
        """
        if not self._store.is_shared:
            return
        with self._lock:
            if not self._is_polling:
                self._since = self._store.news(-1).change
                self._is_polling = True
                self._wake.set()
            self._watching += 1
            if self._thread is None:
                when_gone(self, self._wake.set)
                self._thread = threading.Thread(
                    target=_watch, args=(weakref.ref(self), self._wake), name="asyncroute-watcher", daemon=True
                )
                self._thread.start()

    def unwatch(self) -> None:
        """End one :meth:`watch`."""
        if self._store.is_shared:
            with self._lock:
                self._watching -= 1

    def wait(
        self, task_id: str, is_enough: Callable[[AsyncRouteTask], bool], timeout: float | None
    ) -> AsyncRouteTask | None:
        """Wait until a task is as wanted, or the time is up; return it as it is then (None: there is no such task).

        Holds no lock and no connection meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        changed = threading.Event()
        with self._lock:
            self._waiting.setdefault(task_id, []).append(changed)
        try:
            self.watch()
            try:
                while True:
                    changed.clear()
                    task = self._store.get(task_id)
                    if task is None or is_enough(task):
                        return task
                    if not changed.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
                        return self._store.get(task_id)
            finally:
                self.unwatch()
        finally:
            with self._lock:
                events = self._waiting[task_id]
                events.remove(changed)
                if not events:
                    del self._waiting[task_id]

    def close(self) -> None:
        """End the watcher thread."""
        with self._lock:  # not between the making of a thread and its start
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    def _publish(self, task: AsyncRouteTask) -> None:
        try:
            self._listener(task)
        except Exception:
            # Nobody else must miss this change, or one that came with it.
            logger.exception("A change of task %s could not be acted upon.", task.id)
        if task.id in self._waiting:
            with self._lock:
                for event in self._waiting.get(task.id, ()):
                    event.set()

    def _poll(self) -> None:
        """Pass on what is new; called by the watcher thread alone."""
        news = self._store.news(self._since)
        self._since = news.change
        for task in news.tasks:
            self._publish(task)

    def _step(self, idle_since: float | None) -> tuple[float, float | None]:
        """Do what is due; return how long to sleep and since when nobody has been waiting."""
        with self._lock:
            if self._is_closed:
                return 0.0, idle_since
            if self._watching:
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= LINGER_SECONDS:
                self._is_polling = False
            if not self._is_polling:
                self._wake.clear()
                return IDLE_SECONDS, idle_since
        try:
            self._poll()
        except Exception:
            logger.exception("The watcher could not read what is new; it tries again.")
            return 1.0, idle_since
        return POLL_SECONDS, idle_since


def _watch(reference: weakref.ref[Notifier], wake: threading.Event) -> None:
    """Run the watcher thread. It holds its notifier weakly, so that an app that is dropped ends it."""
    idle_since: float | None = None
    while True:
        notifier = reference()
        if notifier is None or notifier._is_closed:
            return
        seconds, idle_since = notifier._step(idle_since)
        del notifier
        if seconds == IDLE_SECONDS:
            wake.wait(seconds)
        else:
            time.sleep(seconds)
