"""Children that die in every way: their own task fails and says how, and nobody else is harmed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_asyncroute.runtime import runtime_of
from tests import child_app
from tests.conftest import close_app, eventually_true
from tests.flow.driving import Flow
from tests.flow.test_processes import is_alive, unhook

Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def app_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    app = child_app.create_app(TESTING=True, instance_path=str(tmp_path_factory.mktemp("instance")))
    yield Flow(app, app.extensions["child_app"])
    close_app(app)
    unhook(app)


@pytest.fixture
def flow(app_of_all: Flow) -> Flow:
    return app_of_all


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """The app is that of all tests here."""


def server_pid(flow: Flow) -> int:
    """Return the pid of the fork server."""
    server = runtime_of(flow.app).runner._fork_server
    assert server is not None and server._process is not None
    return server._process._pid


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("exit0", "exit code 0"),
        ("exit3", "exit code 3"),
        ("exit255", "exit code 255"),
        ("signal9", "SIGKILL"),
        ("signal15", "SIGTERM"),
        ("signal6", "SIGABRT"),
        ("signal35", "signal 35"),
        ("segfault", "SIGSEGV"),
        ("processor", "SIGXCPU"),
        ("close", "exit code 0"),
        ("half", "exit code 5"),
        ("rubbish", "what it sent cannot be read"),
        ("huge", "what it sent cannot be read"),
        ("lie", "what it sent cannot be read"),
    ],
)
def test_f03_f06_f07_a_child_that_dies(flow: Flow, how: str, error: str) -> None:
    innocents = [flow.start("/sleep/0.3"), flow.start("/wait/0.3")]
    assert flow.error(f"/die/{how}") == f"Process died: {error}"
    assert [flow.ended(task)["State"] for task in innocents] == ["Completed", "Completed"]


def test_f03_a_child_killed_from_outside(flow: Flow) -> None:
    task = flow.start("/sleep/30.0")
    eventually_true(lambda: flow.get(task).get("Progress"))
    (pid,) = children_of(server_pid(flow))
    os.kill(pid, signal.SIGKILL)
    assert flow.ended(task, 1)["Error"] == "Process died: SIGKILL"


def test_a_child_that_floods_its_output(flow: Flow, capfd: Any) -> None:
    assert flow.result("/die/stdout") == "alive"


def test_a_crash_takes_the_rest_of_its_group_along(flow: Flow, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    task = flow.start(f"/family?pids={path}")
    eventually_true(lambda: flow.get(task).get("Progress"))
    pids = [int(pid) for pid in path.read_text().split()]
    os.kill(pids[0], signal.SIGKILL)
    assert flow.ended(task)["Error"] == "Process died: SIGKILL"
    eventually_true(lambda: not any(map(is_alive, pids)), 1)


def test_a_fork_server_that_was_killed_is_replaced(flow: Flow) -> None:
    """Tasks that run go on: their parent hears them still."""
    task = flow.start("/sleep/0.5")
    eventually_true(lambda: flow.get(task).get("Progress"))
    first = server_pid(flow)
    os.kill(first, signal.SIGKILL)
    assert flow.ended(task)["State"] == "Completed"
    assert flow.result("/where")["pid"]
    assert server_pid(flow) != first


def test_a_crash_whose_fork_server_is_gone_is_told_as_it_is(flow: Flow) -> None:
    task = flow.start("/sleep/30.0")
    eventually_true(lambda: flow.get(task).get("Progress"))
    (pid,) = children_of(server_pid(flow))
    os.kill(server_pid(flow), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    assert flow.ended(task)["Error"] == "Process died: exit status unknown"


def test_a_spare_that_died_is_replaced_silently(flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
    flow.result("/spare")
    pids = eventually_true(lambda: children_of(server_pid(flow)))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually_true(lambda: not any(map(is_alive, pids)))
    assert flow.result("/spare")["pid"] not in pids
    assert caplog.records == []


def test_a_child_cannot_be_started(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent has no more descriptors: the task fails and says so, the next one runs."""
    with monkeypatch.context() as patched:
        patched.setattr("os.pipe", full)
        assert flow.error("/where") == "OSError: [Errno 24] Too many open files"
    assert flow.result("/where")


def full() -> Any:
    raise OSError(24, "Too many open files")


def test_many_crashes_leave_no_descriptors(flow: Flow) -> None:
    flow.result("/where")

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(10):
        flow.error("/die/exit1")
        flow.result("/where")
    eventually_true(lambda: count() <= before)
    server = server_pid(flow)
    eventually_true(lambda: len(children_of(server)) <= 1)  # the spare
    assert len(os.listdir(f"/proc/{server}/fd")) < 15
