"""Flask-Compress: changed ETags, long polling, waits and streams of events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask_compress import Compress

from flask_asyncroute import current_task
from tests.support.event_streams import messages, told
from tests.support.flow import Flow, path_of

ACCEPTED = {"Accept-Encoding": "gzip"}


@pytest.fixture
def compress_flow(make_flow: Callable[..., Flow]) -> Flow:
    """Return an app that compresses each response, however short."""
    flow = make_flow(COMPRESS_MIN_SIZE=1)
    Compress(flow.app)
    flow.headers = ACCEPTED
    return flow


def compressed(flow: Flow, path: str, **headers: str) -> Any:
    return flow.request("GET", path, headers=headers)


def test_a_get_has_an_etag_with_a_suffix_that_is_accepted(compress_flow: Flow) -> None:
    compress_flow.route()(lambda: "x" * 1000)
    task = compress_flow.request(
        "POST", "/work", headers={"Prefer": "wait=5", "Accept-Encoding": ""}
    )
    path = path_of(task.get_json())
    first = compressed(compress_flow, path)
    assert first.headers["Content-Encoding"] == "gzip"
    etag = first.headers["ETag"]
    assert etag.endswith(':gzip"')
    assert compressed(compress_flow, path, **{"If-None-Match": etag}).status_code == 304
    plain = etag.replace(":gzip", "")
    again = compressed(compress_flow, path, **{"If-None-Match": plain, "Accept-Encoding": ""})
    assert again.status_code == 304


def test_a_long_poll_with_a_compressed_etag_is_held(
    compress_flow: Flow, begun: threading.Semaphore, gate: threading.Event
) -> None:
    @compress_flow.route()
    def work() -> str:
        begun.release()
        gate.wait(10)
        return "done"

    task = compress_flow.request("POST", "/work", headers={"Accept-Encoding": ""}).get_json()
    path = path_of(task)
    assert begun.acquire(timeout=5)
    etag = compressed(compress_flow, path).headers["ETag"]
    assert etag.endswith(':gzip"')
    began = time.monotonic()
    held = compressed(compress_flow, f"{path}?wait=0.3", **{"If-None-Match": etag})
    assert time.monotonic() - began >= 0.3
    assert held.status_code in (200, 304)
    threading.Timer(0.05, gate.set).start()
    headers = {"If-None-Match": etag, "Accept-Encoding": ""}
    changed = compressed(compress_flow, f"{path}?wait=20", **headers)
    assert changed.status_code == 200 and changed.get_json()["State"] == "Completed"


def test_events_are_sent_as_they_happen(
    compress_flow: Flow, begun: threading.Semaphore, gate: threading.Event
) -> None:
    """A compressor would buffer them until it has enough data."""

    @compress_flow.route()
    def work() -> str:
        current_task.send_event({"n": 1}, event="step")
        begun.release()
        gate.wait(10)
        return "done"

    task = compress_flow.request("POST", "/work", headers={"Accept-Encoding": ""}).get_json()
    assert begun.acquire(timeout=5)
    response = compress_flow.client.get(
        f"{path_of(task)}/events", headers={"Accept-Encoding": "zstd, br, gzip"}, buffered=False
    )
    assert "Content-Encoding" not in response.headers
    events = messages(response.iter_encoded())
    assert told([next(events), next(events)]) == ["Running", "step"]
    gate.set()
    assert told(events) == ["Completed"]
    response.close()


def test_lists_and_problems_are_compressed(compress_flow: Flow) -> None:
    for path in ("/tasks", "/task/unknown"):
        response = compressed(compress_flow, path)
        vary = response.headers["Vary"]
        assert "Accept-Encoding" in vary and "Cookie" in vary
    assert compressed(compress_flow, "/tasks").headers["Content-Encoding"] == "gzip"
