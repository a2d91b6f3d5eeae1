"""Who is waiting for news of a task, in this process: told at once of what is written here, and by one watcher thread of
what other processes write. Who waits for a task is given it; who follows events reads them from the store.

It hears of local changes by signal, asks the store for the others, and changes nothing itself.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import signals
from .errors import StoreUnavailable
from .finalizers import when_gone
from .followers import Follower, Waiter
from .loop import Loop
from .stores.base import Listener, TaskStore
from .task import AsyncRouteTask

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

POLL_SECONDS = 0.05
"""How often a store is asked that tells nothing by itself."""
REREAD_SECONDS = 0.25
"""How often one is asked that does; also how soon an end of the server is noticed at the latest."""
REST_SECONDS = 0.005
"""How long the watcher rests after it was told, so that many changes are read as one."""
LINGER_SECONDS = 2.0
"""How long the watcher goes on after the last one who was waiting: somebody else will wait soon."""
IDLE_SECONDS = 60.0
"""How often an idle watcher looks whether its app is still there."""
PARTING_SECONDS = 0.5
"""How long a client may take for what it is being sent when nobody is to wait any more."""

Hear = Callable[[AsyncRouteTask], None]


class Notifier(Loop):
    """Passes on that tasks have changed. Thread-safe; one per process and app.

    :param hear: hears of every change that anybody makes while :meth:`watch` is in force.
    :param is_server_ending: asked by the watcher now and then: whether this process is about to exit.
    """

    def __init__(
        self, app: Flask, store: TaskStore, hear: Hear, is_server_ending: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__("asyncroute-watcher")
        self._store = store
        self._hear = hear
        self._is_server_ending = is_server_ending
        self._who_waits = threading.Lock()
        self._waiting: dict[str | None, set[Follower]] = {}
        self._watching = 0
        self._is_polling = False
        self._since = 0
        self._idle_since: float | None = None
        self._rested_at = 0.0
        self._listener: Listener | None = None
        self._has_asked = False
        self._is_held_up = False
        """Whether the store is away, which is logged once."""
        self.is_over = False
        """Whether nobody is to wait any more: this process is about to exit."""
        self._over_at = math.inf
        self._late_at = 0.0
        # Weak, unlike other receivers: the signals must not keep this object alive once its app is gone.
        signals.task_changed.connect(self.on_task_changed, sender=app)
        signals.events_written.connect(self.on_events_written, sender=app)

    def on_task_changed(self, sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        """Pass on a change that this process made. The receiver of `task_changed`."""
        self._publish(task)

    def on_events_written(self, sender: Flask, task_id: str, **extra: Any) -> None:
        """Pass on that a view of this process has sent something. The receiver of `events_written`."""
        self._tell(task_id)

    def watch(self) -> None:
        """Begin to follow what other processes write, if there are any; whatever is committed from here on is heard of.

        :raises StoreUnavailable: where the store cannot be read.
        """
        if self._store.is_shared:
            self._begin()

    def unwatch(self) -> None:
        """End one :meth:`watch`."""
        if self._store.is_shared:
            self._end()

    def _begin(self) -> None:
        with self._who_waits:
            self._watching += 1
            is_first = self._watching == 1
        try:
            if not self._is_polling:
                # Not under the lock, which whoever tells of news needs: the store may take its time.
                newest = self._store.newest()
                with self._who_waits:
                    if not self._is_polling:
                        self._since = newest
                        self._is_polling = True
            self.start()
        except BaseException:
            self._end()
            raise
        if is_first:
            self.wake()

    def _end(self) -> None:
        with self._who_waits:
            self._watching -= 1

    @contextmanager
    def telling(self, follower: Follower, task_id: str | None = None) -> Iterator[None]:
        """Tell ``follower`` meanwhile whenever there is something new: of one task, or of any (None); and when nobody is to
        wait any more (:attr:`is_over`).

        :raises StoreUnavailable: where the store cannot be read.
        """
        self._add(follower, task_id)
        try:
            yield
        finally:
            self._end()
            self._forget(follower, task_id)

    def _add(self, follower: Follower, task_id: str | None) -> None:
        with self._who_waits:
            self._waiting.setdefault(task_id, set()).add(follower)
        try:
            self._begin()
        except BaseException:
            self._forget(follower, task_id)
            raise

    def _forget(self, follower: Follower, task_id: str | None) -> None:
        with self._who_waits:
            followers = self._waiting[task_id]
            followers.remove(follower)
            if not followers:
                del self._waiting[task_id]

    def wait(
        self, task_id: str, is_enough: Callable[[AsyncRouteTask], bool], timeout: float | None
    ) -> AsyncRouteTask | None:
        """Wait until a task is as wanted, or the time is up, or nobody is to wait any more; return it as it is then (None:
        there is no such task).

        Holds no lock and no connection meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        news = Waiter()
        with self.telling(news, task_id):
            news.clear()
            task = self._store.get(task_id)
            while task is not None and not is_enough(task) and not self.is_over:
                if not news.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
                    return self._store.get(task_id)
                told = news.take()
                # What is told late may be older than what is known; and a store that was put in place of this one has
                # numbers of its own.
                task = told if told is not None and told.change > task.change else self._store.get(task_id)
            return task

    def end_waits(self) -> None:
        """Have all who wait come to an end at once, now and from now on."""
        self.is_over = True
        self._over_at = min(self._over_at, time.monotonic())
        with self._who_waits:
            for followers in self._waiting.values():
                for follower in followers:
                    follower.tell()

    def close(self) -> None:
        """End the watcher thread, and all who wait."""
        self.end_waits()
        super().close()
        if self._listener is not None:
            self._listener.close()

    def _publish(self, task: AsyncRouteTask) -> None:
        try:
            self._hear(task)
        except Exception:
            # Nobody else must miss this change, or one that came with it.
            logger.exception("A change of task %s could not be acted upon.", task.id)
        self._tell(task.id, task)

    def _tell(self, task_id: str, task: AsyncRouteTask | None = None) -> None:
        if task_id in self._waiting or None in self._waiting:
            with self._who_waits:
                for follower in (*self._waiting.get(task_id, ()), *self._waiting.get(None, ())):
                    follower.tell(task)

    def _poll(self) -> None:
        """Pass on what is new; called by the watcher thread alone."""
        if not self._has_asked:
            self._listener = self._store.listen(self._wake.set)
            self._has_asked = True
            if self._listener is not None:
                when_gone(self, self._listener.close)
        news = self._store.news(self._since)
        self._since = news.change
        for task in news.tasks:
            self._publish(task)
        for task_id in news.sent:
            self._tell(task_id)

    def _hang_up_on_late_ones(self, now: float) -> None:
        """End the connections of clients that do not take what they are sent, since a thread of the server is stuck with each."""
        if now < self._late_at:
            return
        self._late_at = now + REREAD_SECONDS
        # Once nobody is to wait, whoever is being sent something has had its time.
        by = math.inf if now - self._over_at >= PARTING_SECONDS else now
        with self._who_waits:
            for followers in self._waiting.values():
                for follower in followers:
                    follower.hang_up_if_late(by)

    def _step(self) -> float:
        try:
            return self._watch()
        except StoreUnavailable as error:
            if not self._is_held_up:
                logger.error(
                    "The watcher waits for the store, and hears nothing of other processes until then: %s", error
                )
            self._is_held_up = True
        except Exception:
            logger.exception("The watcher could not read what is new; it tries again.")
        return 1.0

    def _watch(self) -> float:
        """Do what is due; return in how many seconds to look again."""
        if not self.is_over and self._is_server_ending():
            self.end_waits()
        now = time.monotonic()
        self._hang_up_on_late_ones(now)
        with self._who_waits:
            if self._watching:
                self._idle_since = None
            elif self._idle_since is None:
                self._idle_since = now
            elif now - self._idle_since >= LINGER_SECONDS:
                self._is_polling = False
            if not self._is_polling:
                return IDLE_SECONDS
        if not self._store.is_shared:
            return REREAD_SECONDS  # all that is written is written here
        if self._listener is not None and now < self._rested_at:
            return self._rested_at - now
        self._poll()
        self._is_held_up = False
        self._rested_at = time.monotonic() + REST_SECONDS
        return POLL_SECONDS if self._listener is None else REREAD_SECONDS
