"""A store that cannot be used for a while: what runs goes on, and how it ends is kept until it can be written (F19, F21, F24, F44)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, current_task, signals
from flask_asyncroute import runner as runner_module
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.opening import make_store
from tests.conftest import eventually_true
from tests.faults.faulty import WRITES, Down, FaultyStore, Nth
from tests.flow.driving import Flow

MakeFaulty = Callable[..., Flow]

ENDS = ("Completed", "Failed", "Aborted")


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}[request.param]


@pytest.fixture
def make_faulty(make_app: Callable[..., Flask], store_url: str, monkeypatch: pytest.MonkeyPatch) -> MakeFaulty:
    """Give ``make_faulty(fault)``: an app on each store, which fails as ``fault`` wants it. What waits is taken over soon."""
    monkeypatch.setattr(runner_module, "TAKEOVER_AFTER_US", 20_000)
    monkeypatch.setattr(runner_module, "LOOK_SECONDS", 0.05)

    def make(fault: Any, **config: Any) -> Flow:
        monkeypatch.setattr(runner_module, "make_store", lambda *given: FaultyStore(make_store(*given), fault))
        app = make_app(ASYNCROUTE_STORE=store_url, **config)
        return Flow(app, AsyncRoute(app))

    return make


def is_kept(flow: Flow, task: dict[str, Any]) -> bool:
    return task["Id"] in runtime_of(flow.app).runner.dispatcher.running


@pytest.mark.parametrize("ending", ["return", "raise"])
def test_f19_an_outcome_is_kept_until_it_can_be_written(
    make_faulty: MakeFaulty, gate: threading.Event, ending: str, hear: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flask_asyncroute")
    fault = Down(*WRITES)
    flow = make_faulty(fault)
    heard = hear(signals.task_finished, sender=flow.app)
    begun = threading.Event()

    @flow.route(max_workers=1)
    def work() -> Any:
        current_task.set_progress(50, "half")
        begun.set()
        gate.wait(10)
        if ending == "raise":
            raise ValueError("no")
        return {"Done": True}

    task = flow.start()
    assert begun.wait(5)
    eventually_true(lambda: flow.get(task).get("Progress") == 50)
    fault.is_down = True
    refused = flow.start(status=503)
    assert refused["type"] == "urn:flask-asyncroute:store-unavailable"
    ended_by = time.time()
    gate.set()
    eventually_true(lambda: "update" in fault.refused)
    runner = runtime_of(flow.app).runner
    executor = runner.executors[0]
    eventually_true(lambda: executor.free() == 1, 5)
    assert is_kept(flow, task), "nobody else may think it lost"
    assert flow.get(task)["State"] == "Running"
    assert heard == []
    written_by = time.time()
    eventually_true(lambda: fault.refused.count("update") >= 3, 5)
    assert f"What became of task {task['Id']} could not be stored" in caplog.text
    fault.is_down = False
    ended = flow.ended(task, 6)
    if ending == "return":
        assert (ended["State"], ended["Result"], ended["Progress"]) == ("Completed", {"Done": True}, 100)
    else:
        assert (ended["State"], ended["Error"], ended["Progress"]) == ("Failed", "ValueError: no", 50)
    eventually_true(lambda: not is_kept(flow, task))
    eventually_true(lambda: f"What became of task {task['Id']} is stored now" in caplog.text)
    assert [found.id for _, found in heard] == [task["Id"]]
    completed_us = heard[0][1].completed_us
    assert ended_by <= completed_us / 1e6 <= written_by, "when it ended, not when it was written"
    assert flow.run()["State"] == ("Completed" if ending == "return" else "Failed"), "all goes on"


@pytest.mark.parametrize("ending", ["return", "raise", "check"])
def test_f19_a_timeout_that_could_not_be_written_is_the_outcome(
    make_faulty: MakeFaulty, gate: threading.Event, ending: str
) -> None:
    """Whatever the view does after it was asked to stop."""
    fault = Down(*WRITES)
    flow = make_faulty(fault)
    begun = threading.Event()
    stopped = threading.Event()

    @flow.route(timeout=0.3, interrupt_after=None)
    def work() -> Any:
        begun.set()
        while not current_task.stop_requested:
            gate.wait(0.01)
        stopped.set()
        if ending == "raise":
            raise ValueError("no")
        if ending == "check":
            current_task.check()
        return {"Done": True}

    task = flow.start()
    assert begun.wait(5)
    fault.is_down = True
    assert stopped.wait(5), "the view is asked to stop all the same"
    eventually_true(lambda: fault.refused.count("update") >= 2)
    assert flow.get(task)["State"] == "Running"
    fault.is_down = False
    ended = flow.still(task, 6)
    assert (ended["State"], ended["Error"]) == ("Aborted", "Timeout")
    eventually_true(lambda: not is_kept(flow, task))


def test_f19_a_timeout_is_written_while_the_view_goes_on(make_faulty: MakeFaulty, gate: threading.Event) -> None:
    fault = Down(*WRITES)
    flow = make_faulty(fault)
    begun = threading.Event()

    @flow.route(timeout=0.3, interrupt_after=None)
    def work() -> Any:
        begun.set()
        gate.wait(10)

    task = flow.start()
    assert begun.wait(5)
    fault.is_down = True
    eventually_true(lambda: "update" in fault.refused)
    fault.is_down = False
    ended = flow.ended(task, 6)
    assert (ended["State"], ended["Error"], ended["Stopping"]) == ("Aborted", "Timeout", True)
    gate.set()
    assert "Stopping" not in flow.still(task)


def test_f19_the_end_of_a_stopped_run_is_kept_too(make_faulty: MakeFaulty, gate: threading.Event) -> None:
    fault = Down(*WRITES)
    flow = make_faulty(fault)
    begun = threading.Event()

    @flow.route(interrupt_after=None)
    def work() -> Any:
        begun.set()
        gate.wait(10)

    task = flow.start()
    assert begun.wait(5)
    assert flow.stop(task)["Stopping"] is True
    fault.is_down = True
    gate.set()
    eventually_true(lambda: "update" in fault.refused)
    assert is_kept(flow, task)
    fault.is_down = False
    assert flow.still(task, 6)["State"] == "Aborted"
    eventually_true(lambda: not is_kept(flow, task))


def test_f19_progress_is_written_with_the_next_report(make_faulty: MakeFaulty, gate: threading.Event) -> None:
    fault = Down("update")
    flow = make_faulty(fault)
    begun = threading.Event()

    @flow.route()
    def work() -> Any:
        begun.set()
        current_task.progress = 40
        gate.wait(10)

    fault.is_down = True
    task = flow.start()
    assert begun.wait(5)
    eventually_true(lambda: fault.refused)
    assert "Progress" not in flow.get(task)
    fault.is_down = False
    eventually_true(lambda: flow.get(task).get("Progress") == 40, 3)


def test_f19_a_stop_while_an_outcome_is_kept_is_decided_once(make_faulty: MakeFaulty, hear: Any) -> None:
    """Whoever can write first has it: here the stop, since the process that ran the task may not write for a while."""
    fault = Down()
    fault.names = ()
    flow = make_faulty(fault)
    heard = hear(signals.task_finished, sender=flow.app)

    @flow.route()
    def work() -> Any:
        fault.names = ("update",)
        fault.is_down = True
        return 1

    task = flow.start()
    eventually_true(lambda: fault.refused)
    fault.is_down = False
    answer = flow.request("DELETE", f"/task/{task['Id']}")
    assert answer.status_code in (200, 410)
    ended = flow.still(task)
    assert ended["State"] == ("Aborted" if answer.status_code == 200 else "Completed")
    eventually_true(lambda: not is_kept(flow, task), 6)
    assert flow.still(task) == ended
    assert [found.state.value for _, found in heard] == [ended["State"]]


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_f19_a_claim_that_fails_leaves_the_task_waiting(make_faulty: MakeFaulty, how: str, hear: Any) -> None:
    """Also where it was stored after all: the task would run for ever, and nobody would run it."""
    failed = threading.Event()
    is_failing = threading.Event()
    is_failing.set()

    def fault(name: str) -> str | None:
        if name == "claim" and is_failing.is_set():
            failed.set()
            return how
        return None

    flow = make_faulty(fault)
    runs = []

    @flow.route()
    def work() -> Any:
        runs.append(current_task.id)

    task = flow.start()
    assert failed.wait(5)
    is_failing.clear()
    assert flow.ended(task, 6)["State"] == "Completed"
    assert runs == [task["Id"]]


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("is_inside", [True, False])
def test_f19_a_claim_that_fails_ends_a_task_that_only_this_process_can_run(
    make_faulty: MakeFaulty, how: str, is_inside: bool
) -> None:
    """Nobody else would ever take it: one that runs inside its request, or on an Executor of the app's own."""
    is_failing = threading.Event()
    is_failing.set()
    flow = make_faulty(lambda name: how if name == "claim" and is_failing.is_set() else None)
    runs = []
    with ThreadPoolExecutor(1) as pool:

        @flow.route(executor="immediate" if is_inside else pool)
        def work() -> Any:
            runs.append(current_task.id)

        task = flow.start()
        ended = flow.ended(task, 6)
        is_failing.clear()
        assert flow.ended(flow.start(), 6)["State"] == "Completed", "others go on"
    assert (ended["State"], ended["Error"], ended.get("Stopping")) == ("Aborted", "Worker lost", None)
    assert task["Id"] not in runs


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_f19_a_start_that_no_executor_takes_is_withdrawn_when_the_store_is_back(make_faulty: MakeFaulty) -> None:
    """Its client was told 503: nothing of it may run, or be seen, later."""
    fault = Down("delete")
    flow = make_faulty(fault)
    runs = []
    pool = ThreadPoolExecutor(1)

    @flow.route(executor=pool)
    def work() -> Any:
        runs.append(current_task.id)

    pool.shutdown()
    fault.is_down = True
    flow.start(status=503)
    assert fault.refused
    fault.is_down = False
    eventually_true(lambda: not flow.query(), 6)
    assert runs == []


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_f44_a_start_in_doubt_starts_nothing(make_faulty: MakeFaulty) -> None:
    """The client was told 503, so it will try again; what may have been stored is removed."""
    fault = Nth(1, "after")
    flow = make_faulty(lambda name: fault(name) if name == "add" else None)

    @flow.route()
    def work() -> Any:
        return 1

    flow.start(status=503)
    eventually_true(lambda: all(task["IsCompleted"] for task in flow.query()))


