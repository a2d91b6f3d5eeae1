"""Clients of streams of events: they read as the WHATWG's rules say, and can be cut in the middle of anything."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from types import TracebackType
from typing import Any

from . import check
from .client import TIMEOUT

STATES = ("task.state", "task.completed")
END = "task.completed"
_BLOCK_ENDS = re.compile(rb"\n\n")


@dataclass(frozen=True)
class Message:
    """One event of a stream."""

    name: str
    data: Any
    id: str | None

    @property
    def short(self) -> Any:
        """The state it tells of, or the number that a view gave it."""
        return self.data["State"] if self.name in STATES else self.data["n"]


class Parser:
    """Takes a stream piece by piece, however it is cut, and gives whole events."""

    def __init__(self) -> None:
        self.retry: int | None = None
        self.last_id: str | None = None
        self.has_begun = False
        """Whether anything has come, be it a comment."""
        self._buffer = b""

    def feed(self, data: bytes) -> list[Message]:
        """Return the events that are complete with this piece."""
        found = []
        *blocks, self._buffer = _BLOCK_ENDS.split(self._buffer + data)
        self.has_begun = self.has_begun or bool(blocks)
        for block in blocks:
            fields: dict[str, str] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                check(name not in fields, f"{name} is twice in {block!r}")
                fields[name] = value.removeprefix(" ")
            self.last_id = fields.get("id", self.last_id)
            if "retry" in fields:
                self.retry = int(fields["retry"])
            if "data" in fields:
                found.append(Message(fields["event"], json.loads(fields["data"]), fields.get("id")))
        return found


class Stream:
    """An open stream, read as it comes, closed at the end of the context.

    :param last_id: sent as ``Last-Event-ID``.
    """

    def __init__(self, port: int, path: str, last_id: str | None = None, timeout: float = TIMEOUT) -> None:
        self.parser = Parser()
        self._http = HTTPConnection("127.0.0.1", port, timeout=timeout)
        headers = {"Accept": "text/event-stream"} | ({} if last_id is None else {"Last-Event-ID": last_id})
        self._http.request("GET", path, headers=headers)
        # A response that closes its connection takes the socket along.
        self._socket = self._http.sock
        self.response: HTTPResponse = self._http.getresponse()
        self.status = self.response.status

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.response.close()
        self._http.close()

    @property
    def pid(self) -> int:
        """The worker that serves it, as it says."""
        return int(self.response.headers["X-Pid"])

    def read(self, size: int = 65536) -> bytes:
        """Return what has come, at most ``size`` bytes of it; nothing at the end."""
        return self.response.read1(size)

    def messages(self) -> Iterator[Message]:
        """Yield the events as they come, to the end of the stream."""
        while data := self.read():
            yield from self.parser.feed(data)

    def until_begun(self) -> list[Message]:
        """Read the first that comes: then it is followed what happens from here on."""
        found: list[Message] = []
        while not self.parser.has_begun and (data := self.read()):
            found += self.parser.feed(data)
        return found

    def reset(self) -> None:
        """Break the connection as a client does that has crashed, with whatever was not read yet."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
