"""Children and their fork server: what becomes of them, whoever goes first, and what an app may do when it is imported."""

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

from flask_asyncroute.executors import frames
from flask_asyncroute.executors.children import Child, ForkServer
from tests.unit.test_leash import is_alive

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
ANEW = "or opens files or connections, when it is imported"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ForkServer]]:
    """Give ``serve(doing="")``: a fork server for an app that does so when it is imported."""
    made: list[ForkServer] = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(doing: str = "") -> ForkServer:
        (tmp_path / "served_app.py").write_text(APP.format(doing=doing))
        made.append(ForkServer("served_app", VALUES, 1024))
        return made[-1]

    yield make
    for server in made:
        server.close()


def pid_of(server: ForkServer) -> int:
    assert server._process is not None
    return server._process._pid


def ready(child: Child) -> int:
    """Wait until a child has loaded the app; return its pid."""
    kind, payload = next(child.listen())
    assert kind == frames.READY, payload
    return int(payload)


def test_a_server_ends_after_its_last_child(serve: Callable[..., ForkServer], eventually: Eventually) -> None:
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


def test_a_server_goes_with_the_object(serve: Callable[..., ForkServer], eventually: Eventually) -> None:
    server = ForkServer("flask_asyncroute", VALUES, 1024)
    server.start().drop()
    parent = pid_of(server)
    del server
    gc.collect()
    eventually(lambda: not os.path.exists(f"/proc/{parent}"))


def test_a_child_without_a_job_ends_with_its_parents_interest(serve: Callable[..., ForkServer]) -> None:
    child = serve().start()
    ready(child)
    child._channel.close()
    assert child.is_gone(5)
    assert child.status == 0
    child.drop()


def test_a_socket_that_does_not_block_is_made_to(
    serve: Callable[..., ForkServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under gevent none does, and a child that was quicker than its parent found nothing to read, and left."""
    pair = socket.socketpair

    def pair_of_gevent(*given: Any) -> tuple[socket.socket, socket.socket]:
        ours, theirs = pair(*given)
        theirs.setblocking(False)
        return ours, theirs

    monkeypatch.setattr(socket, "socketpair", pair_of_gevent)
    child = serve().start()
    ready(child)
    assert not child.is_gone(0.3)
    child.drop()


def test_a_server_that_is_asked_again_after_its_end_begins_anew(serve: Callable[..., ForkServer]) -> None:
    server = serve()
    server.start().drop()
    server.close()
    child = server.start()
    assert ready(child)
    child.drop()


def test_a_child_is_killed_before_it_is_there(serve: Callable[..., ForkServer]) -> None:
    """The fork server is still busy with the import."""
    child = serve("time.sleep(0.3)").start()
    child.kill()
    assert child.is_gone(5)
    assert child.status == -signal.SIGKILL
    child.drop()


@pytest.mark.parametrize(
    ("doing", "is_anew"),
    [
        ("", False),
        ("log = open('log', 'a')", False),
        ("log = open('log', 'w'); devices = open('/dev/urandom', 'rb'), open('/dev/null', 'r+b', 0)", False),
        ("thread = threading.Thread(target=int); thread.start(); thread.join()", False),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", True),
        ("held = socket.socket()", True),
        ("held = sqlite3.connect('x.db'); held.execute('CREATE TABLE IF NOT EXISTS t (a)'); held.commit()", True),
        ("held = os.pipe()", True),
        ("open('data', 'w').close(); held = open('data', 'rb')", True),
    ],
)
def test_what_children_cannot_share_is_not_handed_on(
    serve: Callable[..., ForkServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    doing: str,
    is_anew: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    server = serve(doing)
    for _ in range(2):
        child = server.start()
        assert ready(child)
        child.drop()
    written = capfd.readouterr().err
    assert written.count(ANEW) == is_anew, written


@pytest.mark.parametrize(
    ("doing", "error"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("import no_such_module", "no_such_module"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("this is no Python", "SyntaxError"),
    ],
)
def test_an_app_that_cannot_be_imported_is_told_by_each_child(
    serve: Callable[..., ForkServer], capfd: pytest.CaptureFixture[str], doing: str, error: str
) -> None:
    server = serve(doing)
    for _ in range(2):
        child = server.start()
        kind, payload = next(child.listen())
        assert kind == frames.OUTCOME
        ending = msgspec.json.decode(payload, type=frames.Ending)
        assert ending.error is not None
        assert ending.error.startswith("ConfigurationError: ASYNCROUTE_APP: 'served_app'") and error in ending.error
        child.leave(5)
    assert "could not be imported beforehand" in capfd.readouterr().err


def test_an_app_that_kills_the_server_when_it_is_imported(serve: Callable[..., ForkServer]) -> None:
    """Nobody waits for ever; and the next time is like the first."""
    server = serve("os._exit(3)")
    for _ in range(2):
        child = server.start()
        assert list(child.listen()) == []
        assert child.status is None
        child.drop()
