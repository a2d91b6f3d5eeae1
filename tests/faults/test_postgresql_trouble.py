"""Connections to PostgreSQL that break before, within and at a commit, and a server that is
unreachable.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask import request
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from flask_asyncroute import AsyncRoute, task_started
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.snapshot import Body
from flask_asyncroute.stores.base import Claim, Expect, TaskStore, ViewEvent
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql.statements import LOCK_CLASS
from flask_asyncroute.task import TERMINAL, AsyncRouteTask, State
from tests.support.apps import close_app
from tests.support.databases import engine_of, new_postgresql_database
from tests.support.flow import Flow
from tests.support.proxy import Proxy
from tests.support.tasks import new_task
from tests.support.waiting import eventually_true

COMMIT = b"COMMIT\x00"
"""The message of the driver; READ COMMITTED does not match."""
T0 = 1_700_000_000_000_000
SHARED = {"permission_json": msgspec.json.encode(Permission(Access(groups=("g",))))}
ROOT = Path(__file__).parent.parent.parent

CREATORS = """
import os, sys
import psycopg, sqlalchemy
import flask_asyncroute.stores.sql.postgresql, flask_asyncroute.stores.sql.store
from flask_asyncroute.stores.registry import make_store

url, count = sys.argv[1], int(sys.argv[2])
start_reader, start_writer = os.pipe()
for _ in range(count):
    if os.fork() == 0:
        os.close(start_writer)
        os.read(start_reader, 1)
        store = make_store(url, "", "test", True)
        try:
            store.open()
            told = store.secret().hex()
        except BaseException as error:
            told = repr(error.__cause__ or error)
        os.write(1, f"{told}\\n".encode())
        os._exit(0)
os.close(start_reader)
os.close(start_writer)
for _ in range(count):
    os.wait()
"""

FORKING = """
import os, sys
from flask import Flask
from sqlalchemy import create_engine, text
from flask_asyncroute import AsyncRoute

engine = create_engine(sys.argv[1])
app = Flask("forking")
app.config.update(ASYNCROUTE_STORE=engine, ASYNCROUTE_LIST_ANONYMOUS=True)
async_routes = AsyncRoute(app)

@app.post("/work")
@async_routes.task(executor="immediate")
def work():
    return os.getpid()

def backend():
    with engine.connect() as connection:
        return connection.scalar(text("SELECT pg_backend_pid()"))

client = app.test_client()
task = client.post("/work").get_json()
before = {backend() for _ in range(10)}
child = os.fork()
if child == 0:
    try:
        for _ in range(20):
            assert client.get(f"/task/{task['Id']}").status_code == 200
            assert client.post("/work").status_code == 202
        assert backend() not in before, "the child speaks on a connection of its parent"
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
for _ in range(20):
    assert client.get(f"/task/{task['Id']}").status_code == 200
    assert client.post("/work").status_code == 202
_, status = os.waitpid(child, 0)
with engine.connect() as connection:
    found = connection.scalars(text("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")).all()
