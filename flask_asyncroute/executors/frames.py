"""What a parent and its child tell each other, as frames on a socket: a kind, a length, so many bytes of JSON.

A frame over its limit, or of an unknown kind, is an error; nobody makes room for what is only announced.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ..states import State

SETTINGS, JOB, BODY = b"S", b"J", b"B"
READY, PROGRESS, EVENT, OUTCOME = b"R", b"P", b"E", b"O"

SMALL_FRAME = 64 * 1024
EVENT_FRAME = 2 * SMALL_FRAME
HEADER = struct.Struct("!cQ")
PIECE = 256 * 1024


class FrameError(Exception):
    """What came is no frame."""


class Settings(msgspec.Struct):
    """First to a child: which app to load, and what the parent's configuration has.

    :param values: by key, as far as it is JSON.
    :param own: keys whose values are the child's own: functions and other objects, and what made the URL rules.
    """

    app: str
    values: dict[str, Any]
    own: list[str]


class Job(msgspec.Struct):
    """Then: the task to run. A large body follows in frames of its own.

    :param deadline: of the monotonic clock, which is one for all processes; None: no limit.
    """

    task_id: str
    endpoint: str
    user: str | None
    epoch: int
    deadline: float | None
    request: msgspec.Raw
    body_size: int


class Report(msgspec.Struct):
    """From a child: its progress."""

    progress: float | None
    message: str | None


class Sent(msgspec.Struct):
    """From a child: what its view has sent."""

    name: str
    data: msgspec.Raw


class Ending(msgspec.Struct):
    """Last from a child: how the view ended, and the last progress."""

    state: State
    report: Report
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    error_status: int | None = None


def send(sock: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    """Send one frame.

    :raises OSError: where nobody is there.
    """
    sock.sendall(HEADER.pack(kind, len(payload)) + payload)


def receive(sock: socket.socket, limits: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the frames that come, until the other side closes.

    :param limits: the most bytes of each kind.
    :raises FrameError: for anything else.
    """
    reader = FrameReader(limits)
    while data := sock.recv(PIECE):
        yield from reader.feed(data)


class FrameReader:
    """Puts frames together from pieces as they arrive.

    :param limits: the most bytes of each kind that may come.
    """

    def __init__(self, limits: Mapping[bytes, int]) -> None:
        self._limits = limits
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Take ``data``; yield each frame that is complete now.

        :raises FrameError: for a kind that is not known, or a frame over its limit.
        """
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            kind, size = HEADER.unpack_from(self._buffer)
            if size > self._limits.get(kind, -1):
                raise FrameError(f"A frame of kind {kind!r} and {size} bytes came, which is none.")
            end = HEADER.size + size
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield kind, payload
