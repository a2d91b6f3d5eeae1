"""The values of the option ``retry``, and the delays of its schedule."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.errors import ConfigurationError, ResultError, RetryRequested, TaskAborted
from flask_asyncroute.executors.outcome import can_retry
from flask_asyncroute.retries import MAX_TIMES, Retry, Schedule


def delays(count: int, **options: Any) -> list[float]:
    schedule = Retry(**{"jitter": 0, **options}).schedule
    return [schedule.seconds_before(retry) for retry in range(1, count + 1)]


def test_delays_grow_up_to_their_maximum() -> None:
    assert delays(5) == [1, 2, 4, 8, 16]
    assert delays(4, delay=timedelta(seconds=10), factor=3, max_delay=60) == [10, 30, 60, 60]
    assert delays(3, delay=5, factor=1) == [5, 5, 5]
    assert delays(2, delay=0) == [0, 0]


def test_a_very_late_retry_has_the_longest_delay() -> None:
    schedule = Retry(times=MAX_TIMES, factor=1000, jitter=0).schedule
    assert schedule.seconds_before(MAX_TIMES) == 600
    assert Retry(delay=0, factor=1000).schedule.seconds_before(MAX_TIMES) == 0


@given(retry=st.integers(1, 2000), jitter=st.floats(0, 1))
def test_the_random_part_is_a_fraction_of_the_delay(retry: int, jitter: float) -> None:
    delay = min(2.0 ** (retry - 1), 600) if retry < 20 else 600
    found = Retry(jitter=jitter).schedule.seconds_before(retry)
    assert delay * (1 - jitter) - 1e-6 <= found <= delay * (1 + jitter) + 1e-6


def test_a_schedule_round_trips_as_json() -> None:
    schedule = Retry(times=7, delay=timedelta(minutes=1), factor=3, jitter=1).schedule
    assert msgspec.json.decode(msgspec.json.encode(schedule), type=Schedule) == schedule


@pytest.mark.parametrize(
    "options",
    [
        {"times": -1}, {"times": 1.5}, {"times": True}, {"times": MAX_TIMES + 1},
        {"on": "ValueError"}, {"on": (ValueError, 1)}, {"on": [ValueError]}, {"on": int},
        {"delay": -1}, {"delay": "1"}, {"delay": float("nan")}, {"max_delay": -1},
        {"factor": 0.5}, {"factor": 1001}, {"factor": True}, {"factor": float("nan")},
        {"jitter": -0.1}, {"jitter": 1.1}, {"jitter": "0"},
    ],
)  # fmt: skip
def test_an_invalid_value_is_a_configuration_error(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=rf"Retry\({name}="):
        Retry(**options)


@pytest.mark.parametrize("error", [TaskAborted("x"), ResultError("x")])
def test_aborts_and_unstorable_results_are_never_retried(error: BaseException) -> None:
    assert not can_retry(error, (BaseException,))


def test_a_request_for_a_retry_ignores_on() -> None:
    assert can_retry(RetryRequested(), (KeyError,))
    assert not can_retry(ValueError(), (KeyError,))
