"""Connections for requests whose whole response has a deadline."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

REDIRECT = "X-Asyncroute-Redirect"
"""The header that has the Location of a redirect."""
current = threading.local()
"""Its ``deadline`` is that of the request that this thread sends."""


class Deadline:
    """Shuts down the socket of one exchange after a time, because timeouts of sockets limit only
    each single read.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.is_over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self.abort)
        self._timer.daemon = True
        self._timer.name = "asyncroute-client-deadline"

    def watch(self, connection: socket.socket) -> None:
        """Begin to count. An authentication scheme can send a second request on a new socket."""
        self._sockets.append(connection)
        if self.is_over:
            self.abort()
        elif self._timer.ident is None:
            self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()

    def abort(self) -> None:
        self.is_over = True
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Watched(HTTPConnection):
    def getresponse(self) -> Any:
        _watch(self.sock)
        return super().getresponse()


class _WatchedTLS(HTTPSConnection):
    def getresponse(self) -> Any:
        _watch(self.sock)
        return super().getresponse()


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


def _watch(connection: socket.socket | None) -> None:
    deadline: Deadline | None = getattr(current, "deadline", None)
    if deadline is not None and connection is not None:
        deadline.watch(connection)


class Adapter(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        response = super().send(*arguments, **options)
        if response.is_redirect:
            # Without this, requests reads the whole body of a redirect, even if it is not followed.
            response.headers[REDIRECT] = response.headers.pop("Location")
        return response