assert before <= set(found), "the child closed a connection of its parent"
print(os.waitstatus_to_exitcode(status), len(client.get("/tasks?limit=99").get_json()))
"""


@pytest.fixture
def proxy(postgresql_url: str) -> Iterator[Proxy]:
    url = make_url(postgresql_url)
    proxy = Proxy((url.host or "127.0.0.1", url.port or 5432))
    yield proxy
    proxy.close()


@pytest.fixture
def proxy_url(proxy: Proxy, postgresql_url: str) -> str:
    url = make_url(postgresql_url).set(host="127.0.0.1", port=proxy.port)
    url = url.update_query_dict(
        {"sslmode": "disable", "gssencmode": "disable", "connect_timeout": "5"}
    )
    return url.render_as_string(hide_password=False)


@pytest.fixture
def store(proxy_url: str) -> Iterator[TaskStore]:
    """Return a store that connects through the proxy, with a task in each state that calls need."""
    store = make_store(proxy_url, "", "test", True)
    store.open()
    for name in ("waiting", "running", "stopping", "ended", "waiting-shared", "running-shared"):
        shared = SHARED if name.endswith("shared") else {}
        store.add(new_task(name, user="anna", **shared), b"{}", None, [("groups", "g")])
        if not name.startswith("waiting"):
            assert store.claim(name, "me", T0) is not None
    store.add(new_task("running-unique", unique_key="r" * 64), b"{}", None, ())
    assert store.claim("running-unique", "me", T0) is not None
    ended = {"state": State.ABORTED, "completed_us": T0, "error": "x"}
    assert (
        store.update("stopping", Expect((State.RUNNING,)), {**ended, "stopping": True}) is not None
    )
    assert store.update("ended", Expect((State.RUNNING,)), ended) is not None
    store.write_value("key", b"1", None)
    yield store
    store.close()


@pytest.fixture
def direct(postgresql_url: str, store: TaskStore) -> Iterator[TaskStore]:
    """Return a store with the same tasks whose connections do not break."""
    direct = make_store(postgresql_url, "", "test", True)
    direct.open()
    yield direct
    direct.close()


def _completed(store: TaskStore, task_id: str) -> AsyncRouteTask | None:
    values = {"state": State.COMPLETED, "completed_us": T0 + 1, "result_json": b"1"}
    return store.update(task_id, Expect((State.RUNNING,), "me", 1), values)


def _is_claimed(result: Claim | None, direct: TaskStore, task_id: str) -> bool:
    return (
        result is not None
        and result.request == b"{}"
        and result.task == direct.get(task_id)
        and result.task.epoch == 1
        and result.task.revision == 2
    )


def _has_ended(result: AsyncRouteTask | None, direct: TaskStore, task_id: str) -> bool:
    return result is not None and result == direct.get(task_id) and result.revision == 3


def _size_of_body(store: TaskStore, task_id: str) -> int:
    body = store.body(task_id)
    body.close()
    return body.size


WRITES: dict[str, tuple[Callable[[TaskStore], Any], Callable[[Any, TaskStore], bool]]] = {
    "add": (
        lambda store: store.add(new_task("new"), b"{}", None, ()),
        lambda result, direct: direct.get("new") is not None,
    ),
    "add with readers and body": (
        lambda store: store.add(
            new_task("new", user="anna", body_size=600_000),
            b"{}",
            Body([b"x" * 600_000]),
            [("groups", "h")],
        ),
        lambda result, direct: (
            direct.get("new") is not None and _size_of_body(direct, "new") == 600_000
        ),
    ),
    "add with a unique key": (
        lambda store: store.add(new_task("new", unique_key="u" * 64), b"{}", None, ()),
        lambda result, direct: (
            direct.get("new") is not None and direct.started_with("u" * 64)[0].id == "new"  # type: ignore[index]
        ),
    ),
    "claim": (
        lambda store: store.claim("waiting", "me", T0 + 1),
        lambda result, direct: _is_claimed(result, direct, "waiting"),
    ),
    "claim with readers": (
        lambda store: store.claim("waiting-shared", "me", T0 + 1),
        lambda result, direct: _is_claimed(result, direct, "waiting-shared"),
    ),
    "end": (
        lambda store: _completed(store, "running"),
        lambda result, direct: _has_ended(result, direct, "running"),
    ),
    "end with readers": (
        lambda store: _completed(store, "running-shared"),
        lambda result, direct: _has_ended(result, direct, "running-shared"),
    ),
    "end with a unique key": (
        lambda store: _completed(store, "running-unique"),
        lambda result, direct: (
            _has_ended(result, direct, "running-unique") and direct.started_with("r" * 64) is None
        ),
    ),
    "progress": (
        lambda store: store.update("running", Expect((State.RUNNING,), "me", 1), {"progress": 5.0}),
        lambda result, direct: (
            result is not None and result == direct.get("running") and result.revision == 3
        ),
    ),
    "release": (
        lambda store: store.update(
            "stopping", Expect((State.ABORTED,), "me", 1, stopping=True), {"stopping": False}
        ),
        lambda result, direct: (
            result is not None and result == direct.get("stopping") and result.revision == 4
        ),
    ),
    "delete": (
        lambda store: store.delete("ended", Expect(tuple(TERMINAL))),
        lambda result, direct: result in ("work", "") and direct.get("ended") is None,
    ),
    "value": (
        lambda store: store.write_value("key", b"2", None),
        lambda result, direct: result is True and direct.read_value("key")[0] == b"2",  # type: ignore[index]
    ),
    "no value": (
        lambda store: store.write_value("key", None, None),
        lambda result, direct: result is True and direct.read_value("key") is None,
    ),
}
SINGLE_STATEMENTS = ("add", "claim", "end", "progress", "release")
"""Writes by a single statement, which commits itself."""


@pytest.mark.covers("F22")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("name", WRITES)
def test_a_connection_that_breaks_at_the_commit(
    store: TaskStore, direct: TaskStore, proxy: Proxy, name: str, how: str
) -> None:
    """Whether or not the server has committed, the write happens once and the caller gets its
    result.
    """
    call, is_right = WRITES[name]
    cut_at = b"asyncroute_tasks" if name in SINGLE_STATEMENTS else COMMIT

    def cut(data: bytes) -> str | None:
        return how if cut_at in data and not proxy.cuts else None

    proxy.cut = cut
    result = call(store)
    assert proxy.cuts == 1
    assert is_right(result, direct), result
    assert store.get("waiting") is not None, "the store can be used"


@pytest.mark.covers("F22")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("name", [name for name in WRITES if name not in SINGLE_STATEMENTS])
def test_a_connection_that_breaks_within_a_transaction(
    store: TaskStore, direct: TaskStore, proxy: Proxy, name: str, how: str
) -> None:
    call, is_right = WRITES[name]

    def cut(data: bytes) -> str | None:
        return how if b"asyncroute_" in data and not proxy.cuts else None

    proxy.cut = cut
    result = call(store)
    assert proxy.cuts == 1
    assert is_right(result, direct), result


def break_while_it_waits(proxy: Proxy, url: str, call: Callable[[], Any]) -> Any:
    """Break the connection of a call while the server waits for the lock of the namespace.
    Release the lock when the second attempt also waits for it.

    The server does not notice the disconnected client, so it completes the first attempt later.
    """
    results: list[Any] = []
    waiters = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = "
        "current_database()"
    )
    with engine_of(url).connect() as other, engine_of(url).connect() as plain:
        observer = plain.execution_options(isolation_level="AUTOCOMMIT")
        locks = f"SELECT pg_advisory_xact_lock({LOCK_CLASS}, key) FROM asyncroute_namespaces"
        other.execute(text(locks))
        thread = threading.Thread(target=lambda: results.append(call()))
        thread.start()
        eventually_true(lambda: observer.execute(waiters).scalar() == 1)
        proxy.break_off()
        eventually_true(lambda: observer.execute(waiters).scalar() == 2)
        other.rollback()
    thread.join(10)
    (result,) = results
    return result


@pytest.mark.covers("F22")
@pytest.mark.parametrize("name", ["add", "add with a unique key", "claim", "end", "release"])
def test_a_connection_that_breaks_while_the_server_waits(
    store: TaskStore, direct: TaskStore, proxy: Proxy, postgresql_url: str, name: str
) -> None:
    """The second attempt finds the change and recognizes it as its own."""
    call, is_right = WRITES[name]
    result = break_while_it_waits(proxy, postgresql_url, lambda: call(store))
    assert is_right(result, direct), result


@pytest.mark.covers("F22")
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_connection_that_breaks_in_a_read(store: TaskStore, proxy: Proxy, how: str) -> None:
    reads: list[Callable[[], Any]] = [
        lambda: store.get("waiting"),
        lambda: store.query((), NEWEST_FIRST, 9, None, None),
        lambda: store.changes_since(0),
        lambda: store.body("waiting").close(),
        lambda: store.waiting({"work": 9}, 2 * T0),
        lambda: store.past_retention(2 * T0, 9),
        lambda: store.read_value("key"),
        lambda: list(store.value_keys()),
    ]
    for number, read in enumerate(reads):
        expected = read()
        proxy.cut = lambda data, number=number: (
            how if b"asyncroute_" in data and proxy.cuts == number else None
        )
        assert read() == expected
        assert proxy.cuts == number + 1


@pytest.mark.covers("F22")
def test_a_commit_with_an_unknown_result_raises(
    store: TaskStore, direct: TaskStore, proxy: Proxy
) -> None:
    """The server becomes unreachable during the commit."""
    call, _ = WRITES["end with readers"]

    def cut(data: bytes) -> str | None:
        if COMMIT in data:
            proxy.is_refusing = True
            return "after"
        return None

    proxy.cut = cut
    with pytest.raises(StoreUnavailable):
        call(store)
    proxy.cut = lambda data: None
    proxy.come_back()
    eventually_true(lambda: direct.get("running-shared").state is State.COMPLETED)  # type: ignore[union-attr]
    assert call(store) is None, "the write is not applied twice"
    assert direct.get("running-shared") == store.get("running-shared")


@pytest.mark.covers("F22")
def test_backends_that_are_terminated_are_replaced(
    store: TaskStore, direct: TaskStore, postgresql_url: str, proxy: Proxy
) -> None:
    """An administrator or a restart may terminate them. The pool detects it at the next use."""
    holders = [
        threading.Thread(target=lambda: store.query((), NEWEST_FIRST, 9, None, None))
        for _ in range(5)
    ]
    for holder in holders:
        holder.start()
    for holder in holders:
        holder.join(5)
    for name, (call, is_right) in WRITES.items():
        if name.startswith("add with") or name == "progress" or name == "no value":
            continue
        with engine_of(postgresql_url).connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        began = time.monotonic()
        result = call(store)
        assert time.monotonic() - began < 5
        assert is_right(result, direct), name


def fill_pool(store: TaskStore, count: int = 5) -> None:
    """Leave this many idle connections in the pool of a store."""
    engine = store._database._engine  # type: ignore[attr-defined]
    lent = [engine.raw_connection() for _ in range(count)]
    for connection in lent:
        connection.close()
    assert engine.pool.checkedin() >= count


def terminate_backends(url: str) -> None:
    """Terminate all connections to a database, and wait until the server has closed them."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with engine_of(url).connect() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend(pid) {others}"))
        connection.rollback()
        eventually_true(
            lambda: (
                connection.rollback(),
                connection.scalar(text(f"SELECT count(*) {others}")) == 0,
            )[1]
        )


