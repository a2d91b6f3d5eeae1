"""Timeouts of running tasks, the remaining time, and sleeps."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from flask_asyncroute import current_task
from tests.flow.test_views import spin
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]


@pytest.mark.parametrize("timeout", [0.05, 0.3])
def test_a_task_times_out(flow: Flow, executor: Any, timeout: float) -> None:
    """It ends within 0.2 s of its limit, in one of three attempts if the machine is busy."""
    ended: list[float] = []

    @flow.route(executor=executor, timeout=timeout)
    def work() -> None:
        begun = time.monotonic()
        current_task.sleep(10)
        ended.append(time.monotonic() - begun)

    late: list[float] = []
    while not late or (late[-1] >= 0.2 and len(late) < 3):
        task = flow.still(flow.start())
        assert (task["State"], task["Error"]) == ("Aborted", "Timeout")
        times = [datetime.fromisoformat(task[name]) for name in ("ExpireTime", "CompletedTime")]
        assert times[1] >= times[0], "not before the deadline"
        late.append(max(ended[-1] - timeout, (times[1] - times[0]).total_seconds()))
    assert late[-1] < 0.2, late


def test_a_view_that_does_not_check_is_interrupted_after_its_timeout(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(timeout=0.2, interrupt_after=0.1)
    def work() -> None:
        spin(gate)

    task = flow.start()
    found = flow.ended(task)
    assert (found["State"], found["Error"]) == ("Aborted", "Timeout")
    flow.still(task)


def test_a_view_that_checks_times_out(flow: Flow, executor: Any) -> None:
    @flow.route(executor=executor, timeout=0.1)
    def work() -> None:
        for _ in range(1000):
            current_task.check()
            time.sleep(0.01)

    task = flow.still(flow.start())
    assert (task["State"], task["Error"]) == ("Aborted", "Timeout")


def test_remaining_counts_down(flow: Flow) -> None:
    @flow.route(timeout=0.2, interrupt_after=None)
    def work() -> None:
        seen = [current_task.remaining() or 0]
        current_task.sleep(0.05)
        seen.append(current_task.remaining() or 0)
        assert 0.2 >= seen[0] > seen[1] > 0
        current_task.sleep(1)
        assert current_task.remaining() == 0
        assert current_task.stop_requested

    assert flow.still(flow.start())["Error"] == "Timeout"


@pytest.mark.parametrize("ending", ["return", "raise", "check"])
def test_a_view_that_ends_after_its_deadline_has_timed_out(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """This holds even if the dispatcher has not noticed the deadline yet."""
    monkeypatch.setattr(
        "flask_asyncroute.engine.dispatcher.Dispatcher.expire", lambda dispatcher, execution: None
    )
    flow = make_flow()

    @flow.route(timeout=0.05)
    def work() -> Any:
        while not current_task.stop_requested:
            time.sleep(0)
        if ending == "raise":
            raise ValueError("no")
        if ending == "check":
            current_task.check()
        return {"Done": True}

    found = flow.ended(flow.start())
    assert (found["State"], found["Error"]) == ("Aborted", "Timeout")


def test_a_timeout_counts_from_the_start_of_execution(flow: Flow, gate: threading.Event) -> None:
    @flow.route(timeout=0.4, max_workers=1)
    def work() -> str:
        gate.wait(0.3)
        return "done"

    first, second = flow.start(), flow.start()
    assert flow.ended(first)["Result"] == "done"
    gate.set()
    found = flow.ended(second)
    assert found["Result"] == "done"
    assert found["ExpireTime"] > flow.get(first)["ExpireTime"]


def test_a_task_that_is_not_cancellable_times_out(flow: Flow) -> None:
    """``cancellable=False`` only refuses stops."""

    @flow.route(timeout=0.1, cancellable=False)
    def work() -> None:
        current_task.sleep(10)

    assert flow.ended(flow.start())["Error"] == "Timeout"


def test_a_task_without_a_timeout(make_flow: MakeFlow) -> None:
    for number, timeout in enumerate((None, -1)):
        flow = make_flow()
        flow.route(timeout=timeout, endpoint=f"work{number}")(lambda: current_task.remaining())
        task = flow.run()
        assert task["State"] == "Completed" and not {"ExpireTime", "Result"} & set(task)


def test_sleep_returns_true_after_its_time(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        begun = time.monotonic()
        whole = [current_task.sleep(0.05), current_task.sleep(0), current_task.sleep(-1)]
        return [whole, 0.05 <= time.monotonic() - begun < 0.5]

    assert flow.result() == [[True, True, True], True]


@pytest.mark.parametrize("seconds", [math.inf, 1e12, 10**400])
def test_an_endless_sleep_ends_at_a_stop(make_flow: MakeFlow, seconds: float) -> None:
    """A service may sleep until it is stopped."""
    flow = make_flow()

    @flow.route()
    def work() -> bool:
        return current_task.sleep(seconds)

    task = flow.start()
    flow.became(task, "Running", "Failed")
    flow.stop(task)
    flow.still(task)


@pytest.mark.parametrize("seconds", [None, "5", True, []], ids=repr)
def test_an_invalid_sleep_raises(make_flow: MakeFlow, seconds: Any) -> None:
    flow = make_flow()
    flow.route()(lambda: current_task.sleep(seconds))
    assert flow.error().startswith("TypeError: seconds must be a number")
