"""Graceful shutdown: running tasks, waiting tasks, late starts, and an unavailable store."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, TaskAborted, current_task
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.executors.thread import ThreadTaskExecutor
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.workers.runner import Runner
from flask_asyncroute.workers.shutdown import shut_down
from tests.support.flow import Flow

Eventually = Callable[..., Any]


class Served:
    """An app with views that the test controls."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.client = app.test_client()
        self.routes = AsyncRoute(app)
        self.begun = threading.Event()
        self.go = threading.Event()
        self.interrupted: list[str] = []

        @app.put("/held")
        @self.routes.task(interrupt_after=None)
        def held() -> str:
            self.begun.set()
            self.go.wait(20)
            return "done"

        @app.put("/loop")
        @self.routes.task()
        def loop() -> None:
            self.begun.set()
            try:
                while True:
                    time.sleep(0.001)
            except TaskAborted:
                self.interrupted.append(current_task.id)
                raise

        @app.put("/polite")
        @self.routes.task(on_loss="restart")
        def polite() -> None:
            current_task.progress = 40
            self.begun.set()
            current_task.sleep(20)
            current_task.check()

        @app.put("/obstinate")
        @self.routes.task(on_loss="restart", interrupt_after=None)
        def obstinate() -> None:
            self.begun.set()
            self.go.wait(20)

        @app.put("/coroutine")
        @self.routes.task()
        async def coroutine() -> None:
            self.begun.set()
            await asyncio.sleep(20)

        @app.put("/single")
        @self.routes.task(max_workers=1)
        def single() -> None:
            self.begun.set()
            self.go.wait(20)

    @property
    def runner(self) -> Runner:
        return runtime_of(self.app).runner

    def start(self, path: str) -> str:
        reply = self.client.put(path)
        assert reply.status_code == 202, reply.text
        return str(reply.json["Id"])

    def begin(self, path: str) -> str:
        """Start a task and wait until its view runs."""
        self.begun.clear()
        task_id = self.start(path)
        assert self.begun.wait(5)
        return task_id

    def task(self, task_id: str) -> Any:
        return self.client.get(f"/task/{task_id}").json

    def listed(self) -> list[str]:
        workers = self.runner.store.workers
        assert workers is not None
        return [worker.name for worker in workers.listed()]


@pytest.fixture
def served(make_app: Callable[..., Flask], gate: threading.Event) -> Any:
    served_app = Served(make_app())
    served_app.go = gate
    return served_app


def test_an_idle_process_exits_at_once(served: Served) -> None:
    served.begin("/held")
    served.go.set()
    assert served.runner.dispatcher.wait_idle(5)
    assert served.listed() == [served.runner.lifecycle.owner]
    began = time.monotonic()
    shut_down({served.runner: 20})
    assert time.monotonic() - began < 1
    assert served.listed() == []


def test_a_task_that_finishes_in_time_completes(served: Served) -> None:
    task_id = served.begin("/held")
    shutdown_thread = threading.Thread(target=shut_down, args=({served.runner: 20},))
    shutdown_thread.start()
    served.go.set()
    shutdown_thread.join(5)
    assert not shutdown_thread.is_alive()
    assert (served.task(task_id)["State"], served.task(task_id)["Result"]) == ("Completed", "done")
    assert served.listed() == []


def test_a_task_that_does_not_finish_in_time_is_aborted(served: Served) -> None:
    """The view is asked to stop and soon interrupted, whatever the route's ``interrupt_after``."""
    task_id = served.begin("/loop")
    began = time.monotonic()
    shut_down({served.runner: 0.1})
    assert 0.1 <= time.monotonic() - began < 2
    found = served.task(task_id)
    assert (found["State"], found["Error"], found.get("Stopping")) == (
        "Aborted",
        "Server shutdown",
        None,
    )
    assert served.interrupted == [task_id]


def test_a_view_that_returns_after_the_stop_request_is_aborted(served: Served) -> None:
    @served.app.put("/partly")
    @served.routes.task()
    def partly() -> str:
        served.begun.set()
        current_task.sleep(20)
        return "half of it"

    task_id = served.begin("/partly")
    shut_down({served.runner: 0})
    found = served.task(task_id)
    assert (found["State"], found["Error"]) == ("Aborted", "Server shutdown")
    assert "Result" not in found


