"""What servers do with bodies, streams, waits and signals, compared with the table in
`docs/howto/servers.rst`.

The tests start the servers with the commands of that page.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, AsyncRouteTask, State
from tests.support.client import Reply, send
from tests.support.event_streams import Stream
from tests.support.processes import is_running
from tests.support.server import START
from tests.support.waiting import eventually_true

from .test_gunicorn import lines

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
MakeApp = Callable[..., Flask]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "howto" / "servers.rst").read_text("utf-8")

BIN = Path(sys.executable).parent
DRAIN = 1
MAX_STREAMS = 2
SHORT = 2
"""The maximum age of streams in seconds in tests that wait for their end."""
ADAPTERS = {
    "WsgiToAsgi": "from asgiref.wsgi import WsgiToAsgi\nasgi_app = WsgiToAsgi(app)\n",
    "a2wsgi": "from a2wsgi import WSGIMiddleware\nasgi_app = WSGIMiddleware(app, workers=20)\n",
}
LOG_TRACEBACKS = ("cheroot", "hypercorn")
"""Servers that log their own tracebacks when they are stopped."""


@dataclass(frozen=True)
class Row:
    """A row of the table on the page."""

    name: str
    body: str
    others: str
    closed_tab: str
    tasks: str


def rows() -> list[Row]:
    """Return the rows of the table, without its header."""
    table = PAGE.partition(".. list-table::")[2].partition("\n.. raw:: html")[0]
    cells = [re.findall(r"- (.+)", row) for row in table.split("   * ")[1:]]
    return [Row(*each) for each in cells[1:]]


def row(name: str) -> Row:
    return next(row for row in rows() if row.name == name)


def commands() -> dict[str, str]:
    """Return the command that starts each server."""
    found = re.findall(r"^   # (.+)\n((?:   .+\\\n)*   .+)$", PAGE, re.MULTILINE)
    return {name: command.replace("\\\n", "") for name, command in found}


def file(name: str) -> str:
    """Return the content of a file on the page."""
    (found,) = re.findall(rf"   :caption: {name}\n\n((?: +.+\n|\n)+)", PAGE)
    return textwrap.dedent(found)


def test_the_page_has_a_command_for_each_server() -> None:
    names = [row.name for row in rows()]
    assert names == list(commands()) and len(names) >= 15


@dataclass
class Served:
    """A running server."""

    row: Row
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def start(self, path: str) -> str:
        """Start a task; return its id."""
        return str(send(self.port, "PUT", path).json()["Id"])

    def begin(self, *paths: str) -> tuple[list[str], int]:
        """Start tasks and wait until they run; return their ids and the process that runs them."""
        ids = [self.start(path) for path in paths]
        eventually_true(lambda: all(lines(self.folder, "begin")[task_id] for task_id in ids), 10)
        (pid,) = {lines(self.folder, "begin")[task_id][0]["pid"] for task_id in ids}
        return ids, pid

    def slots(self) -> int:
        """Return the number of free slots for streams and waits."""
        return int(send(self.port, "GET", "/slots").json()["Left"])

    def let_streams_last(self, seconds: int) -> None:
        """Set the maximum age of streams that begin later."""
        assert send(self.port, "PUT", f"/stream-age/{seconds}").status == 200

    def answers(self) -> bool:
        try:
            return send(self.port, "GET", "/pid").status == 200
        except (OSError, HTTPException):
            return False

    def log(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")


@contextmanager
def serving(
    row: Row, folder: Path, change: Callable[[str], str] = str, starts: bool = True
) -> Iterator[Served]:
    """Run a server with the command on the page; yield it.

    :param change: changes the command.
    :param starts: whether the process does what ``wsgi.py`` on the page does besides the import of
        the app. gunicorn calls ``start()`` in its configuration file.
    """
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = int(made.getsockname()[1])
    program, *arguments = shlex.split(change(commands()[row.name]).replace("8000", str(port)))
    if not (BIN / program).exists():
        pytest.skip(f"{program} is not installed")
    settings = f"{str(folder)!r}, drain={DRAIN}, max_streams={MAX_STREAMS}"
    (folder / "reports.py").write_text(
        "from tests.support.apps.served import create_app\n"
        f"app = create_app({settings})\n"
        "async_routes = app.extensions['async_routes']\n"
    )
    wsgi = file("wsgi.py") if starts else "from reports import app\n"
    (folder / "wsgi.py").write_text(wsgi + ADAPTERS.get(row.name.split()[-1], ""))
    (folder / "serve.py").write_text(file("serve.py").replace("8000", str(port)))
    if program == "gunicorn":
        arguments += ["--no-control-socket"]
        (folder / "gunicorn.conf.py").write_text(START * starts)
    if row.name == "uvicorn, own WSGI":
        # It uses a2wsgi if it can import it.
        (folder / "a2wsgi.py").write_text("raise ModuleNotFoundError(__name__)\n")
    path = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(BIN / program), *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
    served = Served(row, folder, port, process)
    try:
        eventually_true(lambda: served.answers() or process.poll() is not None, 60, 0.05)
        assert process.poll() is None, served.log()
        yield served
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


@pytest.fixture(scope="module", params=rows(), ids=lambda row: row.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Yield each server of the page, for all tests of this module that use it, in their order."""
    with serving(request.param, tmp_path_factory.mktemp("served")) as found:
        yield found


