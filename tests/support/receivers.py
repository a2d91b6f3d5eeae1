"""Receivers of callbacks on several loopback hosts: good receivers, and receivers that hang, drip,
flood, redirect or refuse.

The path of a callback names the kind of receiver: ``/<kind>/…``.
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

from tests.support.apps.calling import SECRET

HELD_SECONDS = 0.15
"""The longest response time of a good receiver, so that some callbacks are always in progress."""
DRIP_SECONDS = 0.05
FLOOD = 50_000_000
"""Bytes."""

DELIVERED = ("good", "late", "busy", "flood")
"""Kinds that accept the callback, some only after a retry."""
ONCE = ("gone",)
"""Kinds that refuse it permanently."""
REFUSED = ("moved", "hang", "drip", "head")
"""Kinds that never accept it."""


@dataclass(frozen=True)
class Message:
    """A received callback."""

    kind: str
    webhook_id: str
    document: dict[str, Any]
    at: float


class Receivers:
    """Listens on several loopback hosts while the context lasts."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.over = threading.Event()
        self.forged: list[str] = []
        """Callbacks with an invalid signature."""
        self.trapped = 0
        """Requests that followed a redirect."""
        self.flooded: list[int] = []
        """Bytes that each flood was able to send."""
        self.most_at_once = 0
        """The most callbacks that one host handled at once, including those of killed senders."""
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
        """Return the URL of a receiver. The slow kinds have their own hosts, so that they do not
        delay others.
        """
        trouble = {"hang": 6, "drip": 7, "head": 8, "moved": 9, "flood": 9}
        number = trouble.get(kind) or self._chance.randint(1, 5)
        host, port = self._servers[number - 1].server_address[:2]
        return f"http://{host!s}:{port}/{kind}/hook"

    def of(self, task_id: str) -> list[Message]:
        """Return the callbacks of one task."""
        return [message for message in list(self.messages) if message.document["Id"] == task_id]

    def take(self, kind: str, headers: dict[str, str], body: bytes) -> int:
        """Verify and store a callback; return how many its task has, including this one."""
        try:
            document = Webhook(SECRET).verify(body, headers)
        except (WebhookVerificationError, ValueError) as error:
            self.forged.append(f"{error}: {headers} {body!r}")
            return 0
        with self._lock:
            self.messages.append(Message(kind, headers["webhook-id"], document, time.monotonic()))
            return len(self.of(document["Id"]))

    def hold(self, host: str) -> None:
        """Wait for a random time before the response."""
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
        """Print nothing: senders are killed while they send."""


class _Handler(BaseHTTPRequestHandler):
    receivers: ClassVar[Receivers]

    def do_POST(self) -> None:
        kind = self.path.split("/")[1]
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            return  # the sender was killed, so it must send the callback again
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
