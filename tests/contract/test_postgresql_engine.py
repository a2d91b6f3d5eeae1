"""A store with an Engine of the app: it gets each connection back as it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from flask_asyncroute.errors import IdTaken, StoreUnavailable
from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.stores.base import Expect, ViewEvent
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql import postgresql
from flask_asyncroute.stores.sql.postgresql import EngineDatabase
from flask_asyncroute.task import AsyncRouteTask, State

NewTask = Callable[..., AsyncRouteTask]
RUNNING = Expect((State.RUNNING,), "me", 1)
END: dict[str, Any] = {"state": State.COMPLETED, "completed_us": 5}
SHARED = {"permission_json": msgspec.json.encode(Permission(Access(groups=("g",))))}
LEVELS: dict[str, dict[str, Any]] = {
    "default": {},
    "autocommit": {"isolation_level": "AUTOCOMMIT"},
    "read committed": {"isolation_level": "READ COMMITTED"},
    "serializable": {"isolation_level": "SERIALIZABLE"},
}


@pytest.fixture(params=LEVELS)
def engine(request: pytest.FixtureRequest, postgresql_url: str) -> Iterator[Engine]:
    """Return an Engine with one connection, so that the app and the store share it."""
    made = create_engine(
        postgresql_url, pool_size=1, max_overflow=0, pool_timeout=5, **LEVELS[request.param]
    )
    yield made
    made.dispose()


@pytest.fixture
def store(engine: Engine) -> Iterator[Any]:
    store = make_store(engine, "", "test", True)
    store.open()
    yield store
    store.close()


def state(engine: Engine) -> tuple[Any, ...]:
    """Return the settings of the pooled connection, and its process on the server."""
    lent = engine.raw_connection()
    try:
        driver: Any = lent.driver_connection
        return (
            driver.autocommit, driver.isolation_level, driver.read_only, driver.deferrable,
            driver.info.transaction_status, driver.info.backend_pid,
        )  # fmt: skip
    finally:
        lent.close()


def test_all_calls_leave_the_connection_as_it_was(
    engine: Engine, store: Any, make_task: NewTask
) -> None:
    before = state(engine)
    assert before[4] == TransactionStatus.IDLE
    calls: list[Callable[[], Any]] = [
        lambda: store.add(make_task("plain"), b"{}", None, ()),
        lambda: store.add(make_task("shared", **SHARED), b"{}", None, [("groups", "g")]),
        lambda: store.get("plain"),
        lambda: store.get("unknown"),
        lambda: store.claim("plain", "me", 1),
        lambda: store.claim("plain", "me", 1),
        lambda: store.claim("shared", "me", 1),
        lambda: store.add_events("plain", RUNNING, [ViewEvent("e", b"1", 1)]),
        lambda: store.update("plain", RUNNING, {"progress": 1.0}),
        lambda: store.update("plain", RUNNING, END),
        lambda: store.update("plain", RUNNING, END),
        lambda: store.update("shared", RUNNING, END),
        lambda: store.query((), NEWEST_FIRST, 9, None, None),
        lambda: store.changes_since(0),
        lambda: store.events(0, 9),
        lambda: store.keep_notifying(1),
        lambda: store.write_value("key", b"1", None),
        lambda: store.delete("plain", Expect(tuple(State))),
    ]
    for number, call in enumerate(calls):
        call()
        assert state(engine) == before, number
    assert store.get("shared").state is State.COMPLETED
    assert store.get("plain") is None


@pytest.mark.parametrize("kind", ["plain", "shared"])
def test_a_taken_id_leaves_the_connection_as_it_was(
    engine: Engine, store: Any, make_task: NewTask, kind: str
) -> None:
    fields = SHARED if kind == "shared" else {}
    grants = [("groups", "g")] if kind == "shared" else []
    store.add(make_task("task", **fields), b"{}", None, grants)
    before = state(engine)
    newest = store.newest()
    with pytest.raises(IdTaken):
        store.add(make_task("task", **fields), b"{}", None, grants)
    assert state(engine) == before
    assert not store.changes_since(newest).tasks, "the failed statement reports no change"


@pytest.mark.parametrize("method", ["fetch_one", "fetch_all", "write_one"])
def test_an_error_of_a_statement_leaves_the_connection_as_it_was(
    engine: Engine, store: Any, method: str
) -> None:
    before = state(engine)
    with pytest.raises(StoreUnavailable):
        getattr(store._database, method)("SELECT 1 / 0", {})
    assert state(engine) == before


def test_a_connection_is_replaced_if_a_call_is_interrupted(
    engine: Engine, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption may leave the response to a statement unread."""
    before = state(engine)

    class Interruption(BaseException):
        pass

    def interrupt(cursor: Any, *arguments: Any, **options: Any) -> Any:
        cursor.connection.pgconn.send_query(b"SELECT pg_sleep(0.1)")
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Cursor, "execute", interrupt)
        with pytest.raises(Interruption):
            store.get("task")
    assert store.get("task") is None
    after = state(engine)
    assert (after[0], after[4]) == (before[0], before[4])
    assert after[5] != before[5], "another connection"


def test_a_transaction_of_the_app_can_be_rolled_back_after_calls_of_the_store(
    postgresql_url: str, make_task: NewTask
) -> None:
    engine = create_engine(postgresql_url, pool_size=1, max_overflow=0, pool_timeout=5)
    store = make_store(engine, "", "test", True)
    store.open()
    try:
        store.add(make_task(), b"{}", None, ())
        with pytest.raises(IdTaken):
            store.add(make_task(), b"{}", None, ())
        with engine.connect() as connection:
            connection.execute(text("DELETE FROM asyncroute_tasks"))
            connection.rollback()
        assert store.get("task") is not None
    finally:
        store.close()
        engine.dispose()


@pytest.fixture
def clock_database(postgresql_url: str) -> Iterator[EngineDatabase]:
    made = EngineDatabase(create_engine(postgresql_url), is_owned=True)
    yield made
    made.close()


@pytest.mark.covers("F49")
def test_a_change_of_the_clock_of_the_server_is_found_by_the_next_measurement(
    clock_database: EngineDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = clock_database.now_us()
    monkeypatch.setattr(postgresql, "NOW", f"{postgresql.NOW} + 3600000000")
    assert clock_database.now_us() < before + 60_000_000, "it was measured less than 30 s ago"
    real = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: real + postgresql.CLOCK_SECONDS + 1)
    assert clock_database.now_us() > before + 3_500_000_000


def test_the_clock_of_the_server_is_measured_at_most_every_30_seconds(
    clock_database: EngineDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[str] = []
    fetch = clock_database.fetch_one

    def fetch_one(sql: str, values: Any) -> Any:
        queries.append(sql)
        return fetch(sql, values)

    monkeypatch.setattr(clock_database, "fetch_one", fetch_one)
    found = [clock_database.now_us() for _ in range(1000)]
    assert found == sorted(found)
    assert len(queries) == postgresql.MEASUREMENTS


def test_the_clock_of_a_server_that_is_unavailable_goes_on(
    clock_database: EngineDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sql: str, values: Any) -> Any:
        raise StoreUnavailable("no server", retry_after=1)

    with monkeypatch.context() as patched:
        patched.setattr(clock_database, "fetch_one", refuse)
        with pytest.raises(StoreUnavailable):
            clock_database.now_us()
    before = clock_database.now_us()
    real = time.monotonic()
    monkeypatch.setattr(clock_database, "fetch_one", refuse)
    monkeypatch.setattr(time, "monotonic", lambda: real + postgresql.CLOCK_SECONDS + 1)
    assert before <= clock_database.now_us() < before + 60_000_000
