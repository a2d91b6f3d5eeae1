"""``submit`` outside the processes that take tasks: in scripts, in ``flask shell``, and in the child
processes of ``executor="process"``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.apps import child_app, close_app
from tests.support.flow import Flow

STORES = ["sqlite", "postgresql"]
SCRIPT = """
import os
import sys

from flask import Flask, request
from flask_asyncroute import AsyncRoute

app = Flask("tool", instance_path=sys.argv[1])
app.config["ASYNCROUTE_STORE"] = sys.argv[2]
async_routes = AsyncRoute(app)


@app.post("/report/<int:year>")
@async_routes.task
def report(year):
    return [year, request.json, os.getpid()]


if sys.argv[3:] == ["submit"]:
    with app.app_context():
        print(async_routes.submit("report", {"year": 2026}, json=[os.getpid()]).id)
elif sys.argv[3:]:
    async_routes.start(app)
    with app.app_context():
        task = async_routes.wait(sys.argv[3], 30)
        year, [submitted_in], pid = task.result
        print(task.state, year, submitted_in != pid == os.getpid())
"""


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite:///asyncroute.db"
    return str(request.getfixturevalue("postgresql_url"))


def run(*command: str, text: str = "", **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], input=text, capture_output=True, text=True, timeout=100,
        env={**os.environ, **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_of_a_script_waits_for_a_runner(tmp_path: Path, store_url: str) -> None:
    """The script ends before a process that takes tasks begins."""
    script = tmp_path / "tool.py"
    script.write_text(SCRIPT, "utf-8")
    arguments = (str(script), str(tmp_path / "instance"), store_url)
    task_id = run(*arguments, "submit").strip()
    assert run(*arguments, task_id) == "Completed 2026 True\n"


def test_flask_shell_submits(tmp_path: Path) -> None:
    arguments = repr(["", str(tmp_path / "instance"), "sqlite:///asyncroute.db"])
    (tmp_path / "tool.py").write_text(SCRIPT.replace("sys.argv", arguments), "utf-8")
    typed = (
        "from tool import async_routes\nprint(async_routes.submit('report', {'year': 1}).state)\n"
    )
    found = run("-m", "flask", "--app", "tool", "shell", text=typed, PYTHONPATH=_path(tmp_path))
    assert "NotStarted" in found


def _path(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def children(tmp_path: Path, store_url: str) -> Iterator[Flow]:
    app = child_app.create_app(
        ASYNCROUTE_STORE=store_url, TESTING=True, instance_path=str(tmp_path / "instance")
    )
    yield Flow(app, app.extensions["child_app"])
    close_app(app)
    child_app.disconnect_receivers(app)


def test_a_child_process_submits_a_task(children: Flow, eventually: Callable[..., object]) -> None:
    headers = {"Asyncroute-Depth": "1"}
    task_id, child_pid = children.result("/submits/7", headers=headers)
    square, pid, user, depth = children.ended(task_id)["Result"]
    assert (square, user, depth) == (49, None, "1")
    assert pid == os.getpid() != child_pid


def test_a_child_process_cannot_submit_a_task_that_only_it_could_run(children: Flow) -> None:
    assert 'child process of executor="process" cannot' in children.error("/submits-at-once")


def test_a_child_process_cannot_submit_on_a_store_in_memory(tmp_path: Path) -> None:
    app = child_app.create_app(TESTING=True, instance_path=str(tmp_path))
    try:
        flow = Flow(app, app.extensions["child_app"])
        assert "memory://" in flow.error("/submits/7")
    finally:
        close_app(app)
        child_app.disconnect_receivers(app)
