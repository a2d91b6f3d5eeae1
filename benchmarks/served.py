"""The app that gunicorn serves for the benchmarks of stops and killed workers, and its server.

This module is also the configuration of that gunicorn: ``--config python:benchmarks.served``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from flask import Flask, Response, jsonify
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from flask_asyncroute import AsyncRoute, TaskAborted, current_task

from .hotpath import PATIENCE, wait_until
from .peers.processes import Process, free_port

WORKERS = 2
THREADS = 4
POLL = 0.002
"""Seconds between two checks of the journal, or of a task, by the client."""
POSTGRESQL = "TEST_POSTGRESQL_URL"
"""Environment variable with the URL of a PostgreSQL server whose user may create databases."""
DEFAULT_POSTGRESQL = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
WORK_SECONDS = 0.2
"""Duration of a ``PUT /restartable`` task after the gate has been opened."""
GATE_SECONDS = 0.02
"""Seconds between two checks of the gate."""
STOPPED = {
    "Id": "cacf8d5b-99db-4fd1-a911-f5869807a618", "AsyncRouteId": "[Put]/endless",
    "State": "Aborted", "IsCompleted": True, "Cancellable": True,
    "CreationTime": "2026-01-01T00:00:00.000000Z", "StartingTime": "2026-01-01T00:00:00.003000Z",
    "CompletedTime": "2026-01-01T00:00:00.300000Z", "ExpireTime": "2026-01-01T10:00:00.003000Z",
    "Error": "Aborted by the user", "Stopping": True, "Url": "http://127.0.0.1:50000/endless",
    "Method": "PUT",
    "Sse": {
        "Group": "/endless", "Url": "/task/cacf8d5b-99db-4fd1-a911-f5869807a618/events",
        "SendResult": False,
    },
}  # fmt: skip
"""The response of the plain view: that of a stop."""

async_routes = AsyncRoute()


def post_worker_init(worker: Any) -> None:
    """Run tasks before the first request."""
    async_routes.start(worker.wsgi)


def create_app(folder: str, store: str, max_workers: int) -> Flask:
    """Return the app with ``PUT /endless``, ``PUT /restartable``, ``DELETE /plain``, and ``GET
    /pid``.

    :param folder: for the store of SQLite, the journal and the gate.
    :param store: ``ASYNCROUTE_STORE``.
    :param max_workers: ``max_workers`` of ``PUT /restartable``.
    """
    app = Flask("served", instance_path=folder)
    app.config.update(ASYNCROUTE_STORE=store)
    journal, gate = Journal(Path(folder)), gate_of(Path(folder))

    @app.put("/endless")
    @async_routes.task
    def endless() -> None:
        journal.write("begin", current_task.id)
        try:
            while True:
                current_task.sleep(1)
                current_task.check()
        except TaskAborted:
            journal.write("stopped", current_task.id)
            raise

    @app.put("/restartable")
    @async_routes.task(max_workers=max_workers, on_loss="restart")
    def restartable() -> None:
        journal.write("begin", current_task.id)
        while not gate.exists():
            current_task.sleep(GATE_SECONDS)
        current_task.sleep(WORK_SECONDS)
        journal.write("end", current_task.id)

    @app.delete("/plain")
    def plain() -> Response:
        response = jsonify(STOPPED)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Vary"] = "Accept, Authorization, Cookie"
        return response

    @app.get("/pid")
    def pid() -> dict[str, int]:
        return {"pid": os.getpid()}

    @app.after_request
    def add_pid(response: Response) -> Response:
        response.headers["X-Pid"] = str(os.getpid())
        return response

    async_routes.init_app(app)
    return app


@dataclass(frozen=True)
class Event:
    """One line of the journal.

    :param at: the monotonic time, which all processes of a Linux machine share.
    """

    what: str
    task_id: str
    pid: int
    at: float


class Journal:
    """A file in which the views of all processes record their events."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal"

    def write(self, what: str, task_id: str) -> None:
        """Record an event of this moment. Safe in any number of threads and processes."""
        line = json.dumps([what, task_id, os.getpid(), time.monotonic()]) + "\n"
        number = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(number, line.encode())
        finally:
            os.close(number)

    def read(self, what: str) -> list[Event]:
        """Return the events of one kind, oldest first."""
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [
            event for event in (Event(*json.loads(line)) for line in lines) if event.what == what
        ]

    def clear(self) -> None:
        """Delete all events."""
        self._path.unlink(missing_ok=True)


