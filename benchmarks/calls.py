"""Calls an app as a WSGI server does, ``app(environ, start_response)``, and measures the time."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from flask import Flask

HEADERS = {
    "HTTP_HOST": "127.0.0.1:8000",
    "HTTP_USER_AGENT": "curl/7.88.1",
    "HTTP_ACCEPT": "*/*",
}


def environ_of(
    method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the environ of a request as gunicorn creates it.

    :param body: sent as JSON; None: no body.
    """
    path, _, query = target.partition("?")
    environ = {
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "RAW_URI": target,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": "gunicorn",
        "REMOTE_ADDR": "127.0.0.1",
        "REMOTE_PORT": "50000",
        **HEADERS,
        **(headers or {}),
    }
    data = b""
    if body is not None:
        data = json.dumps(body).encode()
        environ["CONTENT_TYPE"] = "application/json"
        environ["CONTENT_LENGTH"] = str(len(data))
    environ["wsgi.input"] = io.BytesIO(data)
    return environ


class Answer:
    """A response and its time.

    :param seconds: from the call to the close of the response.
    """

    def __init__(
        self, status: int, headers: Sequence[tuple[str, str]], body: bytes, seconds: float
    ) -> None:
        self.status = status
        self.headers = dict(headers)
        self.body = body
        self.seconds = seconds

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


def call(app: Flask, environ: dict[str, Any], status: int | None = None) -> Answer:
    """Call the app and read the whole response.

    :param status: the expected status; None: any.
    :raises AssertionError: if the status differs.
    """
    head: list[Any] = []

    def start_response(status_line: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
        head[:] = [status_line, headers]
        return None

    began = time.perf_counter()
    pieces = app(environ, start_response)
    body = b"".join(pieces)
    pieces.close()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - began
    answer = Answer(int(head[0][:3]), head[1], body, seconds)
    if status is not None and answer.status != status:
        raise AssertionError(
            f"{environ['REQUEST_METHOD']} {environ['RAW_URI']}: {head[0]}: {body[:500]!r}"
        )
    return answer


class Times:
    """Measured times of one kind of call."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @property
    def median_us(self) -> float:
        """The median in microseconds."""
        return median(self.seconds) * 1e6

    @property
    def p95_us(self) -> float:
        """The 95th percentile in microseconds."""
        ordered = sorted(self.seconds)
        return ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)] * 1e6
