"""Writes to PostgreSQL that commit at the same time, and readers of their changes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.rows import namedtuple_row
from sqlalchemy import text
from sqlalchemy.engine import make_url

from flask_asyncroute.callbacks.model import Delivery, Shown
from flask_asyncroute.errors import KeyTaken, StoreUnavailable, UniqueTaken
from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.stores.base import (
    STATE,
    Event,
    Expect,
    SharedTaskStore,
    StartKey,
    ViewEvent,
)
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.task import TERMINAL, AsyncRouteTask, State, now_us
from tests.support.databases import engine_of, new_postgresql_database
from tests.support.tasks import new_task
from tests.support.waiting import eventually_true

NewStore = Callable[..., SharedTaskStore]
T0 = 1_700_000_000_000_000
PATIENCE = 10.0
RUNNING = Expect((State.RUNNING,), "me", 1)
ENDED = Expect(tuple(TERMINAL))
END: dict[str, Any] = {"state": State.COMPLETED, "completed_us": T0}
STOP: dict[str, Any] = {"state": State.ABORTED, "completed_us": T0, "stopping": True}
REQUEUE: dict[str, Any] = {"state": State.NOT_STARTED, "owner": None, "started_us": None}
SHARED = {"permission_json": msgspec.json.encode(Permission(Access(groups=("g",))))}
SHOWN = Shown(
    url_field="$url", method="POST", content_type="application/json", send_result=True,
    event_name="e", header_fields=[], url="http://localhost/",
)  # fmt: skip
CALLBACK: dict[str, Any] = {
    "callback_json": msgspec.json.encode(SHOWN),
    "callback_state": "NotStarted",
}
DELIVERY = Delivery(
    webhook_id="w", url="http://localhost/", host="localhost", method="POST",
    content_type="application/json", headers={}, event_name="e", send_result=True,
    is_trusted=True, depth=0,
)  # fmt: skip


@pytest.fixture
def stores(make_postgresql_store: NewStore) -> tuple[SharedTaskStore, SharedTaskStore]:
    """Return the stores of two processes."""
    made = make_postgresql_store(), make_postgresql_store()
    for store in made:
        store.open()
    return made


@pytest.fixture
def new_database(postgresql_server: str) -> Iterator[str]:
    """Return the URL of a database without tables."""
    with new_postgresql_database(postgresql_server) as url:
        yield url


@contextmanager
def open_store(url: str) -> Iterator[Any]:
    store = make_store(url, "", "test", True)
    store.open()
    try:
        yield store
    finally:
        store.close()


def add(store: SharedTaskStore, *names: str, is_claimed: bool = False) -> None:
    for name in names:
        store.add(new_task(name, sse_group="g"), b"", None, ())
        if is_claimed:
            assert store.claim(name, "me", T0) is not None


class Thread(threading.Thread):
    """Calls a function, and keeps its result or its exception."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float = PATIENCE) -> Any:
        """Return the result of the call, or raise its exception.

        :raises AssertionError: if the call has not ended within ``seconds``.
        """
        self.join(seconds)
        assert not self.is_alive(), f"The call has not ended within {seconds} s."
        if self._error is not None:
            raise self._error
        return self._result


class OpenTransaction:
    """Executes the statements of a store in one transaction, which is not committed.

    It replaces the `Database` of the store.
    """

    def __init__(self, store: Any, url: str) -> None:
        conninfo = make_url(url).set(drivername="postgresql")
        self._connection = psycopg.connect(
            conninfo.render_as_string(hide_password=False), row_factory=namedtuple_row
        )
        store._database = store.outbox._database = store._events._database = self
        self.store = store

    def __enter__(self) -> OpenTransaction:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def now_us(self) -> int:
        return now_us()

    def fetch_one(self, sql: Any, values: Any) -> Any:
        return self._connection.execute(sql, values).fetchone()

    def write_one(self, sql: Any, values: Any) -> Any:
        cursor = self._connection.execute(sql, values)
        return None if cursor.description is None else cursor.fetchone()

    def write(self, work: Callable[[Any], Any]) -> Any:
        return work(self._connection)

    def update(self, task_id: str) -> AsyncRouteTask:
        """Write the progress of a task."""
        task: AsyncRouteTask | None = self.store.update(task_id, RUNNING, {"progress": 5.0})
        assert task is not None
        return task

    def commit(self) -> None:
        self._connection.commit()

    def roll_back(self) -> None:
        self._connection.rollback()

    def close(self) -> None:
        """Do nothing: the fixture closes the store."""


