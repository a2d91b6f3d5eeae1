"""`current_task` in a view: its attributes, progress, stops and `sleep`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from flask_asyncroute import NoCurrentTask, TaskAborted, current_task
from flask_asyncroute.current_task import CurrentTask
from flask_asyncroute.testing import fake_task


@pytest.fixture
def task() -> Iterator[CurrentTask]:
    with fake_task() as new:
        yield new


def progress_of(task: CurrentTask, iterable: Any) -> list[float]:
    """Return the progress before each item of an iterable, and after the last."""
    return [*(task.progress for _ in iterable), task.progress]


@pytest.mark.parametrize(
    "use",
    [
        lambda: current_task.id, lambda: current_task.user, lambda: current_task.progress, lambda: current_task.check(),
        lambda: current_task.set_progress(1), lambda: list(current_task.track([1])), lambda: current_task.sleep(0),
        lambda: setattr(current_task, "progress", 5), lambda: current_task.remaining(), lambda: current_task.stop_requested,
        lambda: current_task.progress_range(0, 1), lambda: current_task.progress_over(1),
    ],
)  # fmt: skip
def test_every_use_without_a_task_raises_no_current_task(use: Any) -> None:
    with pytest.raises(NoCurrentTask, match=r"current_task.*fake_task"):
        use()


def test_id_and_user() -> None:
    with fake_task("an-id", "anna"):
        assert (current_task.id, current_task.user) == ("an-id", "anna")
    with fake_task():
        assert current_task.user is None


def test_another_thread_can_use_the_object(task: CurrentTask) -> None:
    held = current_task._get_current_object()  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: held.set_progress(5))
    thread.start()
    thread.join(5)
    assert current_task.progress == 5


@pytest.mark.parametrize("value", [50, 50.0, Decimal(50), Fraction(100, 2)])
def test_progress_accepts_any_real_number(task: CurrentTask, value: Any) -> None:
    task.progress = value
    assert task.progress == 50
    assert type(task.progress) is int


@pytest.mark.parametrize("value", ["50", b"50", None, True, [], object(), 5j])
def test_progress_rejects_other_types(task: CurrentTask, value: Any) -> None:
    for use in (lambda: task.set_progress(value), lambda: setattr(task, "progress", value)):
        with pytest.raises(TypeError, match="progress must be a number"):
            use()
    assert task.progress == 0


@pytest.mark.covers("A71")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (200, 100),
        (-1, 10),
        (math.nan, 10),
        (math.inf, 100),
        (-math.inf, 10),
        (5, 10),
        (10**400, 100),
        (-(10**400), 10),
    ],
)
def test_progress_is_clipped_and_never_decreases(
    task: CurrentTask, value: Any, expected: float
) -> None:
    task.set_progress(10)
    task.set_progress(value)
    assert task.progress == expected


@pytest.mark.parametrize("message", [5, b"x", ["x"], True])
def test_a_progress_message_must_be_a_string(task: CurrentTask, message: Any) -> None:
    with pytest.raises(TypeError, match="progress message must be a string"):
        task.set_progress(5, message)
    assert task.progress == 0, "the call had no effect"


def test_progress_has_two_decimals(task: CurrentTask) -> None:
    task.set_progress(100 / 3)
    assert task.progress == 33.33


def test_track_runs_to_the_end(task: CurrentTask) -> None:
    assert progress_of(task, task.track("abcd")) == [0, 25, 50, 75, 100]


def test_track_yields_the_items(task: CurrentTask) -> None:
    assert list(task.track(iter("abc"))) == ["a", "b", "c"]
    assert list(task.track([])) == []


@pytest.mark.parametrize(
    ("iterable", "total", "expected"),
    [
        (iter("abcd"), 4, [0, 25, 50, 75, 100]),
        (iter("abcd"), None, [0, 0, 0, 0, 100]),
        (iter("abcd"), 8, [0, 12.5, 25, 37.5, 100]),
        (iter("abcd"), 2, [0, 50, 100, 100, 100]),
        ("abcd", 8, [0, 12.5, 25, 37.5, 100]),
        (iter("ab"), 0, [0, 0, 100]),
        ("", None, [100]),
    ],
)
def test_track_with_a_total(
    task: CurrentTask, iterable: Any, total: int | None, expected: list[float]
) -> None:
    assert progress_of(task, task.track(iterable, total)) == expected


def test_max_progress_divides_progress_between_two_loops(task: CurrentTask) -> None:
    assert progress_of(task, task.track("ab", max_progress=80)) == [0, 40, 80]
    assert progress_of(task, task.track("ab", max_progress=100)) == [80, 90, 100]


def test_track_counts_an_item_after_its_iteration(task: CurrentTask) -> None:
    for item in task.track("abcd"):
        if item == "c":
            break
    assert task.progress == 50


def test_track_stops_counting_when_the_iterable_raises(task: CurrentTask) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(task.track(items(), 2))
    assert task.progress == 50


def test_a_second_progress_range_continues_after_the_first(task: CurrentTask) -> None:
    assert progress_of(task, task.progress_range(0, 4, max_progress=80)) == [0, 20, 40, 60, 80]
    assert progress_of(task, task.progress_range(0, 4)) == [80, 85, 90, 95, 100]


@pytest.mark.parametrize(
    ("arguments", "items"),
    [
        ((0, 3), [0, 1, 2]),
        ((1, 10, 3), [1, 4, 7]),
        ((1, 10, 4), [1, 5, 9]),
        ((10, 0, -5), [10, 5]),
        ((0, 1, 0.25), [0, 0.25, 0.5, 0.75]),
        ((-3, 0), [-3, -2, -1]),
        ((0, 0.5), [0]),
        ((0, 0), []),
        ((5, 5, -1), []),
    ],
)
def test_a_progress_range_yields_its_numbers(
    task: CurrentTask, arguments: Any, items: list[float]
) -> None:
    """The same as Python's ``range`` for integers. An empty range is not an error."""
    steps = task.progress_range(*arguments)
    assert len(steps) == len(items)
    assert list(steps) == items
    assert task.progress == (100 if items else 0)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 5, 0),
        (0, 5, -1),
        (5, 0, 1),
        (0, math.nan),
        (0, math.inf),
        (0, 1, math.nan),
        (0, 1e308, 1e-300),
    ],
)
def test_a_progress_range_without_finite_steps_is_refused(
    task: CurrentTask, arguments: Any
) -> None:
    with pytest.raises(ValueError, match="progress_range"):
        task.progress_range(*arguments)


