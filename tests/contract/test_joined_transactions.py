"""`SharedTaskStore.joined`: tasks that a transaction of the app adds, before and after they are
published.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from flask_asyncroute import ConfigurationError
from flask_asyncroute.callbacks.model import Delivery
from flask_asyncroute.errors import IdTaken, UniqueTaken
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.snapshot import Body
from flask_asyncroute.stores.base import Expect, Readers, SharedTaskStore
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.tasks import new_task, pairs

T0 = 1_700_000_000_000_000
ALL = 10**6
ABORTED = {"state": State.ABORTED, "completed_us": T0, "error": "x"}
NewStore = Callable[..., SharedTaskStore]


@pytest.fixture
def store(make_postgresql_store: NewStore) -> SharedTaskStore:
    made = make_postgresql_store()
    made.open()
    return made


@pytest.fixture
def engine(postgresql_url: str) -> Iterator[Engine]:
    made = create_engine(postgresql_url)
    yield made
    made.dispose()


def add(store: SharedTaskStore, engine: Engine, *tasks: AsyncRouteTask, **more: Any) -> None:
    with engine.begin() as connection:
        for task in tasks:
            store.joined(connection).add(task, b"r", None, **{"grants": (), **more})


def test_an_unpublished_task_is_not_visible_before_the_commit(
    store: SharedTaskStore, engine: Engine
) -> None:
    with engine.connect() as connection:
        store.joined(connection).add(new_task("a", user="anna"), b"r", None, ())
        assert store.get("a") is None
        assert store.unpublished(9) == []
        connection.commit()
    assert store.get("a") == new_task("a", user="anna")
    assert [task.id for task in store.unpublished(9)] == ["a"]


def test_an_unpublished_task_cannot_start(store: SharedTaskStore, engine: Engine) -> None:
    plain, delayed = new_task("plain", created_us=T0), new_task("delayed", start_at_us=T0)
    add(store, engine, plain, delayed)
    assert store.claim("plain", "me", T0 + 9) is None
    assert store.claim("delayed", "me", T0 + 9) is None
    assert store.waiting({"work": 9}, T0 + 9, T0 + 9) == []
    for name in ("plain", "delayed"):
        assert store.publish(name) is not None
    assert sorted(pairs(store.waiting({"work": 9}, T0 + 9, T0 + 9))) == [
        ("delayed", "work"), ("plain", "work"),
    ]  # fmt: skip
    claim = store.claim("plain", "me", T0 + 9)
    assert claim is not None and claim.request == b"r"
    assert store.claim("delayed", "me", T0 + 9) is not None


def test_a_task_is_published_once_with_the_next_change_number(
    store: SharedTaskStore, engine: Engine
) -> None:
    add(store, engine, new_task("a", sse_group="g"))
    before = store.newest()
    assert store.changes_since(0).tasks == []
    assert store.events(0, ALL).events == []
    published = store.publish("a")
    assert published is not None
    assert (published.change, published.revision) == (store.newest(), 1)
    assert published.change > before
    assert store.publish("a") is None
    assert store.publish("unknown") is None
    assert store.unpublished(9) == []
    assert [task.id for task in store.changes_since(before).tasks] == ["a"]
    assert [event.change for event in store.events(before, ALL).events] == [published.change]


def test_two_publish_at_once(store: SharedTaskStore, engine: Engine) -> None:
    add(store, engine, *(new_task(f"t{number}") for number in range(20)))
    published: list[Any] = []
    barrier = threading.Barrier(4)

    def publish() -> None:
        barrier.wait(20)
        published.extend(store.publish(f"t{number}") for number in range(20))

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = [task.change for task in published if task is not None]
    assert len(changes) == len(set(changes)) == 20


def test_unpublished_returns_the_oldest_first(store: SharedTaskStore, engine: Engine) -> None:
    add(store, engine, *(new_task(f"t{number}", created_us=T0 + number) for number in (3, 1, 2)))
    assert [task.id for task in store.unpublished(2)] == ["t1", "t2"]


def test_an_unpublished_task_is_found_listed_and_aborted(
    store: SharedTaskStore, engine: Engine
) -> None:
    add(store, engine, new_task("a", user="anna"))
    assert [task.id for task in store.query((), NEWEST_FIRST, 9, None, Readers("anna"))] == ["a"]
    task = store.update("a", Expect((State.NOT_STARTED,)), ABORTED)
    assert task is not None and task.change > 0
    assert store.unpublished(9) == []


def test_the_related_rows_are_added(store: SharedTaskStore, engine: Engine) -> None:
    delivery = Delivery(
        webhook_id="w", url="http://localhost/", host="localhost", method="POST",
        content_type="application/json", headers={}, event_name="e", send_result=True,
        is_trusted=True, depth=0,
    )  # fmt: skip
    body = Body([b"x" * 300_000])
    task = new_task(
        "a", permission_json=b"{}", unique_key="k" * 64, body_size=300_000, callback_json=b"{}",
        callback_state="NotStarted",
    )  # fmt: skip
    with engine.begin() as connection:
        store.joined(connection).add(task, b"r", body, [("groups", "g")], delivery)
    readers = Readers(granted=(("groups", "g"),))
    assert [task.id for task in store.query((), NEWEST_FIRST, 9, None, readers)] == ["a"]
    found = store.started_with("k" * 64)
    assert found is not None and found[0].id == "a"
    assert store.publish("a") is not None
    assert store.claim("a", "me", T0) is not None
    stored = store.body("a")
    assert stored.size == 300_000
    stored.close()
    store.update("a", Expect((State.RUNNING,)), ABORTED)
    assert store.outbox.next_due(T0) is not None
    assert store.started_with("k" * 64) is None


def test_errors_leave_the_transaction_usable(store: SharedTaskStore, engine: Engine) -> None:
    store.add(new_task("taken", unique_key="k" * 64), b"", None, ())
    with engine.begin() as connection:
        joined = store.joined(connection)
        joined.add(new_task("first", unique_key="j" * 64), b"", None, ())
        with pytest.raises(IdTaken):
            joined.add(new_task("taken", unique_key="l" * 64), b"", None, ())
        for key in ("k", "j"):
            with pytest.raises(UniqueTaken):
                joined.add(new_task("second", unique_key=key * 64), b"", None, ())
        found = joined.started_with("j" * 64)
        assert found is not None and found[0].id == "first"
        assert joined.started_with("l" * 64) is None, "the key of the failed task was rolled back"
        joined.add(new_task("third", unique_key="l" * 64), b"", None, ())
    assert sorted(task.id for task in store.unpublished(9)) == ["first", "third"]


def test_other_namespaces_do_not_publish_the_task(
    store: SharedTaskStore, engine: Engine, make_postgresql_store: NewStore
) -> None:
    other = make_postgresql_store("other")
    other.open()
    add(store, engine, new_task("a"))
    assert other.unpublished(9) == []
    assert other.publish("a") is None


def test_a_commit_notifies_listeners_of_all_processes(
    store: SharedTaskStore, engine: Engine, make_postgresql_store: NewStore,
    eventually: Callable[..., Any],
) -> None:  # fmt: skip
    """Also the process of the transaction, even if it shares its connections with the store."""
    other = make_postgresql_store("other")
    changed, submitted, elsewhere = (threading.Event() for _ in range(3))
    listeners = [
        store.listen(changed.set, submitted.set), other.listen(lambda: None, elsewhere.set),
    ]  # fmt: skip
    try:
        for event in (changed, submitted, elsewhere):
            eventually(event.is_set)
            event.clear()
        with engine.begin() as connection:
            store.joined(connection).add(new_task("a"), b"", None, ())
            assert not submitted.is_set()
            connection.rollback()
        add(store, engine, new_task("b"))
        eventually(submitted.is_set)
        assert not changed.is_set() and not elsewhere.is_set()
    finally:
        for listener in listeners:
            assert listener is not None
            listener.close()


def test_the_transaction_holds_no_lock_of_the_namespace(
    store: SharedTaskStore, engine: Engine
) -> None:
    with engine.begin() as connection:
        store.joined(connection).add(new_task("a", unique_key="k" * 64), b"", None, ())
        kinds = connection.execute(
            text("SELECT DISTINCT locktype FROM pg_locks WHERE pid = pg_backend_pid()")
        )
        assert {kind for (kind,) in kinds} <= {"relation", "virtualxid", "transactionid"}
        connection.rollback()


def test_a_sqlite_store_has_no_unpublished_tasks(make_sqlite_store: NewStore) -> None:
    store = make_sqlite_store()
    store.open()
    assert not store.has_unpublished
    assert (store.unpublished(9), store.publish("a")) == ([], None)
    with pytest.raises(ConfigurationError, match="PostgreSQL store"):
        store.joined(None)
