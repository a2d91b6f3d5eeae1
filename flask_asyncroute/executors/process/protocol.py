"""The protocol between the app (the parent) and a child process that runs one task.

Messages are sent in frames. A frame has a kind, a length and a payload. Unknown kinds and excessive
lengths are refused before memory is allocated.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, TypeAlias

import msgspec

from ...task import State

SETTINGS, JOB, BODY = b"S", b"J", b"B"
READY, PROGRESS, EVENT, OUTCOME = b"R", b"P", b"E", b"O"

HEADER = struct.Struct("!cQ")
PIECE = 256 * 1024
SMALL = 64 * 1024
TO_CHILD = {SETTINGS: 16 * 1024 * 1024, JOB: 16 * 1024 * 1024, BODY: PIECE}
"""Maximum payload of a frame to a child process in bytes, by kind of frame."""
# The maximum size of a result is added to the limit of an outcome.
TO_PARENT = {READY: SMALL, PROGRESS: SMALL, EVENT: 2 * SMALL, OUTCOME: SMALL}
"""Maximum payload of a frame from a child process in bytes, by kind of frame."""

Report: TypeAlias = tuple[float | None, str | None]
"""The progress and message of a task in a child process; None if not set."""
Event: TypeAlias = tuple[str, msgspec.Raw]  # name and data


class FrameError(Exception):
    """The received bytes do not follow the protocol."""


class Job(msgspec.Struct):
    """The task that a child process must run. It is sent after the child's settings.

    A large request body follows in BODY frames.

    :param epoch: the number of this run of the task.
    """

    task_id: str
    endpoint: str
    user: str | None
    epoch: int
    deadline: float | None  # on the monotonic clock, which processes share; None: no limit
    request: msgspec.Raw
    body_size: int
    attempt: int
    retries_left: int


class Ending(msgspec.Struct):
    """A child's last message: how its view ended, and the last progress."""

    state: State
    report: Report
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    error_status: int | None = None
    can_retry: bool = False
    retry_after: Annotated[float, msgspec.Meta(ge=0, le=4e9)] | None = None


def send(sock: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    """Send one message of the protocol.

    :raises OSError: if the other process has exited.
    """
    sock.sendall(HEADER.pack(kind, len(payload)) + payload)


def receive(sock: socket.socket) -> bytes:
    """Wait for data and return the next bytes. Returns b"" if the other process has exited."""
    try:
        return sock.recv(PIECE)
    except OSError:
        return b""


def frames(pieces: Iterable[bytes], limits: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the payload of each complete frame in the received data.

    :param pieces: the received data, divided anywhere.
    :param limits: maximum payload in bytes, by kind of frame.
    :raises FrameError: if a frame has an unknown kind or exceeds its limit.
    """
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= HEADER.size:
            kind, size = HEADER.unpack_from(buffer)
            if size > limits.get(kind, -1):
                raise FrameError(f"invalid frame of kind {kind!r} and {size} bytes")
            end = HEADER.size + size
            if len(buffer) < end:
                break
            payload = bytes(buffer[HEADER.size : end])
            del buffer[:end]
            yield kind, payload
