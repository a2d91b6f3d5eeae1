"""Fixtures for all tests: apps and stores that are closed at the end, and a check for leaks."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIG_IGN, SIGINT, default_int_handler, getsignal
from signal import signal as handle
from typing import Any

import flask
import pytest
from blinker import ANY, NamedSignal
from flask import Flask
from hypothesis import settings
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from flask_asyncroute import AsyncRouteTask, metadata, signals
from flask_asyncroute.current_task import _running
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.workers import app_identity
from tests.support.apps import close_app, new_app
from tests.support.databases import engine_of, new_postgresql_database, new_sqlite_store
from tests.support.tasks import new_task
from tests.support.waiting import eventually_true

pytest_plugins = ["flask_asyncroute_pytest", "pytester"]
"""An environment that is older than its entry point does not load it."""

collect_ignore = ["integrations"]
"""Needs a separate environment: ``make integrations``."""

LEAK_SECONDS = 5.0
"""How long a thread may take to end after its app is closed."""

# A shell starts background jobs with SIGINT ignored, and the servers of the tests would inherit
# this.
if getsignal(SIGINT) is SIG_IGN:
    handle(SIGINT, default_int_handler)

settings.register_profile("laptop", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "laptop")

_FLASK_SIGNALS = (
    flask.appcontext_popped, flask.appcontext_pushed, flask.appcontext_tearing_down, flask.before_render_template,
    flask.got_request_exception, flask.message_flashed, flask.request_finished, flask.request_started,
    flask.request_tearing_down, flask.template_rendered,
)  # fmt: skip
_WATCHED = (*signals.PUBLIC_SIGNALS, *_FLASK_SIGNALS)
_OURS = "flask_asyncroute"
_shared_apps: list[Flask] = []
"""Apps of all tests of a module. While there is one, threads may start and end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=_share,
        default=1.0,
        help="fraction of the work of the stress tests, above 0, at most 1 (default: %(default)s)",
    )


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise ValueError
    return share


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Return ``eventually(condition, seconds=5, interval=0.005)``, which waits for a true value and
    returns it.
    """
    return eventually_true


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread of the package, a Flask context, a current task or a signal
    receiver.

    It is the first fixture of each test, so it is torn down last.
    """
    threads = _threads()
    receivers = _receivers()
    yield
    contexts = [
        what
        for what, is_left in (
            ("a request context", flask.has_request_context()),
            ("an app context", flask.has_app_context()),
            ("a current task", _running.get(None) is not None),
        )
        if is_left
    ]
    assert not contexts, f"The test left {' and '.join(contexts)} behind."
    if not _shared_apps:
        left = _join(_threads() - threads)
        assert not left, (
            f"The test left threads behind: {', '.join(sorted(thread.name for thread in left))}."
        )
    if _receivers() - receivers:
        gc.collect()
    left_receivers = _receivers() - receivers
    assert not left_receivers, (
        f"The test left receivers behind: {sorted(map(str, left_receivers))}."
    )


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Return ``make_app(name="app", *, instance_path=None, **config)``, which returns a Flask app
    in testing mode with its own folder.

    Its runtime is closed at the end. Two apps with one ``instance_path`` share the default store.
    """
    made: list[Flask] = []

    def make(name: str = "app", *, instance_path: Path | str | None = None, **config: Any) -> Flask:
        app = new_app(name, instance_path or tmp_path / f"instance-{len(made)}", config)
        made.append(app)
        return app

    yield make
    for app in reversed(made):
        close_app(app)


@pytest.fixture(scope="module")
def make_module_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Flask]]:
    """Return the same as `make_app`, for apps that all tests of a module share."""
    made: list[Flask] = []

    def make(name: str = "app", *, instance_path: Path | str | None = None, **config: Any) -> Flask:
        app = new_app(name, instance_path or tmp_path_factory.mktemp("instance"), config)
        made.append(app)
        _shared_apps.append(app)
        return app

    threads = _threads()
    yield make
    for app in reversed(made):
        close_app(app)
        _shared_apps.remove(app)
    left = _join(_threads() - threads)
    assert not left, (
        f"The module left threads behind: {', '.join(sorted(thread.name for thread in left))}."
    )


@pytest.fixture
def separate_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each app of the test stand for a separate process, which may have another release."""
    monkeypatch.setattr(app_identity, "supersede_others", lambda runner: None)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return an event that views can wait for. It is set at the end, so that no view hangs."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def hear() -> Iterator[Callable[..., list[tuple[str, AsyncRouteTask]]]]:
    """Return ``hear(*signals, sender=ANY)``, which returns a list to which each signal appends
    (name, task). ``task_removed`` has no record, so it appends (name, id).
    """
    connected: list[tuple[NamedSignal, Any]] = []

    def connect(*which: NamedSignal, sender: Any = ANY) -> list[tuple[str, AsyncRouteTask]]:
        received: list[tuple[str, AsyncRouteTask]] = []
        for signal in which:

            def receive(app: Flask, name: str = signal.name, **values: Any) -> None:
                received.append((name, values["task"] if "task" in values else values["task_id"]))

            signal.connect(receive, sender=sender, weak=False)
            connected.append((signal, receive))
        return received

    yield connect
    for signal, receiver in connected:
        signal.disconnect(receiver)


