"""Waits on real servers: their resources and duration, and exits of the server meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import send
from tests.support.event_streams import Stream
from tests.support.programs import GRACE, PATIENCE, ROOT
from tests.support.server import gunicorn
from tests.support.waiting import eventually_true

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
DRAIN = 1.0
WAITS = 32

APP = """
import os
from flask_asyncroute.runtime import runtime_of
from tests.support.apps.news import create_app

app = create_app({folder!r}, drain={drain}, max_streams=40)


@app.get("/free_slots")
def free_slots():
    return {{"Left": runtime_of(app).runner.stream_slots._value}}

"""
PEOPLE = """
from flask_sqlalchemy import SQLAlchemy

app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///people.db"
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 20}
db = SQLAlchemy(app)
app.extensions["async_routes"].identity_loader(
    lambda: {"id": db.session.scalar(db.text("SELECT 'ann'"))}
)


@app.get("/pool")
def pool():
    return {"CheckedOut": db.engine.pool.checkedout()}

"""
ASGIREF = "from asgiref.wsgi import WsgiToAsgi\nasgi = WsgiToAsgi(app)\n"
A2WSGI = "from a2wsgi import WSGIMiddleware\nasgi = WSGIMiddleware(app)\n"
EXIT = (
    "import signal, sys\nif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:\n"
    "    signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
)
"""The signal handler for uvicorn from the page on deployment."""
STARTED = "app.extensions['async_routes'].start(app)\n"

UWSGI = "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])"
UVICORN = "-m uvicorn --port {port}"
SERVERS = {
    "gthread": ("gunicorn", "", "-m gunicorn --threads 4 -b 127.0.0.1:{port} served:app"),
    "sync": ("gunicorn", "", "-m gunicorn -b 127.0.0.1:{port} served:app"),
    "gevent": ("gevent", "", "-m gunicorn -k gevent -b 127.0.0.1:{port} served:app"),
    "uwsgi": (
        "pyuwsgi", "", "-c {uwsgi} --http-socket 127.0.0.1:{port} --master --threads 4 --virtualenv {prefix} "
        "--module served:app",
    ),
    "granian": ("granian", "", "-m granian --interface wsgi --port {port} served:app"),
    "hypercorn": ("hypercorn", "", "-m hypercorn -b 127.0.0.1:{port} wsgi:served:app"),
    "uvicorn": ("uvicorn", "", f"{UVICORN} --interface wsgi served:app"),
    "asgiref": ("uvicorn", ASGIREF, f"{UVICORN} served:asgi"),
    "a2wsgi": ("a2wsgi", A2WSGI, f"{UVICORN} served:asgi"),
}  # fmt: skip
"""A required module, code for the module of the app, and the command."""


@contextmanager
def serving(
    folder: Path, name: str, *options: str, before: str = "", after: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a server with the app; yield its process and port."""
    module, adapter, command = SERVERS[name]
    for needed in (module, "uvicorn" if adapter else module):
        pytest.importorskip(needed)
    source = APP.format(folder=str(folder), drain=DRAIN)
    (folder / "served.py").write_text(before + source + adapter + after)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    given = {"port": str(port), "uwsgi": UWSGI, "prefix": sys.prefix}
    arguments = [part.format(**given) for part in command.split()]
    path = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments, *options], cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
    try:
        eventually_true(lambda: answers(port), PATIENCE, 0.05)
        yield process, port
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def answers(port: int) -> bool:
    try:
        return send(port, "GET", "/pid").status == 200
    except OSError:
        return False


def running(port: int) -> str:
    task_id = str(send(port, "PUT", "/gate").json()["Id"])
    eventually_true(
        lambda: send(port, "GET", f"/task/{task_id}").json()["State"] == "Running", 10, 0.05
    )
    return task_id


def state_in_another_server(folder: Path, task_id: str) -> tuple[str, str | None]:
    options = ("--workers", "1", "--threads", "4")
    environ = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    with gunicorn(folder / "log2", "served:app", *options, environ=environ) as server:
        task = send(server.port, "GET", f"/task/{task_id}").json()
        return task["State"], task.get("Error")


@pytest.mark.parametrize("name", ["sync", "gevent", "uwsgi", "granian", "hypercorn", "a2wsgi"])
def test_a_wait_on_various_servers(tmp_path: Path, name: str) -> None:
    """Its status and headers are sent late. `test_servers` waits on each server."""
    with serving(tmp_path, name) as (_, port):
        started = send(port, "PUT", "/told/300", headers={"Prefer": "wait=10"})
        assert (started.status, started.json()["State"]) == (200, "Completed")
        assert started.headers["location"] == f"/task/{started.json()['Id']}"
        assert started.headers["preference-applied"].startswith("wait=")
        path = f"/task/{running(port)}?wait=0.3"
        answer = send(port, "GET", path)
        assert (answer.status, answer.json()["State"]) == (200, "Running")
        assert int(answer.headers["content-length"]) == len(answer.body)
        etag = answer.headers["etag"]
        head = send(port, "HEAD", path)
        assert (head.status, head.headers["etag"], head.body) == (200, etag, b"")
        unchanged = send(port, "GET", path, headers={"If-None-Match": etag})
        assert (unchanged.status, unchanged.headers["etag"], unchanged.body) == (304, etag, b"")
        assert send(port, "GET", "/free_slots").json()["Left"] == 40
    assert b"Traceback" not in (tmp_path / "log").read_bytes()


