"""Real servers, several processes: whichever answers, tasks start, are found, stop, and outlive the process that took them."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prove import workers
from prove.apps.crowd import read_journal
from prove.client import Connection, send
from prove.server import Server, gunicorn

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
WORKERS = ("--workers", "2", "--threads", "4")


def crowd(folder: Path, **config: Any) -> str:
    """Return how gunicorn and flask name the app of `prove.apps.crowd` for a folder."""
    arguments = "".join(f", {name}={value!r}" for name, value in config.items())
    return f"prove.apps.crowd:create_app({str(folder)!r}{arguments})"


def lines(folder: Path, what: str) -> dict[str, list[dict[str, Any]]]:
    """Return what the runs of each task wrote of a kind."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_journal(folder):
        if line["what"] == what:
            found[line["id"]].append(line)
    return found


def state(port: int, task_id: str) -> Any:
    reply = send(port, "GET", f"/task/{task_id}")
    assert reply.status == 200, reply.body
    return reply.json()["State"]


def live_through(server: Server, eventually: Eventually) -> None:
    """Start a task and see it end; start another and stop it."""
    port = server.port
    task = send(port, "PUT", "/work/50").json()
    eventually(lambda: state(port, task["Id"]) == "Completed")
    task = send(port, "PUT", "/work/20000").json()
    eventually(lambda: state(port, task["Id"]) == "Running")
    stop = send(port, "DELETE", f"/task/{task['Id']}")
    assert (stop.status, stop.json()["State"]) == (200, "Aborted")
    eventually(lambda: "Stopping" not in send(port, "GET", f"/task/{task['Id']}").json())
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("preload", [False, True])
def test_tasks_over_four_workers(preload: bool) -> None:
    workers.run(40, preload)


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_worker_classes(tmp_path: Path, eventually: Eventually, worker_class: str) -> None:
    with gunicorn(tmp_path / "log", crowd(tmp_path), "--workers", "2", "--worker-class", worker_class) as server:
        live_through(server, eventually)


@pytest.mark.parametrize("store", ["sqlite:///asyncroute.db", "memory://"])
def test_the_development_server(tmp_path: Path, eventually: Eventually, store: str) -> None:
    app = crowd(tmp_path, store=store)
    with Server(tmp_path / "log", "flask", "--app", app, "run", "--port", "0", "--no-reload") as server:
        live_through(server, eventually)


def test_f36_an_app_that_was_used_before_the_fork(tmp_path: Path, eventually: Eventually) -> None:
    """Threads, pools and connections of the parent do not exist in its children, which need their own."""
    module = tmp_path / "used_app.py"
    module.write_text(
        f"import time\n"
        f"from prove.apps.crowd import create_app\n"
        f"app = create_app({str(tmp_path)!r})\n"
        f"client = app.test_client()\n"
        f"task = client.put('/work/0').json\n"
        f"while client.get('/task/' + task['Id']).json['State'] != 'Completed':\n"
        f"    time.sleep(0.01)\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with gunicorn(tmp_path / "log", "used_app:app", *WORKERS, "--preload", environ=environ) as server:
        ended = lines(tmp_path, "end")
        assert [line["pid"] for (line,) in ended.values()] == [server.pid]
        live_through(server, eventually)
        seen: set[int] = set()

        def both_have_run() -> bool:
            with Connection(server.port) as connection:
                reply = connection.send("PUT", "/work/0")
                path = reply.headers["location"]
                eventually(lambda: connection.send("GET", path).json()["State"] == "Completed")
                seen.add(reply.pid)
            return seen == set(server.workers())

        eventually(both_have_run, 20)
        ran = {line["pid"] for found in lines(tmp_path, "end").values() for line in found}
        assert ran == {server.pid, *server.workers()}


def test_f02_waiting_tasks_of_a_killed_worker_run_elsewhere(tmp_path: Path, eventually: Eventually) -> None:
    """Once, and with their request as it was."""
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS) as server:
        pids: set[int] = set()
        eventually(lambda: pids.add(send(server.port, "GET", "/pid").pid) or len(pids) == 2)
        with Connection(server.port) as connection:
            replies = [connection.send("PUT", f"/slow/{milliseconds}") for milliseconds in (60_000, 31, 32, 33)]
        (victim,) = {reply.pid for reply in replies}
        running, *waiting = (reply.json()["Id"] for reply in replies)
        eventually(lambda: lines(tmp_path, "begin")[running], 10)
        os.kill(victim, signal.SIGKILL)

        eventually(lambda: all(state(server.port, task_id) == "Completed" for task_id in waiting), 20)
        begun = lines(tmp_path, "begin")
        assert [len(begun[task_id]) for task_id in waiting] == [1, 1, 1]
        assert {line["pid"] for task_id in waiting for line in begun[task_id]}.isdisjoint({victim})
        eventually(lambda: len(lines(tmp_path, "finished")) == 4)
        assert {found[0]["state"] for found in lines(tmp_path, "finished").values()} == {"Completed", "Aborted"}
        assert [len(found) for found in lines(tmp_path, "finished").values()] == [1, 1, 1, 1]
        assert state(server.port, running) == "Aborted"
        urls = [send(server.port, "GET", f"/task/{task_id}").json()["Url"] for task_id in waiting]
        assert [url.rpartition("/")[2] for url in urls] == ["31", "32", "33"]


def test_f02_waiting_tasks_of_a_killed_server_run_in_the_next(tmp_path: Path, eventually: Eventually) -> None:
    """With start() in post_worker_init its workers need no request to begin."""
    with gunicorn(tmp_path / "log", crowd(tmp_path), "--workers", "1", "--threads", "4") as server:
        with Connection(server.port) as connection:
            replies = [connection.send("PUT", f"/slow/{milliseconds}") for milliseconds in (60_000, 31, 32)]
        waiting = [reply.json()["Id"] for reply in replies[1:]]
        os.killpg(server.pid, signal.SIGKILL)
    assert not any(task_id in lines(tmp_path, "begin") for task_id in waiting)

    configuration = tmp_path / "gunicorn.conf.py"
    configuration.write_text(
        "def post_worker_init(worker):\n"
        "    app = worker.app.wsgi()\n"
        "    app.extensions['crowd'].start(app)\n"
    )  # fmt: skip
    options = ("--config", str(configuration), *WORKERS)
    with gunicorn(tmp_path / "log", crowd(tmp_path), *options) as server:
        eventually(lambda: all(task_id in lines(tmp_path, "finished") for task_id in waiting), 20)
        assert [state(server.port, task_id) for task_id in waiting] == ["Completed", "Completed"]
        assert [len(lines(tmp_path, "begin")[task_id]) for task_id in waiting] == [1, 1]
        assert "Traceback" not in server.output()