def test_a_chunked_body_is_delivered_or_refused(served: Served, eventually: Eventually) -> None:
    def put(body: list[bytes]) -> Reply | None:
        try:
            return send(served.port, "PUT", "/body", body=body)
        except OSError:
            return None  # A refusal may close the connection before the body has been sent.

    reply = put([b"x" * 30_000] * 10)
    if served.row.body == "delivered":
        assert reply is not None and reply.status == 202
        path = reply.headers["location"]
        found = eventually(lambda: send(served.port, "GET", path).json().get("Result"))
        assert found == {"Size": 300_000}
    else:
        refusal = int(served.row.body)
        assert reply is None or reply.status == refusal
        assert eventually(lambda: put([b"x"])).status == refusal
        assert send(served.port, "GET", "/tasks?AsyncRouteId=body").json() == []


def test_an_event_reaches_the_client_while_the_task_waits_for_it(
    served: Served, eventually: Eventually
) -> None:
    task_id = served.start("/talk")

    def two_arrive() -> bool:
        """Return whether a stream brings an event and, once that is confirmed, the next one."""
        has_confirmed = False
        with Stream(served.port, f"/task/{task_id}/events") as stream:
            for message in stream.messages():
                if message.name == "word" and has_confirmed:
                    return True
                confirmation = served.folder / f"heard-{message.data.get('n')}"
                if message.name == "word" and not confirmation.exists():
                    confirmation.touch()
                    has_confirmed = True
        return False

    eventually(two_arrive, 30)
    (served.folder / "enough").touch()


def test_other_requests_are_answered_during_a_wait_or_soon_after(
    served: Served, eventually: Eventually
) -> None:
    task_id = served.start("/chatter")
    path = f"/task/{task_id}?wait=20"
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(send, served.port, "GET", path)
        others = eventually(
            lambda: (
                (served.slots() < MAX_STREAMS and "answered") or (wait.done() and "wait up to 5 s")
            ),
            30,
        )
        assert send(served.port, "DELETE", f"/task/{task_id}").status == 200
        reply = wait.result()
    assert others == served.row.others
    assert reply.json()["State"] == ("Aborted" if others == "answered" else "Running")
    assert reply.answered_at - reply.sent_at < 10


def test_closed_tabs_release_their_slots(served: Served, eventually: Eventually) -> None:
    task_id = served.start("/chatter")
    if served.row.closed_tab == "at its end":
        served.let_streams_last(SHORT)
    request = f"GET /task/{task_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    tabs = [socket.create_connection(("127.0.0.1", served.port), 30) for _ in range(4)]
    for tab in tabs:
        tab.sendall(request)
    assert tabs[0].recv(1000).startswith(b"HTTP/1.1 200")
    for tab in tabs:
        tab.close()
    eventually(lambda: served.slots() == MAX_STREAMS, 30, 0.05)
    assert send(served.port, "DELETE", f"/task/{task_id}").status == 200
    served.let_streams_last(300)


@pytest.mark.covers("F01", "F04")
def test_a_stop_while_a_stream_is_open(
    served: Served, eventually: Eventually, make_app: MakeApp
) -> None:
    """The stream ends, the process exits, and its tasks end as the page says."""
    bound = DRAIN + 2.0
    if served.row.tasks == "drained after open streams":
        served.let_streams_last(SHORT)
        bound += SHORT
    if patience := re.search(r"--graceful-timeout (\d+)", commands()[served.row.name]):
        bound += int(patience[1])
    tasks, pid = served.begin("/work/600", "/work/60000", "/once-more")
    stream = Stream(served.port, f"/task/{tasks[1]}/events")
    stream.until_begun()
    stop(served, pid, bound, eventually, stream)
    check_tasks(served, tasks, eventually, make_app)


@pytest.mark.covers("F04")
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("gunicorn, gevent", signal.SIGTERM),
        ("waitress", signal.SIGINT),
        ("flask run", signal.SIGINT),
    ],
    ids=["gunicorn, gevent", "waitress", "flask run"],
)
def test_a_stop_while_no_request_is_open(
    tmp_path: Path, eventually: Eventually, make_app: MakeApp, name: str, number: int
) -> None:
    """This holds without a call of ``start()`` as well."""
    with serving(row(name), tmp_path, starts=False) as served:
        tasks, pid = served.begin("/work/600", "/work/60000", "/once-more")
        stop(served, pid, DRAIN + 2.0, eventually, number=number)
    check_tasks(served, tasks, eventually, make_app)