class Scenario:
    """One way of everything: two tasks, one that ends and one that is stopped; lists and a removal."""

    def __init__(self, flow: Flow, hear: Any) -> None:
        self.flow = flow
        self.finished = hear(signals.task_finished, sender=flow.app)
        self.begun = threading.Event()

        @flow.route("/ends", max_workers=2)
        def ends() -> Any:
            current_task.progress = 10
            return {"Done": True}

        @flow.route("/waits", max_workers=2)
        def waits() -> Any:
            self.begun.set()
            current_task.sleep(20)

    def play(self) -> dict[str, str]:
        """Do all of it, each request once more where it was refused; return which ids were accepted, and what they must become."""
        accepted = {}
        ends = self._asked("POST", "/ends", 202)
        accepted[ends["Id"]] = "Completed"
        self._until_ended(ends["Id"])
        waits = self._asked("POST", "/waits", 202)
        accepted[waits["Id"]] = "Aborted"
        assert self.begun.wait(5)
        self._asked("DELETE", f"/task/{waits['Id']}", 200)
        self._until_ended(waits["Id"])
        listed = self._asked("GET", "/tasks?State=Completed", 200)
        assert ends["Id"] in {task["Id"] for task in listed}
        self._purge(ends["Id"])
        del accepted[ends["Id"]]
        return accepted

    def _purge(self, task_id: str) -> None:
        """Remove a task; a refusal may have come after it was done."""
        for _ in range(2):
            answer = self.flow.request("DELETE", f"/task/{task_id}?purge=true")
            assert answer.status_code in (204, 404, 503), answer.get_data(as_text=True)
            if answer.status_code != 503:
                break

    def _asked(self, method: str, path: str, status: int) -> Any:
        for _ in range(2):
            answer = self.flow.request(method, path)
            if answer.status_code == status:
                return answer.get_json()
            assert answer.status_code == 503, answer.get_data(as_text=True)
            assert answer.headers["Retry-After"]
        raise AssertionError(f"{method} {path} was refused twice")

    def _until_ended(self, task_id: str) -> None:
        def has_ended() -> bool:
            answer = self.flow.request("GET", f"/task/{task_id}")
            assert answer.status_code in (200, 503), f"I1: {task_id} is unknown"
            return answer.status_code == 200 and answer.get_json()["IsCompleted"]

        eventually_true(has_ended, 8, 0.02)


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_f44_the_nth_call_fails(make_faulty: MakeFaulty, how: str, hear: Any, gate: threading.Event) -> None:
    """I1 to I4 hold for each N. Housekeeping's own reads are counted as well, so the same N is not the same call each time."""
    number = 0
    while True:
        number += 1
        fault = Nth(number, how)
        flow = make_faulty(fault, ASYNCROUTE_NAMESPACE=f"of-{number}")
        scenario = Scenario(flow, hear)
        accepted = scenario.play()
        calls = fault.disarm()
        runner = runtime_of(flow.app).runner
        eventually_true(lambda runner=runner: not runner.dispatcher.running, 6)
        found = flow.query("limit=500")
        assert accepted.keys() <= {task["Id"] for task in found}, f"I1, call {number}"
        for task in found:
            flow.still(task, 6)
            task = flow.get(task)
            where = f"call {number} ({fault.calls[number - 1 : number]}) failed {how}"
            assert task["State"] == accepted.get(task["Id"], task["State"]), where
            times = [task[name] for name in ("CreationTime", "StartingTime", "CompletedTime") if name in task]
            assert times == sorted(times), where
            told = [found.state.value for _, found in scenario.finished if found.id == task["Id"]]
            assert told in ([task["State"]], []), where
            if how == "before":
                assert told == [task["State"]], where
        assert {executor.free() for executor in runner.executors} == {2}, "every place was given back"
        runtime_of(flow.app).close()
        if calls < number:
            break
    assert number > 12


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_f24_a_slow_store_slows_polls_alone(make_faulty: MakeFaulty, gate: threading.Event) -> None:
    """Two seconds for each call: all that runs goes on meanwhile, is timed out and stopped, and nothing waits for ever."""
    is_slow = threading.Event()

    def fault(name: str) -> None:
        if is_slow.is_set():
            gate.wait(2.0)

    flow = make_faulty(fault)
    steps = [0]
    stopped_at: list[float] = []

    @flow.route("/counts", max_workers=2)
    def counts() -> Any:
        while not gate.is_set() and steps[0] < 100:
            steps[0] += 1
            current_task.progress = steps[0]
            gate.wait(0.01)
        return steps[0]

    @flow.route("/late", timeout=0.5, interrupt_after=None)
    def late() -> Any:
        begun.set()
        while not current_task.stop_requested and not gate.is_set():
            gate.wait(0.01)
        stopped_at.append(time.monotonic())

    begun = threading.Event()
    late_task = flow.start("/late")
    assert begun.wait(5)
    is_slow.set()
    began = time.monotonic()
    answers: list[int] = []
    starts = [
        threading.Thread(target=lambda: answers.append(flow.app.test_client().post("/counts").status_code))
        for _ in range(2)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join(10)
    assert answers == [202, 202]
    assert 2 <= time.monotonic() - began < 4, "the starts do not wait for each other"
    eventually_true(lambda: steps[0] == 100, 10)
    eventually_true(lambda: stopped_at, 10)
    is_slow.clear()
    assert flow.still(late_task, 15)["Error"] == "Timeout"
    eventually_true(lambda: all(task["IsCompleted"] for task in flow.query()), 15)
    assert {task["State"] for task in flow.query("AsyncRouteId=[Post]/counts")} == {"Completed"}
