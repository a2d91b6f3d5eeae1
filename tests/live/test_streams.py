"""Streams and waits on real servers: they end with their worker, and clients that are gone or asleep cost little."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from prove.client import Connection, Reply, send
from prove.exits import by_hup
from prove.following import Stream
from prove.losses import START
from prove.server import Server, gunicorn
from tests.test_docs import blocks

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
DRAIN = 1.0
OUT_SECONDS = DRAIN + 2.0


def serve(folder: Path, *options: str, before: str = "", **config: Any) -> Server:
    """Return a gunicorn of one worker, whose streams and waits learn of its end.

    :param before: code that runs in the worker before the app is made.
    """
    (folder / "gunicorn.conf.py").write_text(START)
    arguments = "".join(f", {name}={value!r}" for name, value in {"drain": DRAIN, "max_streams": 3, **config}.items())
    (folder / "news_app.py").write_text(
        f"{before}\nfrom flask_asyncroute.runtime import runtime_of\nfrom prove.apps.news import create_app\n"
        f"app = create_app({str(folder)!r}{arguments})\n"
        "@app.get('/places')\n"
        "def places():\n"
        "    return {'Left': runtime_of(app).runner.places._left}\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    config_file = str(folder / "gunicorn.conf.py")
    return gunicorn(
        folder / "log", "news_app:app", "--workers", "1", "--config", config_file, *options, environ=environ
    )


def running(port: int, eventually: Eventually, path: str = "/gate") -> str:
    task_id = str(send(port, "PUT", path).json()["Id"])
    eventually(lambda: send(port, "GET", f"/task/{task_id}").json()["State"] != "NotStarted", 10, 0.05)
    return task_id


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def rest(stream: Stream) -> bytes:
    return b"".join(iter(stream.read, b""))


def by_term(server: Server, pid: int) -> float:
    os.kill(pid, signal.SIGTERM)
    return time.monotonic()


def by_max_requests(server: Server, pid: int) -> float:
    for _ in range(100):
        try:
            send(server.port, "GET", "/pid")
        except OSError:
            break
        if "Autorestarting worker" in server.output():
            break
    return time.monotonic()


@pytest.mark.parametrize("store", ["sqlite:///asyncroute.db", "memory://"])
@pytest.mark.parametrize("how", [by_term, by_hup, by_max_requests])
@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_streams_and_waits_end_with_their_worker(
    tmp_path: Path, eventually: Eventually, worker_class: str, how: Callable[[Server, int], float], store: str
) -> None:
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    options = ["--worker-class", worker_class, "--threads", "8", "--keep-alive", "1"]
    if how is by_max_requests:
        options += ["--max-requests", "60"]
    with serve(tmp_path, *options, store=store) as server, ExitStack() as streams:
        task_id = running(server.port, eventually)
        (pid,) = server.workers()
        open_streams = [
            streams.enter_context(Stream(server.port, path)) for path in (f"/task/{task_id}/events", "/tasks/events")
        ]
        for stream in open_streams:
            stream.until_begun()
        with Connection(server.port) as connection:
            # Who keeps a connection holds up the exit by as long as the server waits for another request on it. That of
            # gthread is within what is promised; gevent only looks once a second.
            fields = {"Connection": "close"} if worker_class == "gevent" else {}
            path = f"/task/{task_id}?wait=20"
            thread, replies = in_background(lambda: connection.send("GET", path, headers=fields))
            eventually(lambda: places(server.port) == 0, 10, 0.05)
            began = how(server, pid)
            ends = [rest(stream) for stream in open_streams]
            streams_ended = time.monotonic() - began
            thread.join(10)
            if worker_class == "gevent":
                streams.close()
            eventually(lambda: pid not in server.workers(), 10)
            out = time.monotonic() - began
        assert [end[-len(b"retry: 1000\n\n") :] for end in ends] == [b"retry: 1000\n\n"] * 2
        assert len(replies) == 1 and isinstance(replies[0], Reply)
        assert (replies[0].status, replies[0].json()["State"]) == (200, "Running")
        assert streams_ended <= 1.5
        assert out <= OUT_SECONDS
        assert "Traceback" not in server.output()


def places(port: int) -> int:
    """Return how many more requests may be held open."""
    return int(send(port, "GET", "/places").json()["Left"])


def is_held(stream: Stream) -> bool:
    """Return whether a stream goes on: one for which there was no place comes whole, and says how long it is."""
    return stream.response.headers["Content-Length"] is None


def test_streams_end_with_a_sync_worker(tmp_path: Path, eventually: Eventually) -> None:
    with serve(tmp_path, "--worker-class", "sync") as server:
        task_id = running(server.port, eventually)
        (pid,) = server.workers()
        with Stream(server.port, f"/task/{task_id}/events") as stream:
            stream.until_begun()
            began = by_term(server, pid)
            assert rest(stream).endswith(b"retry: 1000\n\n")
            eventually(lambda: pid not in server.workers(), 10)
        assert time.monotonic() - began <= OUT_SECONDS
        assert "Traceback" not in server.output()


def test_streams_of_a_sync_worker_end_before_it_is_killed(tmp_path: Path, eventually: Eventually) -> None:
    """They are over after five seconds, as the only thread is taken; the next request is answered then."""
    with serve(tmp_path, "--worker-class", "sync", "--timeout", "8") as server:
        task_id = running(server.port, eventually)
        (pid,) = server.workers()
        for _ in range(2):
            began = time.monotonic()
            with Stream(server.port, f"/task/{task_id}/events") as stream:
                assert rest(stream).endswith(b"retry: 1000\n\n")
            assert 4.5 <= time.monotonic() - began <= 6.5
        assert send(server.port, "GET", f"/task/{task_id}").json()["State"] == "Running"
        assert server.workers() == [pid]


BEATS = 0.5
QUICK = f"from flask_asyncroute.http import streams\nstreams.HEARTBEAT_SECONDS = {BEATS}\nstreams.LATE_SECONDS = {2 * BEATS}"


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_f40_a_client_that_vanishes_frees_its_place_within_two_heartbeats(
    tmp_path: Path, eventually: Eventually, worker_class: str, with_reset: bool
) -> None:
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    with serve(tmp_path, "-k", worker_class, "--threads", "4", before=QUICK, max_streams=1) as server:
        task_id = running(server.port, eventually)
        for _ in range(3):
            with Stream(server.port, f"/task/{task_id}/events") as stream:
                stream.until_begun()
                assert is_held(stream)
                assert places(server.port) == 0
                if with_reset:
                    stream.reset()
            gone = time.monotonic()
            eventually(lambda: places(server.port) == 1, 10, 0.01)
            assert time.monotonic() - gone <= 2 * BEATS + 0.1


def test_f40_a_client_that_never_reads_costs_little(tmp_path: Path, eventually: Eventually) -> None:
    """What it does not take is left in the store, and the view that sends it is not held up."""
    count = 900
    with serve(tmp_path, "--threads", "4", before=QUICK, max_streams=1) as server:
        (pid,) = eventually(server.workers)
        task_id = running(server.port, eventually, f"/flood/{count}")
        with socket.create_connection(("127.0.0.1", server.port)) as asleep:
            asleep.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            asleep.sendall(f"GET /task/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            eventually(lambda: places(server.port) == 0, 10, 0.05)
            before = resident_kib(pid)
            eventually(lambda: send(server.port, "GET", f"/task/{task_id}").json()["State"] == "Completed", 60, 0.05)
            assert resident_kib(pid) - before < 40 * 1024, "54 MB were sent"
            asleep.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        eventually(lambda: places(server.port) == 1, 2 * BEATS + 1, 0.01)
        with Stream(server.port, f"/task/{task_id}/events") as stream:
            sent = [message.short for message in stream.messages() if message.name == "step"]
        assert sent == list(range(count)), "who reads gets all of it"


@contextmanager
def asleep(port: int, task_id: str) -> Iterator[None]:
    """Ask for the events of a task, and take none that come."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET /task/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        client.recv(1, socket.MSG_PEEK)
        yield


