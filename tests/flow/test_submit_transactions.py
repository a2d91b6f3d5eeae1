"""Tasks that the app's own transaction on PostgreSQL adds: ``submit(connection=…)``."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import request
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from flask_asyncroute import (
    Access,
    AsyncRouteTask,
    Callback,
    CannotStart,
    ConfigurationError,
    Permission,
    StoreUnavailable,
    task_aborted,
    task_completed,
    task_created,
)
from flask_asyncroute.errors import CommitUnknown
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql.postgresql import EngineDatabase
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.testing import inline
from flask_asyncroute.workers.runner import Runner
from tests.support.databases import engine_of, new_postgresql_database
from tests.support.flow import Flow
from tests.support.tasks import new_task

MakeFlow = Callable[..., Flow]
Eventually = Callable[..., Any]
WAIT = 20


@pytest.fixture
def engine(postgresql_url: str) -> Iterator[Engine]:
    """Return the engine of the app, with a table ``orders`` of the app."""
    made = create_engine(postgresql_url)
    with made.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS orders (id integer PRIMARY KEY)"))
        connection.execute(text("DELETE FROM orders"))
    yield made
    made.dispose()


@pytest.fixture
def flow(make_flow: MakeFlow, postgresql_url: str) -> Flow:
    """Return an app whose process takes tasks."""
    made = make_flow(ASYNCROUTE_STORE=postgresql_url)

    @made.route("/work/<int:n>")
    def work(n: int) -> Any:
        return [n, request.get_data(as_text=True)]

    return made


def submit(flow: Flow, connection: Any, *values: Any, **options: Any) -> AsyncRouteTask:
    with flow.app.app_context():
        return flow.async_routes.submit(
            *(values or ("work", {"n": 5})), connection=connection, **options
        )


def found(flow: Flow, task_id: str) -> AsyncRouteTask | None:
    with flow.app.app_context():
        return flow.async_routes.get(task_id)


def ended(flow: Flow, task: AsyncRouteTask) -> AsyncRouteTask:
    with flow.app.app_context():
        return flow.async_routes.wait(task.id, WAIT)


def rows(engine: Engine) -> dict[str, int]:
    """Return the number of rows in each table that a task can have rows in."""
    names = [f"asyncroute_{name}" for name in ("tasks", "grants", "bodies", "keys", "callbacks")]
    with engine.connect() as connection:
        return {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in names}


def test_a_task_begins_after_the_commit(
    flow: Flow, engine: Engine, hear: Callable[..., Any], eventually: Eventually
) -> None:
    flow.async_routes.start(flow.app)
    received = hear(task_created, task_completed, sender=flow.app)
    with engine.begin() as connection:
        task = submit(flow, connection, json=[1], user="anna")
        connection.execute(text("INSERT INTO orders VALUES (1)"))
        assert (task.state, task.change, task.user) == ("NotStarted", 0, "anna")
        assert found(flow, task.id) is None
        assert received == []
    assert ended(flow, task).result == [5, "[1]"]
    eventually(lambda: len(received) == 2)
    assert [(name, one.id) for name, one in received] == [
        ("task-created", task.id), ("task-completed", task.id),
    ]  # fmt: skip
    assert received[0][1].change > 0


@pytest.mark.parametrize("executor", ["celery"])
def test_a_celery_task_is_sent_when_its_transaction_is_committed(
    make_flow: MakeFlow, postgresql_url: str, engine: Engine, executor: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The regular checks, twice a second, are not needed for it."""
    monkeypatch.setattr("flask_asyncroute.workers.broker_loop.SEND_SECONDS", 600.0)
    monkeypatch.setattr(Runner, "_publish_all", lambda runner: runner.notifier.listen())
    flow = make_flow(ASYNCROUTE_STORE=postgresql_url)
    flow.route("/work/<int:n>", endpoint="work", executor=executor)(lambda n: n)
    flow.async_routes.start(flow.app)
    for _ in range(3):
        with engine.begin() as connection:
            task = submit(flow, connection)
        assert ended(flow, task).result == 5