OpenOne = Callable[[], OpenTransaction]


@pytest.fixture
def open_transaction(make_postgresql_store: NewStore, postgresql_url: str) -> OpenOne:
    """Return ``open_transaction()``, which opens a transaction of a further process."""

    def begin() -> OpenTransaction:
        store: Any = make_postgresql_store()
        store.open()
        store.close()
        return OpenTransaction(store, postgresql_url)

    return begin


def waits_for_lock(url: str) -> bool:
    """Return whether a connection to the database waits for a lock."""
    with engine_of(url).connect() as connection:
        found = connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND datname = current_database()"
            )
        )
    return bool(found)


# Writes while another write is not committed


WRITES: dict[str, Callable[[SharedTaskStore], Any]] = {
    "add": lambda store: add(store, "new") or True,
    "add with a key": lambda store: (
        store.add(new_task("new"), b"", None, (), StartKey("key", "f"), 100) or True
    ),
    "add with a unique key": lambda store: (
        store.add(new_task("new", unique_key="new"), b"", None, (), StartKey("key", "f"), 100)
        or True
    ),
    "add with grants": lambda store: (
        store.add(new_task("new", **SHARED), b"", None, [("groups", "g")]) or True
    ),
    "claim": lambda store: store.claim("waiting", "me", T0),
    "claim with grants": lambda store: store.claim("shared", "me", T0),
    "progress": lambda store: store.update("running", RUNNING, {"progress": 1.0}),
    "events": lambda store: store.add_events("running", RUNNING, [ViewEvent("e", b"1", 1)]),
    "finish": lambda store: store.update("running", RUNNING, END),
    "finish with a unique key": lambda store: store.update("unique", RUNNING, END),
    "stop": lambda store: store.update("running", RUNNING, STOP),
    "requeue": lambda store: store.update("running", RUNNING, REQUEUE),
    "delete": lambda store: store.delete("ended", ENDED),
    "claim a callback": lambda store: store.outbox.claim("me", T0, 1),
    "redeliver a callback": lambda store: store.outbox.redeliver("ended", {}),
    "write a value": lambda store: store.write_value("key", b"1", None),
}


@pytest.fixture
def prepared(stores: tuple[SharedTaskStore, SharedTaskStore]) -> SharedTaskStore:
    """Return a store with a task for each of `WRITES`, and a running task that none of them
    changes.
    """
    store = stores[0]
    add(store, "waiting")
    store.add(new_task("shared", **SHARED), b"", None, [("groups", "g")])
    add(store, "running", "open", is_claimed=True)
    store.add(new_task("unique", unique_key="unique"), b"", None, ())
    assert store.claim("unique", "me", T0) is not None
    store.add(new_task("ended", **CALLBACK), b"", None, (), delivery=DELIVERY)
    assert store.claim("ended", "me", T0) is not None
    assert store.update("ended", RUNNING, END) is not None
    return store


@pytest.mark.parametrize("name", WRITES)
def test_a_write_does_not_wait_for_the_commit_of_another_write(
    prepared: SharedTaskStore, open_transaction: OpenOne, name: str
) -> None:
    with open_transaction() as write:
        write.update("open")
        assert Thread(lambda: WRITES[name](prepared)).result(5)
        write.commit()
    task = prepared.get("open")
    assert task is not None and task.progress == 5.0


# Reads while a write is not committed


READS: dict[str, Callable[[SharedTaskStore, int], list[int]]] = {
    "changes_since": lambda store, since: [
        task.change for task in store.changes_since(since).tasks
    ],
    "events": lambda store, since: [event.change for event in store.events(since, 9).events],
    "events of a task": lambda store, since: [
        event.change for event in store.events(since, 9, "high").events
    ],
}


