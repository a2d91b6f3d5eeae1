"""Tasks in child processes, over HTTP. They behave like tasks in threads, except for the
differences that separate processes cause.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, task_completed, task_failed, task_progressed, task_started
from flask_asyncroute.errors import ConfigurationError
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import PROGRESS, STATE
from tests.support.apps import child_app, close_app
from tests.support.flow import Flow
from tests.support.waiting import eventually_true

STORES = {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}


@pytest.fixture(scope="module")
def make_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Flow]]:
    """Return ``make_children(store)``, which returns the app of `child_app` on a store.

    All tests share one app, and so one fork server, per store.
    """
    made: dict[str, Flow] = {}

    def make(store: str) -> Flow:
        if store not in made:
            folder = tmp_path_factory.mktemp("instance")
            app = child_app.create_app(
                ASYNCROUTE_STORE=store, TESTING=True, instance_path=str(folder)
            )
            made[store] = Flow(app, app.extensions["child_app"])
        return made[store]

    yield make
    for flow in made.values():
        close_app(flow.app)
        child_app.disconnect_receivers(flow.app)


@pytest.fixture
def fresh_child(tmp_path: Path) -> Iterator[Flow]:
    """Return an app whose own fork server writes to the captured output."""
    app = child_app.create_app(TESTING=True, instance_path=str(tmp_path))
    yield Flow(app, app.extensions["child_app"])
    close_app(app)
    child_app.disconnect_receivers(app)


@pytest.fixture(params=list(STORES))
def children(request: pytest.FixtureRequest, make_children: Callable[[str], Flow]) -> Flow:
    return make_children(STORES[request.param])


@pytest.fixture
def child(make_children: Callable[[str], Flow]) -> Flow:
    """Return the app on ``memory://``, for tests that do not depend on the store."""
    return make_children("memory://")


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Disable the check for leaks, because the tests share apps with running threads."""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_each_task_runs_in_its_own_child(children: Flow) -> None:
    first, second = (children.result("/where") for _ in range(2))
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert first["session"] == first["group"] == first["pid"]
    assert first["prepared_in"] == first["pid"]
    assert first["main"] is None, "__main__ is not run in the child"
    assert first["loaded"] == 1
    assert first["threads"] == 1


def test_the_request_is_rebuilt_in_the_child(children: Flow) -> None:
    with children.client.session_transaction() as held:
        held["name"] = "Anna"
    found = children.result("/echo/5?a=1", json={"b": [2]}, headers={"X-Own": "own"})
    assert 0 < found.pop("remaining") <= 36000
    task_id = found.pop("id")
    assert children.get(task_id)["State"] == "Completed"
    assert found == {
        "number": 5, "fixed": "yes", "user": None, "args": {"a": "1"}, "form": {}, "json": {"b": [2]}, "header": "own",
        "session": "Anna", "url": "/plain", "size": 0, "app": "tests.support.apps.child_app",
    }  # fmt: skip


@pytest.mark.parametrize(
    "size", [0, 1, 8 * 1024, 8 * 1024 + 1, 256 * 1024, 256 * 1024 + 1, 20_000_000]
)
def test_bodies_of_any_size_arrive(children: Flow, size: int) -> None:
    assert children.result("/size", data=b"x" * size) == {"size": size}


def test_an_upload_arrives(children: Flow, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(os.urandom(400_000))
    with path.open("rb") as file:
        found = children.result("/echo/1", data={"file": (file, "name"), "a": "b"})
    assert (found["size"], found["form"]) == (400_000, {"a": "b"})


def test_results_of_a_child(children: Flow) -> None:
    assert children.run("/return/none").get("Result", "left out") == "left out"
    assert children.result("/return/list") == [1, None]
    assert children.result("/return/text") == "é\ufffd"
    assert len(children.result("/return/half")) == 1_000_000
    assert children.result("/async") == [1, 2]


@pytest.mark.covers("F09", "F11")
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/raise/value", r"ValueError: bad thing"),
        ("/raise/http", r"404 Not Found: no such thing"),
        ("/raise/unknown", r"TaskNotFound: gone"),
        ("/raise/local", r"Local: odd"),
        ("/raise/mute", r"Mute: \(its message could not be read\)"),
        ("/raise/long", r"ValueError: x{1988}"),
        ("/raise/exit", r"SystemExit: 4"),
        ("/raise/interrupt", r"KeyboardInterrupt"),
        ("/raise/recursion", r"RecursionError: .*"),
        ("/return/big", r"ResultError: .*1,048,576.*"),
        ("/return/set", r"ResultError: .*set.*"),
        ("/return/response", r"ResultError: .*Response.*"),
        ("/die/memory", r"MemoryError"),
    ],
)
def test_exceptions_and_invalid_results_of_a_child(child: Flow, path: str, error: str) -> None:
    assert re.fullmatch(error, child.error(path)), child.error(path)


def test_a_write_to_the_session_is_visible_in_the_child(child: Flow) -> None:
    assert child.result("/write") == "x"


def test_the_code_of_an_http_exception_is_kept(child: Flow) -> None:
    task = child.run("/raise/http")
    assert child.request("GET", f"/task/{task['Id']}/result").status_code == 404


def test_an_exception_is_reported_once_in_the_child(
    fresh_child: Flow, tmp_path: Path, capfd: Any
) -> None:
    child = fresh_child
    exceptions, teardowns = tmp_path / "exceptions", tmp_path / "teardown"
    task = child.run(f"/raise/value?exceptions={exceptions}&teardown={teardowns}")
    ((pid, name),) = (line.split() for line in exceptions.read_text().splitlines())
    assert (int(pid) != os.getpid(), name) == (True, "ValueError")
    assert f"{pid} ValueError" in teardowns.read_text().splitlines()
    written = capfd.readouterr().err
    assert written.count(f"The view of task {task['Id']} raised an exception.") == 1
    assert written.count("ValueError: bad thing") == 1


def test_signals_are_sent_only_in_the_parent(
    child: Flow, hear: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    sent_signals = hear(
        task_started, task_progressed, task_completed, task_failed, sender=child.app
    )
    child.result("/where")
    # The signals are sent after the commit, which a reader can see earlier.
    eventually(lambda: len(sent_signals) == 2)
    assert [name for name, _ in sent_signals] == ["task-started", "task-completed"]
    sent_signals.clear()
    assert child.result("/signals") == []
    child.error("/die/exit3")
    eventually(lambda: len(sent_signals) == 4)
    assert [name for name, _ in sent_signals] == [
        "task-started",
        "task-completed",
        "task-started",
        "task-failed",
    ]


def test_progress_arrives_coalesced(child: Flow, hear: Callable[..., Any]) -> None:
    sent_signals = hear(task_progressed, sender=child.app)
    began = time.monotonic()
    task = child.run("/progress")
    took = time.monotonic() - began
    assert (task["Result"], task["Progress"], task["ProgressMessage"]) == (100, 100, "step 99999")
    assert len(sent_signals) <= took * 10 + 2


def test_events_of_a_child_are_stored_in_order(child: Flow) -> None:
    task = child.run("/events")
    events = runtime_of(child.app).runner.store.events(0, 5000, task["Id"]).events
    sent = [event for event in events if event.name != STATE and event.name != PROGRESS]
    assert [event.data for event in sent[-1000:-1]] == [
        b'{"n":%d}' % number for number in range(501, 1500)
    ]
    assert (sent[-1].name, sent[-1].data) == ("message", b'"bye"')
    assert events[-1].name == STATE and task["State"] == "Completed"


def test_progress_over_updates_progress_of_a_child(child: Flow) -> None:
    task = child.start("/timed_progress")
    eventually_true(lambda: child.get(task).get("Progress") == 80)
    assert child.get(task)["State"] == "Running"
    assert child.ended(task)["Progress"] == 100


@pytest.mark.parametrize("path", ["/spin", "/sleep/30.0", "/deaf"])
def test_a_stop_kills_the_child_at_once(children: Flow, path: str) -> None:
    task = children.start(path)
    eventually_true(lambda: children.get(task).get("Progress"))
    began = time.monotonic()
    stopped = children.stop(task)
    assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
    assert children.still(task)["State"] == "Aborted"
    assert time.monotonic() - began < 0.5


def test_a_stop_before_the_child_has_started(child: Flow) -> None:
    for _ in range(10):
        task = child.start("/spin")
        child.stop(task)
        assert child.still(task)["State"] == "Aborted"
    assert child.result("/where")


def test_a_timeout_kills_the_child(children: Flow) -> None:
    began = time.monotonic()
    task = children.still(children.start("/brief"))
    assert (task["State"], task["Error"]) == ("Aborted", "Timeout")
    assert time.monotonic() - began < 1.5


def test_a_stop_kills_the_whole_group(child: Flow, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    task = child.start(f"/family?pids={path}")
    eventually_true(lambda: child.get(task).get("Progress"))
    pids = [int(pid) for pid in path.read_text().split()]
    assert all(map(is_alive, pids))
    child.stop(task)
    child.still(task)
    eventually_true(lambda: not any(map(is_alive, pids)), 1)


def test_processes_started_by_a_view_are_killed_at_its_end(child: Flow, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert child.result(f"/family?returns=1&pids={path}") == "returned"
    pids = [int(pid) for pid in path.read_text().split()]
    eventually_true(lambda: not any(map(is_alive, pids)))


@pytest.mark.covers("F13")
def test_a_thread_that_outlives_its_view_keeps_the_child_alive_briefly(child: Flow) -> None:
    pid = child.result("/stays")
    assert is_alive(pid), "the task finishes when its view returns"
    eventually_true(lambda: not is_alive(pid))
    assert child.result("/where")


def test_tasks_wait_for_a_free_slot(child: Flow) -> None:
    tasks = [child.start("/sleep/0.4") for _ in range(3)]
    child.became(tasks[0], "Running")
    assert child.get(tasks[2])["State"] == "NotStarted"
    assert [child.ended(task)["State"] for task in tasks] == ["Completed"] * 3


@pytest.mark.covers("F18")
def test_a_stopped_waiting_task_does_not_start(child: Flow) -> None:
    tasks = [child.start("/sleep/0.5") for _ in range(3)]
    assert child.stop(tasks[2])["State"] == "Aborted"
    assert "StartingTime" not in child.get(tasks[2])
    assert [child.ended(task)["State"] for task in tasks] == ["Completed", "Completed", "Aborted"]


def test_a_child_may_use_a_shared_store(make_children: Callable[[str], Flow]) -> None:
    flow = make_children(STORES["sqlite"])
    before = flow.result("/store/state")
    assert flow.result("/store/state") == before + 1
    with flow.app.app_context():
        assert flow.async_routes.state["hits"] == before + 1
    assert flow.result("/store/get") == "Running"
    assert flow.result("/store/query") >= 2
    assert flow.result("/store/client")["State"] == "Running"
    assert "A child process cannot start tasks" in flow.result("/store/start")["detail"]
    task = flow.still(flow.start("/store/stop"))
    assert (task["State"], task["Error"]) == ("Aborted", "Aborted by the user")


@pytest.mark.parametrize("what", ["state", "get", "query", "stop"])
def test_with_a_memory_store_a_child_has_only_current_task(child: Flow, what: str) -> None:
    assert re.fullmatch(
        "ConfigurationError: With memory://, a child process .*current_task.*",
        child.error(f"/store/{what}"),
    )


def test_a_child_may_have_children(child: Flow) -> None:
    assert child.result("/nested") is True


@pytest.mark.covers("A80")
def test_a_view_calls_another_view_in_the_same_child(children: Flow) -> None:
    task = children.ended(children.start("/calling/1"), seconds=20)
    found = task["Result"]
    assert found[0] == found[2] == task["Id"]
    assert found[1] == found[3] != os.getpid()


def test_output_and_logs_of_a_child_reach_the_parent_s_output(
    fresh_child: Flow, capfd: Any
) -> None:
    fresh_child.result("/log")
    written = capfd.readouterr()
    assert "printed in the child" in written.out
    assert "logged in the child" in written.err


def test_each_task_uses_another_spare_child(child: Flow) -> None:
    pids = [child.result("/spare")["pid"] for _ in range(4)]
    assert len(set(pids)) == 4


def test_threads_and_processes_in_one_app(child: Flow) -> None:
    assert child.result("/thread") == {"pid": os.getpid()}


def test_the_configuration_of_the_parent_applies(tmp_path: Path) -> None:
    app = child_app.create_app(
        ASYNCROUTE_MAX_RESULT=100, ASYNCROUTE_EXPOSE_ERRORS=False, instance_path=str(tmp_path)
    )
    flow = Flow(app, app.extensions["child_app"])
    try:
        assert flow.error("/return/half") == "ResultError"
        assert flow.error("/raise/value") == "ValueError"
        assert flow.error("/die/exit3") == "Process died: exit code 3"
    finally:
        close_app(app)
        child_app.disconnect_receivers(app)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (None, "__main__.*ASYNCROUTE_APP"),
        ("no_such_module:app", "ASYNCROUTE_APP.*no_such_module"),
        ("tests.no_such_module", "ASYNCROUTE_APP.*no_such_module"),
        ("tests.support.apps.child_app:no_such_name", "ASYNCROUTE_APP.*no_such_name"),
        ("tests.support.flow", "tests.support.flow.*ASYNCROUTE_APP"),
    ],
)
def test_an_app_that_a_child_could_not_import_is_an_error_at_first_use(
    make_app: Callable[..., Flask], path: str | None, error: str
) -> None:
    app = make_app("__main__", ASYNCROUTE_APP=path, ASYNCROUTE_STORE="memory://")
    AsyncRoute(app).start(app)  # Without a process route it does not matter.
    app = make_app("__main__", ASYNCROUTE_APP=path, ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    async_routes.route("/work", executor="process")(noop)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=error):
            async_routes.start(app)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (
            "tests.support.apps.child_app:create_app",
            "ConfigurationError: ASYNCROUTE_APP.*|RuntimeError.*",
        ),
        ("tests.support.apps.child_app:create_app('x')", "ConfigurationError: ASYNCROUTE_APP.*"),
        ("tests.support.apps.child_app:is_socket(1)", "ConfigurationError: ASYNCROUTE_APP.*"),
    ],
)
def test_an_app_that_a_child_cannot_load_fails_its_task(
    make_app: Callable[..., Flask], path: str, error: str, capfd: Any
) -> None:
    app = make_app(
        "tests.support.apps.child_app", ASYNCROUTE_APP=path, ASYNCROUTE_STORE="memory://"
    )
    flow = Flow(app, AsyncRoute(app))
    flow.route(executor="process")(noop)
    found = flow.error()
    assert re.fullmatch(error, found) or "no async route" in found or "noop" in found, found
    capfd.readouterr()


@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_process_routes_are_an_error_on_other_systems_than_linux(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    app = make_app(ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    async_routes.route("/work", executor="process")(noop)
    with pytest.raises(ConfigurationError, match='executor="process" works only on Linux'):
        async_routes.start(app)


def noop() -> None:
    """Do nothing."""


def test_a_task_that_waits_too_long_for_a_child_is_aborted(tmp_path: Path) -> None:
    app = child_app.create_app(
        TESTING=True, instance_path=str(tmp_path), ASYNCROUTE_MAX_WORKERS=1,
        ASYNCROUTE_START_TIMEOUT=2,
    )  # fmt: skip
    flow = Flow(app, app.extensions["child_app"])
    try:
        running = flow.start("/sleep/20.0")
        flow.became(running, "Running")
        waiting = flow.ended(flow.start("/sleep/20.0"))
        assert (waiting["State"], waiting["Error"]) == ("Aborted", "Expired")
        assert flow.get(running)["State"] == "Running"
        flow.stop(running)
        flow.still(running)
    finally:
        close_app(app)
        child_app.disconnect_receivers(app)