def test_a_view_that_cannot_be_interrupted_is_aborted_and_not_stopping(
    served: Served, eventually: Eventually
) -> None:
    """Its code ends with the process, so nothing would clear ``Stopping`` later."""
    task_id = served.begin("/held")
    shut_down({served.runner: 0})
    found = served.task(task_id)
    assert (found["State"], found["Error"], found.get("Stopping")) == (
        "Aborted",
        "Server shutdown",
        None,
    )
    served.go.set()
    assert served.runner.dispatcher.wait_idle(5)
    assert served.task(task_id)["Error"] == "Server shutdown", "a late result is dropped"


@pytest.mark.parametrize("path", ["/polite", "/obstinate"])
def test_a_task_with_on_loss_restart_waits_again(served: Served, path: str) -> None:
    task_id = served.begin(path)
    shut_down({served.runner: 0})
    found = served.task(task_id)
    assert found["State"] == "NotStarted"
    assert not {"StartingTime", "ExpireTime", "Progress", "Error"} & found.keys()
    stored = served.runner.store.get(task_id)
    assert stored is not None
    assert (stored.owner, stored.restarts) == (None, 0), "a shutdown does not count as a restart"
    served.go.set()
    assert served.runner.dispatcher.wait_idle(5)
    assert served.task(task_id)["State"] == "NotStarted"


def test_a_coroutine_view_is_cancelled(served: Served) -> None:
    task_id = served.begin("/coroutine")
    began = time.monotonic()
    shut_down({served.runner: 0})
    assert time.monotonic() - began < 0.9
    assert served.task(task_id)["Error"] == "Server shutdown"


def test_waiting_tasks_are_run_by_the_next_process(
    served: Served, make_app: Callable[..., Flask], eventually: Eventually
) -> None:
    running = served.begin("/single")
    waiting = [served.start("/single") for _ in range(3)]
    shut_down({served.runner: 0})
    served.go.set()
    assert served.runner.dispatcher.wait_idle(5)
    assert served.task(running)["Error"] == "Server shutdown"
    assert [served.task(task_id)["State"] for task_id in waiting] == ["NotStarted"] * 3
    runtime_of(served.app).close()
    next_served = Served(make_app(instance_path=served.app.instance_path))
    next_served.go = served.go
    next_served.client.get("/task/none")
    eventually(
        lambda: all(next_served.task(task_id)["State"] == "Completed" for task_id in waiting), 10
    )


