"""HTTP requests to a server on loopback, each on a new connection unless it is kept open."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from types import TracebackType
from typing import Any

TIMEOUT = 30.0


@dataclass(frozen=True)
class Reply:
    """One response.

    :param sent_at: monotonic seconds before the request was sent.
    :param answered_at: monotonic seconds after the response was read.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    sent_at: float
    answered_at: float

    @property
    def pid(self) -> int:
        """The process id of the worker that answered."""
        return int(self.headers["x-pid"])

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


class Connection:
    """A persistent connection, which gunicorn's thread workers serve in one process."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """Send one request and read the response."""
        sent_at = time.monotonic()
        self._http.request(method, path, body, headers or {})
        response = self._http.getresponse()
        data = response.read()
        answered_at = time.monotonic()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, fields, data, sent_at, answered_at)


def send(
    port: int,
    method: str,
    path: str,
    document: Any = None,
    body: bytes | Iterable[bytes] | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send one request on a new connection.

    :param document: sent as JSON.
    """
    fields = {"Connection": "close", **(headers or {})}
    if document is not None:
        body = json.dumps(document).encode()
        fields["Content-Type"] = "application/json"
    with Connection(port) as connection:
        return connection.send(method, path, body, fields)


def get_patiently(port: int, path: str) -> Reply:
    """Send a GET, up to six times if the worker of the connection is killed."""
    for _ in range(5):
        try:
            return send(port, "GET", path)
        except (OSError, HTTPException):
            time.sleep(0.2)
    return send(port, "GET", path)