def flooded(port: int, eventually: Eventually) -> str:
    """Return a task that has ended, with more events than all buffers between here and there hold."""
    task_id = str(send(port, "PUT", "/flood/300").json()["Id"])
    eventually(lambda: send(port, "GET", f"/task/{task_id}").json()["State"] == "Completed", 60, 0.05)
    return task_id


def test_f40_a_client_that_never_reads_frees_its_thread_within_two_heartbeats(
    tmp_path: Path, eventually: Eventually
) -> None:
    """Of a task that runs, and of one that has ended, whose stream needs no place."""
    with serve(tmp_path, "--threads", "4", before=QUICK, max_streams=1) as server:
        task_id = running(server.port, eventually, "/flood/300")
        with asleep(server.port, task_id):
            eventually(lambda: places(server.port) == 0, 10, 0.01)
            eventually(lambda: places(server.port) == 1, 60, 0.05)
        eventually(lambda: send(server.port, "GET", f"/task/{task_id}").json()["State"] == "Completed", 60, 0.05)
        with ExitStack() as clients:
            for _ in range(4):
                clients.enter_context(asleep(server.port, task_id))
            # All four threads are taken, so this is answered when one is free again.
            assert send(server.port, "GET", f"/task/{task_id}").status == 200
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_f40_a_client_that_never_reads_holds_up_no_exit(
    tmp_path: Path, eventually: Eventually, worker_class: str
) -> None:
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    with serve(tmp_path, "-k", worker_class, "--threads", "4", "--keep-alive", "1") as server:
        (pid,) = eventually(server.workers)
        with asleep(server.port, flooded(server.port, eventually)):
            began = by_term(server, pid)
            eventually(lambda: pid not in server.workers(), 20)
            assert time.monotonic() - began <= OUT_SECONDS
        assert "Traceback" not in server.output()


