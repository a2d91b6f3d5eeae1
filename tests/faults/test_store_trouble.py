"""A store that cannot be used for a while: running tasks continue, and outcomes are kept until they
can be stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from flask import Flask, request

from flask_asyncroute import AsyncRoute, Retry, current_task, signals
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Expect
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.task import State, now_us
from flask_asyncroute.workers import runner as runner_module
from flask_asyncroute.workers.shutdown import shut_down
from tests.support.faulty_store import WRITES, Down, FaultyStore, Nth
from tests.support.flow import Flow
from tests.support.waiting import eventually_true

MakeFaulty = Callable[..., Flow]

CREDENTIALS = {"Authorization": "Bearer a"}
ENDS = ("Completed", "Failed", "Aborted")


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}[request.param]


@pytest.fixture
def make_faulty(
    make_app: Callable[..., Flask], store_url: str, monkeypatch: pytest.MonkeyPatch
) -> MakeFaulty:
    """Return ``make_faulty(fault)``, which creates an app whose store fails as ``fault`` decides.
    Waiting tasks are taken over soon.
    """
    monkeypatch.setattr(runner_module, "TAKEOVER_AFTER_US", 20_000)
    monkeypatch.setattr(runner_module, "LOOK_SECONDS", 0.05)

    def make(fault: Any, **config: Any) -> Flow:
        monkeypatch.setattr(
            runner_module, "make_store", lambda *given: FaultyStore(make_store(*given), fault)
        )
        app = make_app(ASYNCROUTE_STORE=store_url, **config)
        return Flow(app, AsyncRoute(app))

    return make


def has_kept_outcome(flow: Flow, task: dict[str, Any]) -> bool:
    return task["Id"] in runtime_of(flow.app).runner.dispatcher.running


@pytest.mark.covers("F19")
@pytest.mark.parametrize("ending", ["return", "raise"])
def test_an_outcome_is_kept_until_it_can_be_written(
    make_faulty: MakeFaulty,
    gate: threading.Event,
    ending: str,
    hear: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flask_asyncroute")
    fault = Down(*WRITES)
    flow = make_faulty(fault)
    sent_signals = hear(signals.task_finished, sender=flow.app)
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
    assert refused["type"] == "tag:flask-asyncroute.readthedocs.io,2026:store-unavailable"
    ended_by = time.time()
    gate.set()
    eventually_true(lambda: "update" in fault.refused)
    runner = runtime_of(flow.app).runner
    executor = runner.executors[0]
    eventually_true(lambda: executor.free() == 1, 5)
    assert has_kept_outcome(flow, task), "no other process may recover it"
    assert flow.get(task)["State"] == "Running"
    assert sent_signals == []
    written_by = time.time()
    eventually_true(lambda: fault.refused.count("update") >= 3, 5)
    assert f"A change of task {task['Id']} could not be stored" in caplog.text
    fault.is_down = False
    ended = flow.ended(task, 6)
    if ending == "return":
        assert (ended["State"], ended["Result"], ended["Progress"]) == (
            "Completed",
            {"Done": True},
            100,
        )
    else:
        assert (ended["State"], ended["Error"], ended["Progress"]) == (
            "Failed",
            "ValueError: no",
            50,
        )
    eventually_true(lambda: not has_kept_outcome(flow, task))
    eventually_true(
        lambda: f"The delayed change of task {task['Id']} has been stored" in caplog.text
    )
    assert [found.id for _, found in sent_signals] == [task["Id"]]
    completed_us = sent_signals[0][1].completed_us
    assert ended_by <= completed_us / 1e6 <= written_by, "the time of the end, not of the write"
    assert flow.run()["State"] == ("Completed" if ending == "return" else "Failed"), (
        "the next task runs"
    )


@pytest.mark.covers("F19")
@pytest.mark.parametrize("ending", ["return", "raise", "check"])
def test_a_timeout_that_is_written_late_is_the_outcome(
    make_faulty: MakeFaulty, gate: threading.Event, ending: str
) -> None:
    """The view may do anything after it was asked to stop."""
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
    assert stopped.wait(5), "the view is still asked to stop"
    eventually_true(lambda: fault.refused.count("update") >= 2)
    assert flow.get(task)["State"] == "Running"
    fault.is_down = False
    ended = flow.still(task, 6)
    assert (ended["State"], ended["Error"]) == ("Aborted", "Timeout")
    eventually_true(lambda: not has_kept_outcome(flow, task))


@pytest.mark.covers("F19")
def test_a_timeout_is_written_while_the_view_still_runs(
    make_faulty: MakeFaulty, gate: threading.Event
) -> None:
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


@pytest.mark.covers("F19")
def test_the_end_of_a_stopped_view_is_kept_until_it_can_be_written(
    make_faulty: MakeFaulty, gate: threading.Event
) -> None:
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
    assert has_kept_outcome(flow, task)
    fault.is_down = False
    assert flow.still(task, 6)["State"] == "Aborted"
    eventually_true(lambda: not has_kept_outcome(flow, task))


@pytest.mark.covers("F19")
def test_progress_is_written_with_the_next_report(
    make_faulty: MakeFaulty, gate: threading.Event
) -> None:
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


@pytest.mark.covers("F19")
def test_a_stop_while_an_outcome_is_kept_has_one_winner(make_faulty: MakeFaulty, hear: Any) -> None:
    """The first write wins. Here it is the stop, because the process of the task waits before it
    tries again.
    """
    fault = Down()
    fault.names = ()
    flow = make_faulty(fault)
    sent_signals = hear(signals.task_finished, sender=flow.app)

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
    eventually_true(lambda: not has_kept_outcome(flow, task), 6)
    assert flow.still(task) == ended
    assert [found.state.value for _, found in sent_signals] == [ended["State"]]


@pytest.mark.covers("F19")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_claim_that_fails_leaves_the_task_waiting(
    make_faulty: MakeFaulty, how: str, hear: Any
) -> None:
    """This includes a claim that was stored in spite of the error. Otherwise no process would run
    the task.
    """
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


@pytest.mark.covers("F19")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_claim_that_fails_aborts_a_task_that_only_this_process_can_run(
    make_faulty: MakeFaulty, how: str, is_inside: bool
) -> None:
    """No other process can run an immediate task, or a task on an Executor of the app."""
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
        assert flow.ended(flow.start(), 6)["State"] == "Completed", "other tasks run"
    assert (ended["State"], ended["Error"], ended.get("Stopping")) == (
        "Aborted",
        "Worker lost",
        None,
    )
    assert task["Id"] not in runs


BODY = b"x" * 400_000
"""A body that is stored in rows of its own."""


def add_size_view(flow: Flow, **options: Any) -> Flow:
    @flow.route("/size", **options)
    def size() -> Any:
        return len(request.get_data())

    return flow


def child_app() -> Flask:
    """Return the app that a child process loads."""
    app = Flask("app")
    app.config["ASYNCROUTE_STORE"] = "memory://"
    return add_size_view(Flow(app, AsyncRoute(app))).app


@pytest.mark.covers("F45")
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_body_that_cannot_be_read_yet_is_read_later(
    make_faulty: MakeFaulty, executor: str
) -> None:
    fault = Down("body")
    flow = add_size_view(
        make_faulty(fault, ASYNCROUTE_APP=f"{__name__}:child_app()"), executor=executor
    )  # fmt: skip
    fault.is_down = True
    task = flow.start("/size", data=BODY)
    eventually_true(lambda: len(fault.refused) >= 3)
    assert flow.get(task)["State"] == "Running"
    fault.is_down = False
    assert flow.ended(task, 30)["Result"] == len(BODY)


@pytest.mark.covers("F45")
@pytest.mark.parametrize("end", ["stop", "timeout", "lost", "shutdown", "restart"])
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_task_whose_body_cannot_be_read_can_end(make_faulty: MakeFaulty, end: str) -> None:
    """The view does not run, and its thread is released."""
    fault = Down("body")
    flow = add_size_view(
        make_faulty(fault), timeout=1.0 if end == "timeout" else 600,
        on_loss="restart" if end == "restart" else "abort",
    )  # fmt: skip
    fault.is_down = True
    task = flow.start("/size", data=BODY)
    eventually_true(lambda: fault.refused)
    runner = runtime_of(flow.app).runner
    if end == "stop":
        flow.stop(task)
    if end == "lost":
        stored = runner.store.get(task["Id"])
        assert stored is not None
        runner.lifecycle.recover(stored)
    if end in ("shutdown", "restart"):
        shut_down({runner: 0.0})
    if end == "restart":
        assert flow.get(task)["State"] == "NotStarted"
        fault.is_down = False
        with closing(runner.store.body(task["Id"])) as body:
            assert body.size == len(BODY)
    else:
        ended = flow.still(task)
        error = {"stop": "Aborted by the user", "timeout": "Timeout", "lost": "Worker lost"}
        assert (ended["State"], ended["Error"]) == ("Aborted", error.get(end, "Server shutdown"))
    eventually_true(lambda: {executor.free() for executor in runner.executors} == {2})


@pytest.mark.covers("F45")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_view_does_not_run_if_a_stop_has_removed_its_body(
    make_faulty: MakeFaulty,
) -> None:
    """Another process stops the task, and this one has not noticed it yet."""
    stopped = threading.Event()

    def fault(name: str) -> None:
        if name == "body" and not stopped.is_set():
            store = runtime_of(flow.app).runner.store
            (task_id,) = runtime_of(flow.app).runner.dispatcher.running
            aborted = {"state": State.ABORTED, "completed_us": now_us(), "error": "Elsewhere"}
            stopped.set()
            assert store.update(task_id, Expect((State.RUNNING,)), aborted) is not None

    flow = make_faulty(fault)
    runs = []

    @flow.route("/size")
    def size() -> Any:
        runs.append(len(request.get_data()))

    task = flow.start("/size", data=BODY)
    assert flow.still(task)["Error"] == "Elsewhere"
    eventually_true(lambda: not has_kept_outcome(flow, task))
    assert runs == []


@pytest.mark.covers("F19")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_start_refused_by_its_executor_is_removed_when_the_store_is_back(
    make_faulty: MakeFaulty,
) -> None:
    """The client got 503, so the task must not run or be listed later."""
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


@pytest.mark.covers("F44")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_start_with_an_unknown_commit_does_not_stay_waiting(make_faulty: MakeFaulty) -> None:
    """The client got 503, so it will try again. A task that was stored in spite of the error is
    removed.
    """
    fault = Nth(1, "after")
    flow = make_faulty(lambda name: fault(name) if name == "add" else None)

    @flow.route()
    def work() -> Any:
        return 1

    flow.start(status=503)
    eventually_true(lambda: all(task["IsCompleted"] for task in flow.query()))


@pytest.mark.covers("F44")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_unique_start_with_an_unknown_commit_is_kept(
    make_faulty: MakeFaulty, gate: threading.Event
) -> None:
    """Another start can get its id before an undo, so the task must not be removed."""
    fault = Nth(1, "after")
    flow = make_faulty(lambda name: fault(name) if name == "add" else None)
    runs: list[str] = []

    @flow.route(unique=True)
    def work() -> None:
        runs.append(current_task.id)
        gate.wait(10)

    flow.headers = CREDENTIALS
    flow.start(status=503)
    task = flow.start()
    flow.became(task, "Running")
    gate.set()
    flow.ended(task)
    assert flow.ids() == [task["Id"]] == runs


@pytest.mark.covers("F44")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_unique_start_with_an_unknown_commit_on_an_own_executor_is_removed(
    make_faulty: MakeFaulty,
) -> None:
    """No process would run it, so it would hold its key forever."""
    fault = Nth(1, "after")
    flow = make_faulty(lambda name: fault(name) if name == "add" else None)
    runs: list[str] = []
    with ThreadPoolExecutor(1) as pool:

        @flow.route(unique=True, executor=pool)
        def work() -> None:
            runs.append(current_task.id)

        flow.headers = CREDENTIALS
        flow.start(status=503)
        eventually_true(lambda: not flow.query())
        task = flow.run()
        assert flow.ids() == [task["Id"]] == runs


@pytest.mark.parametrize("name", ["started_with", "add"])
def test_a_unique_start_while_the_store_is_down_leaves_no_key(
    make_faulty: MakeFaulty, name: str
) -> None:
    fault = Down(name)
    flow = make_faulty(fault)

    @flow.route(unique=True, max_workers=1, queue_size=0)
    def work() -> None: ...

    fault.is_down = True
    for _ in range(2):
        flow.start(status=503)
    fault.is_down = False
    flow.run()
    assert fault.refused == [name] * 2


class Scenario:
    """Two tasks, one that completes and one that is stopped, followed by a list and a purge."""

    def __init__(self, flow: Flow, hear: Any, is_unique: bool) -> None:
        self.flow = flow
        self.finished = hear(signals.task_finished, sender=flow.app)
        self.begun = threading.Event()

        @flow.route("/ends", max_workers=2, unique=is_unique)
        def ends() -> Any:
            current_task.progress = 10
            return {"Done": True}

        @flow.route("/waits", max_workers=2, unique=is_unique)
        def waits() -> Any:
            self.begun.set()
            current_task.sleep(20)

    def play(self) -> dict[str, str]:
        """Send all requests, each refused one once more; return the accepted ids with their final
        states.
        """
        accepted = {}
        ends = self._send("POST", "/ends", 202)
        accepted[ends["Id"]] = "Completed"
        self._until_ended(ends["Id"])
        waits = self._send("POST", "/waits", 202)
        accepted[waits["Id"]] = "Aborted"
        assert self.begun.wait(5)
        self._send("DELETE", f"/task/{waits['Id']}", 200)
        self._until_ended(waits["Id"])
        listed = self._send("GET", "/tasks?State=Completed", 200)
        assert ends["Id"] in {task["Id"] for task in listed}
        self._purge(ends["Id"])
        del accepted[ends["Id"]]
        return accepted

    def _purge(self, task_id: str) -> None:
        """Purge a task. A refused request may have taken effect."""
        for _ in range(2):
            answer = self.flow.request("DELETE", f"/task/{task_id}?purge=true")
            assert answer.status_code in (204, 404, 503), answer.get_data(as_text=True)
            if answer.status_code != 503:
                break

    def _send(self, method: str, path: str, status: int) -> Any:
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
            assert answer.status_code in (200, 503), f"{task_id} is unknown"
            return answer.status_code == 200 and answer.get_json()["IsCompleted"]

        eventually_true(has_ended, 8, 0.02)


@pytest.mark.covers("F44", "I1", "I2", "I3", "I4")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("is_unique", [False, True], ids=["", "unique"])
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_the_invariants_hold_if_the_nth_call_of_the_store_fails(
    make_faulty: MakeFaulty, how: str, is_unique: bool, hear: Any, gate: threading.Event
) -> None:
    """Reads by background maintenance count as well, so the Nth call is not always the same one."""
    number = 0
    while True:
        number += 1
        fault = Nth(number, how)
        flow = make_faulty(fault, ASYNCROUTE_NAMESPACE=f"of-{number}")
        flow.headers = CREDENTIALS
        scenario = Scenario(flow, hear, is_unique)
        accepted = scenario.play()
        calls = fault.disarm()
        runner = runtime_of(flow.app).runner
        eventually_true(lambda runner=runner: not runner.dispatcher.running, 6)
        found = flow.query("limit=500")
        assert accepted.keys() <= {task["Id"] for task in found}, (
            f"a task is missing after call {number}"
        )
        for task in found:
            flow.still(task, 6)
            task = flow.get(task)
            where = f"call {number} ({fault.calls[number - 1 : number]}) failed {how}"
            assert task["State"] == accepted.get(task["Id"], task["State"]), where
            times = [
                task[name]
                for name in ("CreationTime", "StartingTime", "CompletedTime")
                if name in task
            ]
            assert times == sorted(times), where
            states_sent = [
                found.state.value for _, found in scenario.finished if found.id == task["Id"]
            ]
            assert states_sent in ([task["State"]], []), where
            if how == "before":
                assert states_sent == [task["State"]], where
        assert {executor.free() for executor in runner.executors} == {2}, "every slot was released"
        runtime_of(flow.app).close()
        if calls < number:
            break
    assert number > 12


@pytest.mark.covers("F45")
@pytest.mark.parametrize("executor", ["thread", "immediate", "own"])
def test_a_retry_that_cannot_be_written_is_written_later(
    make_faulty: MakeFaulty, executor: str, hear: Any
) -> None:
    fault = Down(*WRITES)
    flow = make_faulty(fault)
    retried = hear(signals.task_retried, sender=flow.app)
    attempts: list[int] = []

    with ThreadPoolExecutor(1) as pool:

        @flow.route(
            executor=pool if executor == "own" else executor,
            retry=Retry(times=1, delay=0.02),
        )
        def work() -> str:
            attempts.append(current_task.attempt)
            if current_task.attempt == 1:
                fault.is_down = True
                raise ValueError("no")
            return "done"

        def come_back() -> None:
            eventually_true(lambda: fault.refused.count("update") >= 3, 10)
            fault.is_down = False

        repair = threading.Thread(target=come_back)
        repair.start()
        task = flow.start()
        repair.join(15)
        ended = flow.ended(task, 10)
    assert (ended["State"], ended["LastError"]) == ("Completed", "ValueError: no")
    assert attempts == [1, 2]
    assert [found.attempt for _, found in retried] == [2]


@pytest.mark.covers("F45")
def test_a_retry_that_cannot_be_claimed_is_claimed_later(make_faulty: MakeFaulty) -> None:
    fault = Down("claim")
    flow = make_faulty(fault)
    attempts: list[int] = []

    @flow.route(retry=Retry(times=1, delay=0.02))
    def work() -> str:
        attempts.append(current_task.attempt)
        if current_task.attempt == 1:
            fault.is_down = True
            raise ValueError("no")
        return "done"

    task = flow.start()
    eventually_true(lambda: len(fault.refused) >= 3, 10)
    assert flow.get(task)["Attempt"] == 2
    fault.is_down = False
    assert flow.ended(task, 10)["State"] == "Completed"
    assert attempts == [1, 2]


@pytest.mark.covers("F44", "I1", "I2", "I3")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_each_attempt_runs_once_if_the_nth_call_of_the_store_fails(
    make_faulty: MakeFaulty, how: str, hear: Any
) -> None:
    """Reads by background maintenance count as well, so the Nth call is not always the same one."""
    number = 0
    while True:
        number += 1
        fault = Nth(number, how)
        flow = make_faulty(fault, ASYNCROUTE_NAMESPACE=f"of-{number}")
        finished = hear(signals.task_finished, sender=flow.app)
        attempts: dict[str, list[int]] = {}

        @flow.route(retry=Retry(times=1, delay=0.02))
        def work(attempts: dict[str, list[int]] = attempts) -> None:
            attempts.setdefault(current_task.id, []).append(current_task.attempt)
            if current_task.attempt == 1:
                raise ValueError("no")

        if flow.request("POST", "/work").status_code != 202:
            flow.start()
        runner = runtime_of(flow.app).runner

        def has_ended(flow: Flow = flow) -> bool:
            answer = flow.request("GET", "/tasks")
            return answer.status_code == 200 and all(
                task["IsCompleted"] for task in answer.get_json()
            )

        eventually_true(has_ended, 10, 0.02)
        calls = fault.disarm()
        eventually_true(lambda runner=runner: not runner.dispatcher.running, 6)
        where = f"call {number} ({fault.calls[number - 1 : number]}) failed {how}"
        completed = [task for task in flow.query() if task["State"] == "Completed"]
        assert completed, where
        for task in completed:
            assert (task["Attempt"], attempts[task["Id"]]) == (2, [1, 2]), where
            sent = [found.state.value for _, found in finished if found.id == task["Id"]]
            assert len(sent) <= 1, where
        runtime_of(flow.app).close()
        if calls < number:
            break
    assert number > 8


@pytest.mark.covers("F24")
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_slow_store_does_not_delay_running_tasks(
    make_faulty: MakeFaulty, gate: threading.Event
) -> None:
    """Each call takes two seconds. Running tasks continue, time out and stop meanwhile."""
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
        threading.Thread(
            target=lambda: answers.append(flow.app.test_client().post("/counts").status_code)
        )
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
