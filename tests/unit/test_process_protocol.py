"""Frames between a parent and a child process: reassembly, limits and invalid data."""

from __future__ import annotations

import socket
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.executors.process.protocol import (
    HEADER,
    FrameError,
    frames,
    receive,
    send,
)

LIMITS = {b"A": 1000, b"B": 0}


@given(
    payloads=st.lists(st.binary(max_size=1000), max_size=10),
    cuts=st.lists(st.integers(min_value=1, max_value=1100), min_size=1, max_size=50),
)
def test_frames_are_assembled_from_pieces_of_any_size(
    payloads: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(HEADER.pack(b"A", len(payload)) + payload for payload in payloads)
    pieces = []
    for size in cycle(cuts):
        pieces.append(data[:size])
        data = data[size:]
        if not data:
            break
    assert list(frames(pieces, LIMITS)) == [(b"A", payload) for payload in payloads]


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(b"A", 1001),
        HEADER.pack(b"B", 1),
        HEADER.pack(b"C", 0),
        b"\xff" * HEADER.size,
        b"x" * 100,
    ],
)
def test_an_invalid_header_is_refused(header: bytes) -> None:
    with pytest.raises(FrameError):
        list(frames([header], LIMITS))


def test_frames_before_an_invalid_one_are_returned() -> None:
    found = frames([HEADER.pack(b"A", 1) + b"x" + b"rubbish" * 2], LIMITS)
    assert next(found) == (b"A", b"x")
    with pytest.raises(FrameError):
        next(found)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        for kind, payload in frames([data], LIMITS):
            assert len(payload) <= LIMITS[kind]
    except FrameError:
        pass


def test_frames_over_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, b"A", b"one")
        send(ours, b"B")
        ours.sendall(HEADER.pack(b"A", 10) + b"cut short")
        ours.close()
        pieces = iter(lambda: receive(theirs), b"")
        assert list(frames(pieces, LIMITS)) == [(b"A", b"one"), (b"B", b"")]
