"""A parser for streams of server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from .errors import InvalidResponseError

_ID = re.compile(rb"[\x20-\x7e]{0,1000}")
"""An id becomes a header of the next request."""
_LINE_SIZE = 40
"""Bytes of memory that each line of data takes beside its content."""


class ServerEvent(NamedTuple):
    """One event of a task.

    :param name: ``task.state``, ``task.progress``, ``task.completed``, or a name that the view
        chose.
    :param data: the decoded JSON.
    :param id: the id from which a stream can be resumed; None if the event has none.
    """

    name: str
    data: Any
    id: str | None


class SseParser:
    """Parses data in pieces of any size.

    :param max_event: bytes; a larger event is an error.
    """

    def __init__(self, max_event: int) -> None:
        self.last_id: str | None = None
        self.retry: float | None = None
        """Seconds after which the server wants the client to reconnect."""
        self._max = max_event
        self._rest = bytearray()
        self._name = ""
        self._id: str | None = None
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[ServerEvent]:
        """Return the events that this piece completes.

        :raises InvalidResponseError: if an event is too large or its data is not JSON.
        """
        found = []
        self._rest += data
        if b"\n" in data:  # else a long line in small pieces would be searched again and again
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                line = line.removesuffix(b"\r")
                if line:
                    self._take(line)
                else:
                    found += self._end()
        self._limit(len(self._rest))
        return found

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._size += len(value) + _LINE_SIZE
            self._limit(0)
            self._data.append(value)
        elif name == b"event":
            self._name = value[:1000].decode("utf-8", "replace")
        elif name == b"id" and _ID.fullmatch(value):
            self._id = value.decode()
        elif name == b"retry" and value.isdigit():
            self.retry = int(value[:9]) / 1000

    def _end(self) -> list[ServerEvent]:
        if self._id is not None:
            self.last_id = self._id
        name, data, event_id = self._name, self._data, self._id
        self._name, self._data, self._id, self._size = "", [], None, 0
        if not data:
            return []
        try:
            document = json.loads(b"\n".join(data))
        except (ValueError, RecursionError) as error:
            raise InvalidResponseError(f"The data of an event is not JSON: {error}") from None
        return [ServerEvent(name or "message", document, event_id)]

    def _limit(self, more: int) -> None:
        if self._size + more > self._max:
            raise InvalidResponseError(
                f"An event of the stream is larger than max_response ({self._max} bytes)."
            )
