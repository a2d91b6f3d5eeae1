"""Runs of a Celery worker in this process, without Celery's own machinery: the test delivers the
message.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

pytest.importorskip("celery")

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from flask_asyncroute import AsyncRoute, celery_task, current_task  # noqa: F401 - see `deliver`
from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.executors.celery import TASK_NAME, CeleryTaskExecutor
from flask_asyncroute.executors.registry import CELERY_WORKER
from flask_asyncroute.runtime import runtime_of
from tests.support.brokers import new_celery
from tests.support.faulty_store import Down, FaultyStore
from tests.support.flow import Flow

MakeSide = Callable[..., Flow]
Eventually = Callable[..., Any]


def deliver(worker: Flow, task: dict[str, Any]) -> None:
    """Run a task as the worker does when it receives the message."""
    worker.app.extensions["celery"].tasks[TASK_NAME](task["Id"])


@pytest.fixture
def make_side(make_app: Callable[..., Flask], tmp_path: Path, separate_processes: None) -> MakeSide:
    """Return ``make_side(celery=None, folder="shared", **config)``, which creates the app of a web
    server or of a worker. By default they share the store.
    """

    def make(celery: Celery | None = None, folder: str = "shared", **config: Any) -> Flow:
        app = make_app(
            instance_path=tmp_path / folder, ASYNCROUTE_STORE="sqlite:///asyncroute.db", **config
        )
        app.extensions["celery"] = celery or new_celery("memory://")
        return Flow(app, AsyncRoute(app))

    return make


@pytest.fixture
def prefork(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process look like a child of a prefork worker."""

    def on_soft_limit(*_: Any) -> None:
        raise SoftTimeLimitExceeded()

    before = signal.signal(signal.SIGUSR1, on_soft_limit)
    monkeypatch.setattr(CeleryTaskExecutor, "can_kill", True)
    yield
    assert signal.signal(signal.SIGUSR1, before) is on_soft_limit


@pytest.mark.parametrize("step", ["claim", "finish"])
def test_a_soft_time_limit_outside_the_view_loses_no_task(
    make_side: MakeSide, prefork: None, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    web, worker = make_side(), make_side()
    for side in (web, worker):
        side.route(executor="celery")(lambda: "done")
    task = web.start()
    original = getattr(Lifecycle, step)
    sent: list[str] = []

    def at_the_limit(self: Lifecycle, *arguments: Any) -> Any:
        if step == "finish":
            os.kill(os.getpid(), signal.SIGUSR1)
        result = original(self, *arguments)
        os.kill(os.getpid(), signal.SIGUSR1)
        sent.append(step)
        return result

    monkeypatch.setattr(Lifecycle, step, at_the_limit)
    deliver(worker, task)
    assert sent == [step]
    found = web.still(task)
    assert (found["State"], found["Result"]) == ("Completed", "done")


def test_a_soft_time_limit_in_the_view_fails_the_task(make_side: MakeSide, prefork: None) -> None:
    web, worker = make_side(), make_side()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        threading.Event().wait(10)

    for side in (web, worker):
        side.route(executor="celery", endpoint="work")(work)
    task = web.start()
    deliver(worker, task)
    found = web.get(task)
    assert found["State"] == "Failed" and "SoftTimeLimitExceeded" in found["Error"]


def test_a_worker_retries_an_outcome_that_could_not_be_stored(
    make_side: MakeSide, eventually: Eventually
) -> None:
    web, worker = make_side(), make_side()
    fault = Down("update")

    def work() -> str:
        fault.is_down = True
        return "done"

    for side in (web, worker):
        side.route(executor="celery", endpoint="work")(work)
    task = web.start()
    runtime = runtime_of(worker.app)
    runtime.become_celery_worker(CELERY_WORKER)
    runner = runtime.runner
    runner.lifecycle._store = FaultyStore(runner.store, fault)
    deliver(worker, task)
    eventually(lambda: fault.refused)
    assert web.get(task)["State"] == "Running"
    fault.is_down = False
    assert web.ended(task)["Result"] == "done"


def test_two_apps_share_one_celery_app(make_side: MakeSide) -> None:
    celery = new_celery("memory://")
    sides = {
        name: (make_side(folder=name, name=name), make_side(celery, folder=name, name=name))
        for name in ("one", "two")
    }
    for name, pair in sides.items():
        for side in pair:
            side.route(executor="celery", endpoint="work")(
                lambda name=name: [name, current_task.id]
            )
    for name, (web, worker) in sides.items():
        task = web.start()
        deliver(worker, task)
        assert web.get(task)["Result"] == [name, task["Id"]]
