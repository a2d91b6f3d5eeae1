"""Requests to a server on loopback, each on a connection of its own unless one is held."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPConnection
from types import TracebackType
from typing import Any

TIMEOUT = 30.0


@dataclass(frozen=True)
class Reply:
    """One answer.

    :param sent_at: monotonic seconds, before the request went out.
    :param answered_at: after the answer was read.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    sent_at: float
    answered_at: float

    @property
    def pid(self) -> int:
        """The worker that answered, as it says."""
        return int(self.headers["x-pid"])

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


class Connection:
    """A connection that is kept; of one worker therefore, with gunicorn's threads."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def send(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request and read the answer."""
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
