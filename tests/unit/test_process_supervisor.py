"""The fork server and its children: how each ends, and what an app may do while it is imported."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flask_asyncroute.executors.base import ChildSettings
from flask_asyncroute.executors.process import protocol
from flask_asyncroute.executors.process.supervisor import Child, ForkServer
from tests.unit.test_kill_pipe import is_alive

Eventually = Callable[..., Any]
APP = """
import os, socket, sqlite3, threading, time
from flask import Flask
from flask_asyncroute import AsyncRoute
imported_in = os.getpid()
{doing}
app = Flask(__name__)
AsyncRoute(app)
app.config["ASYNCROUTE_STORE"] = "memory://"
"""
VALUES: tuple[dict[str, Any], list[str]] = ({"ASYNCROUTE_STORE": "memory://"}, [])
WARNING = "or opens files or connections at import"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ForkServer]]:
    """Return ``serve(doing="")``, which creates a fork server for an app that runs this code on
    import.
    """
    made: list[ForkServer] = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(doing: str = "") -> ForkServer:
        (tmp_path / "served_app.py").write_text(APP.format(doing=doing))
        made.append(ForkServer(ChildSettings("served_app", *VALUES, 1024)))
        return made[-1]

    yield make
    for server in made:
        server.close()


def pid_of(server: ForkServer) -> int:
    assert server.pid
    return server.pid


def ready(child: Child) -> int:
    """Wait until a child has loaded the app; return its pid."""
    kind, payload = next(child.listen())
    assert kind == protocol.READY, payload
    return int(payload)


def test_a_closed_server_ends_after_its_last_child(
    serve: Callable[..., ForkServer], eventually: Eventually
) -> None:
    server = serve()
    children = [server.start() for _ in range(2)]
    pids = [ready(child) for child in children]
    parent = pid_of(server)
    assert all(map(is_alive, [*pids, parent]))
    server.close()
    children[0].drop()
    eventually(lambda: not is_alive(pids[0]))
    assert is_alive(pids[1]) and is_alive(parent)
    children[1].kill()
    assert children[1].is_gone(5)
    assert children[1].status == -signal.SIGKILL
    children[1].drop()
    eventually(lambda: not os.path.exists(f"/proc/{parent}"))


def test_a_server_leaves_the_session_of_its_parent_before_it_imports_anything(
    serve: Callable[..., ForkServer],
) -> None:
    """Otherwise, Ctrl-C interrupts imports, and each process logs a KeyboardInterrupt."""
    server = serve()
    child = server.start()
    assert os.getsid(pid_of(server)) == pid_of(server)
    ready(child)
    child.drop()


def test_a_server_ends_when_its_object_is_collected(
    serve: Callable[..., ForkServer], eventually: Eventually
) -> None:
    server = ForkServer(ChildSettings("flask_asyncroute", *VALUES, 1024))
    server.start().drop()
    parent = pid_of(server)
    del server
    gc.collect()
    eventually(lambda: not os.path.exists(f"/proc/{parent}"))


def test_a_child_without_a_job_ends_when_its_parent_disconnects(
    serve: Callable[..., ForkServer],
) -> None:
    child = serve().start()
    ready(child)
    child.channel.close()
    assert child.is_gone(5)
    assert child.status == 0
    child.drop()


def test_a_child_makes_its_socket_blocking(
    serve: Callable[..., ForkServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under gevent, sockets are not blocking: a child that read before its parent wrote found no
    data and exited.
    """
    pair = socket.socketpair

    def pair_of_gevent(*args: Any) -> tuple[socket.socket, socket.socket]:
        ours, theirs = pair(*args)
        theirs.setblocking(False)
        return ours, theirs

    monkeypatch.setattr(socket, "socketpair", pair_of_gevent)
    child = serve().start()
    ready(child)
    assert not child.is_gone(0.3)
    child.drop()


def test_a_request_after_close_starts_a_new_server(
    serve: Callable[..., ForkServer],
) -> None:
    server = serve()
    server.start().drop()
    server.close()
    child = server.start()
    assert ready(child)
    child.drop()


def test_a_child_can_be_killed_before_it_is_forked(serve: Callable[..., ForkServer]) -> None:
    """The fork server is still importing the app."""
    child = serve("time.sleep(0.3)").start()
    child.kill()
    assert child.is_gone(5)
    assert child.status == -signal.SIGKILL
    child.drop()


@pytest.mark.parametrize(
    ("doing", "is_warned"),
    [
        ("", False),
        ("log = open('log', 'a')", False),
        (
            "log = open('log', 'w'); devices = open('/dev/urandom', 'rb'), open('/dev/null', "
            "'r+b', 0)",
            False,
        ),
        ("thread = threading.Thread(target=int); thread.start(); thread.join()", False),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", True),
        ("held = socket.socket()", True),
        (
            "held = sqlite3.connect('x.db'); held.execute('CREATE TABLE IF NOT EXISTS t (a)'); "
            "held.commit()",
            True,
        ),
        ("held = os.pipe()", True),
        ("open('data', 'w').close(); held = open('data', 'rb')", True),
    ],
)
def test_a_warning_if_children_cannot_share_open_files_or_threads(
    serve: Callable[..., ForkServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    doing: str,
    is_warned: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    server = serve(doing)
    for _ in range(2):
        child = server.start()
        assert ready(child)
        child.drop()
    written = capfd.readouterr().err
    assert written.count(WARNING) == is_warned, written


@pytest.mark.parametrize(
    ("doing", "error"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("import no_such_module", "no_such_module"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("this is no Python", "SyntaxError"),
    ],
)
def test_each_child_reports_an_error_while_the_app_is_imported(
    serve: Callable[..., ForkServer], capfd: pytest.CaptureFixture[str], doing: str, error: str
) -> None:
    server = serve(doing)
    for _ in range(2):
        child = server.start()
        kind, payload = next(child.listen())
        assert kind == protocol.OUTCOME
        ending = msgspec.json.decode(payload, type=protocol.Ending)
        assert ending.error is not None
        assert (
            ending.error.startswith("ConfigurationError: ASYNCROUTE_APP: loading 'served_app'")
            and error in ending.error
        )
        child.leave(5)
    assert "fork server could not import the app" in capfd.readouterr().err


def test_a_child_ends_if_the_import_of_the_app_kills_the_server(
    serve: Callable[..., ForkServer],
) -> None:
    """No caller waits forever, and the next start fails in the same way."""
    server = serve("os._exit(3)")
    for _ in range(2):
        child = server.start()
        assert list(child.listen()) == []
        assert child.status is None
        child.drop()
