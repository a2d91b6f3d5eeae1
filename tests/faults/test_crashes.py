"""Child processes that crash in various ways: their own task fails with the reason, and other tasks
are not affected.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_asyncroute.executors.process.executor import fork_server_of
from flask_asyncroute.runtime import runtime_of
from tests.flow.test_processes import is_alive
from tests.support.apps import child_app, close_app
from tests.support.flow import Flow
from tests.support.waiting import eventually_true

Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def shared_flow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    app = child_app.create_app(TESTING=True, instance_path=str(tmp_path_factory.mktemp("instance")))
    yield Flow(app, app.extensions["child_app"])
    close_app(app)
    child_app.disconnect_receivers(app)


@pytest.fixture
def flow(shared_flow: Flow) -> Flow:
    return shared_flow


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Disable the check for leaks, because all tests share the app."""


def server_pid(flow: Flow) -> int:
    """Return the pid of the fork server."""
    return fork_server_of(runtime_of(flow.app).runner).pid


def children_of(pid: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    ]


@pytest.mark.covers("F03", "F06", "F07")
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
        ("rubbish", "it sent invalid data"),
        ("huge", "it sent invalid data"),
        ("lie", "it sent invalid data"),
    ],
)
def test_a_child_that_dies_fails_only_its_own_task(flow: Flow, how: str, error: str) -> None:
    others = [flow.start("/sleep/0.3"), flow.start("/wait/0.3")]
    assert flow.error(f"/die/{how}") == f"Process died: {error}"
    assert [flow.ended(task)["State"] for task in others] == ["Completed", "Completed"]


@pytest.mark.covers("F03")
def test_the_task_of_a_killed_child_fails(flow: Flow) -> None:
    task = flow.start("/sleep/30.0")
    eventually_true(lambda: flow.get(task).get("Progress"))
    (pid,) = children_of(server_pid(flow))
    os.kill(pid, signal.SIGKILL)
    assert flow.ended(task, 1)["Error"] == "Process died: SIGKILL"


def test_a_child_that_prints_very_much_completes(flow: Flow, capfd: Any) -> None:
    assert flow.result("/die/stdout") == "alive"


def test_a_crash_kills_the_process_group_of_the_child(flow: Flow, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    task = flow.start(f"/family?pids={path}")
    eventually_true(lambda: flow.get(task).get("Progress"))
    pids = [int(pid) for pid in path.read_text().split()]
    os.kill(pids[0], signal.SIGKILL)
    assert flow.ended(task)["Error"] == "Process died: SIGKILL"
    eventually_true(lambda: not any(map(is_alive, pids)), 1)


def test_a_fork_server_that_was_killed_is_replaced(flow: Flow) -> None:
    """Running tasks continue, because their children report to the parent."""
    task = flow.start("/sleep/0.5")
    eventually_true(lambda: flow.get(task).get("Progress"))
    first = server_pid(flow)
    os.kill(first, signal.SIGKILL)
    assert flow.ended(task)["State"] == "Completed"
    assert flow.result("/where")["pid"]
    assert server_pid(flow) != first


def test_a_crash_without_a_fork_server_has_an_unknown_exit_status(flow: Flow) -> None:
    task = flow.start("/sleep/30.0")
    eventually_true(lambda: flow.get(task).get("Progress"))
    (pid,) = children_of(server_pid(flow))
    os.kill(server_pid(flow), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    assert flow.ended(task)["Error"] == "Process died: exit status unknown"


def test_a_spare_that_died_is_replaced_without_a_log_message(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    flow.result("/spare")
    pids = eventually_true(lambda: children_of(server_pid(flow)))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually_true(lambda: not any(map(is_alive, pids)))
    assert flow.result("/spare")["pid"] not in pids
    assert caplog.records == []


def test_a_child_that_cannot_be_started_fails_its_task(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent has no more file descriptors. The next task runs."""
    with monkeypatch.context() as patched:
        patched.setattr("os.pipe", raise_too_many_files)
        assert flow.error("/where") == "OSError: [Errno 24] Too many open files"
    assert flow.result("/where")


def raise_too_many_files() -> Any:
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
    eventually_true(lambda: len(children_of(server)) <= 1)  # one spare child
    assert len(os.listdir(f"/proc/{server}/fd")) < 15
