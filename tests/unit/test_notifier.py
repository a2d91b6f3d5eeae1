"""Notifications of waiting requests and streams: at once about changes of this process, soon about
those of others.
"""

from __future__ import annotations

import gc
import math
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import signals
from flask_asyncroute.engine import notifier as module
from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.engine.notifier import Notifier, Subscriber
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.stores.base import Changes, Expect, SharedTaskStore, TaskStore, ViewEvent
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask, State

NewTask = Callable[..., AsyncRouteTask]
NewStore = Callable[..., TaskStore]
MakeNotifier = Callable[..., Notifier]
Eventually = Callable[..., Any]
ANY_STATE = Expect(tuple(State))


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def make_notifier(app: Flask) -> Iterator[MakeNotifier]:
    """Return ``make_notifier(store, listener=…)``; closed at the end."""
    made: list[Notifier] = []

    def make(
        store: TaskStore, listener: Callable[[AsyncRouteTask], None] = lambda task: None
    ) -> Notifier:
        made.append(Notifier(app, store, "worker", listener))
        return made[-1]

    yield make
    for notifier in made:
        notifier.close()


@pytest.fixture
def two_stores(make_sqlite_store: NewStore) -> tuple[TaskStore, TaskStore]:
    """Return two stores on one file: that of this process, and that of another."""
    stores = make_sqlite_store(), make_sqlite_store()
    for store in stores:
        store.open()
    return stores


def is_completed(task: AsyncRouteTask) -> bool:
    return task.is_completed


def abort(store: TaskStore, task_id: str = "task") -> AsyncRouteTask:
    task = store.update(task_id, ANY_STATE, {"state": State.ABORTED, "completed_us": 0})
    assert task is not None
    return task


class Waiter:
    """Calls ``wait`` on another thread and records the result."""

    def __init__(
        self, notifier: Notifier, task_id: str = "task", timeout: float | None = 10
    ) -> None:
        self.results: list[AsyncRouteTask | None] = []
        self.took = 0.0
        self._arguments = (notifier, task_id, timeout)
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        notifier, task_id, timeout = self._arguments
        before = time.monotonic()
        self.results.append(notifier.wait(task_id, is_completed, timeout))
        self.took = time.monotonic() - before

    def join(self) -> AsyncRouteTask | None:
        self._thread.join(12)
        assert not self._thread.is_alive()
        return self.results[0]


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "asyncroute-watcher"]


