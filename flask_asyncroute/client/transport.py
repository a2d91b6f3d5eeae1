"""HTTP requests to one origin, with limits of time and size. Follows no redirects.

A server that sends endless headers, one byte a minute, or a gigabyte costs a bounded amount of time
and memory.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import rewind_body

from .connections import REDIRECT, Adapter, Deadline, current
from .errors import (
    OF_STATUS,
    OF_TYPE,
    TRANSIENT,
    ClientError,
    InvalidResponseError,
    RefusedError,
    UnreachableError,
)
from .sse import ServerEvent, SseParser

STREAM_SILENCE = 30.0
"""Seconds without data after which a stream is broken. Servers send a heartbeat every 10 s."""
LEAST_PAUSE, FIRST_PAUSE, LONGEST_PAUSE = 0.1, 0.5, 10.0
"""Seconds between attempts. The longest possible pause doubles, unless the server names one. The
actual pause is a random part of it, at least half. Otherwise, clients that have lost the server
together would all come back together.
"""
MAX_TEXT = 2000
"""Characters of a problem's text in an exception."""

_PIECE = 64 * 1024
_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError,
                   http.client.HTTPException)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A response that has been read completely."""

    status: int
    url: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """:raises InvalidResponseError: if the body is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise InvalidResponseError(f"The response of {self.url} is not JSON: {error}") from None

    @property
    def retry_after(self) -> float | None:
        value = self.headers.get("Retry-After", "")
        return float(value) if re.fullmatch("[0-9]{1,9}", value) else None

    def link(self, relation: str) -> str | None:
        """Return the URL of a Link header (RFC 8288), or None."""
        links = requests.utils.parse_header_links(self.headers.get("Link", ""))
        return next((link["url"] for link in links if link.get("rel") == relation), None)