@pytest.mark.parametrize("is_committed", [True, False])
@pytest.mark.parametrize("name", READS)
def test_a_read_waits_for_earlier_writes_and_returns_all_in_order(
    stores: tuple[SharedTaskStore, SharedTaskStore], open_transaction: OpenOne,
    postgresql_url: str, name: str, is_committed: bool,
) -> None:  # fmt: skip
    store, other = stores
    add(store, "low", "high", is_claimed=True)
    since = store.newest()
    with open_transaction() as write:
        low = write.update("low")
        high = other.update("high", RUNNING, {"progress": 1.0})
        assert high is not None and low.change < high.change
        read = Thread(lambda: READS[name](other, since))
        eventually_true(lambda: waits_for_lock(postgresql_url) or not read.is_alive())
        assert read.is_alive(), "the read waits for the open transaction"
        write.commit() if is_committed else write.roll_back()
    expected = [high.change]
    if is_committed and name != "events of a task":
        expected = [low.change, high.change]
    assert read.result() == expected


@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"delete", "write a value"}))
def test_news_waits_for_every_kind_of_write(
    prepared: SharedTaskStore, open_transaction: OpenOne, postgresql_url: str, name: str
) -> None:
    """Removals and shared values are not reported as changes."""
    since = prepared.newest()
    with open_transaction() as write:
        assert WRITES[name](write.store)
        read = Thread(lambda: prepared.changes_since(since))
        eventually_true(lambda: waits_for_lock(postgresql_url) or not read.is_alive())
        assert read.is_alive(), "the read waits for the open transaction"
        write.commit()
    news = read.result()
    assert list(news.sent) == (["running"] if name == "events" else [])
    assert len(news.tasks) == (name != "events")
    assert news.change == prepared.newest() == prepared.last_assigned() > since


def test_the_newest_number_is_returned_when_all_writes_up_to_it_have_ended(
    stores: tuple[SharedTaskStore, SharedTaskStore], open_transaction: OpenOne, postgresql_url: str
) -> None:
    store, other = stores
    add(store, "low", "high", is_claimed=True)
    since = store.newest()
    with open_transaction() as write:
        low = write.update("low")
        assert Thread(other.last_assigned).result() == low.change, "this does not wait"
        newest = Thread(other.newest)
        eventually_true(lambda: waits_for_lock(postgresql_url) or not newest.is_alive())
        assert newest.is_alive(), "the read waits for the open transaction"
        later = Thread(lambda: store.update("high", RUNNING, {"progress": 1.0}))
        write.commit()
    assert newest.result() == low.change
    high = later.result()
    assert high is not None and high.change > low.change
    found = []
    while (news := other.changes_since(since)).tasks:
        found += [task.id for task in news.tasks]
        since = news.change
    assert found == ["low", "high"]


def test_an_open_write_of_another_namespace_delays_no_read(
    prepared: SharedTaskStore, make_postgresql_store: NewStore, open_transaction: OpenOne
) -> None:
    """The numbers of all namespaces come from one sequence."""
    other = make_postgresql_store("other")
    other.open()
    add(other, "theirs")
    with open_transaction() as write:
        task = write.update("open")
        news = Thread(lambda: other.changes_since(0)).result(5)
        assert news.change >= task.change
        assert [task.id for task in news.tasks] == ["theirs"]


# Two writes to one task


def test_the_later_of_two_writes_to_a_task_has_the_higher_number(
    stores: tuple[SharedTaskStore, SharedTaskStore],
) -> None:
    rounds = 200
    add(stores[0], "task", is_claimed=True)
    barrier = threading.Barrier(2, timeout=PATIENCE)
    ended = threading.Event()
    first = stores[0].get("task")
    assert first is not None

    def write(store: SharedTaskStore, side: int) -> list[AsyncRouteTask]:
        written = []
        for number in range(rounds):
            barrier.wait()
            task = store.update("task", RUNNING, {"progress": number / 10 + side * 50})
            assert task is not None
            written.append(task)
        return written

    def poll() -> list[int]:
        found = []
        while not ended.is_set():
            task = stores[1].get("task")
            assert task is not None
            found.append(task.change)
        return found

    poller = Thread(poll)
    writers = [Thread(lambda side=side: write(stores[side], side)) for side in (0, 1)]
    try:
        written = [task for writer in writers for task in writer.result(60)]
    finally:
        ended.set()
    found = poller.result()
    assert found == sorted(found)
    # The revision counts the changes of the task in the order of the commits.
    written.sort(key=lambda task: task.revision)
    assert [task.revision for task in written] == list(
        range(first.revision + 1, first.revision + 1 + 2 * rounds)
    )
    changes = [task.change for task in written]
    assert changes == sorted(set(changes)) and changes[0] > first.change
    assert stores[0].get("task") == written[-1]


