"""Receivers of callbacks: good ones, and those that hang, drip, flood, redirect or refuse, on several hosts of loopback.

The path of a callback says how it is received: ``/<kind>/…``.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from standardwebhooks import Webhook, WebhookVerificationError

from .apps.calling import SECRET

HELD_SECONDS = 0.15
"""The longest that a good receiver takes, so that some callbacks are in flight at any moment."""
DRIP_SECONDS = 0.05
FLOOD = 50_000_000
"""Bytes."""

DELIVERED = ("good", "late", "busy", "flood")
"""Kinds that take the callback, some only when it comes again."""
ONCE = ("gone",)
"""Kinds that want it never again."""
REFUSED = ("moved", "hang", "drip", "head")
"""Kinds that never take it."""


@dataclass(frozen=True)
class Message:
    """A callback as it came."""

    kind: str
    webhook_id: str
    document: dict[str, Any]
    at: float


class Receivers:
    """Listens on hosts of loopback while it is used as a context manager."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.over = threading.Event()
        self.forged: list[str] = []
        """What could not be verified."""
        self.trapped = 0
        """Requests that followed a redirect."""
        self.flooded: list[int] = []
        """Bytes that each flood could send."""
        self.most_at_once = 0
        """The most callbacks that one host was at. It counts those of a killed sender too until it has answered them."""
        self._at_once: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._chance = random.Random(1)
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> Receivers:
        for number in range(1, 10):
            handler = type("Handler", (_Handler,), {"receivers": self})
            server = _Server((f"127.0.0.{number}", 0), handler)
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def url(self, kind: str) -> str:
        """Return where one of this kind is; those that take long for nothing share a host, so that they hold up no others."""
        trouble = {"hang": 6, "drip": 7, "head": 8, "moved": 9, "flood": 9}
        number = trouble.get(kind) or self._chance.randint(1, 5)
        host, port = self._servers[number - 1].server_address[:2]
        return f"http://{host!s}:{port}/{kind}/hook"

    def of(self, task_id: str) -> list[Message]:
        """Return what came about one task."""
        return [message for message in list(self.messages) if message.document["Id"] == task_id]

    def take(self, kind: str, headers: dict[str, str], body: bytes) -> int:
        """Verify and keep a callback; return how many have come about its task, this one included."""
        try:
            document = Webhook(SECRET).verify(body, headers)
        except (WebhookVerificationError, ValueError) as error:
            self.forged.append(f"{error}: {headers} {body!r}")
            return 0
        with self._lock:
            self.messages.append(Message(kind, headers["webhook-id"], document, time.monotonic()))
            return len(self.of(document["Id"]))

    def hold(self, host: str) -> None:
        """Take some time over a callback."""
        with self._lock:
            self._at_once[host] += 1
            self.most_at_once = max(self.most_at_once, self._at_once[host])
            seconds = self._chance.uniform(0, HELD_SECONDS)
        self.over.wait(seconds)
        with self._lock:
            self._at_once[host] -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: senders are killed here while they send."""


class _Handler(BaseHTTPRequestHandler):
    receivers: ClassVar[Receivers]

    def do_POST(self) -> None:
        kind = self.path.split("/")[1]
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            return  # its sender was killed in between: nothing was delivered, and it must come again
        receivers = self.receivers
        if kind == "trap":
            receivers.trapped += 1
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        getattr(self, f"_{kind}")(receivers.take(kind, headers, body))

    def _say(self, status: int, **fields: str) -> None:
        self.receivers.hold(self.headers["Host"])
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _good(self, number: int) -> None:
        self._say(204)

    def _late(self, number: int) -> None:
        self._say(500 if number <= 2 else 200)

    def _busy(self, number: int) -> None:
        self._say(503, Retry_After="1") if number == 1 else self._say(202)

    def _gone(self, number: int) -> None:
        self._say(410)

    def _moved(self, number: int) -> None:
        self._say(307, Location=f"http://{self.headers['Host']}/trap/hook")

    def _hang(self, number: int) -> None:
        self.connection.settimeout(30)
        self.connection.recv(1)

    def _drip(self, number: int) -> None:
        self._drip_on(b"H")

    def _head(self, number: int) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self._drip_on(b"X: y\r\n")

    def _drip_on(self, piece: bytes) -> None:
        while not self.receivers.over.wait(DRIP_SECONDS):
            self.wfile.write(piece)

    def _flood(self, number: int) -> None:
        sent = 0
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            while sent < FLOOD:
                self.wfile.write(b"x" * 65536)
                sent += 65536
        finally:
            self.receivers.flooded.append(sent)

    def log_message(self, format: str, *args: Any) -> None: ...
