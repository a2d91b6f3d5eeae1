"""The connection that a request came on, as far as its server shows it.

`sse` asks for it, since a client that never reads holds up the thread that sends to it, for ever with some servers.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

_KEYS = ("gunicorn.socket", "werkzeug.socket")


def hanging_up(environ: Mapping[str, Any]) -> Callable[[], None] | None:
    """Return what ends the connection of a request, so that a thread that sends on it gets an error at once.

    To be called by another thread while the response is sent. None where the server does not show its connections: waitress
    and uWSGI have limits of their own for clients that do not read.
    """
    for key in _KEYS:
        if key in environ:
            return partial(_hang_up, environ[key])
    return None


def _hang_up(connection: Any) -> None:
    # ValueError: it is closed already.
    with suppress(OSError, ValueError):
        # By another object for the same connection: that of the server may be one of gevent or of TLS, which is in use. No
        # duplicate, for which there may be no descriptor left.
        same = socket.socket(fileno=connection.fileno())
        try:
            same.shutdown(socket.SHUT_RDWR)
        finally:
            same.detach()
