"""Streams and waits on real servers: they end with their worker, and disconnected or stalled
clients cost little.
"""

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

from tests.support.client import Connection, Reply, send
from tests.support.event_streams import Stream
from tests.support.server import START, Server, gunicorn
from tests.test_docs import blocks

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
DRAIN = 1.0
OUT_SECONDS = DRAIN + 2.0


def serve(folder: Path, *options: str, before: str = "", **config: Any) -> Server:
    """Return a gunicorn with one worker, which ends its streams and waits when it exits.

    :param before: code that runs in the worker before the app is created.
    """
    arguments = "".join(
        f", {name}={value!r}"
        for name, value in {"drain": DRAIN, "max_streams": 3, **config}.items()
    )
    (folder / "news_app.py").write_text(
        f"{before}\nfrom flask_asyncroute.runtime import runtime_of\nfrom tests.support.apps.news import "
        "create_app\n"
        f"app = create_app({str(folder)!r}{arguments})\n"
        "@app.get('/free_slots')\n"
        "def free_slots():\n"
        "    return {'Left': runtime_of(app).runner.stream_slots._value}\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    return gunicorn(
        folder / "log", "news_app:app", "--workers", "1", *options, environ=environ, conf=START
    )


def running(port: int, eventually: Eventually, path: str = "/gate") -> str:
    task_id = str(send(port, "PUT", path).json()["Id"])
    eventually(
        lambda: send(port, "GET", f"/task/{task_id}").json()["State"] != "NotStarted", 10, 0.05
    )
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


def by_hup(server: Server, pid: int) -> float:
    return server.reload()


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
@pytest.mark.parametrize("end_worker", [by_term, by_hup, by_max_requests])
@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_streams_and_waits_end_with_their_worker(
    tmp_path: Path,
    eventually: Eventually,
    worker_class: str,
    end_worker: Callable[[Server, int], float],
    store: str,
) -> None:
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    options = ["--worker-class", worker_class, "--threads", "8", "--keep-alive", "1"]
    if end_worker is by_max_requests:
        options += ["--max-requests", "60"]
    with serve(tmp_path, *options, store=store) as server, ExitStack() as streams:
        task_id = running(server.port, eventually)
        (pid,) = server.workers()
        open_streams = [
            streams.enter_context(Stream(server.port, path))
            for path in (f"/task/{task_id}/events", "/tasks/events")
        ]
        for stream in open_streams:
            stream.until_begun()
        with Connection(server.port) as connection:
            # A kept connection delays the exit while the server waits for another request on it.
            # The delay of gthread is within the bound; gevent checks only once a second.
            fields = {"Connection": "close"} if worker_class == "gevent" else {}
            path = f"/task/{task_id}?wait=20"
            thread, replies = in_background(lambda: connection.send("GET", path, headers=fields))
            eventually(lambda: free_slots(server.port) == 0, 10, 0.05)
            began = end_worker(server, pid)
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


def free_slots(port: int) -> int:
    """Return the number of free slots for streams and waits."""
    return int(send(port, "GET", "/free_slots").json()["Left"])


def is_held(stream: Stream) -> bool:
    """Return whether a stream continues. A stream without a slot is sent whole, with its length."""
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


def test_streams_of_a_sync_worker_end_before_it_is_killed(
    tmp_path: Path, eventually: Eventually
) -> None:
    """They end after five seconds, because they use the only thread. The next request is then
    answered.
    """
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


HEARTBEAT = 0.5
QUICK = f"from flask_asyncroute.http import streams\nstreams.HEARTBEAT_SECONDS = {HEARTBEAT}\nstreams.LATE_SECONDS = {2 * HEARTBEAT}"


@pytest.mark.covers("F40")
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_a_disconnected_client_releases_its_slot_within_two_heartbeats(
    tmp_path: Path, eventually: Eventually, worker_class: str, with_reset: bool
) -> None:
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    with serve(
        tmp_path, "-k", worker_class, "--threads", "4", before=QUICK, max_streams=1
    ) as server:
        task_id = running(server.port, eventually)
        for _ in range(3):
            with Stream(server.port, f"/task/{task_id}/events") as stream:
                stream.until_begun()
                assert is_held(stream)
                assert free_slots(server.port) == 0
                if with_reset:
                    stream.reset()
            closed_at = time.monotonic()
            eventually(lambda: free_slots(server.port) == 1, 10, 0.01)
            assert time.monotonic() - closed_at <= 2 * HEARTBEAT + 0.1


