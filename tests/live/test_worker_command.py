"""``flask asyncroute worker`` beside a web server that runs no tasks itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_asyncroute.workers.recovery import UNSERVED_SECONDS
from tests.support.client import send
from tests.support.event_streams import Stream, told
from tests.support.processes import wait_until_gone
from tests.support.programs import ROOT
from tests.support.server import START, Server, gunicorn
from tests.support.worker_processes import WorkerProcess

from .test_gunicorn import crowd, lines, state
from .test_loss import FOUND_SECONDS, begin, task

pytestmark = pytest.mark.live

Eventually = Callable[..., Any]
STOPPED_SECONDS = 0.5
"""The time within which the view in a worker is asked to stop."""


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite:///asyncroute.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def app(tmp_path: Path, store_url: str) -> str:
    """Return the import string of an app whose web servers run no tasks."""
    return crowd(tmp_path, store=store_url, run_tasks=False, drain=1)


@pytest.fixture
def web(tmp_path: Path, app: str) -> Iterator[Server]:
    options = ("--workers", "2", "--threads", "4")
    with gunicorn(tmp_path / "log", app, *options, conf=START) as server:
        yield server
        server.assert_no_traceback()


@pytest.fixture
def start_worker(tmp_path: Path, app: str) -> Iterator[Callable[..., WorkerProcess]]:
    """Return ``start_worker(*options)``, which returns a worker that takes tasks."""
    started: list[WorkerProcess] = []

    def start(*options: str) -> WorkerProcess:
        worker = WorkerProcess(tmp_path / f"worker-{len(started)}.log", app, *options)
        started.append(worker)
        worker.start()
        return worker

    yield start
    for worker in started:
        worker.stop()
        assert "Traceback" not in worker.output(), worker.output()


def test_a_worker_runs_the_tasks_and_the_web_server_streams_them(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    waiting = send(web.port, "PUT", "/work/10").json()["Id"]
    assert state(web.port, waiting) == "NotStarted"
    worker = start_worker()
    with Stream(web.port, f"/task/{waiting}/events") as stream:
        assert told(stream.messages())[-1] == "Completed"
    for path in ("/work/200", "/child/200"):
        started = send(web.port, "PUT", path).json()["Id"]
        with Stream(web.port, f"/task/{started}/events") as stream:
            assert told(stream.messages())[-2:] == ["Running", "Completed"]
        (line,) = lines(tmp_path, "begin")[started]
        assert line.get("worker", line["pid"]) == worker.pid
    assert "Not run by workers" not in worker.output()


def test_a_stop_reaches_the_worker_at_once(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path, eventually: Eventually
) -> None:
    worker = start_worker()
    task_id, pid = begin(web.port, "/work/60000", tmp_path, eventually)
    assert pid == worker.pid
    stop = send(web.port, "DELETE", f"/task/{task_id}")
    assert stop.json()["State"] == "Aborted"
    (line,) = eventually(lambda: lines(tmp_path, "told")[task_id])
    assert line["at"] - stop.sent_at <= STOPPED_SECONDS


def test_running_tasks_end_before_the_worker_exits(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path, eventually: Eventually
) -> None:
    worker = start_worker("--drain", "20")
    running = [
        begin(web.port, path, tmp_path, eventually)[0] for path in ("/work/2000", "/child/2000")
    ]
    os.killpg(worker.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    eventually(lambda: "received SIGINT" in worker.output())
    waiting = send(web.port, "PUT", "/work/10").json()["Id"]
    assert worker.wait() == 0
    assert [state(web.port, task_id) for task_id in running] == ["Completed"] * 2
    assert state(web.port, waiting) == "NotStarted"
    assert "tasks had ended, 0 were aborted or requeued" in worker.output()


def test_tasks_that_do_not_end_in_time_are_aborted_or_restarted(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path, eventually: Eventually
) -> None:
    """After ASYNCROUTE_DRAIN. The exit code tells that tasks were cut off."""
    worker = start_worker()
    cut = [
        begin(web.port, path, tmp_path, eventually)[0]
        for path in ("/work/60000", "/deaf/60000", "/child/60000")
    ]
    again = begin(web.port, "/again/3000", tmp_path, eventually)[0]
    began = time.monotonic()
    worker.send(signal.SIGINT)
    assert worker.wait() == 1
    assert time.monotonic() - began <= 1 + 2
    assert [task(web.port, task_id)["Error"] for task_id in cut] == ["Server shutdown"] * 3
    assert state(web.port, again) == "NotStarted"
    start_worker()
    eventually(lambda: state(web.port, again) == "Completed", 10)
    assert len(lines(tmp_path, "begin")[again]) == 2


def test_a_second_signal_ends_the_worker_at_once(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path, eventually: Eventually
) -> None:
    """As if it had been killed: the web server detects that its tasks are lost."""
    worker = start_worker("--drain", "600")
    lost = begin(web.port, "/deaf/60000", tmp_path, eventually)[0]
    child, child_pid = begin(web.port, "/child/60000", tmp_path, eventually)
    worker.send(signal.SIGTERM)
    eventually(lambda: "received SIGTERM" in worker.output())
    worker.send(signal.SIGTERM)
    assert worker.wait(2) == -signal.SIGTERM
    for task_id in (lost, child):
        eventually(lambda task_id=task_id: state(web.port, task_id) == "Aborted", FOUND_SECONDS + 1)
        assert task(web.port, task_id)["Error"] == "Worker lost"
    wait_until_gone([child_pid], 2)


def test_a_killed_worker_is_replaced_by_another(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path, eventually: Eventually
) -> None:
    first = start_worker()
    again = begin(web.port, "/again/500", tmp_path, eventually)[0]
    os.kill(first.pid, signal.SIGKILL)
    second = start_worker()
    eventually(lambda: state(web.port, again) == "Completed", 10)
    assert [line["pid"] for line in lines(tmp_path, "begin")[again]] == [first.pid, second.pid]


def test_a_worker_for_some_routes_leaves_the_others(
    web: Server, start_worker: Callable[..., WorkerProcess], tmp_path: Path, eventually: Eventually
) -> None:
    chosen = start_worker("--route", "w*", "--route", "child", "--slots", "1")
    other = send(web.port, "PUT", "/slow/10").json()["Id"]
    ran = [begin(web.port, path, tmp_path, eventually) for path in ("/work/10", "/work/10")]
    assert {pid for _, pid in ran} == {chosen.pid}
    assert "Slots: child 1, work 1." in chosen.output()
    assert state(web.port, other) == "NotStarted"
    message = "Tasks of these endpoints wait, but no running worker takes them: slow."
    both = (web.output, chosen.output)
    eventually(
        lambda: sum(output().count(message) for output in both) == 1, 2 * UNSERVED_SECONDS + 5
    )
    start_worker("--route", "slow")
    eventually(lambda: state(web.port, other) == "Completed", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--route", "x*"], "'x*' matches no async route. Use one of these endpoints: again,"),
        (["--slots", "0"], "0 is not in the range x>=1"),
        (["--drain", "-1"], "-1 is invalid; use seconds from 0 to 31622400."),
        (["--drain", "nan"], "nan is invalid; use seconds from 0 to"),
        (["--drain", "inf"], "inf is invalid; use seconds from 0 to"),
        (["--drain", "long"], "'long' is not a valid float"),
    ],
)
def test_a_wrong_option_is_a_usage_error(tmp_path: Path, options: list[str], message: str) -> None:
    code, text = usage_error(crowd(tmp_path), *options)
    assert code == 2 and message in text


def test_a_worker_refuses_a_store_in_memory(tmp_path: Path) -> None:
    code, text = usage_error(crowd(tmp_path, store="memory://"))
    assert code == 2 and "Use the default store or PostgreSQL." in text


MIXED = """
from flask import Flask
from flask_asyncroute import AsyncRoute

