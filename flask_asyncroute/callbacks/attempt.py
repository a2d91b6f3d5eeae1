"""One attempt to deliver a callback: one HTTP/1.1 request on a connection of its own, to an address that was checked.

It follows no redirect, asks no proxy and no ``.netrc``, always verifies certificates, decodes nothing, and is over after
15 seconds whatever the receiver does.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http.client import HTTPConnection, HTTPException
from typing import Any

from ..allowed_hosts import AllowedHosts
from ..web_address import WebAddress
from . import guard
from .guard import Address, Inside, NotResolved

ATTEMPT_SECONDS = 15.0
"""For all of an attempt: name server, connection, TLS, request and answer."""
MAX_ANSWER = 64 * 1024
"""Bytes of an answer that are read, header and body together."""
MAX_RETRY_AFTER = 3600.0
MAX_ADDRESSES = 4
"""Of one name, that are tried."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt.

    :param is_sent: the receiver said 2xx.
    :param is_gone: it said 410, and wants no more of it.
    :param status: what it said; None where it did not.
    :param reason: of a failure, for people.
    :param retry_after: seconds that the receiver asked to wait, at most an hour.
    """

    is_sent: bool
    is_gone: bool = False
    status: int | None = None
    reason: str = ""
    retry_after: float = 0.0


class _TooMuch(OSError):
    """The receiver sends more than is read."""


def post(
    address: WebAddress, method: str, headers: Mapping[str, str], body: bytes, is_trusted: bool, allowed: AllowedHosts
) -> Outcome:
    """Send one request and say what became of it. Raises nothing that a receiver or the network can cause.

    :param headers: all but those of the connection: ``Host``, ``Content-Length``, ``Connection``.
    :param is_trusted: see :func:`guard.addresses_of`.
    """
    deadline = time.monotonic() + ATTEMPT_SECONDS
    try:
        ips = guard.addresses_of(address, is_trusted, allowed, ATTEMPT_SECONDS)
        with _connected(address, ips, deadline) as connection:
            return _exchange(_Stream(connection, deadline), address, method, headers, body)
    except (Inside, NotResolved) as error:
        return Outcome(False, reason=str(error))
    except TimeoutError:
        return Outcome(False, reason=f"no answer within {ATTEMPT_SECONDS:.0f} s")
    except ssl.SSLError as error:
        return Outcome(False, reason=f"no TLS: {error.reason or error}")
    except _TooMuch:
        return Outcome(False, reason=f"the header of the answer has over {MAX_ANSWER} bytes")
    except OSError as error:
        return Outcome(False, reason=f"no connection: {error.strerror or type(error).__name__}")
    except (HTTPException, ValueError) as error:
        return Outcome(False, reason=f"no HTTP: {type(error).__name__}")


def connect(ip: Address, port: int, seconds: float) -> socket.socket:
    """Open a connection to exactly this address."""
    found = socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        found.settimeout(seconds)
        found.connect((str(ip), port))
        return found
    except BaseException:
        found.close()
        raise


@cache
def tls_context() -> ssl.SSLContext:
    """Return what verifies servers: by the system's authorities, or those that ``SSL_CERT_FILE`` names."""
    return ssl.create_default_context()


def _connected(address: WebAddress, ips: list[Address], deadline: float) -> socket.socket:
    """Return a connection to one of these addresses; the next is tried where one does not answer."""
    ips = ips[:MAX_ADDRESSES]
    for number, ip in enumerate(ips, 1):
        try:
            connection = connect(ip, address.port, _left(deadline) / (len(ips) - number + 1))
            break
        except OSError:
            if number == len(ips):
                raise
    try:
        if address.scheme == "http":
            return connection
        connection.settimeout(_left(deadline))
        # The name is what the certificate must have, and what is asked for; the address is only where.
        return tls_context().wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise


def _exchange(stream: _Stream, address: WebAddress, method: str, headers: Mapping[str, str], body: bytes) -> Outcome:
    request = HTTPConnection(address.host, address.port)
    request.auto_open = 0
    request.sock = stream
    request.putrequest(method, address.target, skip_host=True, skip_accept_encoding=True)
    given = {"Host": address.authority, **headers, "Content-Length": str(len(body)), "Connection": "close"}
    for name, value in given.items():
        request.putheader(name, value.encode())
    request.endheaders(body)
    answer = request.getresponse()
    try:
        answer.read(MAX_ANSWER)
    except (OSError, HTTPException):
        pass  # What it says beyond its status is nobody's affair.
    status = answer.status
    if 200 <= status < 300:
        return Outcome(True, status=status)
    reason = f"status {status}" + (", and redirects are not followed" if 300 <= status < 400 else "")
    wanted = retry_after(answer.headers.get("Retry-After"), datetime.now(UTC))
    return Outcome(False, status == 410, status, reason, wanted)


class _Stream(io.RawIOBase):
    """A connection as `http.client` uses it: each use of it ends at the deadline, and no more than 64 KiB are read."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._room = MAX_ANSWER

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(_left(self._deadline))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        """`http.client` closes its connection before the answer is read, which goes on with the file; here both are one."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._room == 0:
            raise _TooMuch
        self._connection.settimeout(_left(self._deadline))
        size = self._connection.recv_into(memoryview(buffer)[: self._room])
        self._room -= size
        return size


def retry_after(text: str | None, now: datetime) -> float:
    """Return in how many seconds to try again, 0 to 3,600, as ``Retry-After`` says (RFC 9110, section 10.2.3)."""
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER)
    try:
        at = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return min(max((at - now).total_seconds(), 0.0), MAX_RETRY_AFTER)


def _left(deadline: float) -> float:
    """Return how many seconds are left.

    :raises TimeoutError: where there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