@pytest.mark.covers("F04")
@pytest.mark.parametrize("option", ["", " --lazy-apps"], ids=["forked", "lazy-apps"])
def test_a_stop_of_uwsgi_while_no_request_is_open(
    tmp_path: Path, eventually: Eventually, make_app: MakeApp, option: str
) -> None:
    """uWSGI runs no exit hooks in a worker that still answers a request, so the signal waits."""
    stats = tmp_path / "stats"

    def change(command: str) -> str:
        return f"{command.replace(' --lazy-apps', '')} --stats {stats}{option}"

    with serving(row("uWSGI"), tmp_path, change, starts=False) as served:
        tasks, pid = served.begin("/work/600", "/work/60000", "/once-more")
        eventually(lambda: is_idle(stats))
        stop(served, pid, DRAIN + 2.0, eventually)
    served.row = replace(served.row, tasks="drained")
    check_tasks(served, tasks, eventually, make_app)


@pytest.mark.covers("F04")
def test_a_graceful_stop_of_uwsgi_while_a_stream_is_open(
    tmp_path: Path, eventually: Eventually, make_app: MakeApp
) -> None:
    """With the hook on the page, uWSGI waits for the stream, and the tasks are drained."""
    (hook,) = re.findall("--hook-master-start [^`]+", PAGE)

    def change(command: str) -> str:
        return command.replace("--die-on-term", hook)

    with serving(row("uWSGI"), tmp_path, change) as served:
        served.let_streams_last(SHORT)
        tasks, pid = served.begin("/work/600", "/work/60000", "/once-more")
        stream = Stream(served.port, f"/task/{tasks[1]}/events")
        stream.until_begun()
        stop(served, pid, SHORT + DRAIN + 2.0, eventually, stream)
    served.row = replace(served.row, tasks="drained")
    check_tasks(served, tasks, eventually, make_app)


@pytest.mark.covers("F01")
def test_tasks_are_lost_if_the_server_exits_without_exit_hooks(
    tmp_path: Path, eventually: Eventually, make_app: MakeApp
) -> None:
    """waitress does so at TERM, without the handler on the page."""
    with serving(row("waitress"), tmp_path, starts=False) as served:
        (task_id,), _ = served.begin("/work/60000")
        served.process.terminate()
        served.process.wait(5)
    find = next_process(served.folder, make_app)
    eventually(lambda: find(task_id).error == "Worker lost", 2)
    assert find(task_id).state is State.ABORTED


def is_idle(stats: Path) -> bool:
    """Return whether no worker of uWSGI serves a request, according to the socket of its stats
    server.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(stats))
        workers = json.load(connection.makefile())["workers"]
    return not any(core["in_request"] for worker in workers for core in worker["cores"])


def stop(
    served: Served,
    pid: int,
    bound: float,
    eventually: Eventually,
    stream: Stream | None = None,
    number: int = signal.SIGTERM,
) -> None:
    """Stop a server by a signal and check that it exits in time.

    :param pid: the process that runs its tasks.
    :param bound: the allowed seconds.
    :param stream: a stream to read until it ends, and then to close.
    """
    began = time.monotonic()
    served.process.send_signal(number)
    if stream is not None:
        with stream, suppress(HTTPException, ConnectionError):  # Some servers cut it off.
            while stream.read():
                pass
    eventually(lambda: not is_running(pid), bound)
    assert time.monotonic() - began <= bound
    served.process.wait(5)
    assert "Traceback" not in served.log() or served.row.name.startswith(LOG_TRACEBACKS)


def check_tasks(
    served: Served, tasks: list[str], eventually: Eventually, make_app: MakeApp
) -> None:
    """Check tasks from another process: one that finished in time, one that did not, one to
    restart.
    """
    quick, slow, again = tasks
    find = next_process(served.folder, make_app)
    if served.row.tasks.startswith("drained"):
        assert find(quick).state is State.COMPLETED
        assert find(slow).error == "Server shutdown"
        assert not find(slow).stopping
    else:
        eventually(lambda: find(slow).error == "Worker lost", 10)
    assert find(slow).state is State.ABORTED
    eventually(lambda: find(again).state is State.COMPLETED, 10)


def next_process(folder: Path, make_app: MakeApp) -> Callable[[str], AsyncRouteTask]:
    """Start a runner of the app in this process; return a function that gets a task by its id."""
    app = make_app(instance_path=folder, ASYNCROUTE_NAMESPACE="served")
    async_routes = AsyncRoute(app)

    @async_routes.route("/once-more", methods=["PUT"], on_loss="restart")
    def once_more() -> None:
        pass

    async_routes.start(app)

    def find(task_id: str) -> AsyncRouteTask:
        with app.app_context():
            task = async_routes.get(task_id)
        assert task is not None
        return task

    return find
