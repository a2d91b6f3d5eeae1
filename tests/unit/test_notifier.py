"""Who is waiting hears of every change: at once of what this process writes, soon of what others write."""

from __future__ import annotations

import gc
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

from flask_asyncroute import notifier as module
from flask_asyncroute import signals
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.followers import Follower
from flask_asyncroute.lifecycle import Lifecycle
from flask_asyncroute.notifier import Notifier
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import Expect, News, TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask

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
    """Give ``make_notifier(store, listener=…)``; closed at the end."""
    made: list[Notifier] = []

    def make(store: TaskStore, listener: Callable[[AsyncRouteTask], None] = lambda task: None) -> Notifier:
        made.append(Notifier(app, store, listener))
        return made[-1]

    yield make
    for notifier in made:
        notifier.close()


@pytest.fixture
def two_stores(make_sqlite_store: NewStore) -> tuple[TaskStore, TaskStore]:
    """Give two stores on one file: ours, and that of another process."""
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
    """Waits on a thread of its own and keeps what came of it."""

    def __init__(self, notifier: Notifier, task_id: str = "task", timeout: float | None = 10) -> None:
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


def test_what_is_so_already_is_not_waited_for(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    store.add(make_task(), b"", None, ())
    aborted = abort(store)
    assert make_notifier(store).wait("task", is_completed, 10) == aborted
    assert make_notifier(store).wait("task", is_completed, None) == aborted
    assert make_notifier(store).wait("task", is_completed, 0) == aborted


def test_an_unknown_task_is_not_waited_for(store: TaskStore, make_notifier: MakeNotifier) -> None:
    assert make_notifier(store).wait("unknown", is_completed, None) is None


@pytest.mark.parametrize("seconds", [0, 0.05])
def test_a_wait_ends_with_its_time(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, seconds: float
) -> None:
    store.add(make_task(), b"", None, ())
    before = time.monotonic()
    task = make_notifier(store).wait("task", is_completed, seconds)
    assert seconds <= time.monotonic() - before < seconds + 2
    assert task == store.get("task")


def test_a_wait_that_ends_with_its_time_gives_the_task_as_it_is_then(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    """Not as it was when the wait began; here nobody is told of the change."""
    store.add(make_task(), b"", None, ())
    notifier = make_notifier(store)
    waiter = Waiter(notifier, timeout=0.3)
    eventually(lambda: notifier._waiting)
    after = store.update("task", ANY_STATE, {"progress": 50.0})
    assert waiter.join() == after


def test_a_change_of_this_process_is_heard_of_at_once(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    heard: list[AsyncRouteTask] = []
    notifier = make_notifier(store, heard.append)
    lifecycle = Lifecycle(app, store, "owner")
    lifecycle.create(make_task(), b"", None, ())
    assert [task.state for task in heard] == [State.NOT_STARTED]
    waiter = Waiter(notifier)
    eventually(lambda: notifier._waiting)
    waiting = store.get("task")
    assert waiting is not None
    aborted = lifecycle.abort(waiting, "x")
    assert waiter.join() == aborted == heard[1]
    assert notifier._waiting == {}


def test_changes_that_are_not_enough_do_not_end_a_wait(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
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


def test_every_one_of_many_who_wait_hears(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
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


def test_what_is_told_too_late_makes_nobody_forget_the_newer(
    app: Flask, store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    """Two threads write one after the other, and the first is the last to tell of it."""
    notifier = make_notifier(store)
    store.add(make_task(), b"{}", None, ())
    waiter = Waiter(notifier)
    eventually(lambda: "task" in notifier._waiting)
    before = store.get("task")
    assert before is not None
    aborted = abort(store)
    notifier.on_task_changed(app, aborted)
    notifier.on_task_changed(app, before)
    assert waiter.join() == aborted


def test_late_news_are_no_answer_to_who_knows_more(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    """Who has written may be held up before it tells; meanwhile a client has read what was written after that."""
    store.add(make_task(), b"{}", None, ())
    old = store.claim("task", "owner", 1)
    known = store.update("task", ANY_STATE, {"progress": 50.0})
    assert old is not None and known is not None
    notifier = make_notifier(store)
    looks: list[AsyncRouteTask] = []

    def is_another(task: AsyncRouteTask) -> bool:
        looks.append(task)
        return task.revision != known.revision

    thread = threading.Thread(target=notifier.wait, args=("task", is_another, 10))
    thread.start()
    eventually(lambda: looks)
    notifier._publish(old.task)
    eventually(lambda: len(looks) > 1)
    store.update("task", ANY_STATE, {"progress": 60.0})
    notifier._tell("task")
    thread.join(10)
    assert [task.revision for task in looks] == [known.revision, known.revision, known.revision + 1]


def test_late_news_hide_no_end(
    store: TaskStore, make_notifier: MakeNotifier, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told between the registration and the first look may be older than what that look finds."""
    store.add(make_task(), b"{}", None, ())
    old = store.claim("task", "owner", 1)
    assert old is not None
    aborted = abort(store)
    notifier = make_notifier(store)
    begin = notifier._begin

    def begin_slowly() -> None:
        begin()
        notifier._publish(old.task)

    monkeypatch.setattr(notifier, "_begin", begin_slowly)
    waiter = Waiter(notifier, timeout=5)
    assert waiter.join() == aborted
    assert waiter.took < 4


def test_f21_a_wait_outlives_a_backup_that_is_put_in_place(
    make_sqlite_store: NewStore,
    sqlite_path: Path,
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    """Its numbers are lower than those of what was told before."""
    store = make_sqlite_store()
    store.open()
    store.add(make_task(), b"{}", None, ())
    store.claim("task", "owner", 1)
    backup = sqlite_path.with_name("backup.db")
    with closing(sqlite3.connect(sqlite_path)) as here, closing(sqlite3.connect(backup)) as there:
        here.backup(there)
    notifier = make_notifier(store)
    waiter = Waiter(notifier, timeout=10)
    eventually(lambda: notifier._is_polling)
    for progress in range(20):
        newest = store.update("task", ANY_STATE, {"progress": float(progress)})
    assert newest is not None
    eventually(lambda: notifier._since == newest.change)
    for name in (f"{sqlite_path.name}-wal", f"{sqlite_path.name}-shm"):
        sqlite_path.with_name(name).unlink(missing_ok=True)
    backup.replace(sqlite_path)
    eventually(lambda: notifier._since < newest.change)
    other = make_sqlite_store()
    other.open()
    abort(other)
    ended = waiter.join()
    assert ended is not None and ended.state is State.ABORTED
    assert waiter.took < 8


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


def test_changes_of_another_app_are_not_heard_of(
    make_app: Callable[..., Flask], make_notifier: MakeNotifier, make_task: NewTask
) -> None:
    heard: list[AsyncRouteTask] = []
    make_notifier(MemoryTaskStore(), heard.append)
    Lifecycle(make_app("other"), MemoryTaskStore(), "owner").create(make_task(), b"", None, ())
    assert heard == []


def test_no_thread_is_started_for_memory_before_somebody_waits(make_notifier: MakeNotifier, make_task: NewTask) -> None:
    store = MemoryTaskStore()
    store.add(make_task(), b"", None, ())
    notifier = make_notifier(store)
    notifier.watch()
    notifier.unwatch()
    assert watchers() == []


def test_no_thread_is_started_before_somebody_waits(
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
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    ours, theirs = two_stores
    ours.add(make_task(), b"", None, ())
    notifier = make_notifier(ours)
    waiter = Waiter(notifier)
    eventually(lambda: notifier._is_polling)
    before = time.monotonic()
    aborted = abort(theirs)
    assert waiter.join() == aborted
    assert time.monotonic() - before < 0.5, "the bound for the view to be told of a stop"


def test_the_listener_hears_of_every_change_while_it_watches(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually
) -> None:
    ours, theirs = two_stores
    theirs.add(make_task("before"), b"", None, ())
    heard: list[str] = []
    notifier = make_notifier(ours, lambda task: heard.append(task.id))
    notifier.watch()
    for number in range(20):
        theirs.add(make_task(f"t{number}"), b"", None, ())
    eventually(lambda: len(heard) >= 20)
    assert heard == [f"t{number}" for number in range(20)], "what was before is no news"
    notifier.unwatch()


def test_watching_goes_on_after_a_rest(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nobody waits for a while, the watcher rests; whoever waits then hears as before, and of what is new alone."""
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.1)
    ours, theirs = two_stores
    heard: list[str] = []
    notifier = make_notifier(ours, lambda task: heard.append(task.id))
    for round in range(3):
        notifier.watch()
        theirs.add(make_task(f"watched-{round}"), b"", None, ())
        eventually(lambda round=round: f"watched-{round}" in heard)
        notifier.unwatch()
        eventually(lambda: not notifier._is_polling)
        theirs.add(make_task(f"resting-{round}"), b"", None, ())
    assert heard == [f"watched-{round}" for round in range(3)]
    assert len(watchers()) == 1


def test_f21_a_store_that_cannot_be_read_for_a_while_ends_no_watching(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, make_task: NewTask, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ours, theirs = two_stores
    ours.add(make_task(), b"", None, ())
    notifier = make_notifier(ours)
    waiter = Waiter(notifier)
    eventually(lambda: notifier._is_polling)
    failed = threading.Event()

    def fail(since: int) -> News:
        failed.set()
        raise StoreUnavailable("not now")

    with monkeypatch.context() as patched:
        patched.setattr(ours, "news", fail)
        assert failed.wait(5)
        abort(theirs)
    ended = waiter.join()
    assert ended is not None and ended.is_completed
    assert "The watcher waits for the store" in caplog.text and "not now" in caplog.text


def test_a_store_that_cannot_be_read_at_the_beginning_is_an_error_of_who_waits(
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


def test_a_listener_that_raises_keeps_nobody_from_hearing(
    app: Flask,
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    make_task: NewTask,
    eventually: Eventually,
) -> None:
    """Such as the cancelling of a coroutine whose loop has just been closed: the stops that came with it still arrive."""
    ours, theirs = two_stores
    for name in ("one", "two", "task"):
        ours.add(make_task(name), b"", None, ())
    heard: list[str] = []

    def listen(task: AsyncRouteTask) -> None:
        heard.append(task.id)
        raise RuntimeError("Event loop is closed")

    notifier = make_notifier(ours, listen)
    waiter = Waiter(notifier, timeout=3)
    eventually(lambda: notifier._is_polling)
    pause, news = threading.Event(), ours.news
    with pytest.MonkeyPatch.context() as patched:
        # Have all three come in one look.
        patched.setattr(ours, "news", lambda since: news(since) if pause.is_set() else News(since, ()))
        for name in ("one", "two", "task"):
            abort(theirs, name)
        pause.set()
        ended = waiter.join()
    assert ended is not None and ended.is_completed
    assert waiter.took < 2.5, "by news, not by the end of its time"
    eventually(lambda: heard == ["one", "two", "task"])


def test_a_listener_that_raises_keeps_nobody_from_hearing_of_our_own_changes(
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


def test_close_ends_the_thread_at_once(two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier) -> None:
    notifier = make_notifier(two_stores[0])
    notifier.watch()
    before = time.monotonic()
    notifier.close()
    notifier.close()
    assert watchers() == []
    assert time.monotonic() - before < 2


def test_close_ends_a_resting_thread_at_once(
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


def test_close_is_not_overheard_by_a_thread_about_to_rest(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The close comes between the thread's look whether it is closed and the moment that it takes back its wake-up."""
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.0)
    notifier = make_notifier(two_stores[0])
    looked, closing = threading.Event(), threading.Event()
    step = Notifier._step

    def late_step(self: Notifier) -> float:
        if self._idle_since is not None:
            looked.set()
            closing.wait(5)
        return step(self)

    monkeypatch.setattr(Notifier, "_step", late_step)
    notifier.watch()
    notifier.unwatch()
    assert looked.wait(5)

    set_wake = notifier._wake.set

    def set_and_go_on() -> None:
        set_wake()
        closing.set()

    monkeypatch.setattr(notifier._wake, "set", set_and_go_on)
    before = time.monotonic()
    notifier.close()
    assert time.monotonic() - before < 3
    assert watchers() == []


def test_a_notifier_that_is_dropped_ends_its_thread(
    app: Flask, two_stores: tuple[TaskStore, TaskStore], eventually: Eventually
) -> None:
    notifier = Notifier(app, two_stores[0], lambda task: None)
    notifier.watch()
    reference = weakref.ref(notifier)
    del notifier
    eventually(lambda: (gc.collect(), reference() is None)[1])
    eventually(lambda: watchers() == [])
    signals.task_changed.send(app, task=None)


def test_a_watcher_that_could_not_be_started_is_started_by_the_next(
    make_notifier: MakeNotifier,
    two_stores: tuple[TaskStore, TaskStore],
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process at its limit of threads has room again later; nobody may be deaf from then on."""
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


def test_a_store_that_takes_its_time_keeps_nobody_from_telling(
    two_stores: tuple[TaskStore, TaskStore], make_notifier: MakeNotifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who begins to wait reads the store; what is written meanwhile is told to those who wait already."""
    notifier = make_notifier(two_stores[0])
    asked, answered = threading.Event(), threading.Event()

    def newest() -> int:
        asked.set()
        assert answered.wait(10)
        return 0

    monkeypatch.setattr(two_stores[0], "newest", newest)
    late = threading.Thread(target=lambda: notifier.wait("slow", is_completed, 0.01))
    late.start()
    assert asked.wait(5)
    told = threading.Thread(target=notifier._tell, args=("slow",))
    told.start()
    told.join(5)
    is_told = not told.is_alive()
    answered.set()
    late.join(5)
    told.join(5)
    assert is_told


def test_a_store_that_cannot_be_listened_to_is_asked_for_it_again(
    two_stores: tuple[TaskStore, TaskStore],
    make_notifier: MakeNotifier,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:
    asked: list[int] = []

    def listen(heard: Callable[[], None]) -> None:
        asked.append(1)
        if len(asked) == 1:
            raise StoreUnavailable("not now")

    monkeypatch.setattr(two_stores[0], "listen", listen)
    notifier = make_notifier(two_stores[0])
    with notifier.telling(Follower(), "task"):
        eventually(lambda: len(asked) == 2)