# Removal of a task while its callback changes


class Pause:
    """Pauses transactions of a store after one of their statements."""

    def __init__(self, store: Any, statement: str) -> None:
        self.is_reached = threading.Event()
        self._may_continue = threading.Event()
        self._statement = statement
        self._write = store._database.write
        store._database.write = self._write_with_pause

    def end(self) -> None:
        self._may_continue.set()

    def _write_with_pause(self, work: Callable[[Any], Any]) -> Any:
        return self._write(lambda cursor: work(_Cursor(cursor, self)))

    def after(self, statement: str) -> None:
        if statement == self._statement:
            self.is_reached.set()
            assert self._may_continue.wait(PATIENCE)


class _Cursor:
    def __init__(self, cursor: Any, pause: Pause) -> None:
        self._cursor = cursor
        self._pause = pause

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        result = self._cursor.execute(statement, parameters)
        self._pause.after(statement)
        return result


CALLBACK_WRITES: dict[str, Callable[[SharedTaskStore], Any]] = {
    "claim": lambda store: store.outbox.claim("sender", T0, 1),
    "retry": lambda store: store.outbox.record_attempt("task", "sender", "NotStarted", T0),
    "finish": lambda store: store.outbox.record_attempt("task", "sender", "Completed", None),
    "redeliver": lambda store: store.outbox.redeliver("task", {}),
}


@pytest.mark.parametrize("paused_after", ["task", "callback"])
@pytest.mark.parametrize("name", CALLBACK_WRITES)
def test_a_callback_may_change_while_its_task_is_removed(
    new_database: str, name: str, paused_after: str
) -> None:
    """For example, a purge removes a task while its callback is sent. Neither write fails, and
    there is no deadlock, which would delay both by a second.
    """
    with open_store(new_database) as store, open_store(new_database) as other:
        store.add(new_task(**CALLBACK), b"", None, (), delivery=DELIVERY)
        assert store.claim("task", "me", T0) is not None
        assert store.update("task", RUNNING, END) is not None
        if name in ("retry", "finish"):
            assert store.outbox.claim("sender", T0, 1)
        sql = other._sql
        pause = Pause(
            other, sql.delete_task(ENDED) if paused_after == "task" else sql.delete_callback
        )
        removal = Thread(lambda: other.delete("task", ENDED))
        assert pause.is_reached.wait(PATIENCE)
        change = Thread(lambda: CALLBACK_WRITES[name](store))
        try:
            eventually_true(lambda: waits_for_lock(new_database) or not change.is_alive())
        finally:
            pause.end()
        assert removal.result() == "work"
        assert not change.result(), "the task is removed first"
        assert store.get("task") is None
    assert deadlocks(new_database) == 0


# Many writers and readers


KINDS = [
    *("add", "claim", "send_events", "finish") * 2, "add_with_key", "add_unique", "progress", "stop",
    "release", "requeue", "delete", "send_callbacks", "redeliver", "write_value",
]  # fmt: skip
"""The methods of `Writer` that write, by frequency."""


