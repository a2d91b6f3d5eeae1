"""Tasks in child processes, through HTTP: the same as in threads, but for what a process of their own changes."""

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
from flask_asyncroute.stores.events import PROGRESS, STATE
from tests import child_app
from tests.conftest import close_app, eventually_true
from tests.flow.driving import Flow

STORES = {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}


@pytest.fixture(scope="module")
def make_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Flow]]:
    """Give ``make_children(store)``: the app of `child_app`, one for each store, whose fork server serves all tests."""
    made: dict[str, Flow] = {}

    def make(store: str) -> Flow:
        if store not in made:
            folder = tmp_path_factory.mktemp("instance")
            app = child_app.create_app(ASYNCROUTE_STORE=store, TESTING=True, instance_path=str(folder))
            made[store] = Flow(app, app.extensions["child_app"])
        return made[store]

    yield make
    for flow in made.values():
        close_app(flow.app)
        unhook(flow.app)


def unhook(app: Flask) -> None:
    """Disconnect what `child_app` has connected."""
    from flask import got_request_exception

    for signal in (got_request_exception, task_completed):
        for receiver in list(signal.receivers_for(app)):
            signal.disconnect(receiver)


@pytest.fixture
def fresh_child(tmp_path: Path) -> Iterator[Flow]:
    """Give an app whose fork server is this test's own, and writes to where the test looks."""
    app = child_app.create_app(TESTING=True, instance_path=str(tmp_path))
    yield Flow(app, app.extensions["child_app"])
    close_app(app)
    unhook(app)


@pytest.fixture(params=list(STORES))
def children(request: pytest.FixtureRequest, make_children: Callable[[str], Flow]) -> Flow:
    return make_children(STORES[request.param])