class Transport:
    """Sends the requests of one client. Thread-safe if the session is.

    :param timeout: seconds for a whole response, for a connection, and for each piece that is sent.
    :param retry_for: seconds during which a request is repeated.
    :param max_response: bytes.
    """

    def __init__(
        self,
        base_url: str,
        session: requests.Session,
        timeout: float,
        retry_for: float,
        max_response: int,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url: {base_url!r} is invalid; use an http or https URL.")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "base_url: leave out credentials, query and fragment; set credentials on the "
                "session."
            )
        self.base_url = base_url.rstrip("/")
        self.retry_for = retry_for
        self.closed = threading.Event()
        """Set when the client is closed; ends pauses between attempts."""
        prepared = requests.Request("GET", base_url).prepare()
        self._origin = "/".join((prepared.url or "").split("/")[:3]) + "/"
        self._session = session
        self._timeout = timeout
        self._max_response = max_response
        self._pid = os.getpid()
        self._active: set[Deadline] = set()
        adapter = session.get_adapter(self._origin)
        if type(adapter) is HTTPAdapter:
            session.mount(self._origin, Adapter(max_retries=adapter.max_retries))

    def close(self) -> None:
        """Refuse new requests; abort those in progress."""
        self.closed.set()
        for deadline in list(self._active):
            deadline.abort()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        once: bool = False,
        **body: Any,
    ) -> Answer:
        """Send a request; repeat it after network errors and 429, 502, 503 and 504.

        :param url: resolved against the base URL.
        :param once: do not repeat it.
        :param body: ``params``, ``data``, ``json`` and ``files`` of :class:`requests.Request`.
        :raises RefusedError: for any status except 2xx and 304, unless a Link names the task that
            the request has started.
        :raises UnreachableError: if there is no response within ``retry_for``.
        :raises InvalidResponseError: if the response is too large, or the URL is of another origin.
        """
        prepared = self._prepare(method, url, headers, **body)
        give_up_at = time.monotonic() + (0.0 if once else self.retry_for)
        for pause in pauses():
            try:
                return _checked(self._attempt(prepared))
            except TRANSIENT as error:
                after = delay(error, pause)
                is_certain = isinstance(error.__cause__, requests.exceptions.SSLError)
                if is_certain or time.monotonic() + after > give_up_at or not _rewound(prepared):
                    raise
                if self.closed.wait(after):
                    raise
        raise AssertionError("pauses() is endless")

    def stream(self, url: str, last_id: str | None = None) -> Stream:
        """Open a stream of server-sent events. The caller closes it.

        :param last_id: the id of the last event received.
        :raises ClientError: see `request`; there is only one attempt.
        """
        headers = {"Accept": "text/event-stream"}
        if last_id is not None:
            headers["Last-Event-ID"] = last_id
        prepared = self._prepare("GET", url, headers)
        deadline = Deadline(self._timeout)
        response = self._send(prepared, deadline, STREAM_SILENCE)
        try:
            if response.status_code != 200:
                answer = self._read(response, deadline)
                _checked(answer)
                if answer.status != 204:
                    raise InvalidResponseError(f"{url} answered {answer.status}, not with events.")
            elif not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise InvalidResponseError(f"{url} is not a stream of server-sent events.")
            _refuse_encoding(response)
        except BaseException:
            response.close()
            self._active.discard(deadline)
            raise
        finally:
            deadline.cancel()
        return Stream(response, deadline, self._max_response, self._active)

    def resolve(self, target: str, source: str | None = None) -> str:
        """Return an absolute URL.

        :raises InvalidResponseError: if it is of another origin.
        """
        url = self._prepare("GET", target, None, source).url
        assert url is not None
        return url

    def _prepare(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | None,
        source: str | None = None,
        **body: Any,
    ) -> requests.PreparedRequest:
        if os.getpid() != self._pid:
            raise ClientError(
                "This client was created before a fork. Create a client in each process."
            )
        if self.closed.is_set():
            raise ClientError("The client is closed.")
        fields = CaseInsensitiveDict(headers or {})
        # Compressed responses could be a thousand times larger than what is received.
        fields["Accept-Encoding"] = "identity"
        fields.setdefault("Accept", "application/json")
        try:
            url = urljoin(source or f"{self.base_url}/", target)
        except ValueError as error:
            raise InvalidResponseError(f"{target[:200]!r} is not a valid URL: {error}") from None
        request = requests.Request(method, url, headers=fields, **body)
        try:
            prepared = self._session.prepare_request(request)
        except requests.exceptions.InvalidURL as error:
            raise InvalidResponseError(f"{target[:200]!r} is not a valid URL: {error}") from None
        # requests connects to the host of this normalized URL, so no other check is needed.
        if prepared.url is None or not prepared.url.startswith(self._origin):
            raise InvalidResponseError(
                f"The URL {target[:200]!r} is not on {self._origin}; nothing was sent to it."
            )
        return prepared

    def _attempt(self, prepared: requests.PreparedRequest) -> Answer:
        deadline = Deadline(self._timeout)
        try:
            response = self._send(prepared, deadline, self._timeout)
            with response:
                return self._read(response, deadline)
        finally:
            deadline.cancel()
            self._active.discard(deadline)

    def _send(
        self, prepared: requests.PreparedRequest, deadline: Deadline, silence: float
    ) -> requests.Response:
        assert prepared.url is not None
        settings = self._session.merge_environment_settings(prepared.url, {}, True, None, None)
        current.deadline = deadline
        self._active.add(deadline)
        if self.closed.is_set():
            deadline.abort()
        try:
            with _translated(prepared.url, deadline):
                return self._session.send(
                    prepared, allow_redirects=False, timeout=(self._timeout, silence), **settings
                )
        except BaseException:
            deadline.cancel()
            self._active.discard(deadline)
            raise
        finally:
            del current.deadline

    def _read(self, response: requests.Response, deadline: Deadline) -> Answer:
        _refuse_encoding(response)
        body = bytearray()
        with _translated(response.url, deadline):
            while piece := response.raw.read1(_PIECE, decode_content=False):
                body += piece
                if len(body) > self._max_response:
                    raise InvalidResponseError(
                        f"The response of {response.url} is larger than max_response "
                        f"({self._max_response} bytes)."
                    )
            if deadline.is_over:  # the end of the data is that of the socket
                raise OSError
        return Answer(response.status_code, response.url, response.headers, bytes(body))


