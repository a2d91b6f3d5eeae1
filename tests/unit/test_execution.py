"""`Execution`, one run of a task: stop requests, the deadline and progress reports."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import TaskAborted
from flask_asyncroute.executors import execution as module
from flask_asyncroute.executors.execution import Execution, TimedProgress
from flask_asyncroute.task import MAX_MESSAGE


class Clock:
    """A manual clock in place of the module's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def woken() -> list[int]:
    return []


@pytest.fixture
def execution(woken: list[int]) -> Execution:
    return Execution("task", 1.0, lambda: woken.append(1))


def test_begin_sets_user_epoch_and_deadline(clock: Clock, execution: Execution) -> None:
    assert (execution.task_id, execution.user, execution.epoch, execution.deadline) == (
        "task",
        None,
        0,
        None,
    )
    execution.begin("anna", 3, 5.0)
    assert (execution.user, execution.epoch, execution.deadline) == ("anna", 3, 1005.0)
    execution.begin(None, 4, None)
    assert execution.deadline is None


def test_time_is_up_at_the_deadline(clock: Clock, execution: Execution) -> None:
    execution.begin(None, 1, 5.0)
    clock.now += 4.999
    assert execution.is_time_up is False
    execution.check()
    clock.now += 0.001
    assert bool(execution.is_time_up) is True
    with pytest.raises(TaskAborted, match="timeout has expired"):
        execution.check()


def test_without_a_timeout_time_is_never_up(clock: Clock, execution: Execution) -> None:
    execution.begin(None, 1, None)
    clock.now += 1e9
    assert not execution.is_time_up
    execution.check()


def test_a_stop_request_takes_effect_once(
    clock: Clock, execution: Execution, woken: list[int]
) -> None:
    assert execution.ask_to_stop() is True
    assert execution.stop.is_set()
    assert execution.interrupt_at == 1001.0
    clock.now += 0.5
    assert execution.ask_to_stop() is False
    assert execution.interrupt_at == 1001.0, "a second request does not delay the interruption"
    assert woken == [1]
    with pytest.raises(TaskAborted, match="stop"):
        execution.check()


def test_one_of_many_concurrent_stop_requests_takes_effect(execution: Execution) -> None:
    barrier, first = threading.Barrier(8), []

    def request() -> None:
        barrier.wait(5)
        first.append(execution.ask_to_stop())

    threads = [threading.Thread(target=request) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(first) == [False] * 7 + [True]


def test_a_view_without_interrupt_after_is_not_interrupted(woken: list[int]) -> None:
    execution = Execution("task", None)
    execution.ask_to_stop()
    assert execution.stop.is_set()
    assert execution.interrupt_at is None


def test_interrupt_after_zero_is_due_at_once(clock: Clock) -> None:
    execution = Execution("task", 0.0)
    execution.ask_to_stop()
    assert execution.interrupt_at == 1000.0


def test_a_coroutine_is_cancelled_and_never_interrupted(execution: Execution) -> None:
    cancelled: list[str] = []
    execution.cancel_with(lambda: cancelled.append("now"))
    execution.ask_to_stop()
    assert cancelled == ["now"]
    assert execution.interrupt_at is None
    execution.ask_to_stop()
    assert cancelled == ["now"], "once, so that cleanup of the view is not cancelled"


def test_a_coroutine_that_begins_after_the_stop_is_cancelled(execution: Execution) -> None:
    execution.ask_to_stop()
    assert execution.interrupt_at is not None
    cancelled: list[str] = []
    execution.cancel_with(lambda: cancelled.append("now"))
    assert cancelled == ["now"]
    assert execution.interrupt_at is None


def test_a_coroutine_that_has_ended_is_not_cancelled(execution: Execution) -> None:
    cancelled: list[str] = []
    execution.cancel_with(lambda: cancelled.append("now"))
    execution.cancel_with(None)
    execution.ask_to_stop()
    assert cancelled == []


def test_without_progress_there_is_no_report(execution: Execution) -> None:
    assert execution.progress == 0.0
    assert not execution.has_report
    assert execution.take_report() is None
    assert execution.final_report() == (None, None)


@pytest.mark.covers("A71")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10], 10.0), ([0], 0.0), ([10, 20], 20.0), ([20, 10], 20.0), ([33.3333], 33.33), ([99.999], 100.0),
        ([200], 100.0), ([-5], 0.0), ([math.inf], 100.0), ([-math.inf], 0.0), ([math.nan], None), ([5, math.nan], 5.0),
        ([math.nan, 5], 5.0), ([50, -math.inf, 1e308], 100.0), ([0.004], 0.0), ([0.006], 0.01),
    ],
)  # fmt: skip
def test_progress_is_clipped_rounded_and_never_decreases(
    values: list[float], expected: float | None
) -> None:
    execution = Execution("task")
    for value in values:
        execution.advance(value)
    assert execution.final_report() == (expected, None)


