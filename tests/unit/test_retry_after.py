"""``Retry-After``, estimated from the durations of earlier tasks of a route."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute import AsyncRoute
from flask_asyncroute.engine.retry_after import RunTimes
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.tasks import new_task

SECOND = 1_000_000
START = 1_700_000_000 * SECOND


def ended(seconds: float, **fields: object) -> AsyncRouteTask:
    took = round(seconds * SECOND)
    return new_task(
        **{"state": State.COMPLETED, "started_us": START, "completed_us": START + took, **fields}
    )


def running(elapsed: float) -> tuple[AsyncRouteTask, int]:
    return new_task(state=State.RUNNING, started_us=START), START + round(elapsed * SECOND)


def note(run_times: RunTimes, task: AsyncRouteTask) -> None:
    run_times.note(task, task.completed_us)


def paced(*seconds: float) -> RunTimes:
    run_times = RunTimes()
    for took in seconds:
        note(run_times, ended(took))
    return run_times


def test_without_earlier_tasks_it_is_one_second() -> None:
    run_times = RunTimes()
    assert run_times.rest(*running(0)) == 1
    assert run_times.rest(new_task(), START) == 1
    assert run_times.until_free("work", 2) == 1


def test_the_remaining_time_of_a_task_is_in_whole_seconds() -> None:
    run_times = paced(10.2)
    assert run_times.rest(new_task(), START) == 11
    assert run_times.rest(*running(0)) == 11
    assert run_times.rest(*running(4.2)) == 6
    assert run_times.rest(*running(4.3)) == 6
    assert run_times.rest(*running(10)) == 1
    assert run_times.rest(*running(100)) == 1


def test_it_is_at_most_a_minute() -> None:
    assert paced(36_000).rest(*running(0)) == 60
    assert paced(36_000).until_free("work", 2) == 60


def test_more_workers_shorten_the_wait_for_a_slot() -> None:
    run_times = paced(10)
    assert [run_times.until_free("work", workers) for workers in (1, 2, 4, 100)] == [10, 5, 3, 1]


def test_each_route_has_its_own_estimate() -> None:
    run_times = paced(10)
    note(run_times, ended(30, endpoint="other"))
    assert run_times.until_free("work", 1) == 10
    assert run_times.until_free("other", 1) == 30


def test_recent_tasks_dominate_the_mean() -> None:
    run_times = paced(50, *[10] * 30)
    assert run_times.rest(*running(0)) in (10, 11)


def test_tasks_that_never_started_or_have_not_ended_do_not_count(
    make_task: Callable[..., AsyncRouteTask],
) -> None:
    run_times = paced(10)
    note(run_times, running(0)[0])
    note(run_times, make_task())
    note(run_times, make_task(state=State.ABORTED, completed_us=START))
    note(run_times, ended(50, state=State.ABORTED, stopping=True))
    assert run_times.until_free("work", 1) == 10


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(-1e6, 1e6), st.integers(1, 64))
def test_it_is_always_an_integer_from_1_to_60(
    took: list[float], elapsed: float, workers: int
) -> None:
    run_times = paced(*took)
    for found in (run_times.rest(*running(elapsed)), run_times.until_free("work", workers)):
        assert type(found) is int and 1 <= found <= 60


def test_a_run_of_this_process_counts_once(
    make_app: Callable[..., Flask],
    eventually: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Polling also reads the changes of this process from the store."""
    app = make_app()
    app.put("/work")(AsyncRoute(app).task(lambda: None))
    noted: list[str] = []
    monkeypatch.setattr(
        RunTimes,
        "note",
        lambda run_times, task, ended: noted.append(task.id) if ended is not None else None,
    )
    ids = [app.test_client().put("/work").json["Id"] for _ in range(3)]
    runner = runtime_of(app).runner
    eventually(lambda: len(noted) >= 3 and not runner.dispatcher.running)
    eventually(lambda: runner.notifier._since >= runner.store.newest())
    assert sorted(noted) == sorted(ids)