@pytest.mark.covers("F50")
def test_a_rollback_leaves_nothing(
    make_flow: MakeFlow, postgresql_url: str, engine: Engine, hear: Callable[..., Any]
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=postgresql_url)

    @flow.route(
        unique=True, permission=Permission(Access(groups=("g",))),
        callback=Callback(url="http://localhost/x"),
    )  # fmt: skip
    def work() -> None: ...

    flow.async_routes.start(flow.app)
    received = hear(task_created, sender=flow.app)
    with engine.connect() as connection:
        task = submit(flow, connection, "work", data=b"x" * 600_000)
        connection.execute(text("INSERT INTO orders VALUES (1)"))
        connection.rollback()
    assert set(rows(engine).values()) == {0}
    with engine.connect() as connection:
        transaction = connection.begin()
        savepoint = connection.begin_nested()
        submit(flow, connection, "work")
        savepoint.rollback()
        kept = submit(flow, connection, "work", data=b"y" * 600_000)
        transaction.commit()
    assert kept.id != task.id
    ended(flow, kept)
    assert found(flow, task.id) is None
    assert [one.id for _, one in received] == [kept.id]


@pytest.mark.covers("F50")
def test_a_client_that_is_killed_leaves_nothing(
    flow: Flow, engine: Engine, postgresql_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    """The killed process holds the unique key until PostgreSQL notices its end."""

    @flow.route("/one", unique=True)
    def one() -> Any:
        return 1

    flow.async_routes.start(flow.app)
    script = tmp_path / "submits.py"
    script.write_text(
        f"""
import sys
from flask import Flask
from sqlalchemy import create_engine
from flask_asyncroute import AsyncRoute

app = Flask({flow.app.name!r}, instance_path={str(tmp_path)!r})
app.config["ASYNCROUTE_STORE"] = {postgresql_url!r}
async_routes = AsyncRoute(app)
async_routes.route("/one", methods=["POST"], endpoint="one", unique=True)(lambda: 1)
with app.app_context(), create_engine({postgresql_url!r}).begin() as connection:
    print(async_routes.submit("one", connection=connection).id, flush=True)
    sys.stdin.read()
"""
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        task_id = process.stdout.readline().strip()
        os.kill(process.pid, signal.SIGKILL)
    assert task_id
    with flow.app.app_context():
        task = flow.async_routes.submit("one")
    assert task.id != task_id
    assert ended(flow, task).result == 1
    assert found(flow, task_id) is None


@pytest.mark.covers("F50")
def test_the_transaction_of_the_caller_survives_errors(
    make_flow: MakeFlow, postgresql_url: str, engine: Engine
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=postgresql_url)
    ids = iter(["taken", "taken", "free", *["taken"] * 10])

    @flow.route(id_generator=lambda: next(ids))
    def work() -> None: ...

    flow.async_routes.start(flow.app)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO orders VALUES (1)"))
        assert submit(flow, connection, "work").id == "taken"
        assert submit(flow, connection, "work").id == "free"
        with pytest.raises(CannotStart, match="existing ids"):
            submit(flow, connection, "work")
        with pytest.raises(ValueError, match="no method"):
            submit(flow, connection, "work", method="GET")
        connection.execute(text("INSERT INTO orders VALUES (2)"))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM orders")) == 2
    for task_id in ("taken", "free"):
        assert ended(flow, new_task(task_id)).state == "Completed"


def test_settings_of_the_callers_transaction_are_kept(flow: Flow, engine: Engine) -> None:
    @flow.route("/one", unique=True)
    def one() -> None: ...

    with engine.begin() as connection:
        names = ("lock_timeout", "idle_in_transaction_session_timeout", "statement_timeout")
        connection.execute(text("SET LOCAL lock_timeout = '123ms'"))
        before = [connection.scalar(text(f"SHOW {name}")) for name in names]
        submit(flow, connection, "one")
        assert [connection.scalar(text(f"SHOW {name}")) for name in names] == before
        connection.rollback()


def test_a_failed_statement_of_the_caller_is_raised(flow: Flow, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO orders VALUES (1)"))
        with pytest.raises(IntegrityError):
            connection.execute(text("INSERT INTO orders VALUES (1)"))
        with pytest.raises(Exception, match="transaction is aborted"):
            submit(flow, connection)


@pytest.mark.parametrize("kind", ["session", "scoped", "flask-sqlalchemy"])
def test_sessions(make_flow: MakeFlow, engine: Engine, postgresql_url: str, kind: str) -> None:
    flow = make_flow(ASYNCROUTE_STORE=postgresql_url, SQLALCHEMY_DATABASE_URI=postgresql_url)

    @flow.route("/work/<int:n>")
    def work(n: int) -> Any:
        return n

    @contextmanager
    def session() -> Iterator[Any]:
        if kind == "session":
            with Session(engine) as made:
                yield made
        elif kind == "scoped":
            made = scoped_session(sessionmaker(engine))
            # As in Flask's documentation: a teardown function ends the session of the thread.
            flow.app.teardown_appcontext(lambda error: made.remove())
            yield made
            made.remove()
        else:
            flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
            db = flask_sqlalchemy.SQLAlchemy()
            db.init_app(flow.app)
            yield db.session
            db.engine.dispose()

    with flow.app.app_context(), session() as one:
        flow.async_routes.start(flow.app)
        one.execute(text("INSERT INTO orders VALUES (1)"))
        lost = flow.async_routes.submit("work", {"n": 1}, connection=one)
        one.rollback()
        one.execute(text("INSERT INTO orders VALUES (2)"))
        task = flow.async_routes.submit("work", {"n": 2}, connection=one)
        one.execute(text("INSERT INTO orders VALUES (3)"))
        one.commit()
        assert flow.async_routes.wait(task.id, WAIT).result == 2
        assert flow.async_routes.get(lost.id) is None
        assert one.scalar(text("SELECT sum(id) FROM orders")) == 5
        one.rollback()


def test_a_view_submits_in_its_transaction(flow: Flow, engine: Engine) -> None:
    @flow.app.post("/orders/<int:n>")
    def order(n: int) -> Any:
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO orders VALUES (:n)"), {"n": n})
            return flow.async_routes.submit("work", {"n": n}, connection=connection).id

    task_id = flow.request("POST", "/orders/7").get_data(as_text=True)
    assert flow.ended(task_id)["Result"] == [7, ""]


def test_a_process_that_is_no_runner_submits(
    make_flow: MakeFlow, flow: Flow, engine: Engine, hear: Callable[..., Any],
    eventually: Eventually, separate_processes: None,
) -> None:  # fmt: skip
    """The runner that publishes the task sends ``task_created``, not the process that submits."""
    url = flow.app.config["ASYNCROUTE_STORE"]
    other = make_flow(ASYNCROUTE_STORE=url)
    other.route("/work/<int:n>", endpoint="work")(lambda n: n)
    theirs = hear(task_created, sender=other.app)
    ours = hear(task_created, sender=flow.app)
    with engine.begin() as connection:
        task = submit(other, connection)
    assert not runtime_of(other.app).runner.maintenance.is_running
    assert found(other, task.id).state == "NotStarted"  # type: ignore[union-attr]
    flow.async_routes.start(flow.app)
    assert ended(flow, task).state == "Completed"
    eventually(lambda: ours)
    assert (theirs, [one.id for _, one in ours]) == ([], [task.id])


def test_a_start_time_counts_after_the_commit_too(flow: Flow, engine: Engine) -> None:
    flow.async_routes.start(flow.app)
    with engine.begin() as connection:
        task = submit(flow, connection, start_at=0.5)
    assert task.start_at_us is not None
    done = ended(flow, task)
    assert done.started_us is not None
    assert done.started_us >= task.start_at_us


def test_a_stop_announces_and_ends_an_unpublished_task(
    flow: Flow, engine: Engine, hear: Callable[..., Any], eventually: Eventually
) -> None:
    """No process takes tasks, so nothing has published the task."""
    received = hear(task_created, task_aborted, sender=flow.app)
    with engine.begin() as connection:
        task = submit(flow, connection)
    before = found(flow, task.id)
    assert before is not None and before.change == 0
    with flow.app.app_context():
        assert flow.async_routes.stop(task.id).state == "Aborted"
    eventually(lambda: len(received) == 2)
    assert [name for name, _ in received] == ["task-created", "task-aborted"]


def test_a_unique_key_is_found_in_the_same_transaction(flow: Flow, engine: Engine) -> None:
    @flow.route("/one", unique=True)
    def one() -> None: ...

    flow.async_routes.start(flow.app)
    with engine.begin() as connection:
        first = submit(flow, connection, "one")
        assert submit(flow, connection, "one").id == first.id
    ended(flow, first)
    with engine.begin() as connection:
        assert submit(flow, connection, "one").id != first.id


def test_another_start_with_the_unique_key_waits_for_the_transaction(
    flow: Flow, engine: Engine, gate: threading.Event, eventually: Eventually
) -> None:
    @flow.route("/one", unique=True)
    def one() -> None:
        gate.wait(WAIT)

    flow.async_routes.start(flow.app)
    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as connection:
            task = submit(flow, connection, "one")
            other = pool.submit(lambda: submit(flow, None, "one"))
            waits = text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            # In a transaction, the view would stay as it was at the first look.
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as look:
                eventually(lambda: look.scalar(waits), WAIT)
        assert other.result(WAIT).id == task.id


def test_a_start_that_waits_too_long_for_a_unique_key_gets_503(
    flow: Flow, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow.route("/one", unique=True)
    def one() -> None: ...

    flow.async_routes.start(flow.app)
    with flow.app.app_context():
        store: Any = runtime_of(flow.app).runner.store
    statement = store._sql.add_unique_key.replace("'5000'", "'100'")
    assert statement != store._sql.add_unique_key
    monkeypatch.setattr(store._sql, "add_unique_key", statement)
    with engine.begin() as connection:
        submit(flow, connection, "one")
        with pytest.raises(StoreUnavailable, match="unique key"):
            submit(flow, None, "one")
        with engine.connect() as other:
            other.execute(text("INSERT INTO orders VALUES (1)"))
            with pytest.raises(StoreUnavailable, match="unique key"):
                submit(flow, other, "one")
            other.commit()  # the transaction has survived
        flow.start("/one", status=503)


@pytest.mark.covers("F50")
def test_an_open_transaction_delays_nothing(flow: Flow, engine: Engine) -> None:
    """Starts, claims, ends, readers of changes and lists go on, also in the same namespace."""
    with engine.begin() as connection:
        task = submit(flow, connection)
        for _ in range(3):
            began = time.monotonic()
            other = flow.run("/work/1")
            with flow.app.app_context():
                runtime_of(flow.app).runner.store.newest()
            assert other["State"] == "Completed"
            assert task.id not in flow.ids()
            assert time.monotonic() - began < 5, "an open transaction blocks it forever"
    ended(flow, task)


@pytest.mark.covers("F50")
def test_tasks_are_published_without_notifications(
    flow: Flow, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a transaction pooler, LISTEN does not work."""
    monkeypatch.setattr(EngineDatabase, "listen", lambda *arguments: None)
    flow.async_routes.start(flow.app)
    with engine.begin() as connection:
        task = submit(flow, connection)
    assert ended(flow, task).state == "Completed"


@pytest.mark.covers("F50")
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_store_that_fails_while_a_task_is_published(
    flow: Flow, engine: Engine, monkeypatch: pytest.MonkeyPatch, hear: Callable[..., Any], how: str
) -> None:
    """The next poll publishes the task, unless the failed write has published it."""
    failures = iter([True, True])
    publish = SQLTaskStore.publish

    def fail(store: SQLTaskStore, task_id: str) -> AsyncRouteTask | None:
        task = publish(store, task_id) if how == "after" or not next(failures, False) else None
        if task is None or (how == "after" and next(failures, False)):
            raise CommitUnknown("A test wants it so.")
        return task

    monkeypatch.setattr(SQLTaskStore, "publish", fail)
    received = hear(task_created, sender=flow.app)
    flow.async_routes.start(flow.app)
    with engine.begin() as connection:
        task = submit(flow, connection)
    assert ended(flow, task).state == "Completed"
    assert len(received) <= 1


def test_a_task_without_a_free_slot_is_published_and_waits(
    flow: Flow, engine: Engine, gate: threading.Event, hear: Callable[..., Any],
    eventually: Eventually,
) -> None:  # fmt: skip
    @flow.route("/held", max_workers=1)
    def held() -> None:
        gate.wait(WAIT)

    received = hear(task_created, sender=flow.app)
    first = flow.start("/held")
    with engine.begin() as connection:
        task = submit(flow, connection, "held")
    eventually(lambda: len(received) == 2)
    assert found(flow, task.id).state == "NotStarted"  # type: ignore[union-attr]
    gate.set()
    assert ended(flow, task).state == "Completed"
    flow.ended(first)


def test_several_runners_publish_a_task_once(
    make_flow: MakeFlow, postgresql_url: str, engine: Engine, hear: Callable[..., Any],
    eventually: Eventually, separate_processes: None,
) -> None:  # fmt: skip
    flows = [make_flow(ASYNCROUTE_STORE=postgresql_url) for _ in range(3)]
    for each in flows:
        each.route("/work", endpoint="work")(lambda: None)
        each.async_routes.start(each.app)
    created = hear(task_created)
    completed = hear(task_completed)
    with engine.begin() as connection:
        ids = {submit(flows[0], connection, "work").id for _ in range(10)}
    eventually(lambda: len(completed) == 10, 20)
    assert sorted(one.id for _, one in created) == sorted(ids)
    assert sorted(one.id for _, one in completed) == sorted(ids)


@contextmanager
def wrong_connection(kind: str, url: str, server: str) -> Iterator[Connection]:
    if kind == "autocommit":
        with engine_of(url).connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")
    elif kind == "sqlite":
        with create_engine("sqlite://").connect() as connection:
            yield connection
    elif kind == "empty":
        with new_postgresql_database(server) as other, engine_of(other).connect() as connection:
            yield connection
    else:
        with new_postgresql_database(server) as other:
            store = make_store(other, "", "app", True)
            store.open()
            with engine_of(other).connect() as connection:
                yield connection
            store.close()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("autocommit", "AUTOCOMMIT"), ("sqlite", "sqlite"), ("empty", "same database"), ("other", "same database")],
)  # fmt: skip
def test_a_wrong_connection_is_refused(
    flow: Flow, postgresql_url: str, postgresql_server: str, kind: str, message: str
) -> None:
    with wrong_connection(kind, postgresql_url, postgresql_server) as connection:
        with pytest.raises(ConfigurationError, match=message):
            submit(flow, connection)
        assert connection.scalar(text("SELECT 1")) == 1, "its transaction has survived"


def test_another_schema_is_refused(flow: Flow, engine: Engine) -> None:
    with flow.app.app_context():
        list(flow.async_routes.query())
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA IF NOT EXISTS elsewhere"))
        connection.execute(text("SET LOCAL search_path = elsewhere"))
        with pytest.raises(ConfigurationError, match="same database and schema"):
            submit(flow, connection)
        connection.rollback()


@pytest.mark.parametrize("value", [5, "postgresql://", object()])
def test_something_else_than_a_connection_is_refused(flow: Flow, value: Any) -> None:
    with pytest.raises(TypeError, match="Connection or Session"):
        submit(flow, value)


def test_asynchronous_connections_need_run_sync(flow: Flow, postgresql_url: str) -> None:
    pytest.importorskip("greenlet")
    flow.async_routes.start(flow.app)

    async def main() -> AsyncRouteTask:
        made = create_async_engine(postgresql_url)
        async with made.begin() as connection, AsyncSession(made) as session:
            for value in (connection, session):
                with pytest.raises(TypeError, match="run_sync"):
                    submit(flow, value)
            task = await connection.run_sync(lambda inner: submit(flow, inner))
            assert found(flow, task.id) is None
        await made.dispose()
        return task

    assert ended(flow, asyncio.run(main())).state == "Completed"


def test_routes_of_one_process_are_refused(
    flow: Flow, engine: Engine, own_pool: ThreadPoolExecutor
) -> None:
    flow.route("/own", endpoint="own", executor=own_pool)(lambda: None)
    flow.route("/at-once", endpoint="at_once", executor="immediate")(lambda: None)
    with engine.connect() as connection:
        for endpoint in ("own", "at_once"):
            with pytest.raises(ConfigurationError, match="before the commit"):
                submit(flow, connection, endpoint)


@pytest.mark.parametrize("store", ["memory://", "sqlite:///asyncroute.db"])
def test_other_stores_are_refused(make_flow: MakeFlow, engine: Engine, store: str) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store)

    @flow.route()
    def work() -> None: ...

    with engine.connect() as connection:
        with pytest.raises(ConfigurationError, match="PostgreSQL store"):
            submit(flow, connection, "work")
        with inline(flow.app), pytest.raises(ConfigurationError, match="before the commit"):
            submit(flow, connection, "work")


def test_the_quota_is_not_checked(make_flow: MakeFlow, postgresql_url: str, engine: Engine) -> None:
    flow = make_flow(ASYNCROUTE_STORE=postgresql_url, ASYNCROUTE_MAX_TASKS_PER_USER=1)

    @flow.route()
    def work() -> None: ...

    with engine.begin() as connection:
        ids = {submit(flow, connection, "work", user="anna").id for _ in range(2)}
        assert len(ids) == 2
        connection.rollback()