@pytest.mark.covers("F40")
def test_a_client_that_never_reads_costs_little(tmp_path: Path, eventually: Eventually) -> None:
    """Unread events stay in the store, and the view that sends them is not delayed."""
    count = 900
    with serve(tmp_path, "--threads", "4", before=QUICK, max_streams=1) as server:
        (pid,) = eventually(server.workers)
        task_id = running(server.port, eventually, f"/flood/{count}")
        with socket.create_connection(("127.0.0.1", server.port)) as stalled_client:
            stalled_client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled_client.sendall(
                f"GET /task/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            )
            eventually(lambda: free_slots(server.port) == 0, 10, 0.05)
            before = resident_kib(pid)
            eventually(
                lambda: send(server.port, "GET", f"/task/{task_id}").json()["State"] == "Completed",
                60,
                0.05,
            )
            assert resident_kib(pid) - before < 40 * 1024, "54 MB were sent"
            stalled_client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        eventually(lambda: free_slots(server.port) == 1, 2 * HEARTBEAT + 1, 0.01)
        with Stream(server.port, f"/task/{task_id}/events") as stream:
            sent = [message.short for message in stream.messages() if message.name == "step"]
        assert sent == list(range(count)), "a client that reads gets all events"


@contextmanager
def stalled_client(port: int, task_id: str) -> Iterator[None]:
    """Request the events of a task without reading them."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET /task/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        client.recv(1, socket.MSG_PEEK)
        yield


def finished_flood(port: int, eventually: Eventually) -> str:
    """Return a finished task with more events than all buffers on the way can hold."""
    task_id = str(send(port, "PUT", "/flood/300").json()["Id"])
    eventually(
        lambda: send(port, "GET", f"/task/{task_id}").json()["State"] == "Completed", 60, 0.05
    )
    return task_id


@pytest.mark.covers("F40")
def test_a_client_that_never_reads_releases_its_thread_within_two_heartbeats(
    tmp_path: Path, eventually: Eventually
) -> None:
    """This holds for a running task and for a finished one, whose stream needs no slot."""
    with serve(tmp_path, "--threads", "4", before=QUICK, max_streams=1) as server:
        task_id = running(server.port, eventually, "/flood/300?gate=")
        with stalled_client(server.port, task_id):
            eventually(lambda: free_slots(server.port) == 0, 10, 0.01)
            eventually(lambda: free_slots(server.port) == 1, 60, 0.05)
        (tmp_path / "open").touch()
        eventually(
            lambda: send(server.port, "GET", f"/task/{task_id}").json()["State"] == "Completed",
            60,
            0.05,
        )
        with ExitStack() as clients:
            for _ in range(4):
                clients.enter_context(stalled_client(server.port, task_id))
            # All four threads are in use, so this is answered when one is free again.
            assert send(server.port, "GET", f"/task/{task_id}").status == 200
        assert "Traceback" not in server.output()


@pytest.mark.covers("F40")
@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_a_client_that_never_reads_does_not_delay_the_exit(
    tmp_path: Path, eventually: Eventually, worker_class: str
) -> None:
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    with serve(tmp_path, "-k", worker_class, "--threads", "4", "--keep-alive", "1") as server:
        (pid,) = eventually(server.workers)
        with stalled_client(server.port, finished_flood(server.port, eventually)):
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
        assert (head.status, head.headers["content-type"], head.body) == (
            200,
            "text/event-stream",
            b"",
        )
        again = send(server.port, "GET", path, headers={"Last-Event-ID": str(last.id)})
        assert (again.status, again.body) == (204, b"")
        # One after the other on a kept connection.
        with Connection(server.port) as connection:
            for method, status in (("HEAD", 200), ("GET", 200), ("GET", 200)):
                assert connection.send(method, path).status == status


def test_the_client_on_the_page_follows_a_task_through_two_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stream ends after a second. Each event of the view is printed once."""
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
        started = json.loads(
            subprocess.check_output(["curl", "-s", "-X", "PUT", f"{address}/told/300"])
        )
        followed = subprocess.check_output(
            ["curl", "-sN", f"{address}/task/{started['Id']}/events"], timeout=20
        )
        assert re.findall(rb"^event: (.*)$", followed, re.MULTILINE)[-1] == b"task.completed"
        prefer = ["-H", "Prefer: wait=10"]
        waited = subprocess.check_output(
            ["curl", "-s", "-X", "PUT", *prefer, f"{address}/told/100"], timeout=20
        )
        assert json.loads(waited)["State"] == "Completed"
