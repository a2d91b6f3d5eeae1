"""Notifications of stores: for every write while a process asks for them, else only for stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.stores.base import Expect, SharedTaskStore, StartKey, ViewEvent
from flask_asyncroute.stores.sql.statements import CHANNEL
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.databases import SHARED, engine_of

NewStore = Callable[..., SharedTaskStore]
NewTask = Callable[..., AsyncRouteTask]
Eventually = Callable[..., Any]
Write = Callable[[SharedTaskStore], Any]
RUNNING = Expect((State.RUNNING,), "me", 1)
STOP: dict[str, Any] = {"state": State.ABORTED, "completed_us": 5, "stopping": True}
END: dict[str, Any] = {"state": State.COMPLETED, "completed_us": 5}
REQUEUE: dict[str, Any] = {"state": State.NOT_STARTED, "owner": None, "started_us": None}


def update(task_id: str, values: dict[str, Any]) -> Write:
    return lambda store: store.update(task_id, RUNNING, values)


def add_events(store: SharedTaskStore) -> Any:
    return store.add_events("events", RUNNING, [ViewEvent("step", b"1", 1)])


ORDINARY: dict[str, Write] = {
    "claim": lambda store: store.claim("new", "me", 1),
    "progress": update("progress", {"progress": 1.0}),
    "events": add_events,
    "finish": update("finish", END),
}
URGENT: dict[str, Write] = {
    "stop": update("stop", STOP),
    "requeue": update("requeue", REQUEUE),
}


class Listening:
    """Two stores of two processes, and a connection that receives all notifications."""

    def __init__(self, one: SharedTaskStore, two: SharedTaskStore, url: str) -> None:
        self.one = one
        self.two = two
        self._url = url
        row = one._database.fetch_one("SELECT min(key) AS key FROM asyncroute_namespaces", {})  # type: ignore[attr-defined]
        self._payload = str(row.key)

    def is_notified_by(self, write: Write) -> bool:
        """Return whether a write sends a notification.

        PostgreSQL delivers notifications in the order of the commits, so the last one is a mark.
        """
        with engine_of(self._url).connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.autocommit = True
            driver.execute(f"LISTEN {CHANNEL}")
            assert write(self.two)
            driver.execute(f"NOTIFY {CHANNEL}, 'mark'")
            payloads = []
            for notification in driver.notifies(timeout=10):
                payloads.append(notification.payload)
                if payloads[-1] == "mark":
                    break
            driver.autocommit = False
        assert payloads[-1] == "mark" and set(payloads) <= {self._payload, "mark"}
        return len(payloads) > 1


@pytest.fixture
def listening(
    make_postgresql_store: NewStore, postgresql_url: str, make_task: NewTask
) -> Listening:
    stores = make_postgresql_store(), make_postgresql_store()
    for store in stores:
        store.open()
    for task_id in ("new", "progress", "events", "finish", "stop", "requeue"):
        stores[1].add(make_task(task_id, on_loss="restart"), b"", None, ())
        if task_id != "new":
            assert stores[1].claim(task_id, "me", 1) is not None
    return Listening(*stores, postgresql_url)


def add(make_task: NewTask) -> Write:
    def add(store: SharedTaskStore) -> bool:
        store.add(make_task("added"), b"", None, ())
        return True

    return add


@pytest.mark.parametrize("name", ["add", *ORDINARY])
def test_an_ordinary_write_sends_no_notification(
    listening: Listening, make_task: NewTask, name: str
) -> None:
    assert not listening.is_notified_by({"add": add(make_task), **ORDINARY}[name])


@pytest.mark.parametrize("name", URGENT)
def test_a_stop_and_a_requeue_always_send_a_notification(listening: Listening, name: str) -> None:
    assert listening.is_notified_by(URGENT[name])


@pytest.mark.parametrize("name", ["add", *ORDINARY, *URGENT])
def test_every_write_sends_a_notification_while_a_process_asks_for_it(
    listening: Listening, make_task: NewTask, name: str
) -> None:
    listening.one.keep_notifying(60)
    write = {"add": add(make_task), **ORDINARY, **URGENT}[name]
    assert listening.is_notified_by(write)


def test_notifications_end_after_the_time_asked_for(
    listening: Listening, eventually: Eventually
) -> None:
    listening.one.keep_notifying(0.2)
    progress = ORDINARY["progress"]
    assert listening.is_notified_by(progress)
    eventually(lambda: not listening.is_notified_by(progress))
    assert listening.is_notified_by(URGENT["stop"])


def test_notifications_resume_when_a_process_asks_again(listening: Listening) -> None:
    progress = ORDINARY["progress"]
    listening.one.keep_notifying(0)
    assert not listening.is_notified_by(progress)
    listening.one.keep_notifying(60)
    assert listening.is_notified_by(progress)


def test_keep_notifying_does_not_affect_other_namespaces(
    listening: Listening, make_postgresql_store: NewStore
) -> None:
    other = make_postgresql_store("other")
    other.open()
    other.keep_notifying(60)
    assert not listening.is_notified_by(ORDINARY["progress"])


def test_a_listener_is_notified_of_every_kind_of_write_by_another_process(
    make_postgresql_store: NewStore, make_task: NewTask, eventually: Eventually
) -> None:
    ours, store = make_postgresql_store(), make_postgresql_store()
    for each in (ours, store):
        each.open()
    ours.keep_notifying(60)
    notified = threading.Event()
    listener = ours.listen(notified.set)
    assert listener is not None
    try:
        eventually(notified.is_set)
        for write in (
            lambda: store.add(make_task(), b"", None, ()),
            lambda: store.claim("task", "me", 1),
            lambda: store.update("task", RUNNING, {"progress": 1.0}),
            lambda: store.add_events("task", RUNNING, [ViewEvent("step", b"1", 1)]),
            lambda: store.update("task", RUNNING, END),
        ):
            notified.clear()
            write()
            eventually(notified.is_set)
    finally:
        listener.close()


def test_a_new_task_with_a_start_time_notifies_all_processes(
    make_postgresql_store: NewStore, make_task: NewTask, eventually: Eventually
) -> None:
    """Also with rows in other tables, and if no process has asked for notifications."""
    ours, store = make_postgresql_store(), make_postgresql_store()
    other = make_postgresql_store("other")
    for each in (ours, store, other):
        each.open()
    changed, delayed, elsewhere = (threading.Event() for _ in range(3))
    listeners = [
        ours.listen(changed.set, delayed=delayed.set),
        other.listen(lambda: None, delayed=elsewhere.set),
    ]
    try:
        for event in (changed, delayed, elsewhere):
            eventually(event.is_set)
        for task in (make_task("plain", start_at_us=1), make_task("keyed", start_at_us=1)):
            for event in (changed, delayed, elsewhere):
                event.clear()
            key = StartKey("k" * 64, "f" * 64) if task.id == "keyed" else None
            store.add(make_task(f"without {task.id}"), b"", None, ())
            assert not delayed.is_set()
            store.add(task, b"", None, (), key)
            eventually(delayed.is_set)
            assert not changed.is_set() and not elsewhere.is_set()
    finally:
        for listener in listeners:
            assert listener is not None
            listener.close()


@SHARED
def test_keep_notifying_changes_no_task(store: SharedTaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"", None, ())
    before = store.newest(), store.get("task")
    store.keep_notifying(60)
    assert (store.newest(), store.get("task")) == before