@pytest.mark.covers("F02")
def test_a_backlog_of_one_route_does_not_delay_another(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Tasks left by a process start when their own pool has a free slot."""

    def make(**config: Any) -> tuple[Flask, list[str]]:
        app, ran = make_app(**config), []
        routes = AsyncRoute(app)
        for path in ("/many", "/one"):
            routes.route(path, methods=["PUT"], max_workers=2, endpoint=path[1:])(
                lambda: ran.append(current_task.id)
            )
        return app, ran

    app, _ = make()
    with monkeypatch.context() as idle:
        idle.setattr(ThreadTaskExecutor, "_start", lambda self, task_id: Future())
        left = [app.test_client().put("/many").json["Id"] for _ in range(60)]
        last = app.test_client().put("/one").json["Id"]
    runtime_of(app).close()
    app, ran = make(instance_path=app.instance_path)
    app.test_client().get("/task/none")
    eventually(lambda: last in ran, 10)
    assert len(ran) < 45, "the other route had free slots throughout"
    eventually(lambda: set(ran) == {*left, last}, 10)
    assert len(ran) == 61


def test_a_task_that_waits_for_an_executor_of_the_app_is_aborted(served: Served) -> None:
    """No other process can run it."""
    with ThreadPoolExecutor(1) as pool:

        @served.app.put("/own")
        @served.routes.task(executor=pool)
        def own() -> None:
            served.begun.set()
            served.go.wait(20)

        running = served.begin("/own")
        waiting = served.start("/own")
        shut_down({served.runner: 0})
        assert {served.task(task_id)["Error"] for task_id in (running, waiting)} == {
            "Server shutdown"
        }
        served.go.set()


def test_a_failure_to_abort_one_task_does_not_affect_others(
    make_app: Callable[..., Flask], tmp_path: Path, gate: threading.Event
) -> None:
    """Executors of the app and functions that cancel a run may raise."""

    class Broken(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            return Unreachable()

    class Unreachable(Future[None]):
        def cancel(self) -> bool:
            raise RuntimeError("the cluster is gone")

    def fail() -> None:
        raise RuntimeError("its loop is closed")

    broken, good = (
        Served(make_app(instance_path=str(tmp_path / name))) for name in ("broken", "good")
    )
    broken.go = good.go = gate
    broken.app.put("/own")(broken.routes.task(executor=Broken())(lambda: None))
    broken.start("/own")
    ids = [(served, served.begin("/held")) for served in (broken, good)]
    execution, _ = broken.runner.dispatcher.running[ids[0][1]]
    execution.cancel_with(fail)
    shut_down({broken.runner: 0, good.runner: 0})
    assert [served.task(task_id)["Error"] for served, task_id in ids] == ["Server shutdown"] * 2


def test_a_start_stored_during_the_exit_is_aborted_if_no_other_process_can_run_it(
    served: Served, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.app.put("/now")(served.routes.task(executor="immediate")(lambda: None))
    create = served.runner.lifecycle.create

    def create_late(*given: Any) -> None:
        shut_down({served.runner: 0})
        create(*given)

    monkeypatch.setattr(served.runner.lifecycle, "create", create_late)
    task_id = served.start("/now")
    eventually(lambda: served.task(task_id).get("Error") == "Server shutdown")


def test_a_start_stored_during_the_exit_is_left_to_other_processes(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was accepted before the exit began, so it is answered 202, but it does not run here."""
    served.begin("/held")
    create = served.runner.lifecycle.create

    def create_late(*given: Any) -> None:
        shut_down({served.runner: 0})
        create(*given)

    monkeypatch.setattr(served.runner.lifecycle, "create", create_late)
    task_id = served.start("/polite")
    served.begun.clear()
    served.go.set()
    assert served.runner.dispatcher.wait_idle(5)
    assert not served.begun.is_set()
    assert served.task(task_id)["State"] == "NotStarted"


def test_a_start_during_the_exit_is_refused(served: Served) -> None:
    served.begin("/held")
    served.runner.dispatcher.is_closing = True
    before = len(list(served.client.get("/tasks").json))
    reply = served.client.put("/held")
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json["type"] == "tag:flask-asyncroute.readthedocs.io,2026:shutting-down"
    assert len(served.client.get("/tasks").json) == before, "no task was stored"


def test_a_process_exits_while_the_store_is_unavailable(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays listed, so that other processes recover its tasks."""
    task_id = served.begin("/held")

    def fail(*given: Any) -> Any:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as unavailable:
        unavailable.setattr(served.runner.store, "update", fail)
        began = time.monotonic()
        shut_down({served.runner: 0})
        assert time.monotonic() - began < 3
        assert "Some outcomes could not be recorded during the shutdown" in caplog.text
        assert served.listed() == [served.runner.lifecycle.owner]
    assert served.task(task_id)["State"] == "Running"


def test_tasks_in_memory_may_finish_before_the_exit(
    make_app: Callable[..., Flask], gate: threading.Event
) -> None:
    served = Served(make_app(ASYNCROUTE_STORE="memory://"))
    served.go = gate
    task_id = served.begin("/held")
    shutdown_thread = threading.Thread(target=shut_down, args=({served.runner: 20},))
    shutdown_thread.start()
    gate.set()
    shutdown_thread.join(5)
    assert served.task(task_id)["State"] == "Completed"


@pytest.mark.covers("F04")
def test_apps_of_one_process_share_the_drain_time(
    make_app: Callable[..., Flask],
    tmp_path: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The times of views that do not end and of stores that do not answer do not add up."""
    all_served = [
        Served(make_app(instance_path=str(tmp_path / str(number)))) for number in range(4)
    ]
    is_back = threading.Event()
    for served in all_served:
        served.go = gate
        served.begin("/held")
        monkeypatch.setattr(served.runner.store, "update", lambda *given: is_back.wait(20) and None)
    began = time.monotonic()
    shut_down({served.runner: 0.1 for served in all_served})
    took = time.monotonic() - began
    is_back.set()
    gate.set()
    assert took < 0.1 + 1.5 + 0.5


def test_queued_tasks_of_an_own_executor_outlive_a_closed_runner(
    make_flow: Callable[..., Flow], own_pool: ThreadPoolExecutor, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    flow.route(executor=own_pool, max_workers=1)(lambda: gate.wait(20))
    tasks = [flow.start() for _ in range(3)]
    flow.became(tasks[0], "Running")
    runtime_of(flow.app).close()
    gate.set()
    assert {flow.ended(task)["State"] for task in tasks} == {"Completed"}
