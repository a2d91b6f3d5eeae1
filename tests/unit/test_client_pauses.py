"""How long the client waits before it opens a stream of events again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from flask_asyncroute.client import (
    AsyncRouteClient,
    ClientError,
    UnavailableError,
    UnreachableError,
)
from tests.support.raw_server import RawServer, response

RUNNING = {"Id": "one", "State": "Running", "Sse": {"Url": "/task/one/events"}}
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CUT = STREAM.replace(b"\r\n\r\n", b"\r\nContent-Length: 999\r\n\r\n")
END = b'event: task.completed\ndata: {"Id": "one", "State": "Completed"}\n\n'
BUSY = response("503 X", {})

Events = Callable[..., list[str]]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of the pauses in seconds. Each is as long as possible, and skipped."""
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    return []


@pytest.fixture
def events(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """Return ``events(*streams, retry_for=60)``, which returns the names of the events that the
    client finds in these responses to its requests for the stream, one after the other.
    """
    made: list[Any] = []

    def read(*streams: bytes, retry_for: float = 60.0) -> list[str]:
        left = list(streams)

        def answer(line: str, request: bytes) -> Iterable[bytes]:
            if "events" in line:
                return [left.pop(0)] if left else [STREAM + END]
            return [response("202 ACCEPTED", RUNNING, "Retry-After: 9")]

        server = RawServer(answer)
        client = AsyncRouteClient(server.url, retry_for=retry_for)
        made.extend([client, server])
        task = client.start("PUT", "/work")
        monkeypatch.setattr(client._transport.closed, "wait", pauses.append)
        return [event.name for event in task.events()]

    yield read
    for each in made:
        with each:
            pass


@pytest.mark.parametrize(
    ("field", "pause"),
    [(b"", 1.0), (b"retry: 3000\n\n", 3.0), (b"retry: 0\n\n", 0.1), (b"retry: 99000\n\n", 10.0)],
)
def test_a_stream_that_ends_is_opened_again_when_the_server_wants(
    events: Events, pauses: list[float], field: bytes, pause: float
) -> None:
    assert events(STREAM + field) == ["task.completed"]
    assert pauses == [pause]


def test_pauses_double_up_to_ten_seconds(events: Events, pauses: list[float]) -> None:
    assert events(*[BUSY] * 7) == ["task.completed"]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_pauses_vary_by_up_to_half(
    events: Events, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that have lost the server together must not all come back together."""
    monkeypatch.setattr(random, "uniform", lambda least, most: least)
    assert events(*[BUSY] * 3) == ["task.completed"]
    assert pauses == [0.25, 0.5, 1.0]


def test_data_ends_the_growth_of_the_pauses(events: Events, pauses: list[float]) -> None:
    assert events(BUSY, BUSY, CUT + b": heartbeat\n\n", BUSY) == ["task.completed"]
    assert pauses == [0.5, 1.0, 0.5, 1.0]


def test_the_pause_that_a_refusal_names_is_kept(events: Events, pauses: list[float]) -> None:
    assert events(response("429 X", {}, "Retry-After: 7"), BUSY) == ["task.completed"]
    assert pauses == [7.0, 1.0]


@pytest.mark.parametrize(("answer", "kind"), [(BUSY, UnavailableError), (CUT, UnreachableError)])
def test_events_give_up_after_retry_for(
    events: Events, pauses: list[float], answer: bytes, kind: type[ClientError]
) -> None:
    with pytest.raises(kind):
        events(*[answer] * 9, retry_for=3.5)
    assert pauses == [0.5, 1.0, 2.0]


def test_a_pause_longer_than_retry_for_is_an_error(events: Events, pauses: list[float]) -> None:
    with pytest.raises(UnavailableError) as caught:
        events(response("503 X", {}, "Retry-After: 61"))
    assert caught.value.retry_after == 61.0
    assert pauses == []