app = Flask(__name__)
async_routes = AsyncRoute(app)


@app.post("/at-once")
@async_routes.task(executor="immediate")
def at_once():
    return 1
"""


def test_a_worker_refuses_routes_that_it_cannot_run(tmp_path: Path) -> None:
    module = tmp_path / "mixed.py"
    module.write_text(MIXED)
    code, text = usage_error(str(module))
    assert code == 2 and "a worker has nothing to do" in text
    module.write_text(
        MIXED + "\n@app.post('/work')\n@async_routes.task\ndef work():\n    return 2\n"
    )
    code, text = usage_error(str(module), "--route", "at_once")
    assert code == 2 and "'at_once' has the executor immediate" in text
    with WorkerProcess(tmp_path / "log", str(module)) as worker:
        assert "Slots: work 2. Not run by workers: at_once (immediate)." in worker.output()


SIGNALLED = """
import pathlib, signal, threading, time

from flask import Flask
from flask_asyncroute import AsyncRoute

app = Flask(__name__)


@app.post("/work")
@AsyncRoute(app).task
def work():
    return 1


def end():
    while not pathlib.Path(__file__).with_name("now").exists():
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)


threading.Thread(target=end, daemon=True).start()
"""


def test_a_signal_that_another_thread_receives_ends_the_worker(tmp_path: Path) -> None:
    """The system can deliver a signal to any thread."""
    module = tmp_path / "signalled.py"
    module.write_text(SIGNALLED)
    with WorkerProcess(tmp_path / "log", str(module)) as worker:
        (tmp_path / "now").touch()
        assert worker.wait() == 0
        assert "received SIGTERM" in worker.output()


def usage_error(app: str, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", app, "asyncroute", "worker", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join(done.stderr.split())
