"""The protocol between the app (the parent) and a child process.

A frame has a kind, a length and a payload. Unknown kinds and excessive lengths are refused before
memory is allocated.
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
"""Maximum payload bytes by kind of frame."""
TO_PARENT = {READY: SMALL, PROGRESS: SMALL, EVENT: 2 * SMALL, OUTCOME: SMALL}
"""Like `TO_CHILD`. An outcome may exceed its limit by the maximum size of a result."""

Report: TypeAlias = tuple[float | None, str | None]
"""A child's progress and message, as :meth:`Execution.take_report` returns them."""
Event: TypeAlias = tuple[str, msgspec.Raw]  # name and data


class FrameError(Exception):
    """The received bytes are not a valid frame."""


class Job(msgspec.Struct):
    """The task that a child must run, sent after its `ChildSettings`. A large body follows in
    frames.
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
    """A child's last message: its view's outcome and last progress."""

    state: State
    report: Report
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    error_status: int | None = None
    can_retry: bool = False
    retry_after: Annotated[float, msgspec.Meta(ge=0, le=4e9)] | None = None


def send(sock: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    """Send one frame; raise OSError if the other process has exited."""
    sock.sendall(HEADER.pack(kind, len(payload)) + payload)


def receive(sock: socket.socket) -> bytes:
    """Return the next bytes; empty if the other process has exited."""
    try:
        return sock.recv(PIECE)
    except OSError:
        return b""


def frames(pieces: Iterable[bytes], limits: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and payload of each complete frame.

    :param limits: maximum payload bytes by kind of frame.
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
