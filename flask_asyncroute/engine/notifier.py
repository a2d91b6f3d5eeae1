"""Notify event streams and waiting requests when any process changes a task.

In this module, a subscriber is an event stream or a waiting request. The store gives every change
of a task an increasing number.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask

from .. import signals
from ..background import Loop, when_gone
from ..errors import StoreUnavailable
from ..stores.base import Listener, SharedTaskStore, TaskStore
from ..task import AsyncRouteTask
from .shared_reads import SharedReads

logger = logging.getLogger("flask_asyncroute")

POLL_SECONDS = 0.05  # Poll interval if the store sends no notifications.
REREAD_SECONDS = 0.25
"""Seconds between two polls of a store that sends notifications.

The notifier also checks at this interval whether the server is shutting down.
"""
REST_SECONDS = 0.005  # Pause after a poll, so that the next poll reads many changes.
LINGER_SECONDS = 2.0  # How long polling continues after the last subscriber has left.
IDLE_SECONDS = 60.0
# The request is renewed while there are subscribers.
NOTIFIED_SECONDS = 60.0
"""Seconds for which a store is asked to send notifications."""
MAX_OWN = 10_000  # Maximum number of own change numbers to keep; more changes are read instead.
SHUTDOWN_SEND_SECONDS = 0.5  # How long a client can take to receive a chunk during shutdown.


class Subscriber:
    """Wakes the thread of an event stream or a waiting request after a task has changed.

    The thread repeats three steps: call :meth:`clear`, read the store, call :meth:`wait`.

    :param disconnect: disconnects the client; None: not possible.
    """

    # `wait` acquires a lock that a change releases. A `threading.Event` would use a kilobyte more
    # per stream.

    __slots__ = ("_changed", "_disconnect", "must_be_sent_by")

    def __init__(self, disconnect: Callable[[], None] | None = None) -> None:
        self._changed = threading.Lock()
        self._disconnect = disconnect
        self.must_be_sent_by: float | None = None  # Deadline of the current chunk (monotonic).

    def clear(self) -> None:
        """Make the next call of :meth:`wait` ignore changes before this call."""
        self._changed.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Block until a task changes. Return False after ``seconds`` without a change."""
        return self._changed.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX))

    def set(self, task: AsyncRouteTask | None = None) -> None:
        """End a call of :meth:`wait`. Call this from one thread at a time.

        :param task: the task that has changed.
        """
        if self._changed.locked():
            self._changed.release()

    def disconnect_if_late(self, now: float) -> None:
        """Disconnect a client that has not received the current piece of data in time."""
        # Such a client blocks a thread of the server.
        deadline = self.must_be_sent_by  # read once: the sending thread can reset it
        if self._disconnect is not None and deadline is not None and now >= deadline:
            self._disconnect()


class Waiter(Subscriber):
    """A subscriber that keeps the newest record of the task from its notifications."""

    __slots__ = ("task",)

    def __init__(self) -> None:
        super().__init__()
        self.task: AsyncRouteTask | None = None

    def set(self, task: AsyncRouteTask | None = None) -> None:
        known = self.task
        if task is not None and (known is None or task.change > known.change):
            self.task = task
        super().set()


