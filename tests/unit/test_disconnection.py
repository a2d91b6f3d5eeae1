"""Disconnecting a client from a thread other than the one that sends to it."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from flask_asyncroute.http.streams import hanging_up


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


@pytest.mark.parametrize("key", ["gunicorn.socket", "werkzeug.socket"])
def test_the_connection_is_closed_at_both_ends(
    pair: tuple[socket.socket, socket.socket], key: str
) -> None:
    ours, theirs = pair
    disconnect = hanging_up({key: ours})
    assert disconnect is not None
    disconnect()
    assert theirs.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")
    ours.close()
    theirs.close()


@pytest.mark.covers("F40")
def test_disconnecting_needs_no_free_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    """Clients that do not read may use up all descriptors of the process."""
    ours, theirs = pair
    disconnect = hanging_up({"gunicorn.socket": ours})
    assert disconnect is not None
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.dup(ours.fileno())
    os.close(next_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, hard_limit))
    try:
        with pytest.raises(OSError):
            os.dup(ours.fileno())
        disconnect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
    assert theirs.recv(1) == b""
    ours.close()
    theirs.close()


def test_disconnecting_a_closed_socket_does_nothing(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    disconnect = hanging_up({"gunicorn.socket": ours})
    assert disconnect is not None
    ours.close()
    disconnect()
    theirs.close()


def test_none_if_the_server_does_not_expose_its_sockets() -> None:
    assert hanging_up({"wsgi.multithread": True}) is None