class Writer:
    """Makes random writes to the tasks that all writers share."""

    def __init__(self, store: SharedTaskStore, number: int, ids: list[str]) -> None:
        self._store = store
        self._name = f"worker-{number}"
        self._random = Random(number)
        self._ids = ids
        self._numbers = itertools.count(1)
        self.sent: dict[int, str] = {}  # Change numbers of view events, with their task.
        self.done = dict.fromkeys(KINDS, 0)  # The number of successful writes of each kind.

    def run(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            name = self._random.choice(KINDS)
            self.done[name] += bool(getattr(self, name)())

    def add(self, key: StartKey | None = None, unique_key: str | None = None) -> bool:
        task_id = f"{self._name}-{next(self._numbers)}"
        fields: dict[str, Any] = {"sse_group": "g", "on_loss": "restart", "unique_key": unique_key}
        delivery = None
        grants: list[tuple[str, str]] = []
        if self._random.random() < 0.3:
            fields |= CALLBACK
            delivery = DELIVERY
        if self._random.random() < 0.3:
            fields |= SHARED
            grants = [("groups", "g")]
        self._store.add(
            new_task(task_id, **fields), b"{}", None, grants, key=key, delivery=delivery
        )
        self._ids.append(task_id)
        return True

    def add_with_key(self) -> bool:
        with suppress(KeyTaken):
            return self.add(StartKey(f"key-{self._random.randrange(50)}", "f"))
        return False

    def add_unique(self) -> bool:
        key = StartKey(f"key-{self._random.randrange(50)}", "f")
        with suppress(KeyTaken, UniqueTaken):
            is_plain = self._random.random() < 0.5
            return self.add(None if is_plain else key, f"unique-{self._random.randrange(10)}")
        return False

    def claim(self) -> bool:
        return self._store.claim(self._id(), self._name, T0) is not None

    def send_events(self) -> bool:
        task = self._store.get(self._id())
        if task is None:
            return False
        events = [ViewEvent("e", b"1", next(self._numbers)) for _ in range(2)]
        expect = Expect((State.RUNNING,), epoch=task.epoch)
        changes = self._store.add_events(task.id, expect, events)
        self.sent.update(dict.fromkeys(changes or (), task.id))
        return bool(changes)

    def progress(self) -> bool:
        return self._update({"progress": self._random.random() * 100})

    def finish(self) -> bool:
        return self._update(END)

    def stop(self) -> bool:
        return self._update(STOP)

    def release(self) -> bool:
        expect = Expect((State.ABORTED,), stopping=True)
        return self._store.update(self._id(), expect, {"stopping": False}) is not None

    def requeue(self) -> bool:
        return self._update(REQUEUE)

    def delete(self) -> bool:
        return self._store.delete(self._id(), ENDED) is not None

    def send_callbacks(self) -> bool:
        claimed = self._store.outbox.claim(self._name, T0, 2)
        for due in claimed:
            state = self._random.choice(["Completed", "NotStarted"])
            due_us = T0 if state == "NotStarted" else None
            self._store.outbox.record_attempt(due.task.id, self._name, state, due_us)
        return bool(claimed)

    def redeliver(self) -> bool:
        return self._store.outbox.redeliver(self._id(), {}) is not None

    def write_value(self) -> bool:
        key = f"key-{self._random.randrange(5)}"
        return self._store.write_value(key, self._random.choice([b"1", None]), None)

    def _update(self, values: dict[str, Any]) -> bool:
        return self._store.update(self._id(), Expect((State.RUNNING,)), values) is not None

    def _id(self) -> str:
        ids = self._ids[-100:]
        return self._random.choice(ids) if ids else "unknown"


class Reader:
    """Reads all changes from the beginning, until it has read those up to ``end``."""

    def __init__(self, store: SharedTaskStore) -> None:
        self._store = store
        self.end: int | None = None
        self.tasks: dict[str, AsyncRouteTask] = {}
        self.sent: set[str] = set()
        self.events: list[Event] = []

    def read_news(self) -> None:
        since = 0
        while self.end is None or since < self.end:
            news = self._store.changes_since(since)
            changes = [task.change for task in news.tasks]
            assert changes == sorted(set(changes)) and news.change >= since
            assert all(since < change <= news.change for change in changes)
            since = news.change
            self.tasks |= {task.id: task for task in news.tasks}
            self.sent |= set(news.sent)

    def read_events(self) -> None:
        since = 0
        while self.end is None or since < self.end:
            page = self._store.events(since, 50)
            changes = [event.change for event in page.events]
            assert changes == sorted(set(changes)) and page.change >= since
            assert all(since < change <= page.change for change in changes)
            since = page.change
            self.events += page.events

    def read_newest(self) -> None:
        newest = 0
        while self.end is None or newest < self.end:
            found = self._store.newest()
            assert newest <= found <= self._store.last_assigned()
            newest = found


def deadlocks(url: str) -> int:
    """Return the number of deadlocks in a database whose connections are all closed.

    A server process reports its deadlocks at the latest when its connection is closed.
    """
    with engine_of(url).connect() as plain:
        connection = plain.execution_options(isolation_level="AUTOCOMMIT")
        others = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND "
            "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        eventually_true(lambda: connection.scalar(others) == 0)
        found = connection.scalar(
            text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        )
    return int(found or 0)


def assert_all_was_read(
    remaining: Collection[AsyncRouteTask], sent: dict[int, str], news: Reader, events: Reader
) -> None:
    """Check that the readers have read the last change of each remaining task."""
    assert {task.id: news.tasks[task.id].change for task in remaining} == {
        task.id: task.change for task in remaining
    }
    ids = {task.id for task in remaining}
    sent = {change: task_id for change, task_id in sent.items() if task_id in ids}
    assert sent and set(sent.values()) <= news.sent
    of_views = {event.change: event.task.id for event in events.events if event.name == "e"}
    assert sent.items() <= of_views.items()
    # Later events replace the state.
    states = {event.task.id: event.task.state for event in events.events if is_state(event)}
    assert {task_id: states[task_id] for task_id in ids} == {
        task.id: task.state for task in remaining
    }


def is_state(event: Event) -> bool:
    return event.name == STATE and event.data is None


def done_by(writers: Sequence[Writer]) -> dict[str, int]:
    """Return how many writes of each kind have succeeded."""
    return {name: sum(writer.done[name] for writer in writers) for name in KINDS}


def run_all(writers: Sequence[Writer], readers: Sequence[Reader], seconds: float) -> None:
    """Run all writers and readers at the same time, until the readers have read all changes.

    On a busy machine the writers run for longer, until each kind of write has succeeded.
    """
    reads = [readers[0].read_news, readers[1].read_events, readers[2].read_newest]
    reading = [Thread(read) for read in reads]
    least = time.monotonic() + seconds
    most = least + 6 * PATIENCE

    def goes_on() -> bool:
        now = time.monotonic()
        return now < least or (now < most and not all(done_by(writers).values()))

    writing = [Thread(lambda writer=writer: writer.run(goes_on)) for writer in writers]
    try:
        for thread in writing:
            thread.result(seconds + 7 * PATIENCE)
    finally:
        end = readers[0]._store.newest()
        for reader in readers:
            reader.end = end
    for thread in reading:
        thread.result(30)


def test_concurrent_writers_and_readers_lose_no_change_and_cause_no_deadlock(
    new_database: str,
) -> None:
    with open_store(new_database) as one, open_store(new_database) as two:
        ids: list[str] = []
        writers = [Writer((one, two)[number % 2], number, ids) for number in range(8)]
        readers = [Reader(two) for _ in range(3)]
        run_all(writers, readers, 5.0)
        remaining = one.query((), NEWEST_FIRST, len(ids), None, None)
        sent = {change: task_id for writer in writers for change, task_id in writer.sent.items()}
        assert_all_was_read(remaining, sent, readers[0], readers[1])
        held = {
            task.unique_key: task.id
            for task in remaining
            if task.unique_key and not task.is_completed
        }
        for key in (f"unique-{number}" for number in range(10)):
            found = one.started_with(key)
            assert held.get(key) == (None if found is None else found[0].id)
    done = done_by(writers)
    assert all(done.values()), f"each kind of write has succeeded: {done}"
    assert deadlocks(new_database) == 0


# The last number of the sequence


def test_the_first_change_of_a_database_is_read(new_database: str) -> None:
    """The sequence has no last number before its first use."""
    with open_store(new_database) as store:
        newest = store.newest()
        assert (newest, store.last_assigned(), store.changes_since(-1).change) == (0, 0, 0)
        add(store, "first")
        assert (store.newest(), store.last_assigned()) == (1, 1)
        assert [task.id for task in store.changes_since(newest).tasks] == ["first"]
        assert [event.task.id for event in store.events(newest, 9).events] == ["first"]


def test_all_tasks_are_read_after_the_database_was_restored(new_database: str) -> None:
    """The sequence of an older copy of the database assigns the same numbers again."""
    with open_store(new_database) as store:
        add(store, "one", "two")
        copied = store.newest()
        add(store, "lost", "also-lost")
        since = store.newest()
        with engine_of(new_database).begin() as connection:
            connection.execute(text(f"DELETE FROM asyncroute_tasks WHERE change > {copied}"))
            connection.execute(text(f"SELECT setval('asyncroute_namespaces_change_seq', {copied})"))
        news = store.changes_since(since)
        assert [task.id for task in news.tasks] == ["one", "two"]
        assert news.change == store.newest() == store.last_assigned() == copied
        add(store, "new")
        assert [task.id for task in store.changes_since(news.change).tasks] == ["new"]


def test_a_transaction_of_a_frozen_process_ends(
    stores: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its lock would block all other processes until TCP notices."""
    one, two = stores
    one.add(new_task("task"), b"", None, ())
    quick = one._sql.get_locked_task.replace("'10000'", "'200'")
    assert quick != one._sql.get_locked_task
    which = {"ns": one._ns, "task_id": "task"}
    with engine_of(one._database._engine.url).connect() as frozen:
        frozen.exec_driver_sql(quick, which)
        newest = two.newest()
        assert two.claim("task", "me", T0).task.change > newest
        frozen.invalidate()


def test_a_frozen_process_does_not_keep_a_unique_key(stores: tuple[Any, Any]) -> None:
    """Otherwise the route could not be used until TCP notices."""
    one, two = stores
    quick = one._sql.add_unique_key.replace("'10000'", "'200'")
    assert quick != one._sql.add_unique_key
    values = {"ns": one._ns, "unique_key": "unique", "id": "frozen"}
    with engine_of(one._database._engine.url).connect() as frozen:
        assert frozen.exec_driver_sql(quick, values).fetchone() is not None
        two.add(new_task("task", unique_key="unique"), b"", None, ())
        frozen.invalidate()


def test_a_start_waits_for_the_transaction_that_holds_its_unique_key(
    stores: tuple[Any, Any], postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After its commit the key is taken, after its rollback it is free, and without an end the
    store is busy, but not broken.
    """
    one, two = stores
    values = {"ns": one._ns, "unique_key": "unique", "id": "open"}

    def start(number: int) -> Thread:
        task = new_task(f"task-{number}", unique_key="unique")
        thread = Thread(lambda: two.add(task, b"", None, ()))
        eventually_true(lambda: waits_for_lock(postgresql_url))
        return thread

    with engine_of(postgresql_url).connect() as transaction:
        transaction.exec_driver_sql(one._sql.add_unique_key, values)
        with pytest.raises(StoreUnavailable, match="same unique key") as raised:
            start(1).result()
        assert raised.value.retry_after == 5
        assert caplog.records == []
        rolled_back = start(2)
        transaction.rollback()
        rolled_back.result()
        assert two.update("task-2", Expect((State.NOT_STARTED,)), END) is not None
        transaction.exec_driver_sql(one._sql.add_unique_key, values)
        committed = start(3)
        transaction.commit()
        with pytest.raises(UniqueTaken):
            committed.result()
    assert two.get("task-3") is None


def test_only_the_wait_for_a_unique_key_is_short(stores: tuple[Any, Any]) -> None:
    """The other locks of a start are waited for as in every write."""
    store = stores[0]
    values = {"ns": store._ns, "unique_key": "unique", "id": "task"}

    def lock_timeout(cursor: Any) -> str:
        before = cursor.execute("SHOW lock_timeout").fetchone()[0]
        assert cursor.execute(store._sql.add_unique_key, values).fetchone() is not None
        after: str = cursor.execute("SHOW lock_timeout").fetchone()[0]
        assert before == after
        return after

    assert store._database.write(lock_timeout) != "5s"


def test_closed_connections_are_not_taken_for_own_ones(
    stores: tuple[Any, Any], postgresql_url: str
) -> None:
    """The server may assign the number of their process to a client of another process."""
    database = stores[0]._database
    stores[0].get("task")
    assert len(database._own_pids) >= 1
    database._engine.dispose()
    eventually_true(lambda: not len(database._own_pids))