@pytest.fixture
def child(make_children: Callable[[str], Flow]) -> Flow:
    """Give the app on ``memory://``, where the store makes no difference."""
    return make_children("memory://")


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Leaks are looked for where the app is closed; its threads are those of all tests here."""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_a_task_runs_in_a_child_of_its_own(children: Flow) -> None:
    first, second = (children.result("/where") for _ in range(2))
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert first["session"] == first["group"] == first["pid"]
    assert first["prepared_in"] == first["pid"]
    assert first["main"] is None, "nobody's __main__ is run again"
    assert first["loaded"] == 1
    assert first["threads"] == 1


def test_the_request_is_there(children: Flow) -> None:
    with children.client.session_transaction() as held:
        held["name"] = "Anna"
    found = children.result("/echo/5?a=1", json={"b": [2]}, headers={"X-Own": "own"})
    assert 0 < found.pop("remaining") <= 36000
    task_id = found.pop("id")
    assert children.get(task_id)["State"] == "Completed"
    assert found == {
        "number": 5, "fixed": "yes", "user": None, "args": {"a": "1"}, "form": {}, "json": {"b": [2]}, "header": "own",
        "session": "Anna", "url": "/plain", "size": 0, "app": "tests.child_app",
    }  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 8 * 1024, 8 * 1024 + 1, 256 * 1024, 256 * 1024 + 1, 20_000_000])
def test_bodies_of_any_size_arrive(children: Flow, size: int) -> None:
    assert children.result("/size", data=b"x" * size) == {"size": size}


def test_an_upload_arrives(children: Flow, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(os.urandom(400_000))
    with path.open("rb") as file:
        found = children.result("/echo/1", data={"file": (file, "name"), "a": "b"})
    assert (found["size"], found["form"]) == (400_000, {"a": "b"})


def test_results(children: Flow) -> None:
    assert children.run("/return/none").get("Result", "left out") == "left out"
    assert children.result("/return/list") == [1, None]
    assert children.result("/return/text") == "é\ufffd"
    assert len(children.result("/return/half")) == 1_000_000
    assert children.result("/async") == [1, 2]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/raise/value", r"ValueError: bad thing"),
        ("/raise/http", r"404 Not Found: no such thing"),
        ("/raise/local", r"Local: odd"),
        ("/raise/mute", r"Mute: \(its message could not be read\)"),
        ("/raise/long", r"ValueError: x{1988}"),
        ("/raise/exit", r"SystemExit: 4"),
        ("/raise/interrupt", r"KeyboardInterrupt"),
        ("/raise/recursion", r"RecursionError: .*"),
        ("/return/big", r"ResultError: .*1,048,576.*"),
        ("/return/set", r"ResultError: .*set.*"),
        ("/return/response", r"ResultError: .*Response.*"),
        ("/write", r"SessionIsReadOnly: .*"),
        ("/die/memory", r"MemoryError"),
    ],
)
def test_f09_f11_what_a_view_raises_or_cannot_return(child: Flow, path: str, error: str) -> None:
    assert re.fullmatch(error, child.error(path)), child.error(path)


def test_the_code_of_an_http_exception_is_kept(child: Flow) -> None:
    task = child.run("/raise/http")
    assert child.request("GET", f"/task/{task['Id']}/result").status_code == 404


def test_an_exception_is_made_known_once_where_it_ran(fresh_child: Flow, tmp_path: Path, capfd: Any) -> None:
    child = fresh_child
    heard, torn = tmp_path / "exceptions", tmp_path / "teardown"
    task = child.run(f"/raise/value?exceptions={heard}&teardown={torn}")
    ((pid, name),) = (line.split() for line in heard.read_text().splitlines())
    assert (int(pid) != os.getpid(), name) == (True, "ValueError")
    assert f"{pid} ValueError" in torn.read_text().splitlines()
    written = capfd.readouterr().err
    assert written.count(f"The view of task {task['Id']} raised.") == 1
    assert written.count("ValueError: bad thing") == 1


def test_signals_are_sent_in_the_parent_alone(child: Flow, hear: Callable[..., Any]) -> None:
    heard = hear(task_started, task_progressed, task_completed, task_failed, sender=child.app)
    child.result("/where")
    assert [name for name, _ in heard] == ["task-started", "task-completed"]
    heard.clear()
    assert child.result("/signals") == []
    child.error("/die/exit3")
    assert [name for name, _ in heard] == ["task-started", "task-completed", "task-started", "task-failed"]


def test_progress_arrives_coalesced(child: Flow, hear: Callable[..., Any]) -> None:
    heard = hear(task_progressed, sender=child.app)
    began = time.monotonic()
    task = child.run("/progress")
    took = time.monotonic() - began
    assert (task["Result"], task["Progress"], task["ProgressMessage"]) == (100, 100, "step 99999")
    assert len(heard) <= took * 10 + 2


def test_events_of_a_child_are_stored_in_order(child: Flow) -> None:
    task = child.run("/events")
    events = runtime_of(child.app).runner.store.events(0, 5000, task["Id"]).events
    sent = [event for event in events if event.name != STATE and event.name != PROGRESS]
    assert [event.data for event in sent[-1000:-1]] == [b'{"n":%d}' % number for number in range(501, 1500)]
    assert (sent[-1].name, sent[-1].data) == ("message", b'"bye"')
    assert events[-1].name == STATE and task["State"] == "Completed"


def test_progress_by_itself(child: Flow) -> None:
    task = child.start("/climb")
    eventually_true(lambda: child.get(task).get("Progress") == 80)
    assert child.get(task)["State"] == "Running"
    assert child.ended(task)["Progress"] == 100


@pytest.mark.parametrize("path", ["/spin", "/sleep/30.0", "/deaf"])
def test_a_stop_kills_at_once(children: Flow, path: str) -> None:
    task = children.start(path)
    eventually_true(lambda: children.get(task).get("Progress"))
    began = time.monotonic()
    stopped = children.stop(task)
    assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
    assert children.still(task)["State"] == "Aborted"
    assert time.monotonic() - began < 0.5


def test_a_stop_before_the_child_is_there(child: Flow) -> None:
    for _ in range(10):
        task = child.start("/spin")
        child.stop(task)
        assert child.still(task)["State"] == "Aborted"
    assert child.result("/where")


def test_a_timeout_kills(children: Flow) -> None:
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


def test_what_a_view_leaves_behind_goes_with_it(child: Flow, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert child.result(f"/family?returns=1&pids={path}") == "returned"
    pids = [int(pid) for pid in path.read_text().split()]
    eventually_true(lambda: not any(map(is_alive, pids)))


def test_f13_a_thread_that_stays_holds_the_child_up_for_a_while(child: Flow) -> None:
    pid = child.result("/stays")
    assert is_alive(pid), "the task has ended when its view has"
    eventually_true(lambda: not is_alive(pid))
    assert child.result("/where")


def test_tasks_wait_for_a_free_place(child: Flow) -> None:
    tasks = [child.start("/sleep/0.4") for _ in range(3)]
    child.became(tasks[0], "Running")
    assert child.get(tasks[2])["State"] == "NotStarted"
    assert [child.ended(task)["State"] for task in tasks] == ["Completed"] * 3


def test_f18_a_waiting_task_is_stopped(child: Flow) -> None:
    tasks = [child.start("/sleep/0.5") for _ in range(3)]
    assert child.stop(tasks[2])["State"] == "Aborted"
    assert "StartingTime" not in child.get(tasks[2])
    assert [child.ended(task)["State"] for task in tasks] == ["Completed", "Completed", "Aborted"]


def test_with_a_store_a_child_may_use_it(make_children: Callable[[str], Flow]) -> None:
    flow = make_children(STORES["sqlite"])
    before = flow.result("/store/state")
    assert flow.result("/store/state") == before + 1
    with flow.app.app_context():
        assert flow.async_routes.state["hits"] == before + 1
    assert flow.result("/store/get") == "Running"
    assert flow.result("/store/query") >= 2
    assert flow.result("/store/client")["State"] == "Running"
    assert "A child process starts no tasks" in flow.result("/store/start")["detail"]
    task = flow.still(flow.start("/store/stop"))
    assert (task["State"], task["Error"]) == ("Aborted", "Aborted by the user")


@pytest.mark.parametrize("what", ["state", "get", "query", "stop"])
def test_in_memory_a_child_has_current_task_alone(child: Flow, what: str) -> None:
    assert re.fullmatch(
        "ConfigurationError: In a child process .*memory://.*current_task.*", child.error(f"/store/{what}")
    )


def test_a_child_may_have_children(child: Flow) -> None:
    assert child.result("/nested") is True


def test_what_a_child_writes_comes_out(fresh_child: Flow, capfd: Any) -> None:
    fresh_child.result("/log")
    written = capfd.readouterr()
    assert "printed in the child" in written.out
    assert "logged in the child" in written.err


def test_spares_are_ready_and_replaced(child: Flow) -> None:
    pids = [child.result("/spare")["pid"] for _ in range(4)]
    assert len(set(pids)) == 4


def test_threads_and_processes_live_side_by_side(child: Flow) -> None:
    assert child.result("/thread") == {"pid": os.getpid()}


def test_values_of_the_parent_win(tmp_path: Path) -> None:
    app = child_app.create_app(ASYNCROUTE_MAX_RESULT=100, ASYNCROUTE_EXPOSE_ERRORS=False, instance_path=str(tmp_path))
    flow = Flow(app, app.extensions["child_app"])
    try:
        assert flow.error("/return/half") == "ResultError"
        assert flow.error("/raise/value") == "ValueError"
        assert flow.error("/die/exit3") == "Process died: exit code 3"
    finally:
        close_app(app)
        unhook(app)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (None, "__main__.*ASYNCROUTE_APP"),
        ("no_such_module:app", "ASYNCROUTE_APP.*no_such_module"),
        ("tests.no_such_module", "ASYNCROUTE_APP.*no_such_module"),
        ("tests.child_app:no_such_name", "ASYNCROUTE_APP.*no_such_name"),
        ("tests.flow.driving", "tests.flow.driving.*ASYNCROUTE_APP"),
    ],
)
def test_an_app_that_no_child_could_load_is_an_error_at_first_use(
    make_app: Callable[..., Flask], path: str | None, error: str
) -> None:
    app = make_app("__main__", ASYNCROUTE_APP=path, ASYNCROUTE_STORE="memory://")
    AsyncRoute(app).start(app)  # without such a route nobody minds
    app = make_app("__main__", ASYNCROUTE_APP=path, ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    async_routes.route("/work", executor="process")(noop)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=error):
            async_routes.start(app)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("tests.child_app:create_app", "ConfigurationError: ASYNCROUTE_APP.*|RuntimeError.*"),
        ("tests.child_app:create_app('x')", "ConfigurationError: ASYNCROUTE_APP.*"),
        ("tests.child_app:is_socket(1)", "ConfigurationError: ASYNCROUTE_APP.*"),
    ],
)
def test_an_app_that_a_child_cannot_load_fails_its_task(
    make_app: Callable[..., Flask], path: str, error: str, capfd: Any
) -> None:
    app = make_app("tests.child_app", ASYNCROUTE_APP=path, ASYNCROUTE_STORE="memory://")
    flow = Flow(app, AsyncRoute(app))
    flow.route(executor="process")(noop)
    found = flow.error()
    assert re.fullmatch(error, found) or "no async route" in found or "noop" in found, found
    capfd.readouterr()


@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_elsewhere_than_on_linux_it_is_an_error(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    app = make_app(ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    async_routes.route("/work", executor="process")(noop)
    with pytest.raises(ConfigurationError, match='executor="process" works on Linux alone'):
        async_routes.start(app)


def noop() -> None:
    """Do nothing."""
