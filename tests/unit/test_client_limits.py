"""The Python client against servers that lie: bounded time and memory, and one origin."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import requests

from flask_asyncroute.client import (
    AsyncRouteClient,
    ClientError,
    InvalidResponseError,
    RefusedError,
    UnavailableError,
    UnreachableError,
)
from flask_asyncroute.client.sse import SseParser
from tests.support.raw_server import RawServer, Serve, drip, response

SECONDS = 10.0
LIMIT = 100_000
SOON = "Retry-After: 0"
RUNNING = {"Id": "one", "State": "Running"}
COMPLETED = {"Id": "one", "State": "Completed", "Result": 1}
OWNED = {**RUNNING, "User": "ann", "Sse": {"Url": "/task/one/events", "SendResult": False}}
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
KINDS = ["start", "get", "cancel", "query", "events"]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[AsyncRouteClient, RawServer]]]:
    """Return ``serve(function, **options)``, which returns a client with low limits, and its server."""
    made: list[tuple[AsyncRouteClient, RawServer]] = []

    def start(function: Serve, **options: Any) -> tuple[AsyncRouteClient, RawServer]:
        server = RawServer(function)
        session = requests.Session()
        session.headers["Authorization"] = "Bearer secret"
        options = {"retry_for": 0.5, "timeout": 1.0, "max_response": LIMIT, **options}
        made.append((AsyncRouteClient(server.url, session, **options), server))
        return made[-1]

    yield start
    for client, server in made:
        client.close()
        with server:
            pass


Start = Callable[..., tuple[AsyncRouteClient, RawServer]]


@pytest.fixture
def other() -> Iterator[RawServer]:
    """Return a server of another origin, which must not receive anything."""
    with RawServer(lambda *_: [response("200 OK", COMPLETED)]) as server:
        yield server
        assert server.requests == []


def call(client: AsyncRouteClient, kind: str) -> Any:
    """Send one request of a kind; return when it is answered."""
    if kind == "start":
        return client.start("PUT", "/work", json={"secret": 1})
    if kind == "get":
        return client.task("one")
    if kind == "query":
        return list(client.query(State="Running"))
    task = client.start("PUT", "/first")
    return task.cancel() if kind == "cancel" else list(task.events())


def first(line: str) -> Iterable[bytes] | None:
    """Answer the requests before that which a test is about."""
    if line == "PUT /first":
        return [response("202 ACCEPTED", OWNED, "Location: /task/other", "Retry-After: 9")]
    if line == "GET /tasks/events":
        return [response("404 X", {})]
    return None


@pytest.mark.covers("A93")
@pytest.mark.parametrize("status", ["301 X", "302 X", "303 X", "307 X", "308 X"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_redirect_is_followed(serve: Start, other: RawServer, status: str, kind: str) -> None:
    redirect = response(status, b"", f"Location: {other.url}/x")
    client, server = serve(lambda line, _: first(line) or [redirect])
    with pytest.raises(RefusedError, match="Redirects are not followed") as caught:
        call(client, kind)
    assert caught.value.status == int(status[:3])
    assert other.url in caught.value.detail


@pytest.mark.covers("A93")
def test_the_body_of_a_redirect_is_limited(serve: Start) -> None:
    client, server = serve(lambda *_: flood("302 X", "Location: /elsewhere"))
    with pytest.raises(InvalidResponseError, match="larger than max_response"):
        client.start("PUT", "/work")
    assert server.sent < 100 * LIMIT


@pytest.mark.covers("A93")
@pytest.mark.parametrize(
    "target",
    [
        "{other}/task/one",
        "//{host}/task/one",
        "{own}@{host}/task/one",
        "http://x:y@{own_host}/task/one",
        "https://{own_host}/task/one",
        "{own}0/task/one",
        "ftp://{host}/",
        "http://[::1/",
        "javascript:alert(1)",
        "file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("where", ["Location", "Link", "Status", "Sse"])
def test_urls_of_other_origins_are_refused(
    serve: Start, other: RawServer, target: str, where: str
) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        hosts = {"host": other.url[7:], "own_host": server.url[7:]}
        url = target.format(other=other.url, own=server.url, **hosts)
        if where == "Link":
            return [response("200 OK", [RUNNING], f'Link: <{url}>; rel="next"')]
        if where == "Location":
            return [response("202 ACCEPTED", RUNNING, f"Location: {url}")]
        if where == "Status":
            return [response("302 X", RUNNING, f'Link: <{url}>; rel="status"')]
        return [response("202 ACCEPTED", {**RUNNING, "Sse": {"Url": url}}, "Retry-After: 9")]

    client, server = serve(answer)
    with pytest.raises(InvalidResponseError):
        if where == "Link":
            list(client.query())
        else:
            list(client.start("PUT", "/work").events())
    assert len(server.requests) == 1


@pytest.mark.covers("A93")
@pytest.mark.parametrize("target", ["http:////{host}/x", "{own}\\@{host}/x", "/\\{host}/x"])
def test_ambiguous_urls_lead_to_the_own_server(serve: Start, other: RawServer, target: str) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        url = target.format(own=server.url, host=other.url[7:])
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", RUNNING, f"Location: {url}", SOON)]
        return [response("200 OK", COMPLETED)]

    client, server = serve(answer)
    assert client.start("PUT", "/work").result(SECONDS) == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "document",
    [
        {"Id": "../admin", "State": "Running"},
        {"Id": "..", "State": "Running"},
        {"Id": "", "State": "Running"},
        {"Id": 1, "State": "Running"},
        {"Id": "one"},
        {"Id": "one", "State": "Done"},
        {"Id": "one", "State": ["Running"]},
        None,
        "Running",
    ],
)
def test_only_task_objects_are_accepted(serve: Start, document: Any) -> None:
    client, server = serve(lambda *_: [response("200 OK", document)])
    with pytest.raises(InvalidResponseError):
        client.start("PUT", "/work")
    with pytest.raises(InvalidResponseError):
        list(client.query())


@pytest.mark.covers("A93")
def test_another_task_in_place_of_the_requested_one_is_refused(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", RUNNING, SOON)]
        return [response("200 OK", {**COMPLETED, "Id": "two"})]

    client, _ = serve(answer)
    with pytest.raises(InvalidResponseError, match="another task than one: two"):
        client.start("PUT", "/work").result(SECONDS)
    with pytest.raises(InvalidResponseError, match="another task"):
        client.task("one")


@pytest.mark.covers("A93")
@pytest.mark.parametrize("kind", KINDS)
def test_errors_for_a_long_time_are_raised(serve: Start, kind: str) -> None:
    client, server = serve(lambda line, _: first(line) or [response("503 X", {}, SOON)])
    begin = time.monotonic()
    with pytest.raises(UnavailableError):
        call(client, kind)
    assert time.monotonic() - begin < 5
    assert 3 <= len(server.requests) <= 20


@pytest.mark.covers("A93")
def test_errors_for_a_long_time_end_a_followed_task(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", OWNED, SOON)]
        return [response("500 X", {}, SOON) if "events" in line else response("503 X", {}, SOON)]

    client, _ = serve(answer)
    with pytest.raises(UnavailableError):
        client.start("PUT", "/work").result(SECONDS)


def endless(*pieces: bytes) -> Iterator[bytes]:
    return itertools.chain(pieces[:-1], itertools.repeat(pieces[-1]))


def flood(status: str = "200 OK", *fields: str) -> Iterator[bytes]:
    head = "\r\n".join([f"HTTP/1.1 {status}", "Content-Length: 1000000000", *fields, "", ""])
    return endless(head.encode(), b"x" * 65536)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW: dict[str, Callable[[], Iterable[bytes]]] = {
    "no answer": lambda: drip(b""),
    "slow status line": lambda: drip(b"H"),
    "slow headers": lambda: drip(b"x", b"HTTP/1.1 200 OK\r\n"),
    "endless headers": lambda: endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100),
    "an endless header": lambda: endless(b"HTTP/1.1 200 OK\r\na: ", b"b" * 65536),
    "endless early responses": lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "slow body": lambda: drip(b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"),
    "slow body without length": lambda: drip(b" ", b"HTTP/1.0 200 OK\r\n\r\n"),
    "slow chunks": lambda: drip(b"1\r\nx\r\n", CHUNKED),
    "endless chunk header": lambda: endless(CHUNKED, b"1" * 65536),
    "endless trailers": lambda: endless(CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 1000),
    "cut body": lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{}"],
    "cut chunk": lambda: [CHUNKED + b"5\r\n{}"],
    "no HTTP": lambda: [b"SSH-2.0-OpenSSH\r\n"],
    "nothing": lambda: [],
}


@pytest.mark.covers("A93")
@pytest.mark.parametrize("name", SLOW)
def test_a_response_that_does_not_end_is_abandoned(serve: Start, name: str) -> None:
    client, server = serve(lambda *_: SLOW[name](), timeout=0.6)
    begin = time.monotonic()
    with pytest.raises(UnreachableError):
        client.task("one")
    assert time.monotonic() - begin < 6


BOMB = gzip.compress(b" " * 50_000_000)
LARGE: dict[str, Callable[[], Iterable[bytes]]] = {
    "a gigabyte": flood,
    "without length": lambda: endless(b"HTTP/1.0 200 OK\r\n\r\n", b" " * 65536),
    "in chunks": lambda: endless(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "in one chunk": lambda: endless(CHUNKED + b"fffffffff\r\n", b" " * 65536),
    "compressed": lambda: [response("200 OK", BOMB, "Content-Encoding: gzip")],
    "an error": lambda: flood("400 X", "Content-Type: application/problem+json"),
}


@pytest.mark.covers("A93")
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kind", ["start", "get", "query"])
def test_a_large_response_is_refused(serve: Start, name: str, kind: str) -> None:
    client, server = serve(lambda *_: LARGE[name](), timeout=5.0)
    with pytest.raises(InvalidResponseError, match="larger than max_response|is compressed"):
        call(client, kind)
    assert len(server.requests) == 1
    # The rest is in the buffers of the sockets.
    assert server.sent < 20_000_000


def test_deeply_nested_json_is_refused(serve: Start) -> None:
    client, _ = serve(lambda *_: [response("200 OK", b"[" * 99_000)])
    with pytest.raises(InvalidResponseError, match="is not JSON"):
        client.task("one")


def test_a_large_result_ends_a_followed_task(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        return [response("202 ACCEPTED", RUNNING, SOON)] if line.startswith("PUT") else flood()

    client, server = serve(answer, timeout=5.0)
    with pytest.raises(InvalidResponseError, match="larger than max_response"):
        client.start("PUT", "/work").result(SECONDS)
    assert server.sent < 20_000_000


def event(name: str, data: Any, *fields: str) -> bytes:
    return "\n".join([*fields, f"event: {name}", f"data: {json.dumps(data)}", "", ""]).encode()


BAD_STREAMS: dict[str, Callable[[], Iterable[bytes]]] = {
    "a line without end": lambda: endless(STREAM, b"x" * 65536),
    "an event without end": lambda: endless(STREAM, b"data: x\n" * 1000),
    "no JSON": lambda: drip(b"data: {\n\n", STREAM),
    "deep JSON": lambda: [STREAM + b"data: " + b"[" * 90_000 + b"\n\n"],
    "compressed": lambda: [response("200 OK", BOMB, "Content-Encoding: gzip")],
    "a page": lambda: [response("200 OK", b"<p>", kind="xhtml")],
    "bytes that are not UTF-8": lambda: [STREAM + b"data: \xff\xfe\n\n"],
}


@pytest.mark.covers("A93")
def test_a_long_line_in_small_pieces_is_not_searched_again_for_each_piece() -> None:
    """Otherwise, these 4 MB in pieces of 16 bytes would take minutes."""
    parser = SseParser(5_000_000)
    text = b'data: "' + b"x" * 4_000_000 + b'"'
    for start in range(0, len(text), 16):
        assert parser.feed(text[start : start + 16]) == []
    (found,) = parser.feed(b"\n\n")
    assert found.data == "x" * 4_000_000


@pytest.mark.covers("A93")
@pytest.mark.parametrize("name", BAD_STREAMS)
def test_a_bad_stream_is_abandoned(serve: Start, name: str) -> None:
    """The task is polled instead."""

    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if "events" in line:
            return BAD_STREAMS[name]()
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", OWNED, SOON)]
        return [response("200 OK", COMPLETED if server.requests.count(line) > 2 else OWNED, SOON)]

    client, server = serve(answer, retry_for=5.0)
    task = client.start("PUT", "/work")
    with pytest.raises(InvalidResponseError):
        list(task.events())
    assert task.result(SECONDS) == 1
    assert server.sent < 20_000_000


def test_a_stream_with_events_of_other_tasks_changes_nothing(
    serve: Start, eventually: Callable[..., Any]
) -> None:
    ids = (event("task.completed", {**COMPLETED, "Id": f"no-{n}"}) for n in itertools.count())

    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", OWNED, SOON)]
        if "/tasks/" in line:
            return itertools.chain([STREAM, b"id: a\n\n"], ids)
        return [response("200 OK", COMPLETED if server.requests.count(line) > 1 else OWNED, SOON)]

    client, server = serve(answer)
    task = client.start("PUT", "/work")
    eventually(lambda: server.sent > 1_000_000, SECONDS)
    assert task.state == "Running"
    assert task.refresh()["State"] == "Completed" and task.result(0) == 1


def test_the_end_in_a_stream_is_checked(serve: Start) -> None:
    """A ``task.completed`` without the Result makes the client read the task."""

    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", OWNED, SOON)]
        if "/tasks/" in line:
            lie = event("task.completed", {"Id": "one", "State": "Completed"}, "id: b")
            return drip(lie, STREAM, b"id: a\n\n")
        return [response("200 OK", COMPLETED if server.requests.count(line) > 3 else OWNED)]

    client, server = serve(answer)
    assert client.start("PUT", "/work").result(SECONDS) == 1


@pytest.mark.parametrize("page", [[], [RUNNING]])
def test_endless_pages_are_refused(serve: Start, page: list[Any]) -> None:
    link = 'Link: </tasks/query?cursor=x>; rel="next"'
    client, server = serve(lambda *_: [response("200 OK", page, link)])
    with pytest.raises(InvalidResponseError, match="list of tasks does not end"):
        list(client.query())
    assert len(server.requests) == 1 + len(page)


def test_an_id_of_an_event_cannot_add_a_header(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", OWNED, "Retry-After: 9")]
        if line == "GET /tasks/events":
            return [response("404 X", {})]
        if b"Last-Event-ID" in request:
            return [STREAM, event("task.completed", COMPLETED)]
        bad = (
            b"id: a\rX-Evil: 1\ndata: 1\n\nid: \xff\ndata: 2\n\nid: "
            + b"x" * 2000
            + b"\ndata: 3\n\n"
        )
        return [STREAM, b"retry: 100\n\n", b"id: good\ndata: 0\n\n", bad]

    client, server = serve(answer, retry_for=5.0)
    found = list(client.start("PUT", "/work").events())
    assert [each.data for each in found[:4]] == [0, 1, 2, 3] and found[-1].data == COMPLETED
    (resumed,) = [head for head in server.heads if b"Last-Event-ID" in head]
    assert b"Last-Event-ID: good\r\n" in resumed and b"X-Evil" not in resumed


def test_a_route_without_events_raises_an_error(serve: Start) -> None:
    client, _ = serve(lambda *_: [response("202 ACCEPTED", RUNNING, "Retry-After: 9")])
    with pytest.raises(ClientError, match="sse=False"):
        list(client.start("PUT", "/work").events())
