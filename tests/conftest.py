"""What all tests share: apps and stores that are closed at the end, waiting with a deadline, and a check for leaks."""

from __future__ import annotations

import gc
import inspect
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIG_IGN, SIGINT, default_int_handler, getsignal
from signal import signal as handle
from typing import Any

import flask
import pytest
from blinker import ANY, NamedSignal
from flask import Flask
from hypothesis import settings
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from flask_asyncroute import AsyncRouteTask, metadata, signals
from flask_asyncroute import context as asyncroute_context
from flask_asyncroute.runtime import EXTENSION, runtime_of
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.opening import make_store

LEAK_SECONDS = 5.0
"""How long a thread may take to end once its app is closed."""

# A shell has what it starts in the background ignore interrupts, and the servers that tests start would inherit that.
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
_WATCHED = (*signals.FACTS, *_FLASK_SIGNALS)
_OURS = "flask_asyncroute"
_shared_apps: list[Flask] = []
"""Apps of a wider scope than one test; while there is one, its threads may come and go."""


def eventually_true(condition: Callable[[], Any], seconds: float = 5.0, interval: float = 0.005) -> Any:
    """Return the first true value that ``condition`` gives, asked about every ``interval`` seconds.

    :raises AssertionError: where it has given none after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{_source(condition)} was not true within {seconds} s.")
        pause.wait(interval)
    return value


def label(value: Any) -> str:
    """Return what a value is called in the names of tests: the same in each run, unlike the addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", ascii(value))


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Give ``eventually(condition, seconds=5, interval=0.005)``, which waits until the condition holds and returns its value."""
    return eventually_true


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves behind a thread of the package, a Flask context, a current task or a signal receiver.

    It is the first fixture of each test, so it looks after all others have been torn down.
    """
    threads = _threads()
    receivers = _receivers()
    yield
    contexts = [
        what
        for what, is_left in (
            ("a request context", flask.has_request_context()),
            ("an app context", flask.has_app_context()),
            ("a current task", asyncroute_context._running.get(None) is not None),
        )
        if is_left
    ]
    assert not contexts, f"The test left {' and '.join(contexts)} behind."
    if not _shared_apps:
        left = _join(_threads() - threads)
        assert not left, f"The test left threads behind: {', '.join(sorted(thread.name for thread in left))}."
    if _receivers() - receivers:
        gc.collect()
    left_receivers = _receivers() - receivers
    assert not left_receivers, f"The test left receivers behind: {sorted(map(str, left_receivers))}."


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Give ``make_app(name="app", *, instance_path=None, **config)``: a Flask app in testing mode in a folder of its own.

    Its runtime is closed at the end. Give two apps one ``instance_path`` to have them share the default store.
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
    """Give what `make_app` gives, for apps that serve all tests of a module."""
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
    assert not left, f"The module left threads behind: {', '.join(sorted(thread.name for thread in left))}."


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Give an event that views can wait on; it is set at the end, so that none of them hangs."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def hear() -> Iterator[Callable[..., list[tuple[str, AsyncRouteTask]]]]:
    """Give ``hear(*signals, sender=ANY)``: a list that grows by (name, task) with each of these signals, until the end."""
    connected: list[tuple[NamedSignal, Any]] = []

    def connect(*which: NamedSignal, sender: Any = ANY) -> list[tuple[str, AsyncRouteTask]]:
        heard: list[tuple[str, AsyncRouteTask]] = []
        for signal in which:

            def receive(app: Flask, task: AsyncRouteTask, name: str = signal.name, **extra: Any) -> None:
                heard.append((name, task))

            signal.connect(receive, sender=sender, weak=False)
            connected.append((signal, receive))
        return heard

    yield connect
    for signal, receiver in connected:
        signal.disconnect(receiver)


@pytest.fixture
def make_task() -> Callable[..., AsyncRouteTask]:
    """Give ``make_task(id="task", **fields)``: a record as a start makes it, for stores."""
    return new_task


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    """Give the file that the SQLite stores of this test share."""
    return tmp_path / "store" / "asyncroute.db"


