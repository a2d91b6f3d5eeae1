"""Progress of running tasks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute import current_task
from tests.support.flow import Flow
from tests.support.labels import label

MakeFlow = Callable[..., Flow]


class Steps:
    """A view that waits for the test before each step."""

    def __init__(self, flow: Flow, steps: list[Callable[[], Any]], **options: Any) -> None:
        self.flow = flow
        self.go = [threading.Event() for _ in steps]
        self.done = [threading.Event() for _ in steps]

        @flow.route(**options)
        def work() -> None:
            for step, go, done in zip(steps, self.go, self.done, strict=True):
                assert go.wait(10)
                step()
                done.set()

        self.task = flow.start()

    def step(self, number: int) -> None:
        self.go[number].set()
        assert self.done[number].wait(5)

    def await_progress(self, progress: Any, message: str | None = None) -> None:
        from tests.support.waiting import eventually_true

        eventually_true(lambda: self.seen() == (progress, message))

    def seen(self) -> tuple[Any, Any]:
        task = self.flow.get(self.task)
        return task.get("Progress"), task.get("ProgressMessage")

    def end(self) -> dict[str, Any]:
        for go in self.go:
            go.set()
        return self.flow.ended(self.task)


def test_progress_is_visible_while_a_task_runs(flow: Flow) -> None:
    def set_by_attribute() -> None:
        current_task.progress = 12.345

    steps = Steps(
        flow,
        [
            set_by_attribute,
            lambda: current_task.set_progress(50, "half"),
            lambda: current_task.set_progress(20),
            lambda: current_task.set_progress(60, "more"),
            lambda: None,
        ],
    )
    assert steps.seen() == (None, None)
    before = flow.request("GET", f"/task/{steps.task['Id']}").headers["ETag"]
    steps.step(0)
    steps.await_progress(12.35)
    assert flow.request("GET", f"/task/{steps.task['Id']}").headers["ETag"] != before
    steps.step(1)
    steps.await_progress(50, "half")
    steps.step(2)
    steps.step(3)
    steps.await_progress(60, "more")
    ended = steps.end()
    assert (ended["Progress"], ended["ProgressMessage"]) == (100, "more")


@pytest.mark.parametrize("ending", ["fails", "is stopped", "runs out of time"])
def test_progress_does_not_change_if_a_task_fails_or_is_aborted(flow: Flow, ending: str) -> None:
    @flow.route(timeout=0.3 if ending == "runs out of time" else 50)
    def work() -> None:
        current_task.progress = 33
        if ending == "fails":
            raise ValueError
        current_task.sleep(10)

    task = flow.start()
    if ending == "is stopped":
        from tests.support.waiting import eventually_true

        eventually_true(lambda: flow.get(task).get("Progress") == 33)
        flow.stop(task)
    assert flow.still(task)["Progress"] == 33


def test_a_task_that_sets_no_progress_has_none(flow: Flow, executor: Any) -> None:
    flow.route(executor=executor)(lambda: 1)
    assert not {"Progress", "ProgressMessage"} & set(flow.run())


@pytest.mark.covers("A71")
@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([150], 100), ([-5], 0), ([math.nan], 0), ([50, math.nan], 50), ([50, 20], 50), ([math.inf], 100), ([-math.inf], 0), ([33.333333], 33.33), ([0.004], 0),
        ([99.999], 100), ([10**400], 100), ([-(10**400)], 0), ([0], 0), ([40, 40.001], 40), ([7], 7),
    ],
)  # fmt: skip
def test_progress_is_clipped_and_never_goes_back(
    make_flow: MakeFlow, values: list[Any], seen: float
) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        for value in values:
            current_task.progress = value
        return current_task.progress

    assert flow.result() == seen


@pytest.mark.covers("A71")
@pytest.mark.parametrize("value", [None, "5", True, b"5", [], object()], ids=label)
def test_progress_that_is_not_a_number_raises(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()
    flow.route()(lambda: current_task.set_progress(value))
    assert flow.error().startswith("TypeError: progress must be a number")


@pytest.mark.covers("A71")
def test_messages_are_shortened_and_cleaned(flow: Flow) -> None:
    @flow.route()
    def work() -> None:
        current_task.set_progress(1, "x" * 1_000_000)

    @flow.route("/odd")
    def odd() -> None:
        current_task.set_progress(1, "a\x00\ud800é\U0001f600")

    assert flow.run()["ProgressMessage"] == "x" * 500
    assert flow.run("/odd")["ProgressMessage"] == "a\ufffd\ufffdé\U0001f600"


@pytest.mark.covers("A71")
def test_a_flood_of_updates_is_coalesced(flow: Flow, hear: Any) -> None:
    from flask_asyncroute import task_progressed

    @flow.route()
    def work() -> int:
        begun = time.monotonic()
        count = 0
        while time.monotonic() - begun < 0.5:
            count += 1
            current_task.set_progress(min(count / 1000, 99), f"step {count}")
        return count

    sent_signals = hear(task_progressed)
    task = flow.run()
    assert task["Result"] > 100
    assert 1 <= len(sent_signals) <= 8
    assert task["ProgressMessage"] == f"step {task['Result']}"


def test_track_updates_progress(flow: Flow) -> None:
    seen: list[Any] = []

    @flow.route()
    def work() -> None:
        for item in current_task.track("abcd", max_progress=80):
            seen.append((item, current_task.progress))
        seen.append(current_task.progress)
        for _ in current_task.track(iter([1, 2]), total=4):
            seen.append(current_task.progress)
        seen.append(current_task.progress)
        list(current_task.track([]))
        list(current_task.track(iter([1])))

    flow.result()
    assert seen == [("a", 0), ("b", 20), ("c", 40), ("d", 60), 80, 80, 85, 100]


def test_a_range_starts_at_the_progress_of_the_last(flow: Flow) -> None:
    seen: list[Any] = []

    @flow.route()
    def work() -> None:
        first = current_task.progress_range(0, 3, max_progress=80)
        for _ in range(3):
            first.tick()
            seen.append(current_task.progress)
        first.tick()
        second = current_task.progress_range(10, 0, step=-5)
        seen.append(len(second))
        for value in second:
            seen.append((value, current_task.progress))
        seen.append(current_task.progress)

    flow.result()
    assert seen == [26, 53, 80, 2, (10, 80), (5, 90), 100]


def test_an_empty_range_is_valid(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        empty = current_task.progress_range(0, 0)
        empty.tick()
        return [len(empty), list(empty)]

    assert flow.result() == [0, []]


def test_a_range_with_decimals(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        tick = current_task.progress_range(0, 3, decimal=True).tick
        tick("one")
        return current_task.progress

    task = flow.run()
    assert (task["Result"], task["ProgressMessage"]) == (33.33, "one")


@pytest.mark.parametrize(
    "given", [(0, 5, 0), (0, 5, -1), (5, 0, 1), (0, math.inf, 1), (math.nan, 1, 1)]
)
def test_invalid_ranges_raise(make_flow: MakeFlow, given: tuple[Any, ...]) -> None:
    flow = make_flow()
    flow.route()(lambda: len(current_task.progress_range(*given)))
    assert flow.error().startswith("ValueError: progress_range(")


def test_progress_over_updates_progress_in_the_background(flow: Flow, eventually: Any) -> None:
    """It returns at once and continues until the next progress call."""
    seen: list[float] = []
    go = threading.Event()

    @flow.route()
    def work() -> None:
        begun = time.monotonic()
        current_task.progress_over(0.4, interval=0.1, max_progress=80)
        assert time.monotonic() - begun < 0.1
        assert go.wait(10)
        seen.append(current_task.progress)
        current_task.progress_over(0.5, interval=0.1)
        current_task.progress = 90
        seen.append(current_task.progress)
        current_task.sleep(0.25)
        seen.append(current_task.progress)

    task = flow.start()
    values_seen: list[float] = []

    def is_at_80() -> bool:
        values_seen.append(flow.get(task).get("Progress", 0))
        return values_seen[-1] == 80

    eventually(is_at_80)
    assert values_seen == sorted(values_seen)
    assert any(0 < value < 80 for value in values_seen)
    go.set()
    assert flow.ended(task)["Progress"] == 100
    assert seen == [80, 90, 90]


def test_progress_over_stops_at_the_end_of_the_task(flow: Flow) -> None:
    @flow.route()
    def work() -> None:
        current_task.progress_over(10, interval=0.1)
        current_task.sleep(0.35)
        raise ValueError

    task = flow.run()
    assert 0 < task["Progress"] < 10
    assert flow.get(task) == task


@pytest.mark.parametrize("given", [(-1,), (1, 0), (1, -1), (math.nan,), (1, math.nan)])
def test_progress_over_with_invalid_times_raises(
    make_flow: MakeFlow, given: tuple[Any, ...]
) -> None:
    flow = make_flow()
    flow.route()(lambda: current_task.progress_over(*given))
    assert flow.error().startswith("ValueError: progress_over()")


def test_progress_from_a_thread_of_the_view(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        task = current_task._get_current_object()  # type: ignore[attr-defined]
        thread = threading.Thread(target=lambda: task.set_progress(40, "from a thread"))
        thread.start()
        thread.join()
        return task.progress

    task = flow.run()
    assert (task["Result"], task["ProgressMessage"]) == (40, "from a thread")
