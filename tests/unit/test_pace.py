"""When to come again: by what tasks of a route have taken."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.pace import Pace
from flask_asyncroute.states import State
from flask_asyncroute.task import AsyncRouteTask
from tests.conftest import new_task

SECOND = 1_000_000
START = 1_700_000_000 * SECOND


def ended(seconds: float, **fields: object) -> AsyncRouteTask:
    took = round(seconds * SECOND)
    return new_task(**{"state": State.COMPLETED, "started_us": START, "completed_us": START + took, **fields})


def running(elapsed: float) -> tuple[AsyncRouteTask, int]:
    return new_task(state=State.RUNNING, started_us=START), START + round(elapsed * SECOND)


def paced(*seconds: float) -> Pace:
    pace = Pace()
    for took in seconds:
        pace.note(ended(took))
    return pace


def test_where_nothing_is_known_it_is_a_second() -> None:
    pace = Pace()
    assert pace.rest(*running(0)) == 1
    assert pace.rest(new_task(), START) == 1
    assert pace.place("work", 2) == 1


def test_the_expected_rest_of_a_task_in_whole_seconds() -> None:
    pace = paced(10.2)
    assert pace.rest(new_task(), START) == 11
    assert pace.rest(*running(0)) == 11
    assert pace.rest(*running(4.2)) == 6
    assert pace.rest(*running(4.3)) == 6
    assert pace.rest(*running(10)) == 1
    assert pace.rest(*running(100)) == 1


def test_it_is_never_over_a_minute() -> None:
    assert paced(36_000).rest(*running(0)) == 60
    assert paced(36_000).place("work", 2) == 60


def test_a_place_is_free_the_sooner_the_more_workers_there_are() -> None:
    pace = paced(10)
    assert [pace.place("work", workers) for workers in (1, 2, 4, 100)] == [10, 5, 3, 1]


def test_each_route_has_its_own() -> None:
    pace = paced(10)
    pace.note(ended(30, endpoint="other"))
    assert pace.place("work", 1) == 10
    assert pace.place("other", 1) == 30


def test_the_mean_follows_the_newest() -> None:
    pace = paced(50, *[10] * 30)
    assert pace.rest(*running(0)) in (10, 11)


def test_what_has_not_ended_or_never_began_is_left_out(make_task: Callable[..., AsyncRouteTask]) -> None:
    pace = paced(10)
    pace.note(running(0)[0])
    pace.note(make_task())
    pace.note(make_task(state=State.ABORTED, completed_us=START))
    pace.note(ended(50, state=State.ABORTED, stopping=True))
    assert pace.place("work", 1) == 10


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(-1e6, 1e6), st.integers(1, 64))
def test_it_is_always_a_whole_number_from_1_to_60(took: list[float], elapsed: float, workers: int) -> None:
    pace = paced(*took)
    for found in (pace.rest(*running(elapsed)), pace.place("work", workers)):
        assert type(found) is int and 1 <= found <= 60
