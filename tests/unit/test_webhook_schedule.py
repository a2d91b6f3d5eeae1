"""The retry schedule of callbacks."""

from __future__ import annotations

import random

import pytest

from flask_asyncroute.callbacks.model import COMPLETED, FAILED, RUNNING
from flask_asyncroute.webhooks import client, sender
from flask_asyncroute.webhooks.client import Outcome

NOW = 1_700_000_000_000_000


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "now_us", lambda: NOW)


def test_delays_grow_up_to_an_hour() -> None:
    assert [sender.delay(attempts) for attempts in range(7)] == [0, 5, 30, 120, 240, 480, 960]
    assert sender.delay(60) == 3600
    assert client.ATTEMPT_SECONDS == 15


@pytest.mark.parametrize("attempts", [1, 2, 3, 9])
def test_delays_vary_by_20_percent(attempts: int) -> None:
    random.seed(1)
    usual = sender.delay(attempts)
    waits = []
    for _ in range(200):
        state, due_us = sender._next(attempts, Outcome(False, status=500), 10)
        assert state == RUNNING and due_us is not None
        waits.append((due_us - NOW) / 1_000_000)
    assert usual * 0.8 <= min(waits) < usual * 0.85 and usual * 1.15 < max(waits) <= usual * 1.2


def test_a_longer_retry_after_of_the_receiver_is_used() -> None:
    for requested, minimum in ((3600.0, 3600.0), (0.5, 4.0)):
        _, due_us = sender._next(1, Outcome(False, status=503, retry_after=requested), 4)
        assert due_us is not None and (due_us - NOW) / 1_000_000 >= minimum


@pytest.mark.parametrize(
    "attempts, outcome, state",
    [
        (1, Outcome(True, status=204), COMPLETED),
        (4, Outcome(False, status=500), FAILED),
        (1, Outcome(False, is_gone=True, status=410), FAILED),
    ],
)
def test_no_attempt_follows_the_last(attempts: int, outcome: Outcome, state: str) -> None:
    assert sender._next(attempts, outcome, 4) == (state, None)
