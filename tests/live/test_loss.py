"""Workers are killed and servers shut down while tasks run: no task is lost or stays Running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import send
from tests.support.server import Server, gunicorn

from .test_gunicorn import crowd, lines, state

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
WORKERS = ("--workers", "2", "--threads", "4")
FOUND_SECONDS = 2.0
"""The time within which a lost worker on the same host is detected."""


def begin(port: int, path: str, folder: Path, eventually: Eventually) -> tuple[str, int]:
    """Start a task and wait until its view runs; return its id and the process that runs it."""
    task_id = send(port, "PUT", path).json()["Id"]
    (line,) = eventually(lambda: lines(folder, "begin")[task_id], 10)
    return task_id, line["pid"]


def task(port: int, task_id: str) -> Any:
    return send(port, "GET", f"/task/{task_id}").json()


def both_run(server: Server, eventually: Eventually) -> None:
    """Wait until two living workers have served a request and can therefore run tasks."""
    pids: set[int] = set()

    def two_answer() -> bool:
        try:
            pids.add(send(server.port, "GET", "/pid").pid)
        except OSError:  # The worker was just killed.
            return False
        return len([pid for pid in pids if not gone(pid)]) == 2

    eventually(two_answer, 10)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite:///asyncroute.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.mark.covers("F01")
def test_a_running_task_of_a_killed_worker_is_aborted(
    tmp_path: Path, eventually: Eventually, store_url: str
) -> None:
    with gunicorn(tmp_path / "log", crowd(tmp_path, store=store_url), *WORKERS) as server:
        both_run(server, eventually)
        task_id, pid = begin(server.port, "/work/60000", tmp_path, eventually)
        other_id = begin(server.port, "/work/1500", tmp_path, eventually)[0]
        if lines(tmp_path, "begin")[other_id][0]["pid"] == pid:
            other_id = ""
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: state(server.port, task_id) == "Aborted", FOUND_SECONDS)
        found = task(server.port, task_id)
        assert found["Error"] == "Worker lost"
        assert "Stopping" not in found and found["CompletedTime"] >= found["StartingTime"]
        if other_id:
            eventually(lambda: state(server.port, other_id) == "Completed", 5)
        finished = eventually(lambda: lines(tmp_path, "finished")[task_id])
        assert [line["state"] for line in finished] == ["Aborted"]
        assert len(lines(tmp_path, "begin")[task_id]) == 1
        # Only the arbiter logs that the worker was killed.
        assert "Traceback" not in server.output()


@pytest.mark.covers("F01")
def test_a_task_with_on_loss_restart_runs_again(tmp_path: Path, eventually: Eventually) -> None:
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS) as server:
        both_run(server, eventually)
        task_id, pid = begin(server.port, "/again/1500", tmp_path, eventually)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(lines(tmp_path, "begin")[task_id]) == 2, 5)
        eventually(lambda: state(server.port, task_id) == "Completed", 10)
        assert lines(tmp_path, "begin")[task_id][1]["pid"] != pid
        assert len(lines(tmp_path, "end")[task_id]) == 1


@pytest.mark.covers("F01")
def test_a_task_is_restarted_at_most_twice(tmp_path: Path, eventually: Eventually) -> None:
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS) as server:
        both_run(server, eventually)
        task_id, pid = begin(server.port, "/again/60000", tmp_path, eventually)
        for runs in (2, 3):
            os.kill(pid, signal.SIGKILL)
            both_run(server, eventually)
            pid = eventually(lambda runs=runs: lines(tmp_path, "begin")[task_id][runs - 1 :], 10)[
                0
            ]["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: state(server.port, task_id) == "Aborted", FOUND_SECONDS + 3)
        assert task(server.port, task_id)["Error"] == "Worker lost"
        assert len(lines(tmp_path, "begin")[task_id]) == 3


@pytest.mark.covers("F06")
def test_a_task_that_exits_its_process_is_lost(tmp_path: Path, eventually: Eventually) -> None:
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS) as server:
        both_run(server, eventually)
        task_id = send(server.port, "PUT", "/exit/1").json()["Id"]
        pid = eventually(lambda: lines(tmp_path, "begin")[task_id])[0]["pid"]
        eventually(lambda: gone(pid))
        eventually(lambda: state(server.port, task_id) == "Aborted", FOUND_SECONDS)
        assert task(server.port, task_id)["Error"] == "Worker lost"
        assert len(lines(tmp_path, "begin")[task_id]) == 1


def test_a_view_that_returns_in_a_forked_copy(tmp_path: Path, eventually: Eventually) -> None:
    """The copy writes no outcome and serves no requests."""
    with gunicorn(tmp_path / "log", crowd(tmp_path), "--workers", "1", "--threads", "4") as server:
        task_id = send(server.port, "PUT", "/fork").json()["Id"]
        eventually(lambda: state(server.port, task_id) == "Completed")
        assert task(server.port, task_id)["Result"] == {"Copy": False}
        assert "and the forked process returned from the view" in server.output()


def test_a_backup_of_the_folder_does_not_make_workers_look_dead(
    tmp_path: Path, eventually: Eventually
) -> None:
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS) as server:
        both_run(server, eventually)
        backups = [begin(server.port, "/copy", tmp_path, eventually)[0] for _ in range(2)]
        task_id, _ = begin(server.port, "/work/4000", tmp_path, eventually)
        eventually(lambda: state(server.port, task_id) != "Running", 15)
        assert state(server.port, task_id) == "Completed"
        assert [state(server.port, backup) for backup in backups] == ["Running", "Running"]


@pytest.mark.covers("F38")
def test_a_worker_with_a_blocked_interpreter_is_not_taken_for_dead(
    tmp_path: Path, eventually: Eventually
) -> None:
    """Its process answers no requests meanwhile."""
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS, "--timeout", "60") as server:
        both_run(server, eventually)
        task_id = begin(server.port, "/frozen/6000", tmp_path, eventually)[0]
        eventually(lambda: lines(tmp_path, "end")[task_id], 20)
        eventually(lambda: state(server.port, task_id) == "Completed", 5)
        assert len(lines(tmp_path, "begin")[task_id]) == 1


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.covers("F04")
@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
@pytest.mark.parametrize("how", ["TERM", "HUP", "max_requests"])
def test_tasks_of_a_worker_that_exits(
    tmp_path: Path, eventually: Eventually, how: str, worker_class: str
) -> None:
    """Running tasks may finish within the drain time. The others are aborted or wait for the next
    worker. Waiting tasks are kept.
    """
    options = [
        "--workers",
        "1",
        "--worker-class",
        worker_class,
        *(["--threads", "4"] * (worker_class == "gthread")),
    ]
    if how == "max_requests":
        options += ["--max-requests", "12"]
    app = crowd(tmp_path, drain=1)
    with gunicorn(tmp_path / "log", app, *options) as server:
        quick, pid = begin(server.port, "/work/700", tmp_path, eventually)
        slow = begin(server.port, "/work/60000", tmp_path, eventually)[0]
        deaf = begin(server.port, "/deaf/60000", tmp_path, eventually)[0]
        again = begin(server.port, "/again/5000", tmp_path, eventually)[0]
        child, child_pid = begin(server.port, "/child/60000", tmp_path, eventually)
        begin(server.port, "/slow/60000", tmp_path, eventually)
        waiting = send(server.port, "PUT", "/slow/10").json()["Id"]
        began = time.monotonic()
        if how == "max_requests":
            # Stop when it is logged. Another request would wait until the next worker has started.
            while "Autorestarting worker" not in server.output():
                send(server.port, "GET", "/pid")
        else:
            os.kill(server.pid, getattr(signal, f"SIG{how}"))
        eventually(lambda: gone(pid), 1 + 2 + (time.monotonic() - began))
        assert time.monotonic() - began <= 3.0
        eventually(lambda: gone(child_pid), 1)
        if how == "TERM":
            eventually(lambda: gone(server.pid), 2)

    with gunicorn(tmp_path / "log2", app, "--workers", "1", "--threads", "4") as server:
        port = server.port
        assert [state(port, task_id) for task_id in (quick, slow, deaf, child)] == [
            "Completed",
            *["Aborted"] * 3,
        ]
        assert {task(port, task_id)["Error"] for task_id in (slow, deaf, child)} == {
            "Server shutdown"
        }
        eventually(
            lambda: not any("Stopping" in task(port, task_id) for task_id in (slow, deaf)),
            FOUND_SECONDS,
        )
        eventually(lambda: state(port, waiting) == "Completed", 10)
        eventually(lambda: state(port, again) == "Completed", 10)
        assert len(lines(tmp_path, "begin")[waiting]) == 1
        assert len(lines(tmp_path, "begin")[again]) == 2
        assert lines(tmp_path, "told")[slow], "its view was asked to stop"
    for log in ("log", "log2"):
        text = (tmp_path / log).read_text()
        assert "Traceback" not in text, text


@pytest.mark.covers("F37")
def test_the_reloader_aborts_running_tasks(tmp_path: Path, eventually: Eventually) -> None:
    """A change of the code restarts the process. Running tasks delay the restart only briefly."""
    module = tmp_path / "reloaded.py"
    module.write_text(
        f"from tests.support.apps.crowd import create_app\napp = create_app({str(tmp_path)!r})\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = ("flask", "--app", "reloaded:app", "run", "--port", "0", "--debug")
    with Server(tmp_path / "log", *command, environ=environ) as server:
        task_id, pid = begin(server.port, "/work/60000", tmp_path, eventually)
        module.write_text(module.read_text() + "\n# changed\n")
        eventually(lambda: gone(pid), 10)
        ended = time.monotonic()
        finished = eventually(lambda: lines(tmp_path, "finished")[task_id], 3)
        assert finished[0]["state"] == "Aborted"
        asked_at = lines(tmp_path, "told")[task_id][0]["at"]
        assert ended - asked_at < 2.0