class Notifier(Loop):
    """Wakes subscribers after a task has changed. Thread-safe.

    If several processes share the store, a thread polls it for their changes. The thread polls
    while there are subscribers, and between :meth:`watch` and :meth:`unwatch`.

    :param worker: the name of this process in the store.
    :param on_change: called with each changed task, before its subscribers are woken.
    :param is_server_ending: returns whether the server is shutting down. Then all waits and streams
        end.
    :param on_submitted: called when transactions of the app have added tasks; see
        `SharedTaskStore.joined`. Must return immediately, and not keep its runner alive.
    :param on_delayed: the same for new tasks with a start time; see `SharedTaskStore.listen`.
    """

    def __init__(
        self,
        app: Flask,
        store: TaskStore,
        worker: str,
        on_change: Callable[[AsyncRouteTask], None],
        is_server_ending: Callable[[], bool] = lambda: False,
        on_submitted: Callable[[], None] = lambda: None,
        on_delayed: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("asyncroute-watcher")
        self._store = store
        self._worker = worker
        self.shared_reads = SharedReads()
        self._on_change = on_change
        self._is_server_ending = is_server_ending
        self._waiting_lock = threading.Lock()
        self._waiting: dict[str | None, set[Subscriber]] = {}
        self._changed: set[str] = set()  # The tasks whose streams must be woken.
        self._watching = 0  # The number of subscribers and runs.
        self._following = 0  # The number of subscribers.
        self._is_polling = False
        self._is_notified_until = 0.0
        self._since = 0
        self._own: set[int] = set()  # Change numbers of this process, which need not be read.
        self._idle_since: float | None = None
        self._poll_after = 0.0
        self._on_submitted = on_submitted
        self._on_delayed = on_delayed
        self._listening = threading.Lock()
        self._listener: Listener | None = None
        self._has_listened = False
        self._has_logged_outage = False
        self.is_over = False  # Whether all waits end because this process is shutting down.
        self._over_at = math.inf
        self._check_late_at = 0.0
        # Signals hold weak references, so they do not keep this object alive.
        signals.task_changed.connect(self._on_task_changed, sender=app)
        signals.events_written.connect(self._on_events_written, sender=app)

    def watch(self) -> None:
        """From now on, call ``on_change`` if another process stops a task that this process runs.

        :raises StoreUnavailable: if the store cannot be read.
        """
        if self._store.is_shared:
            self._begin()

    def unwatch(self) -> None:
        """Undo one call of :meth:`watch`."""
        if self._store.is_shared:
            self._end()

    def listen(self) -> None:
        """Begin to listen to the notifications of a shared store. Further calls do nothing."""
        with self._listening:
            if self._has_listened or not isinstance(self._store, SharedTaskStore):
                return
            self._listener = self._store.listen(
                self._wake.set, self._on_submitted, self._on_delayed
            )
            self._has_listened = True
            if self._listener is not None:
                when_gone(self, self._listener.close)

    @property
    def is_listening(self) -> bool:
        """Whether the store sends notifications to this process."""
        return self._listener is not None

    def _begin(self, is_follower: bool = False) -> None:
        with self._waiting_lock:
            self._watching += 1
            self._following += is_follower
            if is_follower and self._following == 1:
                # Without subscribers, polls do not drop outdated results.
                self.shared_reads.forget()
        try:
            if is_follower and isinstance(self._store, SharedTaskStore):
                self._keep_notified(self._store)
            if not self._is_polling:
                newest = self._store.newest()  # read without the lock, which notifications need
                with self._waiting_lock:
                    if not self._is_polling:
                        self._since = newest
                        self._own.clear()
                        self.shared_reads.forget()  # results can lack changes since the last poll
                        self._is_polling = True
                self.wake()
            self.start()
        except BaseException:
            self._end(is_follower)
            raise

    def _end(self, is_follower: bool = False) -> None:
        with self._waiting_lock:
            self._watching -= 1
            self._following -= is_follower

    def _keep_notified(self, store: SharedTaskStore) -> None:
        now = time.monotonic()
        if now >= self._is_notified_until - NOTIFIED_SECONDS / 2:
            store.keep_notifying(NOTIFIED_SECONDS)
            self._is_notified_until = now + NOTIFIED_SECONDS

    @contextmanager
    def subscribed(self, subscriber: Subscriber, task_id: str | None = None) -> Iterator[None]:
        """Within the block, wake ``subscriber`` when a task changes and when all waits end.

        :param task_id: the task; None: all tasks.
        :raises StoreUnavailable: if the store cannot be read.
        """
        with self._waiting_lock:
            self._waiting.setdefault(task_id, set()).add(subscriber)
        try:
            self._begin(is_follower=True)
            try:
                yield
            finally:
                self._end(is_follower=True)
        finally:
            with self._waiting_lock:
                followers = self._waiting[task_id]
                followers.remove(subscriber)
                if not followers:
                    del self._waiting[task_id]

    def wait(
        self, task_id: str, is_enough: Callable[[AsyncRouteTask], bool], timeout: float | None
    ) -> AsyncRouteTask | None:
        """Wait until a task satisfies ``is_enough``, and return its record.

        The wait also ends after the timeout, and when this process shuts down. It holds no lock and
        no connection meanwhile.

        :param timeout: seconds; None: no limit.
        :return: the last known record; None if the task does not exist.
        :raises StoreUnavailable: if the store cannot be read.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter = Waiter()
        with self.subscribed(waiter, task_id):
            waiter.clear()
            task = self._store.get(task_id)
            while task is not None and not is_enough(task) and not self.is_over:
                if not waiter.wait(math.inf if deadline is None else deadline - time.monotonic()):
                    return self._store.get(task_id)
                found, waiter.task = waiter.task, None
                is_newer = found is not None and found.change > task.change
                task = found if is_newer else self._store.get(task_id)
            return task

    def end_waits(self) -> None:
        """End all waits and streams of this process. Later waits and streams end at once."""
        self.is_over = True
        self._over_at = min(self._over_at, time.monotonic())
        with self._waiting_lock:
            for followers in self._waiting.values():
                for subscriber in followers:
                    subscriber.set()

    def close(self) -> None:
        """End the thread, all waits and all streams."""
        self.end_waits()
        super().close()
        self.shared_reads.close()
        if self._listener is not None:
            self._listener.close()

    def _on_task_changed(self, sender: object, task: AsyncRouteTask, **extra: Any) -> None:
        self._publish(task)
        # The subscribers have been notified of the task, so its earlier changes need not be read
        # either.
        self._add_own((task.change, task.waiting_change, task.started_change))

    def _on_events_written(
        self, sender: object, task_id: str, changes: Iterable[int], **extra: Any
    ) -> None:
        self._notify(task_id)
        self._add_own(changes)

    def _add_own(self, changes: Iterable[int | None]) -> None:
        if self._store.is_shared and self._is_polling and len(self._own) < MAX_OWN:
            since = self._since
            self._own.update(change for change in changes if change and change > since)

    def _publish(self, task: AsyncRouteTask) -> None:
        try:
            self._on_change(task)
        except Exception:
            # Subscribers must not miss this change or later ones.
            logger.exception(
                "This process could not handle a change of task %s. If the task was stopped, its "
                "view may keep running until the timeout.",
                task.id,
            )
        self._notify(task.id, task)

    def _notify(self, task_id: str, task: AsyncRouteTask | None = None) -> None:
        # Forget results first: later subscribers are not woken and must not get an older result.
        self.shared_reads.forget()
        if task_id in self._waiting or None in self._waiting:
            must_wake_streams = False
            with self._waiting_lock:
                for subscriber in (*self._waiting.get(task_id, ()), *self._waiting.get(None, ())):
                    if isinstance(subscriber, Waiter):
                        subscriber.set(task)
                    elif task_id not in self._changed:
                        must_wake_streams = must_wake_streams or not self._changed
                        self._changed.add(task_id)
            if must_wake_streams:
                try:
                    self.shared_reads.call(self._wake_streams)
                except RuntimeError:  # the system has no more threads
                    self._wake_streams()

    def _wake_streams(self) -> None:
        with self._waiting_lock:
            changed, self._changed = self._changed, set()
        self.shared_reads.read_ahead(changed)
        with self._waiting_lock:
            for task_id in (*changed, None):
                for subscriber in self._waiting.get(task_id, ()):
                    if not isinstance(subscriber, Waiter):
                        subscriber.set()

    def _step(self) -> float:
        try:
            return self._watch()
        except StoreUnavailable as error:
            if not self._has_logged_outage:
                logger.error(
                    "Changes by other processes are not received until the store is available "
                    "again: %s",
                    error,
                )
            self._has_logged_outage = True
        except Exception:
            logger.exception("Changes by other processes could not be read. Retrying.")
        return 1.0

    def _watch(self) -> float:
        if not self.is_over and self._is_server_ending():
            self.end_waits()
        now = time.monotonic()
        if now >= self._check_late_at:
            self._check_late_at = now + REREAD_SECONDS
            self._disconnect_late(now)
            self.shared_reads.forget()  # frees memory; all woken streams have read the results
        with self._waiting_lock:
            if self._watching:
                self._idle_since = None
            elif self._idle_since is None:
                self._idle_since = now
            elif now - self._idle_since >= LINGER_SECONDS:
                self._is_polling = False
            if not self._is_polling:
                return IDLE_SECONDS
        if not isinstance(self._store, SharedTaskStore):
            return REREAD_SECONDS
        if self._listener is not None and now < self._poll_after:
            return self._poll_after - now
        self._poll(self._store)
        self._has_logged_outage = False
        self._poll_after = time.monotonic() + REST_SECONDS
        return POLL_SECONDS if self._listener is None else REREAD_SECONDS

    def _poll(self, store: SharedTaskStore) -> None:
        self.listen()
        if self._following:
            self._keep_notified(store)
        newest = store.last_assigned()
        if self._skip_own(newest):
            return
        reads_all = self._following > 0
        changes = store.changes_since(self._since, None if reads_all else self._worker)
        with self._waiting_lock:
            if self._following and not reads_all:
                # A subscriber has come meanwhile and needs changes that were not read.
                self.wake()
                return
            self._since = changes.change
        self._own = {change for change in self._own.copy() if change > self._since}
        for task in changes.tasks:
            self._publish(task)
        for task_id in changes.sent:
            self._notify(task_id)
        if changes.change < newest:
            self.wake()  # there are more changes than one call returns

    def _skip_own(self, newest: int) -> bool:
        """Move the read position past the changes that this process has made.

        The position stops before the first change of another process.

        :param newest: the number of the newest change in the store.
        :return: whether the position has reached ``newest``, so that there is nothing to read.
        """
        if newest < self._since:
            self._own.clear()  # the database was restored, and assigns these numbers again
        while self._since < newest and self._since + 1 in self._own:
            self._since += 1
            self._own.discard(self._since)
        return self._since == newest

    def _disconnect_late(self, now: float) -> None:
        # During shutdown, every unsent chunk is late after SHUTDOWN_SEND_SECONDS.
        limit = math.inf if now - self._over_at >= SHUTDOWN_SEND_SECONDS else now
        with self._waiting_lock:
            for followers in self._waiting.values():
                for subscriber in followers:
                    subscriber.disconnect_if_late(limit)
