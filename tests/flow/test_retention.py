"""Retention of finished tasks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute import current_task
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
