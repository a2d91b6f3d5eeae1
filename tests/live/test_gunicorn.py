"""Several processes of real servers: any of them starts, finds and stops tasks, which survive the
process that accepted them.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.stress import test_workers as workers
from tests.support.apps.crowd import read_journal
from tests.support.client import Connection, send
from tests.support.server import START, Server, gunicorn

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
WORKERS = ("--workers", "2", "--threads", "4")


def crowd(folder: Path, **config: Any) -> str:
    """Return the import string of the app of `tests.support.apps.crowd` for a folder."""
    arguments = "".join(f", {name}={value!r}" for name, value in config.items())
    return f"tests.support.apps.crowd:create_app({str(folder)!r}{arguments})"


def lines(folder: Path, what: str) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of one kind that the runs of each task wrote."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_journal(folder):
        if line["what"] == what:
            found[line["id"]].append(line)
    return found


def state(port: int, task_id: str) -> Any:
    reply = send(port, "GET", f"/task/{task_id}")
    assert reply.status == 200, reply.body
    return reply.json()["State"]


def run_and_stop(server: Server, eventually: Eventually) -> None:
    """Run a task to its end; start another and stop it."""
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
def test_tasks_over_four_workers(tmp_path: Path, preload: bool) -> None:
    assert workers.run(tmp_path, 40, preload)


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_worker_classes(tmp_path: Path, eventually: Eventually, worker_class: str) -> None:
    with gunicorn(
        tmp_path / "log", crowd(tmp_path), "--workers", "2", "--worker-class", worker_class
    ) as server:
        run_and_stop(server, eventually)


@pytest.mark.parametrize("store", ["sqlite:///asyncroute.db", "memory://"])
def test_the_development_server(tmp_path: Path, eventually: Eventually, store: str) -> None:
    app = crowd(tmp_path, store=store)
    with Server(
        tmp_path / "log", "flask", "--app", app, "run", "--port", "0", "--no-reload"
    ) as server:
        run_and_stop(server, eventually)


@pytest.mark.covers("F36")
def test_an_app_that_was_used_before_the_fork(tmp_path: Path, eventually: Eventually) -> None:
    """Threads, pools and connections do not survive a fork, so the workers need their own."""
    module = tmp_path / "used_app.py"
    module.write_text(
        f"import time\n"
        f"from tests.support.apps.crowd import create_app\n"
        f"app = create_app({str(tmp_path)!r})\n"
        f"client = app.test_client()\n"
        f"task = client.put('/work/0').json\n"
        f"while client.get('/task/' + task['Id']).json['State'] != 'Completed':\n"
        f"    time.sleep(0.01)\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with gunicorn(
        tmp_path / "log", "used_app:app", *WORKERS, "--preload", environ=environ
    ) as server:
        ended = lines(tmp_path, "end")
        assert [line["pid"] for (line,) in ended.values()] == [server.pid]
        run_and_stop(server, eventually)
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


@pytest.mark.covers("F36")
@pytest.mark.parametrize("store", ["sqlite:///asyncroute.db", "memory://"])
def test_state_that_a_module_set_before_the_fork(
    tmp_path: Path, eventually: Eventually, store: str
) -> None:
    """The workers see its values and use connections of their own."""
    (tmp_path / "stateful_app.py").write_text(
        f"from flask import Flask\n"
        f"from flask_asyncroute import AsyncRoute\n"
        f"site = Flask('stateful_app', instance_path={str(tmp_path)!r})\n"
        f"site.config['ASYNCROUTE_STORE'] = {store!r}\n"
        f"async_routes = AsyncRoute(site)\n"
        f"with site.app_context():\n"
        f"    async_routes.state['hits'] = 0\n"
        f"@async_routes.route('/hit', methods=['POST'])\n"
        f"def hit():\n"
        f"    return async_routes.state.apply('hits', lambda hits: hits + 1)\n"
        f"app = site\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    workers = "1" if store == "memory://" else "2"
    with gunicorn(
        tmp_path / "log", "stateful_app:app", "--workers", workers, "--preload", environ=environ
    ) as server:
        tasks = [send(server.port, "POST", "/hit").json()["Id"] for _ in range(20)]
        eventually(lambda: all(state(server.port, task) == "Completed" for task in tasks), 20)
        found = [send(server.port, "GET", f"/task/{task}/result").json() for task in tasks]
        assert sorted(found) == list(range(1, 21))
        server.assert_no_traceback()


def test_two_services_of_one_namespace_log_a_warning_in_each_worker(
    tmp_path: Path, eventually: Eventually
) -> None:
    """Two workers of one app cause no warning. A second service causes one in each worker."""
    for module in ("front", "back"):
        (tmp_path / f"{module}.py").write_text(
            f"from flask import Flask\n"
            f"from flask_asyncroute import AsyncRoute\n"
            f"app = Flask('app', root_path={str(tmp_path / module)!r}, instance_path={str(tmp_path)!r})\n"
            f"app.extensions['async_routes'] = AsyncRoute(app)\n"
            f"@app.extensions['async_routes'].route('/report', methods=['POST'])\n"
            f"def report():\n"
            f"    return {module!r}\n"
        )
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    def serve(module: str) -> Server:
        (tmp_path / f"of-{module}").mkdir()
        log = tmp_path / f"of-{module}" / "log"
        return gunicorn(log, f"{module}:app", *WORKERS, environ=environ, conf=START)

    def warnings(server: Server) -> int:
        return server.output().count("ASYNCROUTE_NAMESPACE")

    with serve("front") as front:
        task = send(front.port, "POST", "/report").json()
        eventually(lambda: state(front.port, task["Id"]) == "Completed", 20)
        listed = "SELECT count(*) FROM asyncroute_workers"
        with closing(sqlite3.connect(tmp_path / "asyncroute.db")) as database:
            eventually(lambda: database.execute(listed).fetchone() == (2,), 20)
        assert warnings(front) == 0
        with serve("back") as back:
            eventually(lambda: (warnings(front), warnings(back)) == (2, 2), 20)
            task = send(back.port, "POST", "/report").json()
            eventually(lambda: state(back.port, task["Id"]) == "Completed", 20)
            assert (warnings(front), warnings(back)) == (2, 2)
            assert f"{str(tmp_path / 'front')!r} and {str(tmp_path / 'back')!r}" in front.output()


@pytest.mark.covers("F02")
def test_waiting_tasks_of_a_killed_worker_run_on_another_one(
    tmp_path: Path, eventually: Eventually
) -> None:
    """Each runs once, with its original request."""
    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS) as server:
        pids: set[int] = set()
        eventually(lambda: pids.add(send(server.port, "GET", "/pid").pid) or len(pids) == 2)
        with Connection(server.port) as connection:
            replies = [
                connection.send("PUT", f"/slow/{milliseconds}")
                for milliseconds in (60_000, 31, 32, 33)
            ]
        (victim,) = {reply.pid for reply in replies}
        running, *waiting = (reply.json()["Id"] for reply in replies)
        eventually(lambda: lines(tmp_path, "begin")[running], 10)
        os.kill(victim, signal.SIGKILL)

        eventually(
            lambda: all(state(server.port, task_id) == "Completed" for task_id in waiting), 20
        )
        begun = lines(tmp_path, "begin")
        assert [len(begun[task_id]) for task_id in waiting] == [1, 1, 1]
        assert {line["pid"] for task_id in waiting for line in begun[task_id]}.isdisjoint({victim})
        eventually(lambda: len(lines(tmp_path, "finished")) == 4)
        assert {found[0]["state"] for found in lines(tmp_path, "finished").values()} == {
            "Completed",
            "Aborted",
        }
        assert [len(found) for found in lines(tmp_path, "finished").values()] == [1, 1, 1, 1]
        assert state(server.port, running) == "Aborted"
        urls = [send(server.port, "GET", f"/task/{task_id}").json()["Url"] for task_id in waiting]
        assert [url.rpartition("/")[2] for url in urls] == ["31", "32", "33"]


@pytest.mark.covers("F02")
def test_waiting_tasks_of_a_killed_server_run_in_the_next(
    tmp_path: Path, eventually: Eventually
) -> None:
    """The workers need no request to begin, because ``post_worker_init`` calls ``start()``."""
    with gunicorn(tmp_path / "log", crowd(tmp_path), "--workers", "1", "--threads", "4") as server:
        with Connection(server.port) as connection:
            replies = [
                connection.send("PUT", f"/slow/{milliseconds}") for milliseconds in (60_000, 31, 32)
            ]
        waiting = [reply.json()["Id"] for reply in replies[1:]]
        os.killpg(server.pid, signal.SIGKILL)
    assert not any(task_id in lines(tmp_path, "begin") for task_id in waiting)

    with gunicorn(tmp_path / "log", crowd(tmp_path), *WORKERS, conf=START) as server:
        eventually(lambda: all(task_id in lines(tmp_path, "finished") for task_id in waiting), 20)
        assert [state(server.port, task_id) for task_id in waiting] == ["Completed", "Completed"]
        assert [len(lines(tmp_path, "begin")[task_id]) for task_id in waiting] == [1, 1]
        assert "Traceback" not in server.output()
