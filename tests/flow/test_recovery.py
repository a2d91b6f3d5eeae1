"""Two runners of one app on one store: one recovers tasks that the other still runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, TaskAborted, current_task
from flask_asyncroute.executors.base import PoolSettings
from flask_asyncroute.executors.execution import Execution
from flask_asyncroute.executors.inline import ImmediateTaskExecutor
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.signals import task_created
from tests.support.flow import Flow

Eventually = Callable[..., Any]


@pytest.fixture
def make_runner(
    make_app: Callable[..., Flask],
    tmp_path_factory: pytest.TempPathFactory,
    separate_processes: None,
) -> Callable[..., Flow]:
    """Return ``make_runner(**config)``, which creates an app on the store of this test."""
    folder = tmp_path_factory.mktemp("shared")

    def make(**config: Any) -> Flow:
        app = make_app(instance_path=folder, **config)
        return Flow(app, AsyncRoute(app))

    return make


@pytest.fixture
def lone_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_worker_stops_a_task_that_another_worker_has_recovered(
    make_runner: Callable[..., Flow], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    flow, other = make_runner(), make_runner()
    begun, view_stopped = threading.Event(), threading.Event()

    @flow.route()
    def work() -> str:
        begun.set()
        try:
            current_task.sleep(20)
            current_task.check()
        except TaskAborted:
            view_stopped.set()
            raise
        return "too late"

    task = flow.start()
    assert begun.wait(5)
    other.request("GET", "/task/none")
    runner = runtime_of(other.app).runner
    stored = runner.store.get(task["Id"])
    assert stored is not None
    assert runner.lifecycle.recover(stored) is not None
    assert view_stopped.wait(5)
    ended = flow.still(task)
    assert (ended["State"], ended["Error"]) == ("Aborted", "Worker lost")


def test_a_task_restarted_by_another_worker_has_one_outcome(
    make_runner: Callable[..., Flow], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """The first run is stopped and its result dropped. The result of the second run is stored."""
    flow, other = make_runner(ASYNCROUTE_MAX_WORKERS=1), make_runner()
    begun, view_stopped = threading.Event(), threading.Event()

    @flow.route(on_loss="restart", interrupt_after=None)
    def work() -> str:
        if begun.is_set():
            return "first again"  # After the stop, this process may run the task again.
        begun.set()
        while not current_task.stop_requested:
            current_task.sleep(5)
        view_stopped.set()
        return "first"

    @other.route(on_loss="restart", endpoint="work")
    def again() -> str:
        return "second"

    task = flow.start()
    assert begun.wait(5)
    other.request("GET", "/task/none")
    runner = runtime_of(other.app).runner
    stored = runner.store.get(task["Id"])
    assert stored is not None
    assert runner.lifecycle.recover(stored) is not None
    assert view_stopped.wait(5)
    ended = eventually(lambda: (found := flow.get(task))["IsCompleted"] and found, 10)
    assert ended["State"] == "Completed"
    assert ended["Result"] in ("first again", "second"), "what the first run returned is dropped"
    assert "Another worker has taken over task" in caplog.text
    after = runner.store.get(task["Id"])
    assert after is not None and (after.restarts, after.epoch) == (1, 2)


def test_a_timeout_applies_while_the_store_does_not_answer(
    make_runner: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """Waits for the store and checks of deadlines are on different threads."""
    flow = make_runner()
    view_stopped = threading.Event()

    @flow.route(timeout=0.3, interrupt_after=0)
    def work() -> None:
        try:
            while not gate.is_set():
                sum(range(100))
        except TaskAborted:
            view_stopped.set()
            raise

    flow.request("GET", "/task/none")
    runner = runtime_of(flow.app).runner
    stuck = threading.Event()

    def wait() -> None:
        stuck.set()
        gate.wait(20)

    runner.maintenance.call(wait)
    assert stuck.wait(5)
    task = flow.start()
    assert view_stopped.wait(5)
    gate.set()
    assert flow.still(task)["Error"] == "Timeout"


def test_a_task_that_waits_for_an_executor_of_the_app_stays_with_its_process(
    make_runner: Callable[..., Flow], eventually: Eventually, lone_thread: ThreadPoolExecutor, gate: threading.Event,
    own_pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """Another process runs only tasks of other routes, and aborts this one when it recovers it."""
    flow, other = make_runner(), make_runner()
    ran: list[str] = []

    def declare(to: Flow, executor: ThreadPoolExecutor, name: str) -> None:
        @to.route("/bound/<what>", executor=executor, endpoint="bound")
        def bound(what: str) -> None:
            if what == "long":
                gate.wait(20)
            ran.append(f"{name} {what}")

        @to.route("/free/<what>", max_workers=1, endpoint="free")
        def free(what: str) -> None:
            if what == "long":
                gate.wait(20)
            ran.append(f"{name} {what}")

    declare(flow, lone_thread, "first")
    declare(other, own_pool, "other")
    flow.start("/bound/long")
    waiting = flow.start("/bound/short")
    flow.start("/free/long")
    free = flow.start("/free/quick")
    other.request("GET", "/task/none")
    eventually(lambda: other.get(free)["State"] == "Completed", 10)
    assert ran == ["other quick"]
    assert other.get(waiting)["State"] == "NotStarted"
    runner = runtime_of(other.app).runner
    stored = runner.store.get(waiting["Id"])
    assert stored is not None
    assert runner.lifecycle.recover(stored) is not None
    gate.set()
    flow.still(waiting)
    assert flow.get(waiting)["Error"] == "Worker lost"
    assert "first short" not in ran


def test_a_task_that_is_claimed_during_its_start_runs_once(
    make_runner: Callable[..., Flow], eventually: Eventually
) -> None:
    """Receivers may delay a start between the store and the executor. If the task is claimed
    meanwhile, the late submission must not replace the entry of its run.
    """
    flow = make_runner()
    begun, view_stopped = threading.Event(), threading.Event()

    @flow.route(max_workers=2)
    def work() -> None:
        begun.set()
        try:
            while True:
                time.sleep(0.001)
        except TaskAborted:
            view_stopped.set()
            raise

    def wait(sender: Flask, **extra: Any) -> None:
        assert begun.wait(10)

    with task_created.connected_to(wait, flow.app):
        task = flow.start()
    runner = runtime_of(flow.app).runner
    assert task["Id"] in runner.dispatcher.running
    (executor,) = runner.executors
    assert executor.holds(task["Id"])
    assert executor.free() == 1, "one slot, not two"
    assert flow.client.delete(f"/task/{task['Id']}").status_code == 200
    assert view_stopped.wait(5)
    eventually(lambda: executor.free() == 2)


def test_a_task_without_a_stored_outcome_is_not_run_again(
    make_runner: Callable[..., Flow],
) -> None:
    """It still counts as running in this process."""
    flow = make_runner()
    flow.request("GET", "/task/none")
    dispatcher = runtime_of(flow.app).runner.dispatcher
    first, second = (Execution("task", None, lambda: None) for _ in range(2))
    executor = ImmediateTaskExecutor(PoolSettings("test", lambda executor, task_id: None, 1, 1))
    assert dispatcher.begin(first, executor)
    assert not dispatcher.begin(second, executor)
    dispatcher.end(second)
    assert dispatcher.running["task"] == (first, executor)
    dispatcher.end(first)
    assert not dispatcher.running
