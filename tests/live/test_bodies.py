"""Incomplete, malformed and large request bodies, sent over a raw connection to a real server: they
are refused and store nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.client import send
from tests.support.server import Server, gunicorn
from tests.support.uploads import upload

pytestmark = pytest.mark.live

LIMIT = 1024 * 1024
PIECE = b"x" * 65536
BAD_CHUNKS = {
    "no-number": b"zz\r\nabc\r\n0\r\n\r\n",
    "negative": b"-5\r\nabcde\r\n0\r\n\r\n",
    "empty-size": b"\r\nabc\r\n0\r\n\r\n",
    "too-long": b"3\r\nabcdef\r\n0\r\n\r\n",
    "second-is-bad": b"3\r\nabc\r\n!!\r\nabc\r\n0\r\n\r\n",
    "cut-in-a-chunk": b"10\r\nabc",
    "cut-in-a-size": b"3\r\nabc\r\n1",
    "no-last-chunk": b"3\r\nabc\r\n",
}


@pytest.fixture(scope="module", params=["gthread", "sync"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bodies")
    app = (
        f"tests.support.apps.csv:create_app({str(folder)!r}, max_body={LIMIT}, list_anonymous=True)"
    )
    threads = ("--threads", "4") if request.param == "gthread" else ()
    options = ("--workers", "1", "--worker-class", request.param, *threads)
    with gunicorn(folder / "log", app, *options) as running:
        yield running
        assert "Traceback" not in running.output(), running.output()


class Wire:
    """A raw connection."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), 20)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self.socket.close()

    def head(self, *fields: str, method: str = "POST", path: str = "/csv") -> None:
        """Send the head of a request."""
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            "Content-Type: text/csv",
            *fields,
            "",
            "",
        ]
        self.socket.sendall("\r\n".join(lines).encode("ascii"))

    def end(self) -> None:
        """Close the sending side."""
        self.socket.shutdown(socket.SHUT_WR)

    def answer(self) -> tuple[int, str]:
        """Read a response; return its status and body, or status 0 if the server closed the
        connection.
        """
        status = self._file.readline()
        if not status:
            return 0, ""
        length = 0
        while (line := self._file.readline().strip().lower()) != b"":
            name, _, value = line.partition(b":")
            if name == b"content-length":
                length = int(value)
        return int(status.split()[1]), self._file.read(length).decode()


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    """Yield a connection. Check afterwards that no task was created and that the server answers."""
    before = send(server.port, "GET", "/tasks?limit=500").json()
    with Wire(server) as connected:
        yield connected
    after = send(server.port, "GET", "/tasks?limit=500")
    assert (after.status, after.json()) == (200, before)


@pytest.mark.parametrize("sent", [b"", b"half of it"])
def test_a_body_cut_short_is_refused(wire: Wire, sent: bytes) -> None:
    wire.head("Content-Length: 1000")
    wire.socket.sendall(sent)
    wire.end()
    status, body = wire.answer()
    assert status == 400 and "incomplete" in body


def test_a_client_that_disconnects_starts_no_task(server: Server, wire: Wire) -> None:
    wire.head("Content-Length: 1000")
    wire.socket.sendall(b"half of it")
    wire.__exit__()
    assert send(server.port, "GET", "/pid").status == 200


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_invalid_chunks_are_refused(wire: Wire, name: str) -> None:
    wire.head("Transfer-Encoding: chunked")
    wire.socket.sendall(BAD_CHUNKS[name])
    wire.end()
    status, body = wire.answer()
    assert status == 400, body
    assert '"detail"' in body


def test_an_announced_body_that_is_too_large_is_refused_unread(wire: Wire) -> None:
    wire.head(f"Content-Length: {50 * 1024 * 1024}")
    wire.socket.sendall(PIECE)
    status, body = wire.answer()
    assert status == 413 and "ASYNCROUTE_MAX_BODY" in body


@pytest.mark.covers("A49")
def test_a_chunked_body_without_end_is_refused(wire: Wire) -> None:
    wire.head("Transfer-Encoding: chunked")
    try:
        for _ in range(1000):
            wire.socket.sendall(b"%x\r\n%s\r\n" % (len(PIECE), PIECE))
    except (BrokenPipeError, ConnectionResetError):
        pass
    else:
        pytest.fail("the server read 64 MB")


@pytest.mark.covers("A49")
def test_a_chunked_body_over_the_limit_is_refused(wire: Wire) -> None:
    wire.head("Transfer-Encoding: chunked")
    for _ in range(LIMIT // len(PIECE) + 1):
        wire.socket.sendall(b"%x\r\n%s\r\n" % (len(PIECE), PIECE))
    wire.socket.sendall(b"0\r\n\r\n")
    status, body = wire.answer()
    assert status == 413 and "ASYNCROUTE_MAX_BODY" in body


def test_an_unread_body_is_not_parsed_as_the_next_request(server: Server, wire: Wire) -> None:
    smuggled = b"GET /pid HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    wire.head(f"Content-Length: {len(smuggled)}", "Accept: image/png")
    wire.socket.sendall(smuggled)
    assert wire.answer()[0] == 406
    wire.socket.sendall(
        b"GET /tasks?limit=0 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    )
    assert wire.answer()[0] in (400, 0)
    assert wire.answer()[0] == 0


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_whole_body_is_accepted(server: Server, is_chunked: bool) -> None:
    upload(server.port, LIMIT // 2, is_chunked)
