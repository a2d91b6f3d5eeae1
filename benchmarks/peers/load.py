"""The load generator: HTTP requests over raw sockets, so that the client uses little CPU."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from itertools import count

from .app import PATIENCE

CONNECTIONS = 8
"""Connections that start tasks as fast as they are answered."""
RATE_CONNECTIONS = 24
"""Connections that share a fixed rate."""
REUSES = 20
"""Requests per connection. New connections spread over all server processes."""
BODY = json.dumps({"sleep_time": 2, "message": "Hello from a client"}).encode()
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: */*", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


START = request("PUT", "/task", body=BODY)
START_AND_WAIT = request("PUT", "/task", f"Prefer: wait={PATIENCE}", body=BODY)


class Client:
    """One connection at a time. Use it in one thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._uses = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, data: bytes, *statuses: int) -> bytes:
        """Send a request and return the body of the response.

        :raises RuntimeError: if the status is not one of ``statuses``.
        """
        if self._uses >= REUSES:
            self.close()
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), PATIENCE + 10)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._uses = 0
        self._uses += 1
        self._socket.sendall(data)
        head, body = self._receive(self._socket)
        status = int(head[9:12])
        if status not in statuses:
            raise RuntimeError(f"The server responded {head[9:40]!r}: {body[:300]!r}")
        if b"connection: close" in head.lower():
            self.close()
        return body

    def _receive(self, connection: socket.socket) -> tuple[bytes, bytes]:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._some(connection)
        head, _, body = received.partition(b"\r\n\r\n")
        found = LENGTH.search(head)
        length = int(found[1]) if found else 0
        while len(body) < length:
            body += self._some(connection)
        return head, body

    def _some(self, connection: socket.socket) -> bytes:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("The server closed the connection before its response.")
        return data


def flood(port: int, tasks: int) -> None:
    """Start tasks over 8 connections, as fast as they are answered."""
    numbers = count()

    def work(client: Client) -> None:
        while next(numbers) < tasks:
            client.send(START, 200, 202)

    _in_threads(port, CONNECTIONS, work)


def at_rate(port: int, rate: float, seconds: float) -> tuple[list[float], bool]:
    """Start tasks at a fixed rate. Return the latencies, and whether the server kept up.

    A latency begins when the request is due, so it includes the wait for a free connection. If a
    request is late by the given time, the rest is not sent.
    """
    numbers = count()
    latencies: list[float] = []
    began = time.perf_counter()

    def work(client: Client) -> None:
        while (number := next(numbers)) < rate * seconds:
            due = began + number / rate
            early = due - time.perf_counter()
            if early > 0:
                time.sleep(early)
                due = time.perf_counter()  # A late wake-up is not the server's fault.
            elif due < time.perf_counter() - seconds:
                return
            client.send(START, 200, 202)
            latencies.append(time.perf_counter() - due)

    _in_threads(port, RATE_CONNECTIONS, work)
    return latencies, len(latencies) >= int(rate * seconds)


def one_at_a_time(port: int, tasks: int) -> list[float]:
    """Return the time of each task, from its start until the client receives its end."""
    times = []
    with Client(port) as client:
        for _ in range(tasks):
            began = time.perf_counter()
            client.send(START_AND_WAIT, 200)
            times.append(time.perf_counter() - began)
    return times


def wait_for_the_end(port: int, started: int, seconds: float) -> None:
    """Wait until all tasks have ended.

    :raises TimeoutError: after ``seconds``.
    """
    ended = request("GET", f"/ended/{started}")
    began = time.monotonic()
    with Client(port) as client:
        while not json.loads(client.send(ended, 200)):
            waited = time.monotonic() - began
            if waited > seconds:
                raise TimeoutError(f"The tasks have not ended within {seconds:g} s.")
            # Poll rarely, because a poll costs as much CPU as a task.
            time.sleep(max(0.01, waited / 20))


def _in_threads(port: int, threads: int, work: Callable[[Client], None]) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            with Client(port) as client:
                work(client)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