@pytest.fixture
def make_task() -> Callable[..., AsyncRouteTask]:
    """Return ``make_task(id="task", **fields)``, which returns the record of a new task."""
    return new_task


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    """Return the path of the file that the SQLite stores of this test share."""
    return tmp_path / "store" / "asyncroute.db"


@pytest.fixture
def make_sqlite_store(sqlite_path: Path) -> Iterator[Callable[..., TaskStore]]:
    """Return ``make_sqlite_store(namespace="test", create_tables=True)``, which returns a new store
    on the file of this test.
    """
    made: list[TaskStore] = []

    def make(namespace: str = "test", create_tables: bool = True) -> TaskStore:
        store = new_sqlite_store(sqlite_path, namespace, create_tables)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture(scope="session")
def postgresql_server() -> str:
    """Return the URL of a PostgreSQL server whose user may create databases.

    Without a server, skip the test, or fail if ``REQUIRE_SERVICES`` is 1.
    """
    url = os.environ.get(
        "TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
    )
    try:
        with engine_of(url).connect():
            pass
    except SQLAlchemyError as error:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            raise
        pytest.skip(f"no PostgreSQL at {url}: {type(error).__name__}")
    return url


@pytest.fixture(scope="session")
def postgresql_database(postgresql_server: str) -> Iterator[str]:
    """Return the URL of a new database that all tests of this run share."""
    with new_postgresql_database(postgresql_server) as url:
        yield url


@pytest.fixture
def postgresql_url(postgresql_database: str) -> Iterator[str]:
    """Return the URL of the database; its tables are emptied at the end."""
    yield postgresql_database
    with engine_of(postgresql_database).begin() as connection:
        for table in metadata.tables.values():
            if table.name != "asyncroute_schema" and connection.scalar(
                text(f"SELECT to_regclass('{table.name}')")
            ):
                connection.execute(table.delete())


@pytest.fixture(scope="session")
def redis() -> str:
    """Return the URL of a Redis database. Without a server, skip the test, or fail if
    ``REQUIRE_SERVICES`` is 1.
    """
    return str(pytest.importorskip("tests.support.brokers").redis_url())


@pytest.fixture(scope="session")
def rabbitmq() -> str:
    """Return the URL of RabbitMQ. Without a server, skip the test, or fail if ``REQUIRE_SERVICES``
    is 1.
    """
    return str(pytest.importorskip("tests.support.brokers").rabbitmq_url())


@pytest.fixture
def make_postgresql_store(postgresql_url: str) -> Iterator[Callable[..., TaskStore]]:
    """Return ``make_postgresql_store(namespace="test", create_tables=True)``, which returns a new
    store on the database.
    """
    made: list[TaskStore] = []

    def make(namespace: str = "test", create_tables: bool = True) -> TaskStore:
        store = make_store(postgresql_url, "", namespace, create_tables)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> TaskStore:
    """Return an open store of each kind."""
    if request.param == "memory":
        made = make_store("memory://", "", "test", True)
    else:
        made = request.getfixturevalue(f"make_{request.param}_store")()
    made.open()
    return made


def _threads() -> set[threading.Thread]:
    return {
        thread
        for thread in threading.enumerate()
        if thread.is_alive() and thread.name.startswith("asyncroute")
    }


def _join(threads: set[threading.Thread]) -> set[threading.Thread]:
    """Wait for threads to end; return those that have not."""
    deadline = time.monotonic() + LEAK_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    return {thread for thread in threads if thread.is_alive()}


def _receivers() -> set[tuple[str, str, int]]:
    """Return the connected receivers, except those of the package."""
    found = set()
    for signal in _WATCHED:
        for receiver in list(signal.receivers.values()):
            function: Any = receiver() if isinstance(receiver, weakref.ref) else receiver
            if function is not None and not str(getattr(function, "__module__", "")).startswith(
                _OURS
            ):
                found.add(
                    (signal.name, getattr(function, "__qualname__", repr(function)), id(function))
                )
    return found