def _checked(answer: Answer) -> Answer:
    if 200 <= answer.status < 300 or answer.status == 304 or answer.link("status"):
        return answer
    raise refusal(answer)


def refusal(answer: Answer) -> RefusedError:
    """Return the exception for a response with an error status."""
    problem: Any = None
    if "json" in answer.headers.get("Content-Type", ""):
        with suppress(InvalidResponseError):
            problem = answer.json()
    if not isinstance(problem, dict):
        problem = {}
    texts = {
        name: value[:MAX_TEXT]
        for name in ("type", "title", "detail")
        if isinstance(value := problem.get(name), str)
    }
    texts.setdefault("title", http.client.responses.get(answer.status, ""))
    if location := answer.headers.get(REDIRECT):
        texts["detail"] = f"Redirects are not followed; this one leads to {location[:MAX_TEXT]!r}."
    kind = OF_TYPE.get(texts.get("type", "").rpartition(":")[2])
    kind = kind or OF_STATUS.get(answer.status, RefusedError)
    return kind(answer.status, retry_after=answer.retry_after, **texts)


def pauses() -> Iterator[float]:
    """Yield the seconds to wait after each failed attempt."""
    pause = FIRST_PAUSE
    while True:
        yield random.uniform(pause / 2, pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def delay(error: ClientError, pause: float) -> float:
    """Return the Retry-After of a refusal, else ``pause``."""
    after: float | None = getattr(error, "retry_after", None)
    return pause if after is None else max(after, LEAST_PAUSE)


class Stream:
    """An open stream of server-sent events. Only `abort` may be called by another thread."""

    def __init__(
        self,
        response: requests.Response,
        deadline: Deadline,
        max_event: int,
        active: set[Deadline],
    ) -> None:
        self.is_over = response.status_code == 204
        """Whether the task has ended and there are no more events."""
        self.parser = SseParser(max_event)
        self._response = response
        self._deadline = deadline
        self._active = active

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._response.close()
        self._active.discard(self._deadline)

    def abort(self) -> None:
        """End the stream; `pieces` raises UnreachableError."""
        self._deadline.abort()

    def pieces(self) -> Iterator[list[ServerEvent]]:
        """Yield the events of each piece of data; an empty list for a heartbeat.

        :raises UnreachableError: if the connection breaks.
        :raises InvalidResponseError: if an event is too large.
        """
        with _translated(self._response.url, self._deadline):
            while not self.is_over and (
                data := self._response.raw.read1(_PIECE, decode_content=False)
            ):
                yield self.parser.feed(data)
            if self._deadline.is_over:
                raise OSError


@contextmanager
def _translated(url: str, deadline: Deadline) -> Iterator[None]:
    try:
        yield
    except _NETWORK_ERRORS as error:
        if deadline.is_over:
            raise UnreachableError(
                f"{url} sent no complete response within {deadline.seconds:g} s."
            ) from None
        raise UnreachableError(f"The request to {url} failed: {error}") from error


def _refuse_encoding(response: requests.Response) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidResponseError(
            f"The response of {response.url} is compressed ({encoding[:40]!r}); the client accepts "
            "only identity."
        )


def _rewound(prepared: requests.PreparedRequest) -> bool:
    """Prepare the body to be sent again; return whether that is possible."""
    body: Any = prepared.body  # can also be a file or an iterator
    if body is None or isinstance(body, (bytes, str)):
        return True
    try:
        rewind_body(prepared)
    except requests.exceptions.UnrewindableBodyError:
        return False
    return True
