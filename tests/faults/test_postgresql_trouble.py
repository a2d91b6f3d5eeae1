"""Connections to PostgreSQL that break: before, within and at a commit, and with the whole server (F22)."""

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
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.snapshot import Body
from flask_asyncroute.states import TERMINAL, State
from flask_asyncroute.stores.base import Claim, Expect, TaskStore
from flask_asyncroute.stores.opening import make_store
from flask_asyncroute.task import AsyncRouteTask
from tests.conftest import close_app, engine_of, eventually_true, new_postgresql_database, new_task
from tests.faults.proxy import Proxy
from tests.flow.driving import Flow

COMMIT = b"COMMIT\x00"
"""What the driver sends; READ COMMITTED is something else."""
T0 = 1_700_000_000_000_000
SHARED = {"permission_json": msgspec.json.encode(Permission(Access(groups=("g",))))}
ROOT = Path(__file__).parent.parent.parent

CREATORS = """
import os, sys
import psycopg, sqlalchemy
import flask_asyncroute.stores.sql.engine, flask_asyncroute.stores.sql.store
from flask_asyncroute.stores.opening import make_store

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
    made = Proxy((url.host or "127.0.0.1", url.port or 5432))
    yield made
    made.close()


@pytest.fixture
def proxy_url(proxy: Proxy, postgresql_url: str) -> str:
    url = make_url(postgresql_url).set(host="127.0.0.1", port=proxy.port)
    url = url.update_query_dict({"sslmode": "disable", "gssencmode": "disable", "connect_timeout": "5"})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def store(proxy_url: str) -> Iterator[TaskStore]:
    """Give a store that goes through the proxy, with a task in each state that a call may want."""
    made = make_store(proxy_url, "", "test", True)
    made.open()
    for name in ("waiting", "running", "stopping", "ended", "waiting-shared", "running-shared"):
        shared = SHARED if name.endswith("shared") else {}
        made.add(new_task(name, user="anna", **shared), b"{}", None, [("groups", "g")])
        if not name.startswith("waiting"):
            assert made.claim(name, "me", T0) is not None
    ended = {"state": State.ABORTED, "completed_us": T0, "error": "x"}
    assert made.update("stopping", Expect((State.RUNNING,)), {**ended, "stopping": True}) is not None
    assert made.update("ended", Expect((State.RUNNING,)), ended) is not None
    made.write_value("key", b"1", None)
    yield made
    made.close()


@pytest.fixture
def direct(postgresql_url: str, store: TaskStore) -> Iterator[TaskStore]:
    """Give a store on the same tasks whose connections do not break."""
    made = make_store(postgresql_url, "", "test", True)
    made.open()
    yield made
    made.close()


def _completed(store: TaskStore, task_id: str) -> AsyncRouteTask | None:
    values = {"state": State.COMPLETED, "completed_us": T0 + 1, "result_json": b"1"}
    return store.update(task_id, Expect((State.RUNNING,), "me", 1), values)


def _is_claimed(made: Claim | None, direct: TaskStore, task_id: str) -> bool:
    return (
        made is not None
        and made.request == b"{}"
        and made.task == direct.get(task_id)
        and made.task.epoch == 1
        and made.task.revision == 2
    )


def _has_ended(made: AsyncRouteTask | None, direct: TaskStore, task_id: str) -> bool:
    return made is not None and made == direct.get(task_id) and made.revision == 3


def _size_of_body(store: TaskStore, task_id: str) -> int:
    body = store.body(task_id)
    body.close()
    return body.size


WRITES: dict[str, tuple[Callable[[TaskStore], Any], Callable[[Any, TaskStore], bool]]] = {
    "add": (
        lambda store: store.add(new_task("new"), b"{}", None, ()),
        lambda made, direct: direct.get("new") is not None,
    ),
    "add with readers and body": (
        lambda store: store.add(
            new_task("new", user="anna", body_size=600_000), b"{}", Body([b"x" * 600_000]), [("groups", "h")]
        ),
        lambda made, direct: direct.get("new") is not None and _size_of_body(direct, "new") == 600_000,
    ),
    "claim": (
        lambda store: store.claim("waiting", "me", T0 + 1),
        lambda made, direct: _is_claimed(made, direct, "waiting"),
    ),
    "claim with readers": (
        lambda store: store.claim("waiting-shared", "me", T0 + 1),
        lambda made, direct: _is_claimed(made, direct, "waiting-shared"),
    ),
    "end": (lambda store: _completed(store, "running"), lambda made, direct: _has_ended(made, direct, "running")),
    "end with readers": (
        lambda store: _completed(store, "running-shared"),
        lambda made, direct: _has_ended(made, direct, "running-shared"),
    ),
    "progress": (
        lambda store: store.update("running", Expect((State.RUNNING,), "me", 1), {"progress": 5.0}),
        lambda made, direct: made is not None and made == direct.get("running") and made.revision == 3,
    ),
    "release": (
        lambda store: store.update("stopping", Expect((State.ABORTED,), "me", 1, stopping=True), {"stopping": False}),
        lambda made, direct: made is not None and made == direct.get("stopping") and made.revision == 4,
    ),
    "delete": (
        lambda store: store.delete("ended", Expect(tuple(TERMINAL))),
        lambda made, direct: made is True and direct.get("ended") is None,
    ),
    "value": (
        lambda store: store.write_value("key", b"2", None),
        lambda made, direct: made is True and direct.read_value("key")[0] == b"2",  # type: ignore[index]
    ),
    "no value": (
        lambda store: store.write_value("key", None, None),
        lambda made, direct: made is True and direct.read_value("key") is None,
    ),
}
ALONE = ("add", "claim", "end", "progress", "release")
"""Those that are a single statement, which is its own commit."""


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("name", WRITES)
def test_f22_a_connection_that_breaks_at_the_commit(
    store: TaskStore, direct: TaskStore, proxy: Proxy, name: str, how: str
) -> None:
    """Whether or not the server has still done it: it is done once, and its caller gets what belongs to it."""
    call, is_right = WRITES[name]
    wanted = b"asyncroute_tasks" if name in ALONE else COMMIT

    def cut(data: bytes) -> str | None:
        return how if wanted in data and not proxy.cuts else None

    proxy.cut = cut
    made = call(store)
    assert proxy.cuts == 1
    assert is_right(made, direct), made
    assert store.get("waiting") is not None, "all goes on"


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("name", [name for name in WRITES if name not in ALONE])
def test_f22_a_connection_that_breaks_within_a_transaction(
    store: TaskStore, direct: TaskStore, proxy: Proxy, name: str, how: str
) -> None:
    call, is_right = WRITES[name]

    def cut(data: bytes) -> str | None:
        return how if b"asyncroute_" in data and not proxy.cuts else None

    proxy.cut = cut
    made = call(store)
    assert proxy.cuts == 1
    assert is_right(made, direct), made


def while_it_waits(proxy: Proxy, url: str, call: Callable[[], Any]) -> Any:
    """Call; break the connection while the server waits for the lock that orders all writes, and have it go on when the
    second try has joined it. A server does not notice that its client is gone: it does what it was told, later.
    """
    told: list[Any] = []
    waiters = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with engine_of(url).connect() as other, engine_of(url).connect() as plain:
        looker = plain.execution_options(isolation_level="AUTOCOMMIT")
        other.execute(text("SELECT 1 FROM asyncroute_namespaces FOR UPDATE"))
        thread = threading.Thread(target=lambda: told.append(call()))
        thread.start()
        eventually_true(lambda: looker.execute(waiters).scalar() == 1)
        proxy.break_off()
        eventually_true(lambda: looker.execute(waiters).scalar() == 2)
        other.rollback()
    thread.join(10)
    (made,) = told
    return made


@pytest.mark.parametrize("name", ["add", "claim", "end", "release"])
def test_f22_a_connection_that_breaks_while_the_server_waits(
    store: TaskStore, direct: TaskStore, proxy: Proxy, postgresql_url: str, name: str
) -> None:
    """The second try finds that there is nothing to do any more, and that it was this very call that did it."""
    call, is_right = WRITES[name]
    made = while_it_waits(proxy, postgresql_url, lambda: call(store))
    assert is_right(made, direct), made


@pytest.mark.parametrize("how", ["before", "after"])
def test_f22_a_connection_that_breaks_in_a_read(store: TaskStore, proxy: Proxy, how: str) -> None:
    reads: list[Callable[[], Any]] = [
        lambda: store.get("waiting"),
        lambda: store.query((), NEWEST_FIRST, 9, None, None),
        lambda: store.news(0),
        lambda: store.body("waiting").close(),
        lambda: store.waiting({"work": 9}, 2 * T0),
        lambda: store.outlived(2 * T0, 9),
        lambda: store.read_value("key"),
        lambda: list(store.value_keys()),
    ]
    for number, read in enumerate(reads):
        wanted = read()
        proxy.cut = lambda data, number=number: how if b"asyncroute_" in data and proxy.cuts == number else None
        assert read() == wanted
        assert proxy.cuts == number + 1


def test_f22_a_commit_that_cannot_be_looked_up(store: TaskStore, direct: TaskStore, proxy: Proxy) -> None:
    """The server is gone with the commit under way: nobody knows, until it is back."""
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
    assert call(store) is None, "a write that comes late loses against itself"
    assert direct.get("running-shared") == store.get("running-shared")


def test_f22_backends_that_are_terminated_are_replaced(
    store: TaskStore, direct: TaskStore, postgresql_url: str, proxy: Proxy
) -> None:
    """As an administrator, or a restart, does it; those in the pool are found dead only when they are used."""
    holders = [threading.Thread(target=lambda: store.query((), NEWEST_FIRST, 9, None, None)) for _ in range(5)]
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
        made = call(store)
        assert time.monotonic() - began < 5
        assert is_right(made, direct), name


def test_f22_a_server_that_restarts(
    make_app: Callable[..., Any], proxy: Proxy, proxy_url: str, gate: threading.Event
) -> None:
    """503 while it is gone; the task that runs goes on, and all is well five seconds after at the latest."""
    from flask_asyncroute import AsyncRoute

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sixteen_processes_make_the_tables_once(postgresql_server: str) -> None:
    for _ in range(2):
        with new_postgresql_database(postgresql_server) as url:
            ended = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", CREATORS, url, "16"],
                capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
            )  # fmt: skip
        told = ended.stdout.split("\n")[:-1]
        assert len(told) == 16
        assert len(set(told)) == 1 and len(told[0]) == 64, told


def test_an_engine_of_the_app_in_a_forked_child(postgresql_server: str) -> None:
    """Parent and child each go on with connections of their own."""
    with new_postgresql_database(postgresql_server) as url:
        ended = subprocess.run(
            [sys.executable, "-c", FORKING, url], capture_output=True, text=True, timeout=60, cwd=ROOT
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["0", "41"], ended.stderr


def test_a_pool_of_one_connection_serves_all(make_app: Callable[..., Any], postgresql_url: str) -> None:
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
