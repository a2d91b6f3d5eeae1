"""Child processes under real servers: they start, stop, crash, and exit with their worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import send
from tests.support.server import Server, gunicorn

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
SERVERS = {
    "sync": ("--worker-class", "sync"),
    "gthread": ("--threads", "4"),
    "gevent": ("--worker-class", "gevent"),
    "sync-preload": ("--worker-class", "sync", "--preload"),
    "gthread-preload": ("--threads", "4", "--preload"),
    "gevent-preload": ("--worker-class", "gevent", "--preload"),
}
STORE = "sqlite:///asyncroute.db"


def app_in(folder: Path) -> str:
    """Return the import string of the app of `tests.support.apps.child_app` for a folder."""
    return f"tests.support.apps.child_app:create_app(ASYNCROUTE_STORE={STORE!r}, instance_path={str(folder)!r})"


@pytest.fixture(params=list(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with gunicorn(
        tmp_path / "log", app_in(tmp_path), "--workers", "2", *SERVERS[request.param]
    ) as running:
        yield running


def start(port: int, path: str) -> Any:
    reply = send(port, "POST", path)
    assert reply.status == 202, reply.body
    return reply.json()


def get(port: int, task: Any) -> Any:
    return send(port, "GET", f"/task/{task['Id']}").json()


def ended(port: int, task: Any, eventually: Eventually) -> Any:
    return eventually(
        lambda: (now := get(port, task))["IsCompleted"] and "Stopping" not in now and now, 15
    )


def descendants(pid: int) -> set[int]:
    """Return the pids of all descendants of a process."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(
                    Path(f"/proc/{entry}/stat").read_text("utf-8").rpartition(")")[2].split()[1]
                )
            except (FileNotFoundError, ProcessLookupError):
                pass
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def is_alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in "ZX"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_tasks_in_children_under_each_server(
    server: Server, tmp_path: Path, eventually: Eventually
) -> None:
    port = server.port
    task = ended(port, start(port, "/where"), eventually)
    assert task["State"] == "Completed", task
    assert task["Result"]["pid"] not in {server.pid, *server.workers()}
    assert task["Result"]["main"] is None

    # The worker answers while children run, and several run at once.
    both = [start(port, "/sleep/60.0") for _ in range(2)]
    eventually(lambda: all(get(port, task).get("Progress") for task in both))
    assert [get(port, task)["State"] for task in both] == ["Running", "Running"]
    for task in both:
        send(port, "DELETE", f"/task/{task['Id']}")
    assert [ended(port, task, eventually)["State"] for task in both] == ["Aborted", "Aborted"]

    task = start(port, "/spin")
    eventually(lambda: get(port, task).get("Progress"))
    began = time.monotonic()
    assert send(port, "DELETE", f"/task/{task['Id']}").json()["State"] == "Aborted"
    ended(port, task, eventually)
    assert time.monotonic() - began < 0.5

    assert ended(port, start(port, "/die/segfault"), eventually)["Error"] == "Process died: SIGSEGV"
    assert ended(port, start(port, "/brief"), eventually)["Error"] == "Timeout"
    assert ended(port, start(port, "/spare"), eventually)["State"] == "Completed"
    assert "Traceback" not in server.output(), server.output()


def test_children_of_a_killed_worker_are_killed(
    server: Server, tmp_path: Path, eventually: Eventually
) -> None:
    port = server.port
    path = tmp_path / "pids"
    task = start(port, f"/family?pids={path}")
    start(port, "/spare")
    eventually(lambda: get(port, task).get("Progress"))
    pids = {int(pid) for pid in path.read_text().split()}
    workers = server.workers()
    started = set().union(*map(descendants, workers))
    assert pids <= started
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)), 1)
    eventually(lambda: not any(map(is_alive, started)), 1)


def test_no_process_is_left_after_a_server_exits(
    server: Server, tmp_path: Path, eventually: Eventually
) -> None:
    port = server.port
    task = start(port, f"/family?pids={tmp_path / 'pids'}")
    start(port, "/spare")
    eventually(lambda: get(port, task).get("Progress"))
    started = descendants(server.pid)
    assert len(started) >= 5
    began = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    eventually(lambda: not any(map(is_alive, started)), 10)
    assert time.monotonic() - began < 8


def test_the_reloader_of_the_development_server_kills_children(
    tmp_path: Path, eventually: Eventually
) -> None:
    module = tmp_path / "reloaded_app.py"
    source = (
        f"from tests.support.apps import child_app\n"
        "app = child_app.create_app(ASYNCROUTE_APP='reloaded_app:app', "
        f"ASYNCROUTE_STORE={STORE!r}, "
        f"instance_path={str(tmp_path)!r})\n"
    )
    module.write_text(source)
    root = str(Path(__file__).parent.parent.parent)
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    command = ("flask", "--app", "reloaded_app:app", "--debug", "run", "--port", "0")
    with Server(tmp_path / "log", *command, environ=environ) as server:
        port = server.port
        assert ended(port, start(port, "/where"), eventually)["State"] == "Completed"
        path = tmp_path / "pids"
        task = start(port, f"/family?pids={path}")
        eventually(lambda: get(port, task).get("Progress"))
        pids = {int(pid) for pid in path.read_text().split()}
        module.write_text(source + "\n")
        eventually(lambda: not any(map(is_alive, pids)), 10)
