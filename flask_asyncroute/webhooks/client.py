"""Make one attempt to send a callback: one HTTP/1.1 request to a checked IP address.

The client follows no redirects, uses no proxy or ``.netrc``, and always verifies certificates. An
attempt ends after at most 15 seconds.
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

from ..callbacks import ssrf
from ..callbacks.ssrf import Address, AllowedHosts, Inside, NotResolved
from ..callbacks.url import WebAddress

ATTEMPT_SECONDS = 15.0  # for DNS, connection, TLS, request and response together
MAX_RESPONSE = 64 * 1024  # bytes read from a response, including its header
MAX_RETRY_AFTER = 3600.0
MAX_ADDRESSES = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one attempt to send a callback.

    :param is_sent: whether the receiver responded with 2xx.
    :param is_gone: whether the receiver responded with 410. Then the callback is not sent again.
    :param status: the response status; None without a response.
    :param reason: why the attempt failed.
    :param retry_after: the response's ``Retry-After`` in seconds, at most an hour.
    """

    is_sent: bool
    is_gone: bool = False
    status: int | None = None
    reason: str = ""
    retry_after: float = 0.0


class _ResponseTooLarge(OSError):
    """The header of a response exceeds `MAX_RESPONSE` bytes."""


def post(
    address: WebAddress,
    method: str,
    headers: Mapping[str, str],
    body: bytes,
    is_trusted: bool,
    allowed: AllowedHosts,
) -> Outcome:
    """Send one HTTP request. Errors of the receiver or the network are returned, not raised.

    :param headers: without ``Host``, ``Content-Length`` and ``Connection``.
    :param is_trusted: whether the developer, not the client, chose the host.
    :param allowed: hosts that are accepted although they are not public.
    """
    deadline = time.monotonic() + ATTEMPT_SECONDS
    try:
        ips = ssrf.addresses_of(address, is_trusted, allowed, ATTEMPT_SECONDS)
        with _connected(address, ips, deadline) as connection:
            return _exchange(_Stream(connection, deadline), address, method, headers, body)
    except (Inside, NotResolved) as error:
        reason = str(error)
    except TimeoutError:
        reason = f"no response within {ATTEMPT_SECONDS:.0f} s"
    except ssl.SSLError as error:
        reason = f"TLS failed: {error.reason or error}"
    except _ResponseTooLarge:
        reason = f"the response header is larger than {MAX_RESPONSE} bytes"
    except OSError as error:
        reason = f"the connection failed: {error.strerror or type(error).__name__}"
    except (HTTPException, ValueError) as error:
        reason = f"invalid HTTP response: {type(error).__name__}"
    return Outcome(False, reason=reason)


def connect(ip: Address, port: int, seconds: float) -> socket.socket:
    """Open a TCP connection to this address, without DNS or a proxy.

    :param seconds: timeout.
    """
    return socket.create_connection((str(ip), port), seconds)


@cache
def tls_context() -> ssl.SSLContext:
    """Return a TLS context that trusts the authorities of the system or of ``SSL_CERT_FILE``."""
    return ssl.create_default_context()


def _connected(address: WebAddress, ips: list[Address], deadline: float) -> socket.socket:
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
        # The certificate must match the host name, not the address.
        return tls_context().wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise


def _exchange(
    stream: _Stream, address: WebAddress, method: str, headers: Mapping[str, str], body: bytes
) -> Outcome:
    request = HTTPConnection(address.host, address.port)
    request.auto_open = 0
    request.sock = stream
    request.putrequest(method, address.target, skip_host=True, skip_accept_encoding=True)
    fields = {"Host": address.authority, **headers}
    fields |= {"Content-Length": str(len(body)), "Connection": "close"}
    for name, value in fields.items():
        request.putheader(name, value.encode())
    request.endheaders(body)
    response = request.getresponse()
    try:
        response.read(MAX_RESPONSE)
    except (OSError, HTTPException):
        pass  # only the status matters
    status = response.status
    if 200 <= status < 300:
        return Outcome(True, status=status)
    hint = "; redirects are not followed" if 300 <= status < 400 else ""
    seconds = retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
    return Outcome(False, status == 410, status, f"status {status}{hint}", seconds)


class _Stream(io.RawIOBase):
    """A connection for `http.client`, with a deadline. At most 64 KiB can be read."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._remaining = MAX_RESPONSE

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(_left(self._deadline))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        # http.client closes this object before it reads the response.
        pass

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._remaining == 0:
            raise _ResponseTooLarge
        self._connection.settimeout(_left(self._deadline))
        size = self._connection.recv_into(memoryview(buffer)[: self._remaining])
        self._remaining -= size
        return size


def retry_after(text: str | None, now: datetime) -> float:
    """Parse a ``Retry-After`` header (RFC 9110, section 10.2.3).

    :return: seconds, at most 3,600; 0 if the header is missing or invalid.
    """
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
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
