"""One run of one task: asking it to stop, its time, and the progress it has to report."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute import execution as module
from flask_asyncroute.errors import TaskAborted
from flask_asyncroute.execution import Climb, Execution
from flask_asyncroute.task import MAX_MESSAGE


class Clock:
    """Stand for the module's clock; time passes when told."""

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


def test_a_run_takes_what_the_claim_told(clock: Clock, execution: Execution) -> None:
    assert (execution.task_id, execution.user, execution.epoch, execution.deadline) == ("task", None, 0, None)
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
    with pytest.raises(TaskAborted, match="time is up"):
        execution.check()


def test_without_a_limit_time_is_never_up(clock: Clock, execution: Execution) -> None:
    execution.begin(None, 1, None)
    clock.now += 1e9
    assert not execution.is_time_up
    execution.check()


def test_a_stop_is_asked_once(clock: Clock, execution: Execution, woken: list[int]) -> None:
    assert execution.ask_to_stop() is True
    assert execution.stop.is_set()
    assert execution.interrupt_at == 1001.0
    clock.now += 0.5
    assert execution.ask_to_stop() is False
    assert execution.interrupt_at == 1001.0, "asking again does not put it off"
    assert woken == [1]
    with pytest.raises(TaskAborted, match="stop"):
        execution.check()


def test_a_stop_asked_by_many_at_once_is_asked_once(execution: Execution) -> None:
    barrier, first = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait(5)
        first.append(execution.ask_to_stop())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(first) == [False] * 7 + [True]


def test_without_interrupt_after_it_is_asked_only(woken: list[int]) -> None:
    execution = Execution("task", None)
    execution.ask_to_stop()
    assert execution.stop.is_set()
    assert execution.interrupt_at is None


def test_interrupt_after_nothing_means_at_once(clock: Clock) -> None:
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
    assert cancelled == ["now"], "once: a view may want to clean up in peace"


def test_a_coroutine_that_comes_after_the_stop_is_cancelled(execution: Execution) -> None:
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


def test_there_is_no_progress_until_there_is(execution: Execution) -> None:
    assert execution.progress == 0.0
    assert not execution.has_report
    assert execution.take_report() is None
    assert execution.final_report() == (None, None)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([10], 10.0), ([0], 0.0), ([10, 20], 20.0), ([20, 10], 20.0), ([33.3333], 33.33), ([99.999], 100.0),
        ([200], 100.0), ([-5], 0.0), ([math.inf], 100.0), ([-math.inf], 0.0), ([math.nan], None), ([5, math.nan], 5.0),
        ([math.nan, 5], 5.0), ([50, -math.inf, 1e308], 100.0), ([0.004], 0.0), ([0.006], 0.01),
    ],
)  # fmt: skip
def test_a71_progress_is_clipped_rounded_and_never_goes_back(values: list[float], kept: float | None) -> None:
    execution = Execution("task")
    for value in values:
        execution.advance(value)
    assert execution.final_report() == (kept, None)


def test_progress_is_reported_when_it_changed(execution: Execution, woken: list[int]) -> None:
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


def test_only_the_newest_counts(execution: Execution) -> None:
    for number in range(50):
        execution.advance(number, f"step {number}")
    assert execution.take_report() == (49.0, "step 49")


def test_the_first_zero_is_progress_too(execution: Execution) -> None:
    execution.advance(0)
    assert execution.take_report() == (0.0, None)


def test_a_message_alone_is_progress_of_nothing(execution: Execution) -> None:
    execution.advance(math.nan, "begins")
    assert execution.take_report() == (0.0, "begins")


@pytest.mark.parametrize(
    ("message", "kept"),
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
def test_a71_a_message_is_cut_and_cleaned(execution: Execution, message: str, kept: str) -> None:
    execution.advance(1, message)
    assert execution.take_report() == (1.0, kept)


def test_the_last_report_ends_what_climbs(clock: Clock, execution: Execution) -> None:
    execution.advance(0, climb=Climb(0, 100, 10, 1))
    assert execution.final_report() == (0.0, None)
    assert execution.climb(clock.now + 5) is None
    assert execution.progress == 0.0


def steps(execution: Execution, clock: Clock, most: int = 100) -> list[tuple[float, float]]:
    """Follow a climb as the housekeeper does; return (time, progress) of each step."""
    found: list[tuple[float, float]] = []
    due = execution.climb(clock.now)
    while due is not None and len(found) < most:
        assert due > clock.now, "the next step lies ahead"
        clock.now = due
        due = execution.climb(clock.now)
        found.append((clock.now - 1000.0, execution.progress))
    return found


@pytest.mark.parametrize(
    ("base", "top", "duration", "interval", "wanted"),
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
def test_progress_climbs_by_itself(
    clock: Clock, base: float, top: float, duration: float, interval: float, wanted: list[tuple[float, float]]
) -> None:
    execution = Execution("task")
    execution.advance(base, climb=Climb(base, top, duration, interval))
    assert steps(execution, clock) == wanted
    assert execution.climb(clock.now + 100) is None
    if duration == 0:
        assert execution.progress == top


def test_a_late_housekeeper_catches_up(clock: Clock) -> None:
    execution = Execution("task")
    execution.advance(0, climb=Climb(0, 100, 10, 1))
    clock.now += 3.7
    assert execution.climb(clock.now) == pytest.approx(1004)
    assert execution.progress == 30
    clock.now += 100
    assert execution.climb(clock.now) is None
    assert execution.progress == 100


def test_other_progress_ends_a_climb(clock: Clock) -> None:
    execution = Execution("task")
    execution.advance(0, climb=Climb(0, 100, 10, 1))
    execution.advance(5)
    assert execution.climb(clock.now + 5) is None
    assert execution.progress == 5


def test_a_stop_ends_a_climb(clock: Clock, execution: Execution) -> None:
    execution.advance(0, climb=Climb(0, 100, 10, 1))
    execution.ask_to_stop()
    assert execution.climb(clock.now + 5) is None
    assert execution.progress == 0


numbers = st.floats(min_value=0, allow_nan=False, allow_infinity=True)


@given(
    base=st.floats(0, 100),
    top=st.floats(),
    duration=numbers,
    interval=numbers.filter(bool),
    passed=st.lists(st.floats(0, 1e9), max_size=4),
)
def test_a_climb_stands_every_number(
    base: float, top: float, duration: float, interval: float, passed: list[float]
) -> None:
    """Tiny, huge and infinite ones included: an error here would be one of the housekeeper's thread."""
    climb = Climb(base, top, duration, interval)
    execution = Execution("task")
    execution.advance(base, climb=climb)
    for seconds in passed:
        now = climb._began + seconds
        due = execution.climb(now)
        assert 0 <= execution.progress <= 100
        assert due is None or due >= now


def test_a71_a_climb_in_tiny_steps_does_not_keep_the_housekeeper_busy(clock: Clock) -> None:
    execution = Execution("task")
    execution.advance(0, climb=Climb(0, 100, 10, 1e-9))
    assert len(steps(execution, clock, 1000)) <= 200


def test_reports_of_many_threads_lose_nothing(execution: Execution) -> None:
    def advance(start: int) -> None:
        for number in range(start, 10_000, 4):
            execution.advance(number / 100)

    threads = [threading.Thread(target=advance, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert execution.final_report() == (99.99, None)


def test_what_a_run_needs_not_be_woken_for(woken: list[Any]) -> None:
    """Without somebody to wake, as in `testing.fake_task`, progress is kept all the same."""
    execution = Execution("task")
    execution.advance(5, "x")
    assert execution.take_report() == (5.0, "x")
