"""Clients that read streams of server-sent events, in process and over sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from types import TracebackType
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.support.client import TIMEOUT

STATES = ("task.state", "task.completed")
END = "task.completed"


@dataclass(frozen=True)
class Message:
    """One event of a stream."""

    name: str
    data: Any
    id: str | None = None

    @property
    def short(self) -> Any:
        """The state of the task, or the number ``n`` that the view sent."""
        return self.data["State"] if self.name in STATES else self.data["n"]


class Parser:
    """Parse a stream as the WHATWG specifies, from pieces of any size."""

    def __init__(self) -> None:
        self.retry: int | None = None
        self.last_id: str | None = None
        self.has_begun = False
        """Whether any data has arrived, even only a comment."""
        self.rest = b""
        """Bytes of an incomplete event."""

    def feed(self, data: bytes) -> list[Message]:
        """Return the events that this piece completes."""
        found = []
        *blocks, self.rest = (self.rest + data).split(b"\n\n")
        self.has_begun = self.has_begun or bool(blocks)
        for block in blocks:
            fields: dict[str, str] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                assert name not in fields or name == "", f"{name} twice in {block!r}"
                fields[name] = value.removeprefix(" ")
            self.last_id = fields.get("id", self.last_id)
            if "retry" in fields:
                self.retry = int(fields["retry"])
            if "data" in fields:
                found.append(Message(fields["event"], json.loads(fields["data"]), fields.get("id")))
        return found


class Stream:
    """An open stream over a socket; the context manager closes it.

    :param last_id: sent as ``Last-Event-ID``.
    """

    def __init__(
        self, port: int, path: str, last_id: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        self.parser = Parser()
        self._http = HTTPConnection("127.0.0.1", port, timeout=timeout)
        resumed = {} if last_id is None else {"Last-Event-ID": last_id}
        try:
            self._http.request("GET", path, headers={"Accept": "text/event-stream"} | resumed)
            # http.client drops its socket once it has the response of a connection that will close.
            self._socket = self._http.sock
            self.response: HTTPResponse = self._http.getresponse()
        except BaseException:
            self._http.close()
            raise
        self.status = self.response.status

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.response.close()
        self._http.close()

    @property
    def pid(self) -> int:
        """The process id of the worker that serves the stream."""
        return int(self.response.headers["X-Pid"])

    def read(self, size: int = 65536) -> bytes:
        """Return the data that has arrived, at most ``size`` bytes; empty at the end."""
        return self.response.read1(size)

    def messages(self) -> Iterator[Message]:
        """Yield the events as they arrive, until the stream ends."""
        while data := self.read():
            yield from self.parser.feed(data)

    def until_begun(self) -> list[Message]:
        """Read until data has arrived. Later changes are streamed."""
        found: list[Message] = []
        while not self.parser.has_begun and (data := self.read()):
            found += self.parser.feed(data)
        return found

    def reset(self) -> None:
        """Close with a TCP reset, as the system does for a client that has crashed."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """Yield the events of a stream as they arrive, without comments and retry times."""
    parser = Parser()
    for chunk in chunks:
        yield from parser.feed(chunk)
    assert not parser.rest.strip(), f"the stream ended within an event: {parser.rest!r}"


def told(found: Iterable[Message]) -> list[str]:
    """Return the state that each event reports, or the name of another event."""
    return [m.data["State"] if m.name in STATES else m.name for m in found]


def opened(
    client: FlaskClient, path: str, last_id: str | None = None, **headers: str
) -> TestResponse:
    """Request a stream with a test client; the caller reads and closes it."""
    if last_id is not None:
        headers["Last-Event-ID"] = last_id
    return client.get(path, headers={"Accept": "text/event-stream", **headers}, buffered=False)


def read(
    client: FlaskClient, path: str, last_id: str | None = None, **headers: str
) -> list[Message]:
    """Return all events of a stream that ends."""
    answer = opened(client, path, last_id, **headers)
    assert answer.status_code == 200, answer.text
    assert answer.content_type == "text/event-stream"
    try:
        return list(messages(answer.iter_encoded()))
    finally:
        answer.close()