@pytest.fixture(params=["url", "engine", "autocommit", "serializable"])
def pooled(
    request: pytest.FixtureRequest, store: TaskStore, postgresql_url: str
) -> Iterator[TaskStore]:
    """Return a store with each kind of connection pool, with the tasks of the fixture `store`."""
    levels = {
        "engine": {},
        "autocommit": {"isolation_level": "AUTOCOMMIT"},
        "serializable": {"isolation_level": "SERIALIZABLE"},
    }
    engine = None
    if request.param != "url":
        engine = create_engine(postgresql_url, **levels[request.param])
    pooled = make_store(engine or postgresql_url, "", "test", True)
    pooled.open()
    yield pooled
    pooled.close()
    if engine is not None:
        engine.dispose()


@pytest.mark.covers("F22")
def test_reads_succeed_after_all_idle_connections_were_lost(
    pooled: TaskStore, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """There are more lost connections than attempts per call."""
    reads: list[Callable[[], Any]] = [
        lambda: pooled.get("waiting"),
        lambda: pooled.query((), NEWEST_FIRST, 9, None, None),
        lambda: pooled.newest(),  # type: ignore[attr-defined]
        lambda: pooled.changes_since(0),  # type: ignore[attr-defined]
        lambda: pooled.read_value("key"),
    ]
    expected = [read() for read in reads]
    for first in range(len(reads)):
        fill_pool(pooled)
        terminate_backends(postgresql_url)
        began = time.monotonic()
        for read, found in zip(reads[first:], expected[first:], strict=True):
            assert read() == found
        assert time.monotonic() - began < 2
    assert "The store cannot be used" not in caplog.text


@pytest.mark.covers("F22")
@pytest.mark.parametrize("name", WRITES)
def test_a_write_happens_once_after_all_idle_connections_were_lost(
    pooled: TaskStore, direct: TaskStore, postgresql_url: str, name: str
) -> None:
    call, is_right = WRITES[name]
    fill_pool(pooled)
    terminate_backends(postgresql_url)
    began = time.monotonic()
    result = call(pooled)
    assert time.monotonic() - began < 2
    assert is_right(result, direct), result


@pytest.mark.covers("F22")
def test_events_are_stored_once_after_all_idle_connections_were_lost(
    pooled: TaskStore, direct: TaskStore, postgresql_url: str
) -> None:
    since = direct.newest()
    fill_pool(pooled)
    terminate_backends(postgresql_url)
    sent = [ViewEvent("step", b"1", number) for number in (1, 2)]
    changes = pooled.add_events("running", Expect((State.RUNNING,), "me", 1), sent)
    assert changes is not None and list(changes) == [since + 1, since + 2]
    assert direct.newest() == since + 2


@pytest.mark.covers("F22")
def test_not_every_lost_connection_replaces_the_pool(store: TaskStore, postgresql_url: str) -> None:
    """Threads that lose connections of one pool at the same time replace it only once, or, in a
    race, twice. Otherwise, each thread would close the new connections of the others.
    """
    engine = store._database._engine  # type: ignore[attr-defined]
    all_lent = threading.Barrier(5)
    found: list[Any] = []
    disposed: list[int] = []
    raw_connection, dispose, this_thread = engine.raw_connection, engine.dispose, threading.local()

    def lend() -> Any:
        connection = raw_connection()
        if not hasattr(this_thread, "has_lent"):
            this_thread.has_lent = True
            all_lent.wait(10)
        return connection

    def count(*arguments: Any, **options: Any) -> None:
        disposed.append(1)
        dispose(*arguments, **options)

    fill_pool(store)
    terminate_backends(postgresql_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "raw_connection", lend)
        patch.setattr(engine, "dispose", count)
        threads = [
            threading.Thread(target=lambda: found.append(store.get("waiting"))) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(found) == 5 and None not in found
    assert 1 <= len(disposed) < 5


@pytest.mark.covers("F22")
def test_a_restart_of_the_server(
    make_app: Callable[..., Any], proxy: Proxy, proxy_url: str, gate: threading.Event
) -> None:
    """Meanwhile, requests are answered 503 and the running task continues. Within five seconds
    after the restart, all requests succeed.
    """
    app = make_app(ASYNCROUTE_STORE=proxy_url)
    flow = Flow(app, AsyncRoute(app))
    begun = threading.Event()

    @flow.route()
    def work() -> Any:
        begun.set()
        gate.wait(10)
        return 1

    task = flow.start()
    assert begun.wait(5)
    proxy.go()
    assert flow.request("GET", f"/task/{task['Id']}").status_code == 503
    refused = flow.request("POST", "/work")
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    gate.set()
    proxy.come_back()
    began = time.monotonic()
    eventually_true(lambda: flow.request("GET", f"/task/{task['Id']}").status_code == 200, 5)
    assert flow.ended(task, 5)["Result"] == 1
    assert time.monotonic() - began < 5
    assert flow.run()["State"] == "Completed"


@pytest.mark.covers("F45")
def test_a_body_is_read_when_the_server_is_back(
    make_app: Callable[..., Any], proxy: Proxy, proxy_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(ASYNCROUTE_STORE=proxy_url)
    flow = Flow(app, AsyncRoute(app))
    flow.route(max_workers=1)(lambda: len(request.get_data()))
    store = runtime_of(app).runner.store
    read, failures = store.body, []

    def body(task_id: str) -> Body:
        try:
            return read(task_id)
        except StoreUnavailable as error:
            failures.append(error)
            raise

    monkeypatch.setattr(store, "body", body)
    with task_started.connected_to(lambda sender, **extra: proxy.go(), app):
        task = flow.start(data=b"x" * 1_000_000)
        eventually_true(lambda: len(failures) >= 3)
    proxy.come_back()
    assert flow.ended(task, 15)["Result"] == 1_000_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sixteen_processes_create_the_tables_once(postgresql_server: str) -> None:
    for _ in range(2):
        with new_postgresql_database(postgresql_server) as url:
            ended = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", CREATORS, url, "16"],
                capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
            )  # fmt: skip
        outputs = ended.stdout.split("\n")[:-1]
        assert len(outputs) == 16
        assert len(set(outputs)) == 1 and len(outputs[0]) == 64, outputs


def test_an_engine_of_the_app_in_a_forked_child(postgresql_server: str) -> None:
    """Parent and child each use connections of their own."""
    with new_postgresql_database(postgresql_server) as url:
        ended = subprocess.run(
            [sys.executable, "-c", FORKING, url], capture_output=True, text=True, timeout=60, cwd=ROOT
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["0", "41"], ended.stderr


def test_a_pool_of_one_connection_is_enough(
    make_app: Callable[..., Any], postgresql_url: str
) -> None:
    """No call needs a second connection while it holds one."""
    from flask_asyncroute import AsyncRoute

    engine = create_engine(postgresql_url, pool_size=1, max_overflow=0, pool_timeout=5)
    app = make_app(ASYNCROUTE_STORE=engine)
    flow = Flow(app, AsyncRoute(app))

    @flow.route()
    def work() -> Any:
        return 1

    assert flow.run()["State"] == "Completed"
    close_app(app)
    engine.dispose()
