"""When a callback is tried again."""

from __future__ import annotations

import random

import pytest

from flask_asyncroute.callbacks import attempt, sender
from flask_asyncroute.callbacks.attempt import Outcome
from flask_asyncroute.delivery import COMPLETED, FAILED, RUNNING

NOW = 1_700_000_000_000_000


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "now_us", lambda: NOW)


def test_the_schedule() -> None:
    assert [sender.delay(attempts) for attempts in range(7)] == [0, 5, 30, 120, 240, 480, 960]
    assert sender.delay(60) == 3600
    assert attempt.ATTEMPT_SECONDS == 15


@pytest.mark.parametrize("attempts", [1, 2, 3, 9])
def test_delays_are_spread_by_a_fifth(attempts: int) -> None:
    random.seed(1)
    usual = sender.delay(attempts)
    waits = []
    for _ in range(200):
        state, due_us = sender._next(attempts, Outcome(False, status=500), 10)
        assert state == RUNNING and due_us is not None
        waits.append((due_us - NOW) / 1_000_000)
    assert usual * 0.8 <= min(waits) < usual * 0.85 and usual * 1.15 < max(waits) <= usual * 1.2


def test_what_the_receiver_asks_for_counts_where_it_is_longer() -> None:
    for asked, least in ((3600.0, 3600.0), (0.5, 4.0)):
        _, due_us = sender._next(1, Outcome(False, status=503, retry_after=asked), 4)
        assert due_us is not None and (due_us - NOW) / 1_000_000 >= least


@pytest.mark.parametrize(
    "attempts, outcome, state",
    [
        (1, Outcome(True, status=204), COMPLETED),
        (4, Outcome(False, status=500), FAILED),
        (1, Outcome(False, is_gone=True, status=410), FAILED),
    ],
)
def test_after_the_last_attempt_there_is_none(attempts: int, outcome: Outcome, state: str) -> None:
    assert sender._next(attempts, outcome, 4) == (state, None)
