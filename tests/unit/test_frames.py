"""Frames between a parent and a child: put together from any pieces, and refused where they are none."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.executors.frames import HEADER, FrameError, FrameReader, receive, send

LIMITS = {b"A": 1000, b"B": 0}


@given(
    payloads=st.lists(st.binary(max_size=1000), max_size=10),
    cuts=st.lists(st.integers(min_value=1, max_value=1100), min_size=1, max_size=50),
)
def test_frames_arrive_however_they_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(HEADER.pack(b"A", len(payload)) + payload for payload in payloads)
    reader = FrameReader(LIMITS)
    found: list[tuple[bytes, bytes]] = []
    number = 0
    while data:
        size = cuts[number % len(cuts)]
        found += reader.feed(data[:size])
        data = data[size:]
        number += 1
    assert found == [(b"A", payload) for payload in payloads]


@pytest.mark.parametrize(
    "header", [HEADER.pack(b"A", 1001), HEADER.pack(b"B", 1), HEADER.pack(b"C", 0), b"\xff" * HEADER.size, b"x" * 100]
)
def test_what_is_no_frame_is_refused_by_its_header(header: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader(LIMITS).feed(header))


def test_frames_before_what_is_none_are_given() -> None:
    frames = FrameReader(LIMITS).feed(HEADER.pack(b"A", 1) + b"x" + b"rubbish" * 2)
    assert next(frames) == (b"A", b"x")
    with pytest.raises(FrameError):
        next(frames)


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    try:
        for kind, payload in FrameReader(LIMITS).feed(data):
            assert len(payload) <= LIMITS[kind]
    except FrameError:
        pass


def test_over_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, b"A", b"one")
        send(ours, b"B")
        ours.sendall(HEADER.pack(b"A", 10) + b"cut short")
        ours.close()
        assert list(receive(theirs, LIMITS)) == [(b"A", b"one"), (b"B", b"")]