def test_only_changed_progress_is_reported(execution: Execution, woken: list[int]) -> None:
    execution.advance(10)
    assert bool(execution.has_report)
    assert execution.take_report() == (10.0, None)
    assert not bool(execution.has_report)
    assert execution.take_report() is None
    execution.advance(10)
    execution.advance(5)
    execution.advance(math.nan)
    assert not execution.has_report, "nothing has changed"
    assert len(woken) == 1
    execution.advance(10, "half way")
    assert execution.take_report() == (10.0, "half way")
    execution.advance(10, "half way")
    assert execution.take_report() is None


def test_a_report_has_only_the_newest_progress(execution: Execution) -> None:
    for number in range(50):
        execution.advance(number, f"step {number}")
    assert execution.take_report() == (49.0, "step 49")


def test_initial_progress_of_zero_is_reported(execution: Execution) -> None:
    execution.advance(0)
    assert execution.take_report() == (0.0, None)


def test_a_message_without_progress_sets_progress_to_zero(execution: Execution) -> None:
    execution.advance(math.nan, "begins")
    assert execution.take_report() == (0.0, "begins")


@pytest.mark.covers("A71")
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("x" * 10_000_000, "x" * MAX_MESSAGE),
        ("\U0001f600" * 600, "\U0001f600" * 500),
        ("a\x00b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("", ""),
        ("a\r\nb\x1b", "a\r\nb\x1b"),
    ],
    ids=["long", "long emoji", "nul", "surrogate", "empty", "controls"],
)
def test_a_message_is_cut_and_invalid_characters_are_replaced(
    execution: Execution, message: str, expected: str
) -> None:
    execution.advance(1, message)
    assert execution.take_report() == (1.0, expected)


def test_the_final_report_ends_timed_progress(clock: Clock, execution: Execution) -> None:
    execution.advance(0, timed_progress=TimedProgress(0, 100, 10, 1))
    assert execution.final_report() == (0.0, None)
    assert execution.advance_by_time(clock.now + 5) is None
    assert execution.progress == 0.0


def steps(execution: Execution, clock: Clock, limit: int = 100) -> list[tuple[float, float]]:
    """Follow timed progress as the maintenance thread does; return (time, progress) of each step."""
    found: list[tuple[float, float]] = []
    due = execution.advance_by_time(clock.now)
    while due is not None and len(found) < limit:
        assert due > clock.now, "the next step is in the future"
        clock.now = due
        due = execution.advance_by_time(clock.now)
        found.append((clock.now - 1000.0, execution.progress))
    return found