def gate_of(folder: Path) -> Path:
    """Return the file that lets ``PUT /restartable`` tasks end as soon as it exists."""
    return folder / "gate"


@dataclass(frozen=True)
class Answer:
    """A response.

    :param pid: the worker that sent it.
    :param sent_at: the monotonic time before the request.
    :param seconds: from the request until the whole response was read.
    """

    body: Any
    pid: int
    sent_at: float
    seconds: float


class Connection:
    """A kept connection to one worker. Call `close` at the end."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.pid = 0
        self.pid = self.send("GET", "/pid").pid

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def send(self, method: str, path: str, status: int = 200) -> Answer:
        """Send a request.

        :raises RuntimeError: if the response has another status, or is from another worker because
            the connection was lost.
        """
        sent_at = time.monotonic()
        self._http.request(method, path)
        response = self._http.getresponse()
        body = response.read()
        seconds = time.monotonic() - sent_at
        if response.status != status:
            raise RuntimeError(f"{method} {path} was answered {response.status}: {body[:300]!r}")
        answer = Answer(json.loads(body), int(response.headers["X-Pid"]), sent_at, seconds)
        if self.pid not in (0, answer.pid):
            raise RuntimeError(f"{method} {path} was answered by {answer.pid}, not {self.pid}.")
        return answer


@dataclass(frozen=True)
class Server:
    """A running gunicorn."""

    process: Process
    port: int
    folder: Path

    @property
    def journal(self) -> Journal:
        """The events of the views."""
        return Journal(self.folder)

    @property
    def gate(self) -> Path:
        """See :func:`gate_of`."""
        return gate_of(self.folder)

    @contextmanager
    def connections(self) -> Iterator[list[Connection]]:
        """Yield one connection to each worker, and close them at the end."""
        found: dict[int, Connection] = {}
        try:
            wait_until(lambda: self._connect(found), "A connection to each worker", POLL)
            yield list(found.values())
        finally:
            for connection in found.values():
                connection.close()

    def _connect(self, found: dict[int, Connection]) -> bool:
        """Open a connection; return whether each worker has one."""
        self.process.check()
        try:
            connection = Connection(self.port)
        except OSError:
            time.sleep(0.05)
            return False
        if found.setdefault(connection.pid, connection) is not connection:
            connection.close()
        return len(found) == WORKERS


@contextmanager
def running(store: str, max_workers: int = 2) -> Iterator[Server]:
    """Yield gunicorn with an empty store, and kill all its processes at the end.

    :param store: a name of `stores`.
    """
    folder = Path(mkdtemp(prefix="asyncroute-bench-"))
    try:
        with _empty(store) as url:
            port = free_port()
            app = f"benchmarks.served:create_app({str(folder)!r}, {url!r}, {max_workers})"
            command = [
                sys.executable, "-m", "gunicorn", "--config", "python:benchmarks.served",
                "--bind", f"127.0.0.1:{port}", "--no-control-socket", "--workers", str(WORKERS),
                "--threads", str(THREADS), "--keep-alive", "60", app,
            ]  # fmt: skip
            process = Process(command, folder / "log")
            try:
                yield Server(process, port, folder)
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stores() -> list[str]:
    """Return ``sqlite``, and ``postgresql`` if a PostgreSQL server responds."""
    try:
        engine = create_engine(_postgresql_url(), poolclass=NullPool)
        engine.connect().close()
    except (ImportError, SQLAlchemyError):
        return ["sqlite"]
    return ["sqlite", "postgresql"]


def _postgresql_url() -> str:
    return os.environ.get(POSTGRESQL, DEFAULT_POSTGRESQL)


@contextmanager
def _empty(store: str) -> Iterator[str]:
    """Yield the URL of an empty store. Drop it at the end, if it is a PostgreSQL database."""
    if store == "sqlite":
        yield "sqlite:///asyncroute.db"
        return
    name = f"asyncroute_bench_{os.getpid()}_{time.monotonic_ns()}"
    engine = create_engine(_postgresql_url(), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        url = make_url(_postgresql_url()).set(database=name)
        yield url.render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