def test_wait_returns_at_once_if_the_condition_holds(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    store.add(make_task(), b"", None, ())
    aborted = abort(store)
    notifier = make_notifier(store)
    for timeout in (10, None, 0):
        assert notifier.wait("task", is_completed, timeout) == aborted


def test_wait_returns_none_for_an_unknown_task(
    store: TaskStore, make_notifier: MakeNotifier
) -> None:
    assert make_notifier(store).wait("unknown", is_completed, None) is None


@pytest.mark.parametrize("seconds", [0, 0.05])
def test_wait_returns_the_task_after_its_timeout(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, seconds: float
) -> None:
    store.add(make_task(), b"", None, ())
    before = time.monotonic()
    task = make_notifier(store).wait("task", is_completed, seconds)
    assert seconds <= time.monotonic() - before < seconds + 2
    assert task == store.get("task")


def test_wait_returns_the_current_record_after_its_timeout(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    """Not the record from the start of the wait. No notification is sent here."""
    store.add(make_task(), b"", None, ())
    notifier = make_notifier(store)
    waiter = Waiter(notifier, timeout=0.3)
    eventually(lambda: notifier._waiting)
    after = store.update("task", ANY_STATE, {"progress": 50.0})
    assert waiter.join() == after


def test_a_change_of_this_process_notifies_at_once(
    app: Flask,
    store: TaskStore,
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    received: list[AsyncRouteTask] = []
    notifier = make_notifier(store, received.append)
    lifecycle = Lifecycle(app, store, "owner")
    lifecycle.create(make_task(), b"", None, ())
    assert [task.state for task in received] == [State.NOT_STARTED]
    waiter = Waiter(notifier)
    eventually(lambda: notifier._waiting)
    waiting = store.get("task")
    assert waiting is not None
    aborted = lifecycle.abort(waiting, "x")
    assert waiter.join() == aborted == received[1]
    assert notifier._waiting == {}


def test_changes_that_do_not_satisfy_the_condition_do_not_end_a_wait(
    app: Flask,
    store: TaskStore,
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    notifier = make_notifier(store)
    lifecycle = Lifecycle(app, store, "owner")
    for name in ("task", "other"):
        lifecycle.create(make_task(name), b"", None, ())
    waiter = Waiter(notifier)
    eventually(lambda: notifier._waiting)
    other = store.get("other")
    assert other is not None
    lifecycle.abort(other, "x")
    claim = lifecycle.claim("task")
    assert claim is not None
    assert not threading.Event().wait(0.1)
    assert waiter.results == []
    lifecycle.abort(claim.task, "x")
    ended = waiter.join()
    assert ended is not None and ended.state is State.ABORTED


def test_all_waits_for_a_task_are_notified(
    app: Flask,
    store: TaskStore,
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    notifier = make_notifier(store)
    lifecycle = Lifecycle(app, store, "owner")
    lifecycle.create(make_task(), b"", None, ())
    waiters = [Waiter(notifier) for _ in range(30)]
    eventually(lambda: len(notifier._waiting.get("task", ())) == 30)
    waiting = store.get("task")
    assert waiting is not None
    aborted = lifecycle.abort(waiting, "x")
    assert [waiter.join() for waiter in waiters] == [aborted] * 30
    assert notifier._waiting == {}


def test_a_late_notification_does_not_replace_a_newer_record(
    app: Flask,
    store: TaskStore,
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    """Two threads write in turn. The first to write is the last to notify."""
    notifier = make_notifier(store)
    store.add(make_task(), b"{}", None, ())
    waiter = Waiter(notifier)
    eventually(lambda: "task" in notifier._waiting)
    before = store.get("task")
    assert before is not None
    aborted = abort(store)
    notifier._publish(aborted)
    notifier._publish(before)
    assert waiter.join() == aborted


def test_a_notification_older_than_the_known_record_is_ignored(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    """A writer may be delayed before it notifies, while a client has already read a later record."""
    store.add(make_task(), b"{}", None, ())
    old = store.claim("task", "owner", 1)
    known = store.update("task", ANY_STATE, {"progress": 50.0})
    assert old is not None and known is not None
    notifier = make_notifier(store)
    seen: list[AsyncRouteTask] = []

    def is_new(task: AsyncRouteTask) -> bool:
        seen.append(task)
        return task.revision != known.revision

    thread = threading.Thread(target=notifier.wait, args=("task", is_new, 10))
    thread.start()
    eventually(lambda: seen)
    notifier._publish(old.task)
    eventually(lambda: len(seen) > 1)
    store.update("task", ANY_STATE, {"progress": 60.0})
    notifier._notify("task")
    thread.join(10)
    assert [task.revision for task in seen] == [known.revision, known.revision, known.revision + 1]


def test_a_late_notification_does_not_hide_an_ended_task(
    store: TaskStore,
    make_notifier: MakeNotifier,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A notification between the registration and the first read may be older than that read."""
    store.add(make_task(), b"{}", None, ())
    old = store.claim("task", "owner", 1)
    assert old is not None
    aborted = abort(store)
    notifier = make_notifier(store)
    begin = notifier._begin

    def begin_slowly(is_follower: bool = False) -> None:
        begin(is_follower)
        notifier._publish(old.task)

    monkeypatch.setattr(notifier, "_begin", begin_slowly)
    waiter = Waiter(notifier, timeout=5)
    assert waiter.join() == aborted
    assert waiter.took < 4


def test_a_change_while_a_wait_begins_is_not_missed(
    app: Flask, make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    store = MemoryTaskStore()
    notifier = make_notifier(store)
    lifecycle = Lifecycle(app, store, "owner")
    for number in range(150):
        task_id = f"t{number}"
        lifecycle.create(make_task(task_id), b"", None, ())
        task = store.get(task_id)
        assert task is not None
        waiter = Waiter(notifier, task_id, 5)
        lifecycle.abort(task, "x")
        ended = waiter.join()
        assert ended is not None and ended.is_completed
        assert waiter.took < 4


def test_every_change_drops_shared_reads_even_without_subscribers(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    """A stream that begins right after the change is not woken, so it must not get an older read."""
    reads = make_notifier(store).shared_reads
    lifecycle = Lifecycle(app, store, "owner")
    for change in (
        lambda: lifecycle.create(make_task(), b"", None, ()),
        lambda: signals.send_to_receivers(
            signals.events_written, app, task_id="task", changes=range(2, 3)
        ),
    ):
        assert reads.get("key", lambda: "before") == "before"
        change()
        assert reads.get("key", lambda: "after") == "after"
        reads.forget()


def test_shared_reads_are_dropped_before_streams_are_woken(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask,
    eventually: Eventually,
) -> None:  # fmt: skip
    notifier = make_notifier(store)
    kept: list[list[object]] = []

    class Recorder(Subscriber):
        def set(self, task: AsyncRouteTask | None = None) -> None:
            kept.append(list(notifier.shared_reads._reads))

    with notifier.subscribed(Recorder(), "task"):
        assert notifier.shared_reads.get("key", lambda: "before") == "before"
        Lifecycle(app, store, "owner").create(make_task(), b"", None, ())
        eventually(lambda: kept)
    assert kept[0] == []


def test_streams_of_one_task_are_woken_with_those_of_all_tasks(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    notifier = make_notifier(store)
    of_task, of_all, of_other = Subscriber(), Subscriber(), Subscriber()
    for subscriber in (of_task, of_all, of_other):
        subscriber.clear()
    with (
        notifier.subscribed(of_task, "task"),
        notifier.subscribed(of_all),
        notifier.subscribed(of_other, "other"),
    ):
        Lifecycle(app, store, "owner").create(make_task(), b"", None, ())
        assert of_task.wait(5) and of_all.wait(5)
        assert not of_other.wait(0)


def test_streams_are_woken_even_if_no_thread_can_be_started(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    notifier = make_notifier(store)
    subscriber = Subscriber()
    subscriber.clear()
    with notifier.subscribed(subscriber, "task"):

        def fail() -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(notifier.shared_reads, "start", fail)
        lifecycle = Lifecycle(app, store, "owner")
        lifecycle.create(make_task(), b"", None, ())
        assert subscriber.wait(0)
        lifecycle.claim("task")
        assert subscriber.wait(0)


def test_shared_reads_are_dropped_when_polling_begins(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    """No subscriber is notified of earlier changes by another process."""
    notifier = make_notifier(two_stores[0])
    assert notifier.shared_reads.get("key", two_stores[0].newest) == 0
    two_stores[1].add(make_task(), b"", None, ())
    with notifier.subscribed(Subscriber(), "task"):
        assert notifier.shared_reads.get("key", two_stores[0].newest) == 1


def test_shared_reads_are_dropped_soon_without_changes(
    store: TaskStore, make_notifier: MakeNotifier, eventually: Eventually
) -> None:
    """They use memory, and later streams rarely need them."""
    notifier = make_notifier(store)
    with notifier.subscribed(Subscriber(), "task"):
        assert notifier.shared_reads.get("key", lambda: "read") == "read"
        eventually(lambda: not notifier.shared_reads._reads)


def test_changes_of_another_app_do_not_notify(
    make_app: Callable[..., Flask], make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    received: list[AsyncRouteTask] = []
    make_notifier(MemoryTaskStore(), received.append)
    Lifecycle(make_app("other"), MemoryTaskStore(), "owner").create(make_task(), b"", None, ())
    assert received == []


def test_watching_a_memory_store_starts_no_thread(
    make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    store = MemoryTaskStore()
    store.add(make_task(), b"", None, ())
    notifier = make_notifier(store)
    notifier.watch()
    notifier.unwatch()
    assert watchers() == []


def test_watching_a_shared_store_starts_one_thread(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier
) -> None:
    notifier = make_notifier(two_stores[0])
    assert watchers() == []
    notifier.watch()
    notifier.watch()
    assert len(watchers()) == 1
    notifier.unwatch()
    notifier.unwatch()


def test_a_change_of_another_process_ends_a_wait(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    ours, theirs = two_stores
    ours.add(make_task(), b"", None, ())
    notifier = make_notifier(ours)
    waiter = Waiter(notifier)
    eventually(lambda: notifier._is_polling)
    before = time.monotonic()
    aborted = abort(theirs)
    assert waiter.join() == aborted
    assert time.monotonic() - before < 0.5, "the limit for notifying a view of a stop"


def test_the_listener_receives_every_change_while_a_subscriber_waits(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    ours, theirs = two_stores
    theirs.add(make_task("before"), b"", None, ())
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    with notifier.subscribed(Subscriber(), "other"):
        for number in range(20):
            theirs.add(make_task(f"t{number}"), b"", None, ())
        eventually(lambda: len(received) >= 20)
    assert received == [f"t{number}" for number in range(20)], "earlier changes are not reported"


def test_polling_resumes_after_a_pause(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Polling pauses after the last wait. The next wait is notified as usual, and only of new
    changes.
    """
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.1)
    ours, theirs = two_stores
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    for round in range(3):
        with notifier.subscribed(Subscriber(), "other"):
            theirs.add(make_task(f"watched-{round}"), b"", None, ())
            eventually(lambda round=round: f"watched-{round}" in received)
        eventually(lambda: not notifier._is_polling)
        theirs.add(make_task(f"pausing-{round}"), b"", None, ())
    assert received == [f"watched-{round}" for round in range(3)]
    assert len(watchers()) == 1


@pytest.mark.covers("F21")
@pytest.mark.parametrize("method", ["last_assigned", "changes_since"])
def test_polling_continues_after_the_store_was_unavailable(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str,
) -> None:  # fmt: skip
    ours, theirs = two_stores
    ours.add(make_task(), b"", None, ())
    notifier = make_notifier(ours)
    waiter = Waiter(notifier)
    eventually(lambda: notifier._is_polling)
    failed = threading.Event()

    def fail(*arguments: Any) -> Any:
        failed.set()
        raise StoreUnavailable("not now")

    with monkeypatch.context() as patched:
        patched.setattr(ours, method, fail)
        abort(theirs)
        assert failed.wait(5)
    ended = waiter.join()
    assert ended is not None and ended.is_completed
    assert "until the store is available again" in caplog.text and "not now" in caplog.text


def test_wait_raises_if_the_store_is_unavailable_at_its_start(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, _ = two_stores
    ours.add(make_task(), b"", None, ())
    notifier = make_notifier(ours)

    def fail() -> int:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as patched:
        patched.setattr(ours, "newest", fail)
        with pytest.raises(StoreUnavailable):
            notifier.wait("task", is_completed, 5)
    assert notifier._waiting == {}
    assert notifier._watching == 0
    task = notifier.wait("task", is_completed, 0.01)
    assert task is not None and task.id == "task"


def test_an_error_of_the_listener_does_not_affect_notifications(
    app: Flask,
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    """For example, cancelling a coroutine whose loop is closed raises. Changes from the same poll
    must still arrive.
    """
    ours, theirs = two_stores
    for name in ("one", "two", "task"):
        ours.add(make_task(name), b"", None, ())
    received: list[str] = []

    def listen(task: AsyncRouteTask) -> None:
        received.append(task.id)
        raise RuntimeError("Event loop is closed")

    notifier = make_notifier(ours, listen)
    waiter = Waiter(notifier, timeout=3)
    eventually(lambda: notifier._is_polling)
    pause, news = threading.Event(), ours.changes_since
    with pytest.MonkeyPatch.context() as patched:
        # Let one poll return all three.
        patched.setattr(
            ours,
            "changes_since",
            lambda *which: news(*which) if pause.is_set() else Changes(which[0], ()),
        )
        for name in ("one", "two", "task"):
            abort(theirs, name)
        pause.set()
        ended = waiter.join()
    assert ended is not None and ended.is_completed
    assert waiter.took < 2.5, "ended by a notification, not by the timeout"
    eventually(lambda: received == ["one", "two", "task"])


def test_an_error_of_the_listener_does_not_affect_changes_of_this_process(
    app: Flask, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    store = MemoryTaskStore()

    def listen(task: AsyncRouteTask) -> None:
        raise RuntimeError("Event loop is closed")

    notifier = make_notifier(store, listen)
    lifecycle = Lifecycle(app, store, "owner")
    lifecycle.create(make_task(), b"", None, ())
    waiter = Waiter(notifier, timeout=3)
    eventually(lambda: notifier._waiting)
    task = store.get("task")
    assert task is not None
    lifecycle.abort(task, "x")
    waiter.join()
    assert waiter.took < 2.5


def test_close_ends_the_thread_at_once(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier
) -> None:
    notifier = make_notifier(two_stores[0])
    notifier.watch()
    before = time.monotonic()
    notifier.close()
    notifier.close()
    assert watchers() == []
    assert time.monotonic() - before < 2


def test_close_ends_a_paused_thread_at_once(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.01)
    notifier = make_notifier(two_stores[0])
    notifier.watch()
    notifier.unwatch()
    eventually(lambda: not notifier._is_polling)
    before = time.monotonic()
    notifier.close()
    assert watchers() == []
    assert time.monotonic() - before < 2


def test_close_wakes_a_thread_that_is_about_to_pause(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``close`` runs after the thread has checked whether it is closed, and before it clears its
    wake-up event.
    """
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.0)
    notifier = make_notifier(two_stores[0])
    checked, closing = threading.Event(), threading.Event()
    step = Notifier._step

    def late_step(self: Notifier) -> float:
        if self._idle_since is not None:
            checked.set()
            closing.wait(5)
        return step(self)

    monkeypatch.setattr(Notifier, "_step", late_step)
    notifier.watch()
    notifier.unwatch()
    assert checked.wait(5)

    set_wake = notifier._wake.set

    def set_and_go_on() -> None:
        set_wake()
        closing.set()

    monkeypatch.setattr(notifier._wake, "set", set_and_go_on)
    before = time.monotonic()
    notifier.close()
    assert time.monotonic() - before < 3
    assert watchers() == []


def test_the_thread_ends_when_its_notifier_is_collected(
    app: Flask, two_stores: tuple[TaskStore, TaskStore], eventually: Eventually
) -> None:
    notifier = Notifier(app, two_stores[0], "worker", lambda task: None)
    notifier.watch()
    reference = weakref.ref(notifier)
    del notifier
    eventually(lambda: (gc.collect(), reference() is None)[1])
    eventually(lambda: watchers() == [])
    signals.task_changed.send(app, task=None)


def test_the_shared_reads_thread_ends_when_its_notifier_is_collected(
    app: Flask, eventually: Eventually
) -> None:
    notifier = Notifier(app, MemoryTaskStore(), "worker", lambda task: None)
    assert notifier.shared_reads.get("key", lambda: "read") == "read"
    threads = [t for t in threading.enumerate() if t.name == "asyncroute-reader"]
    assert threads
    del notifier
    gc.collect()
    eventually(lambda: not any(thread.is_alive() for thread in threads))


def test_wait_works_after_a_failed_thread_start(
    make_notifier: MakeNotifier,
    two_stores: tuple[TaskStore, TaskStore],
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process at its thread limit can start threads again later. Later waits must be notified
    then.
    """
    ours, theirs = two_stores
    theirs.add(make_task("task"), b"", None, ())
    notifier = make_notifier(ours)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            notifier.wait("task", is_completed, 1)
    assert notifier._watching == 0
    timer = threading.Timer(
        0.2, lambda: theirs.update("task", ANY_STATE, {"state": State.COMPLETED, "completed_us": 5})
    )
    timer.start()
    found = notifier.wait("task", is_completed, 10)
    timer.join()
    assert found is not None and found.is_completed


def test_a_slow_store_does_not_delay_notifications(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new wait reads the store. Meanwhile, changes must still be notified to earlier waits."""
    notifier = make_notifier(two_stores[0])
    requested, answered = threading.Event(), threading.Event()

    def newest() -> int:
        requested.set()
        assert answered.wait(10)
        return 0

    monkeypatch.setattr(two_stores[0], "newest", newest)
    slow_wait = threading.Thread(target=lambda: notifier.wait("slow", is_completed, 0.01))
    slow_wait.start()
    assert requested.wait(5)
    notify_thread = threading.Thread(target=notifier._notify, args=("slow",))
    notify_thread.start()
    notify_thread.join(5)
    is_notified = not notify_thread.is_alive()
    answered.set()
    slow_wait.join(5)
    notify_thread.join(5)
    assert is_notified


def test_listening_to_the_store_is_retried(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:
    requested: list[int] = []

    def listen(*calls: Callable[[], None]) -> None:
        requested.append(1)
        if len(requested) == 1:
            raise StoreUnavailable("not now")

    monkeypatch.setattr(two_stores[0], "listen", listen)
    notifier = make_notifier(two_stores[0])
    with notifier.subscribed(Subscriber(), "task"):
        eventually(lambda: len(requested) == 2)


# What a poll reads


@pytest.fixture(params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest) -> tuple[SharedTaskStore, SharedTaskStore]:
    """Return two stores on one database: that of this process, and that of another."""
    make = request.getfixturevalue(f"make_{request.param}_store")
    ours, theirs = make(), make()
    ours.open()
    theirs.open()
    return ours, theirs


class Polls:
    """Blocks the polls of a notifier inside a ``with`` block, and records the calls of `changes_since`."""

    def __init__(
        self, notifier: Notifier, store: SharedTaskStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.calls: list[tuple[int, str | None]] = []
        self._lock = threading.Lock()
        poll, news = notifier._poll, store.changes_since

        def poll_later(store: SharedTaskStore) -> None:
            with self._lock:
                poll(store)

        def read(since: int, worker: str | None = None) -> Changes:
            self.calls.append((since, worker))
            return news(since, worker)

        monkeypatch.setattr(notifier, "_poll", poll_later)
        monkeypatch.setattr(store, "changes_since", read)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def claim_and_abort(app: Flask, store: SharedTaskStore, task_id: str) -> None:
    """Make two changes of this process, which is named "worker"."""
    lifecycle = Lifecycle(app, store, "worker")
    claim = lifecycle.claim(task_id)
    assert claim is not None
    lifecycle.abort(claim.task, "x")


def test_own_changes_are_not_read(
    app: Flask, pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    make_task: NewTask, eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store, _ = pair
    for task_id in ("one", "two"):
        store.add(make_task(task_id), b"", None, ())
    before = store.newest()
    notifier = make_notifier(store)
    polls = Polls(notifier, store, monkeypatch)
    with notifier.subscribed(Subscriber(), "other"):
        with polls:
            claim_and_abort(app, store, "one")
            assert Lifecycle(app, store, "worker").claim("two") is not None
            sent = [ViewEvent("step", b"1", number) for number in (1, 2, 3)]
            changes = store.add_events("two", Expect((State.RUNNING,), epoch=1), sent)
            signals.send_to_receivers(signals.events_written, app, task_id="two", changes=changes)
        assert store.newest() == before + 6
        eventually(lambda: notifier._since == before + 6)
    assert polls.calls == []
    assert notifier._own == set(), "the numbers are not kept"


def test_own_new_tasks_are_not_read_once_this_process_has_claimed_them(
    app: Flask, pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    make_task: NewTask, eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The record of a new task does not contain its change number. That of the claim does."""
    store, _ = pair
    before = store.newest()
    notifier = make_notifier(store)
    polls = Polls(notifier, store, monkeypatch)
    with notifier.subscribed(Subscriber(), "other"):
        with polls:
            lifecycle = Lifecycle(app, store, "worker")
            lifecycle.create(make_task(), b"", None, ())
            assert lifecycle.claim("task") is not None
        assert store.newest() == before + 2
        eventually(lambda: notifier._since == before + 2)
    assert polls.calls == []


def test_a_change_of_another_process_between_own_changes_is_read(
    app: Flask, pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    make_task: NewTask, eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, theirs = pair
    for task_id in ("one", "two"):
        ours.add(make_task(task_id), b"", None, ())
    before = ours.newest()
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    polls = Polls(notifier, ours, monkeypatch)
    with notifier.subscribed(Subscriber(), "other"):
        with polls:
            claim_and_abort(app, ours, "one")
            theirs.add(make_task("theirs"), b"", None, ())
            claim_and_abort(app, ours, "two")
        eventually(lambda: "theirs" in received and notifier._since == before + 5)
    assert polls.calls == [(before + 2, None)]
    assert notifier._own == set(), "the numbers are not kept"


def test_a_change_of_another_process_after_own_changes_is_read(
    app: Flask, pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    make_task: NewTask, eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, theirs = pair
    for task_id in ("one", "two"):
        ours.add(make_task(task_id), b"", None, ())
    before = ours.newest()
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    polls = Polls(notifier, ours, monkeypatch)
    with notifier.subscribed(Subscriber(), "other"):
        with polls:
            claim_and_abort(app, ours, "one")
            theirs.add(make_task("theirs"), b"", None, ())
        eventually(lambda: received == ["one", "one", "theirs"])
        with polls:
            claim_and_abort(app, ours, "two")
        eventually(lambda: notifier._since == before + 5)
        theirs.update("two", ANY_STATE, {"progress": 1.0})
        eventually(lambda: received[3:] == ["two"] * 3)
    assert polls.calls == [(before + 2, None), (before + 5, None)]


def test_a_change_that_was_read_before_its_signal_is_not_missed(
    app: Flask, pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    make_task: NewTask, eventually: Eventually,
) -> None:  # fmt: skip
    """A poll may read an own change before this process publishes it."""
    ours, theirs = pair
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    with notifier.subscribed(Subscriber(), "other"):
        ours.add(make_task("a"), b"", None, ())
        eventually(lambda: received == ["a"])
        task = ours.get("a")
        signals.send_to_receivers(signals.task_changed, app, task=task)
        theirs.add(make_task("b"), b"", None, ())
        eventually(lambda: received == ["a", "a", "b"])
        eventually(lambda: notifier._own == set())


def test_own_change_numbers_are_forgotten_if_the_database_was_restored(
    app: Flask, two_stores: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    make_task: NewTask, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, sqlite_path: Path,
) -> None:  # fmt: skip
    """The database assigns these numbers again, to changes of other processes."""
    ours, theirs = two_stores
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    polls = Polls(notifier, ours, monkeypatch)
    with notifier.subscribed(Subscriber(), "other"):
        ours.add(make_task("before"), b"", None, ())
        eventually(lambda: notifier._since == 1)
        with polls:
            claim_and_abort(app, ours, "before")
            with closing(sqlite3.connect(sqlite_path)) as connection, connection:
                connection.execute("DELETE FROM asyncroute_tasks")
                connection.execute("UPDATE asyncroute_namespaces SET change = 0")
        eventually(lambda: notifier._since == 0)
        for number in (1, 2, 3):
            theirs.add(make_task(f"after-{number}"), b"", None, ())
            eventually(lambda number=number: notifier._since == number)
    assert received == ["before"] * 3 + ["after-1", "after-2", "after-3"]


def test_a_run_receives_only_what_it_needs(
    pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier, make_task: NewTask,
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, theirs = pair
    ours.add(make_task(), b"", None, ())
    assert ours.claim("task", "worker", 1) is not None
    before = ours.newest()
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    polls = Polls(notifier, ours, monkeypatch)
    notifier.watch()
    with polls:
        theirs.add(make_task("new"), b"", None, ())
        stop = {"state": State.ABORTED, "completed_us": 5, "stopping": True}
        assert theirs.update("task", ANY_STATE, stop) is not None
        theirs.add(make_task("newer"), b"", None, ())
    eventually(lambda: notifier._since == theirs.newest())
    notifier.unwatch()
    assert received == ["task"]
    assert polls.calls == [(before, "worker")]


def test_a_subscriber_that_comes_during_a_poll_for_runs_receives_its_changes(
    pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier, make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The poll has read only what the runs need, and must not skip the rest."""
    ours, theirs = pair
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    was_read, may_return = threading.Event(), threading.Event()
    news = ours.changes_since

    def read(since: int, worker: str | None = None) -> Changes:
        found = news(since, worker)
        if worker is not None:
            was_read.set()
            assert may_return.wait(10)
        return found

    monkeypatch.setattr(ours, "changes_since", read)
    notifier.watch()
    theirs.add(make_task(), b"", None, ())
    assert was_read.wait(5)
    subscriber = Subscriber()
    subscriber.clear()
    with notifier.subscribed(subscriber, "task"):
        may_return.set()
        assert subscriber.wait(3)
    notifier.unwatch()
    assert received == ["task"]


@pytest.mark.parametrize("has_run", [True, False])
def test_shared_reads_lack_no_change_that_was_not_read_without_subscribers(
    pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier, make_task: NewTask,
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch, has_run: bool,
) -> None:  # fmt: skip
    """A stream ends and its client reconnects. Meanwhile, polls skip most changes of others."""
    monkeypatch.setattr(module, "REREAD_SECONDS", 0.05)
    ours, theirs = pair
    before = ours.newest()
    notifier = make_notifier(ours)
    reads = notifier.shared_reads
    if has_run:
        notifier.watch()
    with notifier.subscribed(Subscriber(), "task"):
        eventually(lambda: math.isfinite(notifier._check_late_at) and notifier._check_late_at > 0)
        notifier._check_late_at = math.inf  # reads are also dropped regularly, but later than this
        eventually(lambda: not reads._reads)
        assert reads.get("key", ours.newest) == before
    theirs.add(make_task(), b"", None, ())
    eventually(lambda: notifier._since == before + 1)
    with notifier.subscribed(Subscriber(), "task"):
        assert reads.get("key", ours.newest) == before + 1
    if has_run:
        notifier.unwatch()


def test_a_memory_store_keeps_no_change_numbers(
    app: Flask, make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    """No poll would remove them."""
    store = MemoryTaskStore()
    store.add(make_task(), b"", None, ())
    notifier = make_notifier(store)
    with notifier.subscribed(Subscriber(), "task"):
        assert Lifecycle(app, store, "worker").claim("task") is not None
    assert notifier._own == set()


# Notifications of the store


def record_requests(store: SharedTaskStore, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of the arguments of all later calls of ``keep_notifying``."""
    calls: list[float] = []
    keep_notifying = store.keep_notifying

    def keep(seconds: float) -> None:
        calls.append(seconds)
        keep_notifying(seconds)

    monkeypatch.setattr(store, "keep_notifying", keep)
    return calls


def test_subscribers_ask_for_notifications_and_runs_do_not(
    pair: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier, make_task: NewTask,
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, theirs = pair
    before = ours.newest()
    calls = record_requests(ours, monkeypatch)
    notifier = make_notifier(ours)
    notifier.watch()
    theirs.add(make_task(), b"", None, ())
    eventually(lambda: notifier._since == before + 1)
    assert calls == []
    for _ in range(5):
        with notifier.subscribed(Subscriber(), "task"):
            assert calls, "asked before the subscriber reads the task"
    notifier.unwatch()
    assert calls in (  # the thread of the notifier may ask at the same time
        [module.NOTIFIED_SECONDS],
        [module.NOTIFIED_SECONDS] * 2,
    )


def test_notifications_are_asked_for_again_while_there_are_subscribers(
    two_stores: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "NOTIFIED_SECONDS", 0.2)
    calls = record_requests(two_stores[0], monkeypatch)
    notifier = make_notifier(two_stores[0])
    with notifier.subscribed(Subscriber(), "task"):
        began = time.monotonic()
        eventually(lambda: len(calls) == 4)
        assert time.monotonic() - began > 0.25, "not before half of the time has passed"


def test_a_wait_fails_if_notifications_cannot_be_asked_for(
    two_stores: tuple[SharedTaskStore, SharedTaskStore], make_notifier: MakeNotifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(seconds: float) -> None:
        raise StoreUnavailable("not now")

    notifier = make_notifier(two_stores[0])
    with monkeypatch.context() as patch:
        patch.setattr(two_stores[0], "keep_notifying", fail)
        with pytest.raises(StoreUnavailable):
            notifier.wait("task", is_completed, 5)
    assert (notifier._watching, notifier._following, notifier._waiting) == (0, 0, {})
    assert notifier.wait("task", is_completed, 5) is None


@pytest.mark.parametrize("kind", ["subscriber", "run"])
def test_a_notification_wakes_the_poll(
    make_postgresql_store: NewStore, make_notifier: MakeNotifier, make_task: NewTask, kind: str,
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without a notification, the next poll would be a minute later."""
    monkeypatch.setattr(module, "REREAD_SECONDS", 60.0)
    ours: Any = make_postgresql_store()
    theirs: Any = make_postgresql_store()
    for store in (ours, theirs):
        store.open()
    ours.add(make_task(), b"", None, ())
    assert ours.claim("task", "worker", 1) is not None
    received: list[AsyncRouteTask] = []
    notifier = make_notifier(ours, received.append)
    listening = threading.Event()
    listen = ours.listen

    def listen_and_report(notify: Callable[[], None], *others: Callable[[], None]) -> Any:
        def report() -> None:
            notify()
            listening.set()

        return listen(report, *others)

    monkeypatch.setattr(ours, "listen", listen_and_report)
    if kind == "subscriber":
        values: dict[str, Any] = {"progress": 5.0}
        subscription: Any = notifier.subscribed(Subscriber(), "task")
        subscription.__enter__()
    else:
        values = {"state": State.ABORTED, "completed_us": 5, "stopping": True}
        notifier.watch()
    assert listening.wait(5)
    eventually(lambda: not notifier._wake.is_set() and notifier._poll_after < time.monotonic())
    changed = theirs.update("task", ANY_STATE, values)
    eventually(lambda: received == [changed], 3)
    if kind == "subscriber":
        subscription.__exit__(None, None, None)
    else:
        notifier.unwatch()


def test_a_backlog_of_changes_is_read_without_pauses(
    two_stores: tuple[Any, Any],
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after an outage, or if the change number went back."""
    monkeypatch.setattr("flask_asyncroute.stores.sql.events.CHANGES_PAGE", 2)
    monkeypatch.setattr("flask_asyncroute.engine.notifier.POLL_SECONDS", 60.0)
    ours, theirs = two_stores
    received: list[str] = []
    notifier = make_notifier(ours, lambda task: received.append(task.id))
    with notifier.subscribed(Subscriber()):
        eventually(lambda: notifier._poll_after > 0)
        names = [f"t{number}" for number in range(7)]
        for name in names:
            theirs.add(make_task(name), b"", None, ())
        notifier.wake()
        eventually(lambda: received == names)