@pytest.mark.parametrize(
    ("base", "top", "duration", "interval", "expected_steps"),
    [
        (0, 100, 4, 1, [(1, 25), (2, 50), (3, 75), (4, 100)]),
        (0, 80, 10, 5, [(5, 40), (10, 80)]),
        (80, 100, 10, 4, [(4, 88), (8, 96), (10, 100)]),
        (0, 100, 3, 10, [(3, 100)]),
        (0, 100, 1, 1, [(1, 100)]),
        (0, 100, 0, 5, []),
        (0, 300, 3, 1, [(1, 100), (2, 100), (3, 100)]),
        (50, 20, 2, 1, [(1, 50), (2, 50)]),
    ],
)
def test_timed_progress_advances_every_interval(
    clock: Clock,
    base: float,
    top: float,
    duration: float,
    interval: float,
    expected_steps: list[tuple[float, float]],
) -> None:
    execution = Execution("task")
    execution.advance(base, timed_progress=TimedProgress(base, top, duration, interval))
    assert steps(execution, clock) == expected_steps
    assert execution.advance_by_time(clock.now + 100) is None
    if duration == 0:
        assert execution.progress == top


def test_timed_progress_catches_up_after_a_delay(clock: Clock) -> None:
    execution = Execution("task")
    execution.advance(0, timed_progress=TimedProgress(0, 100, 10, 1))
    clock.now += 3.7
    assert execution.advance_by_time(clock.now) == pytest.approx(1004)
    assert execution.progress == 30
    clock.now += 100
    assert execution.advance_by_time(clock.now) is None
    assert execution.progress == 100


def test_setting_progress_ends_timed_progress(clock: Clock) -> None:
    execution = Execution("task")
    execution.advance(0, timed_progress=TimedProgress(0, 100, 10, 1))
    execution.advance(5)
    assert execution.advance_by_time(clock.now + 5) is None
    assert execution.progress == 5


def test_a_stop_ends_timed_progress(clock: Clock, execution: Execution) -> None:
    execution.advance(0, timed_progress=TimedProgress(0, 100, 10, 1))
    execution.ask_to_stop()
    assert execution.advance_by_time(clock.now + 5) is None
    assert execution.progress == 0


numbers = st.floats(min_value=0, allow_nan=False, allow_infinity=True)


@given(
    base=st.floats(0, 100),
    top=st.floats(),
    duration=numbers,
    interval=numbers.filter(bool),
    passed=st.lists(st.floats(0, 1e9), max_size=4),
)
def test_timed_progress_accepts_every_number(
    base: float, top: float, duration: float, interval: float, passed: list[float]
) -> None:
    """Includes tiny, huge and infinite numbers, which must not raise in the maintenance thread."""
    timed_progress = TimedProgress(base, top, duration, interval)
    execution = Execution("task")
    execution.advance(base, timed_progress=timed_progress)
    for seconds in passed:
        now = timed_progress.began + seconds
        due = execution.advance_by_time(now)
        assert 0 <= execution.progress <= 100
        assert due is None or due >= now


@pytest.mark.covers("A71")
def test_timed_progress_in_tiny_intervals_has_few_steps(clock: Clock) -> None:
    execution = Execution("task")
    execution.advance(0, timed_progress=TimedProgress(0, 100, 10, 1e-9))
    assert len(steps(execution, clock, 1000)) <= 200


def test_concurrent_updates_keep_the_highest_progress(execution: Execution) -> None:
    def advance(start: int) -> None:
        for number in range(start, 10_000, 4):
            execution.advance(number / 100)

    threads = [threading.Thread(target=advance, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert execution.final_report() == (99.99, None)


def test_progress_is_recorded_without_a_wake_function(woken: list[Any]) -> None:
    """As in `testing.fake_task`."""
    execution = Execution("task")
    execution.advance(5, "x")
    assert execution.take_report() == (5.0, "x")


def test_a_run_with_an_epoch_has_its_deadline() -> None:
    """`testing.Clock` shortens the deadline of each run that has an epoch."""
    deadlines: list[float | None] = []

    class Watched(Execution):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "epoch" and value:
                deadlines.append(self.deadline)

    Watched("id").begin(None, 1, 60)
    assert len(deadlines) == 1 and deadlines[0] is not None