@pytest.fixture
def make_sqlite_store(sqlite_path: Path) -> Iterator[Callable[..., TaskStore]]:
    """Give ``make_sqlite_store(namespace="test", create_tables=True)``: a further store on the file of this test."""
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
    """Give the URL of a PostgreSQL server whose user may make databases; skip, or in CI fail, where there is none."""
    url = os.environ.get("TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres")
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
    """Give the URL of a database of this run's own, which all its tests share, each in namespaces of its own."""
    with new_postgresql_database(postgresql_server) as url:
        yield url


@pytest.fixture
def postgresql_url(postgresql_database: str) -> Iterator[str]:
    """Give the URL of a database whose tables, if any, are empty at the end."""
    yield postgresql_database
    with engine_of(postgresql_database).begin() as connection:
        for table in metadata.tables.values():
            if table.name != "asyncroute_schema" and connection.scalar(text(f"SELECT to_regclass('{table.name}')")):
                connection.execute(table.delete())


@contextmanager
def new_postgresql_database(server: str) -> Iterator[str]:
    """Make a database, yield its URL, and remove it."""
    name = f"asyncroute_test_{os.getpid()}_{time.monotonic_ns()}"
    engine = engine_of(server).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def engine_of(url: str) -> Engine:
    """Return an engine that keeps no connection."""
    return create_engine(url, poolclass=NullPool)


@pytest.fixture
def make_postgresql_store(postgresql_url: str) -> Iterator[Callable[..., TaskStore]]:
    """Give ``make_postgresql_store(namespace="test", create_tables=True)``: a further store on the database of this test."""
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
    """Give an open store of each kind."""
    if request.param == "memory":
        made = make_store("memory://", "", "test", True)
    else:
        made = request.getfixturevalue(f"make_{request.param}_store")()
    made.open()
    return made


def new_app(name: str, instance_path: Path | str, config: dict[str, Any]) -> Flask:
    """Return a Flask app in testing mode; ``config`` comes on top."""
    app = Flask(name, instance_path=str(Path(instance_path).absolute()), root_path=str(Path(__file__).parent))
    app.config.update({"TESTING": True, "SECRET_KEY": "not secret", **config})
    return app


def close_app(app: Flask) -> None:
    """End what the extension runs for the app in this process."""
    if EXTENSION in app.extensions:
        runtime_of(app).close()


def new_task(id: str = "task", **fields: Any) -> AsyncRouteTask:
    """Return a record as a start makes it."""
    given: dict[str, Any] = {
        "id": id,
        "async_route_id": "[Put]/work",
        "endpoint": "work",
        "state": State.NOT_STARTED,
        "cancellable": True,
        "user": None,
        "url": "http://localhost/work",
        "method": "PUT",
        "created_us": 1_700_000_000_000_000,
        "retention_us": 86_400_000_000,
    }
    return AsyncRouteTask(**(given | fields))


def new_sqlite_store(path: Path, namespace: str = "test", create_tables: bool = True) -> TaskStore:
    """Return a store on an SQLite file, not opened yet."""
    return make_store(f"sqlite:///{path}", "", namespace, create_tables)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive() and thread.name.startswith("asyncroute")}


def _join(threads: set[threading.Thread]) -> set[threading.Thread]:
    """Wait for threads to end; return those that have not."""
    deadline = time.monotonic() + LEAK_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    return {thread for thread in threads if thread.is_alive()}


def _receivers() -> set[tuple[str, str, int]]:
    """Return the receivers that tests have connected; those of the package itself come and go with their apps."""
    found = set()
    for signal in _WATCHED:
        for receiver in list(signal.receivers.values()):
            function: Any = receiver() if isinstance(receiver, weakref.ref) else receiver
            if function is not None and not str(getattr(function, "__module__", "")).startswith(_OURS):
                found.add((signal.name, getattr(function, "__qualname__", repr(function)), id(function)))
    return found


def _source(condition: Callable[[], Any]) -> str:
    try:
        return inspect.getsource(condition).strip()
    except (OSError, TypeError):
        return repr(condition)
