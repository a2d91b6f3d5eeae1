"""Two runners of one app on one store, in this process: what one is taken for dead for, and what the other takes over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, TaskAborted, current_task
from flask_asyncroute.execution import Execution
from flask_asyncroute.executors.immediate import ImmediateTaskExecutor
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.signals import task_created
from tests.flow.driving import Flow

Eventually = Callable[..., Any]


@pytest.fixture
def make_runner(make_app: Callable[..., Flask], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Flow]:
    """Give ``make_runner(**config)``: an app on the store of this test."""
    folder = tmp_path_factory.mktemp("shared")

    def make(**config: Any) -> Flow:
        app = make_app(instance_path=folder, **config)
        return Flow(app, AsyncRoute(app))

    return make


@pytest.fixture
def lone_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_worker_that_was_taken_for_dead_stops_what_it_lost(
    make_runner: Callable[..., Flow], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    flow, other = make_runner(), make_runner()
    begun, told = threading.Event(), threading.Event()

    @flow.route()
    def work() -> str:
        begun.set()
        try:
            current_task.sleep(20)
            current_task.check()
        except TaskAborted:
            told.set()
            raise
        return "too late"

    task = flow.start()
    assert begun.wait(5)
    other.request("GET", "/task/none")
    runner = runtime_of(other.app).runner
    stored = runner.store.get(task["Id"])
    assert stored is not None
    assert runner.lifecycle.lose(stored) is not None
    assert told.wait(5)
    ended = flow.still(task)
    assert (ended["State"], ended["Error"]) == ("Aborted", "Worker lost")


def test_a_task_that_was_restarted_elsewhere_has_one_outcome(
    make_runner: Callable[..., Flow], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """The first run is stopped, its result dropped; the second is the task's."""
    flow, other = make_runner(ASYNCROUTE_MAX_WORKERS=1), make_runner()
    begun, told = threading.Event(), threading.Event()

    @flow.route(on_loss="restart", interrupt_after=None)
    def work() -> str:
        if begun.is_set():
            return "first again"  # once it has stopped, this process may take the task as any other
        begun.set()
        while not current_task.stop_requested:
            current_task.sleep(5)
        told.set()
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
    assert runner.lifecycle.lose(stored) is not None
    assert told.wait(5)
    ended = eventually(lambda: (found := flow.get(task))["IsCompleted"] and found, 10)
    assert ended["State"] == "Completed"
    assert ended["Result"] in ("first again", "second"), "what the first run returned is dropped"
    assert "is another worker's by now" in caplog.text
    after = runner.store.get(task["Id"])
    assert after is not None and (after.restarts, after.epoch) == (1, 2)


def test_a_timeout_holds_while_the_store_is_silent(
    make_runner: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """The thread that waits for the store is not the one that looks at the clock."""
    flow = make_runner()
    told = threading.Event()

    @flow.route(timeout=0.3, interrupt_after=0)
    def work() -> None:
        try:
            while not gate.is_set():
                sum(range(100))
        except TaskAborted:
            told.set()
            raise

    flow.request("GET", "/task/none")
    runner = runtime_of(flow.app).runner
    stuck = threading.Event()

    def wait() -> None:
        stuck.set()
        gate.wait(20)

    runner.housekeeper.call(wait)
    assert stuck.wait(5)
    task = flow.start()
    assert told.wait(5)
    gate.set()
    assert flow.still(task)["Error"] == "Timeout"


def test_a_task_that_waits_for_an_executor_of_the_app_belongs_to_its_process(
    make_runner: Callable[..., Flow], eventually: Eventually, lone_thread: ThreadPoolExecutor, gate: threading.Event,
    own_pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """Another process that has the route leaves it alone, takes what anybody may run, and settles it when that one is gone."""
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
    assert runner.lifecycle.lose(stored) is not None
    gate.set()
    flow.still(waiting)
    assert flow.get(waiting)["Error"] == "Worker lost"
    assert "first short" not in ran


def test_a_task_that_was_taken_over_during_its_start_is_run_once(
    make_runner: Callable[..., Flow], eventually: Eventually
) -> None:
    """A start may take its time between the store and the executor, as where the app's receivers do: it is taken over by
    then, and what comes second must not be what is known of its run.
    """
    flow = make_runner()
    begun, told = threading.Event(), threading.Event()

    @flow.route(max_workers=2)
    def work() -> None:
        begun.set()
        try:
            while True:
                time.sleep(0.001)
        except TaskAborted:
            told.set()
            raise

    def wait(sender: Flask, **extra: Any) -> None:
        assert begun.wait(10)

    with task_created.connected_to(wait, flow.app):
        task = flow.start()
    runner = runtime_of(flow.app).runner
    assert task["Id"] in runner.dispatcher.running
    (executor,) = runner.executors
    assert executor.holds(task["Id"])
    assert executor.free() == 1, "one place, not two"
    assert flow.client.delete(f"/task/{task['Id']}").status_code == 200
    assert told.wait(5)
    eventually(lambda: executor.free() == 2)


def test_a_task_whose_outcome_is_not_stored_yet_is_not_begun_again(make_runner: Callable[..., Flow]) -> None:
    """It counts as running here; a second run would take that from it."""
    flow = make_runner()
    flow.request("GET", "/task/none")
    dispatcher = runtime_of(flow.app).runner.dispatcher
    first, second = (Execution("task", None, lambda: None) for _ in range(2))
    executor = ImmediateTaskExecutor(lambda executor, task_id: None, 1, 1)
    assert dispatcher.begin(first, executor)
    assert not dispatcher.begin(second, executor)
    dispatcher.end(second)
    assert dispatcher.running["task"] == (first, executor)
    dispatcher.end(first)
    assert not dispatcher.running
