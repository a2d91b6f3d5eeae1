"""A server whose responses are raw bytes, for clients that must survive invalid responses."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

Serve = Callable[[str, bytes], Iterable[bytes]]
"""Called with ``METHOD /path`` and the whole request; yields the pieces of the response."""


class RawServer:
    """Serves one request per connection, each on a thread, while the context lasts."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.requests: list[str] = []
        self.heads: list[bytes] = []
        self.sent = 0
        """Bytes of all responses."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            request = _read(connection)
            line = request.partition(b" HTTP/")[0].decode()
            self.requests.append(line)
            self.heads.append(request)
            for piece in self.serve(line, request):
                connection.sendall(piece)
                self.sent += len(piece)


def _read(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (piece := connection.recv(65536)):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        ),
        0,
    )
    while len(body) < length and (piece := connection.recv(65536)):
        body += piece
    return head + b"\r\n\r\n" + body


def response(status: str, document: Any = None, *fields: str, kind: str = "json") -> bytes:
    """Return a whole response, with ``document`` as JSON unless it is bytes."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    head = [f"HTTP/1.1 {status}", f"Content-Type: application/{kind}", "Connection: close"]
    head += [f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(head).encode() + body


def drip(piece: bytes, *before: bytes) -> Iterator[bytes]:
    """Yield a piece every 50 ms, for ten seconds."""
    yield from before
    for _ in range(200):
        time.sleep(0.05)
        yield piece
