"""The wall clock of the host is set: timeouts use the monotonic clock, and retries that of the
database.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, Retry, current_task
from tests.support.flow import Flow

HOUR_NS = 3_600_000_000_000


@pytest.mark.covers("F32")
@pytest.mark.parametrize("store_url", ["memory://", "sqlite:///asyncroute.db"])
@pytest.mark.parametrize("hours", [1, -1])
def test_setting_the_clock_does_not_affect_timeouts(
    make_app: Callable[..., Flask],
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    store_url: str,
    hours: int,
) -> None:
    app = make_app(ASYNCROUTE_STORE=store_url, ASYNCROUTE_HOUSEKEEPING_INTERVAL=0.1)
    flow = Flow(app, AsyncRoute(app))
    begun = threading.Semaphore(0)

    @flow.route(timeout=600)
    def long() -> Any:
        begun.release()
        gate.wait(10)
        return current_task.remaining()

    @flow.route("/short", timeout=0.6, interrupt_after=None)
    def short() -> None:
        begun.release()
        while not current_task.stop_requested:
            gate.wait(0.01)

    @flow.route("/next")
    def then() -> int:
        return 1

    long_task, short_task = flow.start(), flow.start("/short")
    for _ in range(2):
        assert begun.acquire(timeout=5)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * HOUR_NS)
    began = time.monotonic()
    assert flow.ended(short_task)["Error"] == "Timeout"
    assert time.monotonic() - began < 3
    assert flow.get(long_task)["State"] == "Running"
    assert flow.run("/next")["State"] == "Completed"
    gate.set()
    ended = flow.ended(long_task)
    assert ended["State"] == "Completed"
    assert 500 < ended["Result"] <= 600
    for task in flow.query():
        times = [
            datetime.fromisoformat(task[name])
            for name in ("CreationTime", "StartingTime", "CompletedTime")
        ]
        assert times == sorted(times)


@pytest.mark.covers("F49")
@pytest.mark.parametrize("hours", [1, -1])
def test_setting_the_clock_of_a_host_does_not_change_when_a_retry_begins(
    make_app: Callable[..., Flask],
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
    postgresql_url: str,
    hours: int,
) -> None:
    """The clock of a PostgreSQL server counts."""
    app = make_app(ASYNCROUTE_STORE=postgresql_url)
    flow = Flow(app, AsyncRoute(app))
    attempts = failing_once(flow, delay=1.5)
    task = flow.start()
    eventually(lambda: "NextAttemptTime" in flow.get(task))
    real, began = time.time_ns, time.monotonic()
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * HOUR_NS)
    assert flow.ended(task)["State"] == "Completed"
    assert 1 < time.monotonic() - began < 5
    assert attempts == [1, 2]


@pytest.mark.covers("F49")
@pytest.mark.parametrize("store_url", ["memory://", "sqlite:///asyncroute.db"])
def test_a_retry_begins_by_the_clock_of_the_host_of_its_store(
    make_app: Callable[..., Flask],
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
    store_url: str,
) -> None:
    app = make_app(ASYNCROUTE_STORE=store_url)
    flow = Flow(app, AsyncRoute(app))
    attempts = failing_once(flow, delay=1800)
    task = flow.start()
    eventually(lambda: "NextAttemptTime" in flow.get(task))
    real = time.time_ns
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: real() - HOUR_NS)
        assert flow.run("/other")["State"] == "Completed"
        assert flow.get(task)["State"] == "NotStarted"
        patched.setattr(time, "time_ns", lambda: real() + HOUR_NS)
        assert flow.ended(task)["State"] == "Completed"
    assert attempts == [1, 2]


def failing_once(flow: Flow, delay: float) -> list[int]:
    """Add a route whose first attempt fails; return the list of its attempts."""
    attempts: list[int] = []

    @flow.route(retry=Retry(times=3, delay=delay, jitter=0))
    def work() -> None:
        attempts.append(current_task.attempt)
        if current_task.attempt == 1:
            raise ValueError

    flow.route("/other")(lambda: None)
    return attempts