def test_many_waits_hold_no_connection_of_the_app(tmp_path: Path, eventually: Eventually) -> None:
    pytest.importorskip("flask_sqlalchemy")
    options = ("--threads", "40")
    with (
        serving(tmp_path, "gthread", *options, after=PEOPLE) as (_, port),
        ThreadPoolExecutor(WAITS) as clients,
    ):
        path = f"/task/{running(port)}?wait=20"
        replies = [clients.submit(send, port, "GET", path) for _ in range(WAITS)]
        eventually(lambda: send(port, "GET", "/free_slots").json()["Left"] == 40 - WAITS, 15, 0.05)
        assert send(port, "GET", "/pool").json() == {"CheckedOut": 0}
        assert send(port, "GET", path.partition("?")[0]).json()["User"] == "ann"
        (tmp_path / "open").touch()
        assert {reply.result(20).json()["State"] for reply in replies} == {"Completed"}


def test_a_long_wait_does_not_cause_a_sync_worker_to_be_killed(tmp_path: Path) -> None:
    with serving(tmp_path, "sync", "--timeout", "3") as (_, port):
        task_id = running(port)
        pid = send(port, "GET", "/pid").pid
        replies = [send(port, "GET", f"/task/{task_id}?wait=20") for _ in range(2)]
        with Stream(port, f"/task/{task_id}/events") as stream:
            assert b"".join(iter(stream.read, b"")).endswith(b"retry: 1000\n\n")
        assert all(reply.answered_at - reply.sent_at < 3 for reply in replies)
        assert {reply.json()["State"] for reply in replies} == {"Running"}
        assert send(port, "GET", "/pid").pid == pid
        assert send(port, "GET", f"/task/{task_id}").json()["State"] == "Running"
    assert b"WORKER TIMEOUT" not in (tmp_path / "log").read_bytes()


def test_under_asgiref_a_wait_or_a_closed_stream_delays_others_for_seconds(tmp_path: Path) -> None:
    with serving(tmp_path, "asgiref") as (_, port):
        task_id = running(port)
        reply = send(port, "GET", f"/task/{task_id}?wait=20")
        assert reply.answered_at - reply.sent_at < 12
        with Stream(port, f"/task/{task_id}/events") as stream:
            stream.until_begun()
        reply = send(port, "GET", "/pid")
        assert reply.answered_at - reply.sent_at < 12
    assert (tmp_path / "log").read_bytes().count(b"a2wsgi") == 1


@pytest.mark.parametrize(
    ("stop_by", "name"),
    [("term", "uvicorn"), ("term", "a2wsgi"), ("interrupt", "asgiref"), ("workers", "uvicorn")],
)
def test_uvicorn_exits_with_an_open_stream_and_drains(
    tmp_path: Path, name: str, stop_by: str
) -> None:
    number = signal.SIGINT if stop_by == "interrupt" else signal.SIGTERM
    options = ("--workers", "2") if stop_by == "workers" else ()
    handler, started = (EXIT, STARTED) if stop_by != "interrupt" else ("", "")
    with serving(tmp_path, name, *options, before=handler, after=started) as (process, port):
        task_id = running(port)
        with Stream(port, f"/task/{task_id}/events") as stream:
            stream.until_begun()
            process.send_signal(number)
            assert b"".join(iter(stream.read, b"")).endswith(b"retry: 1000\n\n")
        process.wait(GRACE)
    assert state_in_another_server(tmp_path, task_id) == ("Aborted", "Server shutdown")


JOINED = """
import threading
from concurrent.futures import ThreadPoolExecutor
from werkzeug.test import EnvironBuilder
from served import app

path = "/task/" + app.test_client().put("/gate").json["Id"]
pool = ThreadPoolExecutor()

def read(path):
    environ = EnvironBuilder(path, multithread=True).get_environ()
    for piece in app(environ, lambda *given: None):
        begun.release()
        print(piece[-40:], flush=True)

for kind in ("executor", "thread"):
    begun = threading.Semaphore(0)
    if kind == "executor":
        pool.submit(read, path + "/events")
    else:
        threading.Thread(target=read, args=(path + "/events",)).start()
    begun.acquire()
"""
FORKED = """
import multiprocessing

def serve():
    from served import app
    from tests.support.waiting import eventually_true
    client = app.test_client()
    path = "/task/" + client.put("/gate").json["Id"]
    eventually_true(lambda: client.get(path).json["State"] == "Running")
    print(path.rpartition("/")[2], flush=True)

multiprocessing.get_context("fork").Process(target=serve).start()
"""


def run(folder: Path, code: str) -> list[str]:
    source = APP.format(folder=str(folder), drain=DRAIN)
    (folder / "served.py").write_text(source)
    path = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, timeout=PATIENCE,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in found.stderr
    return found.stdout.splitlines()


def test_streams_end_before_python_joins_their_threads(tmp_path: Path) -> None:
    printed = run(tmp_path, JOINED)
    # Two threads print, and print() writes the end of a line separately.
    assert "".join(printed).count("retry: 1000") == 2


def test_a_forked_process_of_multiprocessing_drains(tmp_path: Path) -> None:
    (task_id,) = run(tmp_path, FORKED)
    assert state_in_another_server(tmp_path, task_id) == ("Aborted", "Server shutdown")