def test_a_progress_range_rounds_down_unless_decimal(task: CurrentTask) -> None:
    assert progress_of(task, task.progress_range(0, 3, max_progress=50)) == [0, 16, 33, 50]
    assert progress_of(task, task.progress_range(0, 3, max_progress=100, decimal=True)) == [
        50,
        66.67,
        83.33,
        100,
    ]


def test_tick_advances_a_progress_range(task: CurrentTask) -> None:
    steps = task.progress_range(0, 4)
    steps.tick()
    assert task.progress == 25
    steps.tick("half way")
    assert (task.progress, task._execution.final_report()) == (50, (50.0, "half way"))
    for _ in range(5):
        steps.tick()
    assert task.progress == 100


def test_a_progress_range_ends_at_exactly_100(task: CurrentTask) -> None:
    for count in (3, 7, 9, 11, 13, 49, 1000):
        with fake_task() as other:
            for _ in other.progress_range(0, count):
                pass
            assert other.progress == 100, count


@pytest.mark.covers("A71")
@pytest.mark.parametrize("maximum", [math.nan, math.inf, -math.inf, 200, -5, 1e308])
@pytest.mark.parametrize("decimal", [True, False])
def test_any_float_is_accepted_as_max_progress(
    task: CurrentTask, maximum: float, decimal: bool
) -> None:
    task.set_progress(10)
    for _ in task.progress_range(0, 3, max_progress=maximum, decimal=decimal):
        pass
    for _ in task.track("abc", max_progress=maximum):
        pass
    assert 10 <= task.progress <= 100


