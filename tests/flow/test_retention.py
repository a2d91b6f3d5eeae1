"""Retention of finished tasks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, current_app

from flask_asyncroute import AsyncRoute, current_task, task_removed
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]


@pytest.mark.covers("F34")
def test_only_finished_tasks_are_removed_after_their_retention(
    make_flow: MakeFlow,
    store_url: str,
    gate: threading.Event,
    begun: threading.Semaphore,
    eventually: Any,
) -> None:
    """It counts from the finish. Running, waiting and stopping tasks are never removed."""
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)

    @flow.route("/brief", retention=0)
    def brief() -> None: ...

    @flow.route("/kept", retention=60)
    def kept() -> None: ...

    @flow.route("/slow", retention=0, max_workers=1, interrupt_after=None)
    def slow() -> None:
        begun.release()
        gate.wait(10)

    running, waiting = flow.start("/slow"), flow.start("/slow")
    assert begun.acquire(timeout=5)
    stopping = flow.start("/slow")
    keeper = flow.run("/kept")
    expired = [flow.start("/brief")["Id"] for _ in range(3)]
    eventually(lambda: not set(expired) & set(flow.ids()))
    for task_id in expired:
        flow.get(task_id, status=404)
    assert flow.get(running)["State"] == "Running" and flow.get(waiting)["State"] == "NotStarted"
    assert flow.get(keeper) == keeper
    assert flow.stop(running)["Stopping"] is True
    flow.stop(stopping)
    eventually(lambda: stopping["Id"] not in flow.ids())
    assert flow.get(running)["Stopping"] is True
    gate.set()
    eventually(lambda: flow.ids() == [keeper["Id"]])


def test_the_retention_of_the_configuration(make_flow: MakeFlow, eventually: Any) -> None:
    flow = make_flow(ASYNCROUTE_RETENTION=0, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)
    flow.route()(lambda: 1)
    flow.start()
    eventually(lambda: flow.query() == [])


def test_a_long_task_is_kept_for_its_whole_retention(make_flow: MakeFlow, eventually: Any) -> None:
    flow = make_flow(ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)

    @flow.route("/slow", retention=0.5)
    def slow() -> None:
        current_task.sleep(0.6)

    task = flow.ended(flow.start("/slow"))
    ended_at = time.monotonic()
    eventually(lambda: task["Id"] not in flow.ids())
    assert time.monotonic() - ended_at > 0.35


def test_each_task_that_retention_removes_sends_task_removed(
    make_flow: MakeFlow, store_url: str, listen: Any, eventually: Any
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)
    removed: list[tuple[Any, ...]] = []

    def receive(sender: Flask, task_id: str, endpoint: str, **extra: Any) -> None:
        removed.append((task_id, endpoint, current_app.name, flow.async_routes.exists(task_id)))

    listen(receive, task_removed, sender=flow.app)
    flow.route("/a", retention=0, endpoint="first")(lambda: 1)
    flow.route("/b", retention=0, endpoint="second")(lambda: 1)
    flow.route("/kept", endpoint="kept")(lambda: 1)
    kept = flow.run("/kept")
    ids = {flow.start(path)["Id"]: name for path, name in (("/a", "first"), ("/b", "second"))}
    eventually(lambda: len(removed) == 2)
    assert set(removed) == {(task_id, name, "app", False) for task_id, name in ids.items()}
    assert flow.ids() == [kept["Id"]]


def test_two_processes_send_task_removed_once_for_each_task(
    make_app: Callable[..., Flask], tmp_path: Any, separate_processes: None, hear: Any,
    eventually: Any,
) -> None:  # fmt: skip
    removed = hear(task_removed)
    flows = []
    for _ in range(2):
        app = make_app(instance_path=tmp_path, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)
        flow = Flow(app, AsyncRoute(app))
        flow.route(retention=0, executor="immediate", endpoint="work")(lambda: 1)
        flows.append(flow)
    ids = [flows[number % 2].start()["Id"] for number in range(40)]
    eventually(lambda: not flows[0].ids() and len(removed) >= len(ids))
    assert sorted(task_id for _, task_id in removed) == sorted(ids)