def resident_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("ascii"))
    assert found is not None
    return int(found[1])


def test_streams_over_http(tmp_path: Path, eventually: Eventually) -> None:
    with serve(tmp_path, "--threads", "4") as server:
        task_id = str(send(server.port, "PUT", "/told/10").json()["Id"])
        path = f"/task/{task_id}/events"
        with Stream(server.port, path) as stream:
            assert stream.response.headers["Content-Type"] == "text/event-stream"
            assert stream.response.headers["Cache-Control"] == "no-store"
            *_, last = stream.messages()
        assert (last.name, last.data["State"]) == ("task.completed", "Completed")
        head = send(server.port, "HEAD", path)
        assert (head.status, head.headers["content-type"], head.body) == (200, "text/event-stream", b"")
        again = send(server.port, "GET", path, headers={"Last-Event-ID": str(last.id)})
        assert (again.status, again.body) == (204, b"")
        # On one connection that is kept, one after the other.
        with Connection(server.port) as connection:
            for method, status in (("HEAD", 200), ("GET", 200), ("GET", 200)):
                assert connection.send(method, path).status == status


def test_the_client_on_the_page_follows_a_task_through_two_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first ends after a second, in the middle; what the view sends is printed once each."""
    pytest.importorskip("sseclient")
    names: dict[str, Any] = {}
    (source,) = [block.values[0] for block in blocks() if "import SSEClient" in block.values[0]]
    exec(source, names)
    with serve(tmp_path, "--threads", "4", stream_age=1) as server:
        started = send(server.port, "PUT", "/burst/thread/990").json()
        done = names["follow"](f"http://127.0.0.1:{server.port}/task/{started['Id']}/events")
    assert done["State"] == "Completed"
    assert capsys.readouterr().out.count("step {") == 990


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_follows_a_task_to_its_end(tmp_path: Path) -> None:
    with serve(tmp_path, "--threads", "4") as server:
        address = f"http://127.0.0.1:{server.port}"
        started = json.loads(subprocess.check_output(["curl", "-s", "-X", "PUT", f"{address}/told/300"]))
        followed = subprocess.check_output(["curl", "-sN", f"{address}/task/{started['Id']}/events"], timeout=20)
        assert re.findall(rb"^event: (.*)$", followed, re.MULTILINE)[-1] == b"task.completed"
        prefer = ["-H", "Prefer: wait=10"]
        waited = subprocess.check_output(["curl", "-s", "-X", "PUT", *prefer, f"{address}/told/100"], timeout=20)
        assert json.loads(waited)["State"] == "Completed"