def test_max_progress_must_be_a_number(task: CurrentTask) -> None:
    uses: list[Any] = [
        lambda: task.progress_range(0, 1, max_progress="100"),  # type: ignore[arg-type]
        lambda: list(task.track("a", max_progress=None)),  # type: ignore[arg-type]
        lambda: task.progress_over(1, max_progress=True),
    ]
    for use in uses:
        with pytest.raises(TypeError, match="max_progress must be a number"):
            use()


@pytest.mark.parametrize("arguments", [(-1,), (math.nan,), (1, 0), (1, -1), (1, math.nan)])
def test_progress_over_refuses_invalid_durations_and_intervals(
    task: CurrentTask, arguments: Any
) -> None:
    with pytest.raises(ValueError, match="progress_over"):
        task.progress_over(*arguments)


def test_progress_over_starts_at_the_current_progress_and_returns_at_once(
    task: CurrentTask,
) -> None:
    task.set_progress(20)
    before = time.monotonic()
    task.progress_over(1000, interval=1, max_progress=100)
    execution = task._execution
    assert task.progress == 20
    assert execution.advance_by_time(before + 500.5) is not None
    assert task.progress == pytest.approx(60, abs=0.1)
    assert execution.advance_by_time(before + 1001) is None
    assert task.progress == 100


def test_setting_progress_ends_progress_over(task: CurrentTask) -> None:
    task.progress_over(1000, interval=1)
    task.set_progress(1)
    assert task._execution.advance_by_time(time.monotonic() + 900) is None
    task.progress_over(1000, interval=1)
    for _ in task.track("a", max_progress=2):
        pass
    assert task._execution.advance_by_time(time.monotonic() + 900) is None
    assert task.progress == 2


@pytest.mark.covers("A71")
def test_many_progress_updates_are_fast(task: CurrentTask) -> None:
    """A million updates may take a view seconds, not minutes."""
    count = 100_000
    before = time.perf_counter()
    for number in range(count):
        task.set_progress(number / count * 100)
    assert time.perf_counter() - before < 3, "over 30 µs each"


def test_a_stop_sets_stop_requested_and_check_raises(task: CurrentTask) -> None:
    assert not bool(task.stop_requested)
    task.check()
    task._execution.ask_to_stop()
    assert bool(task.stop_requested)
    with pytest.raises(TaskAborted):
        task.check()


def test_an_expired_timeout_sets_stop_requested_and_check_raises() -> None:
    with fake_task(timeout=0) as task:
        assert task.stop_requested is True
        assert task.remaining() == 0
        with pytest.raises(TaskAborted):
            task.check()


def test_remaining_counts_down() -> None:
    with fake_task(timeout=100) as task:
        first = task.remaining()
        assert first is not None and 99 < first <= 100
        second = task.remaining()
        assert second is not None and second <= first
    with fake_task() as task:
        assert task.remaining() is None


@pytest.mark.parametrize("seconds", [0, -5, 0.01, Decimal("0.01")])
def test_sleep_returns_true_after_its_full_time(task: CurrentTask, seconds: Any) -> None:
    assert task.sleep(seconds) is True


@pytest.mark.parametrize("seconds", ["1", None, True])
def test_sleep_requires_a_number(task: CurrentTask, seconds: Any) -> None:
    with pytest.raises(TypeError, match="seconds must be a number"):
        task.sleep(seconds)


@pytest.mark.parametrize(
    "seconds", [math.nan, math.inf, 1e300, 10**400], ids=["nan", "inf", "1e300", "10**400"]
)
def test_a_stop_ends_a_sleep_of_any_length(task: CurrentTask, seconds: float) -> None:
    """Sleeps longer than the system can wait, and NaN, do not raise in the view."""
    stopper = threading.Timer(0.05, task._execution.ask_to_stop)
    stopper.start()
    task.sleep(seconds)
    stopper.join()
    assert task.stop_requested


def test_a_stop_ends_a_sleep_and_later_sleeps_return_at_once(task: CurrentTask) -> None:
    stopper = threading.Timer(0.05, task._execution.ask_to_stop)
    before = time.monotonic()
    stopper.start()
    assert task.sleep(60) is False
    assert time.monotonic() - before < 5
    assert task.sleep(60) is False, "later sleeps return at once"
    stopper.join()
