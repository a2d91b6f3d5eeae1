"""Hanging up on a client, from another thread than the one that sends to it."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from flask_asyncroute.http.connection import hanging_up


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


@pytest.mark.parametrize("key", ["gunicorn.socket", "werkzeug.socket"])
def test_both_ends_learn_of_it(pair: tuple[socket.socket, socket.socket], key: str) -> None:
    ours, theirs = pair
    hang_up = hanging_up({key: ours})
    assert hang_up is not None
    hang_up()
    assert theirs.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")
    ours.close()
    theirs.close()


def test_f40_it_needs_no_free_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    """Clients that hold up threads are what brings a process to the last of them."""
    ours, theirs = pair
    hang_up = hanging_up({"gunicorn.socket": ours})
    assert hang_up is not None
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(ours.fileno())
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError):
            os.dup(ours.fileno())
        hang_up()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert theirs.recv(1) == b""
    ours.close()
    theirs.close()


def test_one_that_is_closed_already_is_none_to_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    hang_up = hanging_up({"gunicorn.socket": ours})
    assert hang_up is not None
    ours.close()
    hang_up()
    theirs.close()


def test_a_server_that_shows_none() -> None:
    assert hanging_up({"wsgi.multithread": True}) is None
