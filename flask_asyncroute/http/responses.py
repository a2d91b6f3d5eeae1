"""Content negotiation, and all responses except event streams."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import msgspec
from flask import Request, Response, current_app, got_request_exception
from werkzeug.datastructures import Headers
from werkzeug.http import parse_list_header, parse_options_header

from ..encoding import CONTENT_TYPES, clean_text, encode_json, encode_xml, encode_yaml
from ..engine.retry_after import RunTimes
from ..errors import CannotStart, NotAcceptable, RequestRefused
from ..task import AsyncRouteTask, now_us

logger = logging.getLogger("flask_asyncroute")

ALIASES: dict[str, tuple[str, ...]] = {
    "application/json": (),
    "application/xml": ("text/xml",),
    "application/yaml": ("text/yaml", "application/x-yaml", "text/x-yaml"),
    "text/event-stream": (),
    "text/html": ("application/xhtml+xml",),
    "application/problem+json": ("application/json",),
    "application/problem+xml": ("application/xml", "text/xml"),
}
"""Other names of each media type in Accept headers."""

HTML = "text/html"
WITH_HTML = ("application/json", HTML, "application/xml", "application/yaml")
"""What a client can prefer where there is a page. Without a preference, it gets JSON."""

_JAVA = {HTML, "image/gif", "image/jpeg", "*/*"}
"""Java's HTTP client accepts these by default, but its programs expect JSON."""

NO_STORE = "no-store"
VARY = "Accept, Authorization, Cookie"
"""The ``Vary`` header of every response, including streams."""

_URLS = ("location", "content-location")
_PLAIN_URL = re.compile(r"[A-Za-z0-9_./?=&-]*")

_WEIGHT = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
"""The value of ``q``, more lenient than RFC 9110: Java's HTTP client sends ``*; q=.2`` by
default.
"""

_MAX_CACHED = 400
"""Maximum length of cached Accept headers. Browsers send about 130 characters."""


def negotiate(accept: str | None, offered: Sequence[str]) -> str:
    """Return the media type of ``offered`` that the client prefers (RFC 9110, section 12.5.1).

    The most specific matching range sets a type's quality: the type itself, then an alias, then a
    wildcard. Of types with equal quality, the more specific match wins, then the first in
    ``offered``. Parameters other than ``q`` are ignored.

    :param accept: the Accept header; None or empty selects the first type.
    :param offered: keys of :data:`ALIASES`.
    :raises NotAcceptable: if no type matches; the error lists the offered types.
    """
    accept = accept or ""
    choose = _chosen if len(accept) <= _MAX_CACHED else _choose
    chosen = choose(accept, tuple(offered))
    if chosen is None:
        raise NotAcceptable(
            f"Accept {clean_text(accept, 100)!r} matches no offered type; use one of: "
            f"{', '.join(offered)}."
        )
    return chosen


def _choose(accept: str, offered: tuple[str, ...]) -> str | None:
    qualities: dict[str, float] = {}
    for item in parse_list_header(accept):
        name, parameters = parse_options_header(item)
        name = name.strip().lower()
        weight = parameters.get("q", "1").strip()
        if not name or _WEIGHT.fullmatch(weight) is None or float(weight) > 1:
            continue  # skip empty members and invalid weights
        if name == "*":
            name = "*/*"
        qualities[name] = max(float(weight), qualities.get(name, 0.0))
    if HTML not in offered and _prefers_html(qualities):
        # A browser also accepts XML, but shows its reader raw text or an empty page.
        return next((name for name in offered if name.endswith("json")), offered[0])
    if not qualities or qualities.keys() == _JAVA:
        return offered[0]
    ranks = {media_type: _rank(media_type, qualities) for media_type in offered}
    best = max(offered, key=ranks.__getitem__)
    return best if ranks[best][0] > 0 else None


def _prefers_html(qualities: dict[str, float]) -> bool:
    """Return whether the client is a browser: it prefers HTML to JSON, XML and YAML."""
    if qualities.keys() == _JAVA or _rank(HTML, qualities)[1] < 3:
        return False
    return max(WITH_HTML, key=lambda media_type: _rank(media_type, qualities)) == HTML


_chosen = lru_cache(maxsize=256)(_choose)


def is_browser(accept: str) -> bool:
    """Return whether an Accept header prefers HTML, as those of browsers do."""
    if "html" not in accept.lower():  # for speed: most clients are programs
        return False
    try:
        return negotiate(accept, WITH_HTML) == HTML
    except NotAcceptable:
        return False


def _rank(media_type: str, qualities: dict[str, float]) -> tuple[float, int]:
    """Return a type's quality, and the specificity of the range that determines this quality."""
    named = [qualities[alias] for alias in ALIASES[media_type] if alias in qualities]
    if media_type in qualities:
        quality = qualities[media_type]
        # Browsers before 2012 prefer XHTML to HTML, and both mean a page.
        return max([quality, *named]) if media_type == HTML else quality, 4
    if named:
        return max(named), 3
    for precision, media_range in ((2, f"{media_type.partition('/')[0]}/*"), (1, "*/*")):
        if media_range in qualities:
            return qualities[media_range], precision
    return 0.0, 0


def render(
    document: Any, media_type: str, root: str, status: int, headers: Iterable[tuple[str, str]] = ()
) -> Response:
    """Return a response with a document, and headers that prevent caching.

    :param document: plain JSON values; for JSON, also :class:`msgspec.Raw`. Bytes are encoded JSON;
        empty bytes mean no body.
    :param media_type: from :func:`negotiate`.
    :param root: the root element for XML.
    """
    if document == b"":
        body = b""
    elif media_type.endswith("json"):
        # The newline puts the prompt on its own line after curl prints the body.
        body = (document if isinstance(document, bytes) else encode_json(document)) + b"\n"
    else:
        if isinstance(document, bytes):
            document = msgspec.json.decode(document)
        is_yaml = media_type == "application/yaml"
        body = encode_yaml(document) if is_yaml else encode_xml(document, root)
    fields = Headers()
    fields.add("Content-Type", CONTENT_TYPES[media_type])
    fields.add("Content-Length", str(len(body)))
    fields.add("Cache-Control", NO_STORE)
    fields.add("Vary", VARY)
    for name, value in headers:
        fields.add(name, value)
    return _Answer([body], status, fields)


class _Answer(Response):
    def get_wsgi_headers(self, environ: dict[str, Any]) -> Headers:
        # Werkzeug copies headers to complete them. Skipping this if they are complete makes starts
        # 11 % and gets 7 % faster.
        has_length = False
        if self.status_code in (200, 202):
            for name, value in self.headers:
                key = name.lower()
                has_length = has_length or key == "content-length"
                if key in _URLS and not _PLAIN_URL.fullmatch(value):
                    return super().get_wsgi_headers(environ)
        return self.headers if has_length else super().get_wsgi_headers(environ)


def task_answer(
    task: AsyncRouteTask,
    run_times: RunTimes,
    media_type: str,
    status: int = 200,
    headers: Sequence[tuple[str, str]] = (),
) -> Response:
    """Return a response with the task object, and Retry-After if the task has not ended."""
    fields = list(headers)
    if not task.state.is_terminal:
        fields.append(("Retry-After", str(run_times.rest(task, now_us()))))
    return render(document_of(task, media_type), media_type, "AsyncRouteTask", status, fields)


def document_of(task: AsyncRouteTask, media_type: str) -> dict[str, Any]:
    """Return the task object for `render`. For JSON, its result stays encoded."""
    return task.to_wire() if media_type == "application/json" else task.to_dict()


def etag_of(task: AsyncRouteTask, media_type: str) -> str:
    """Return the strong ETag of a task in one media type, without quotes."""
    return f"{task.revision}-{media_type.removeprefix('application/')}"


PROBLEM_TYPES = ("application/problem+json", "application/problem+xml", "application/yaml")
"""The media types of problems. IANA has registered none for YAML."""

MAX_DETAIL = 2000
MAX_INSTANCE = 2000

CHALLENGE = 'App realm="sign in as this application asks"'
"""RFC 9110 requires a challenge in each 401 response. The app decides how to sign in, so this
names no registered scheme: ``Basic`` would open a browser dialog, ``Bearer`` would imply tokens.
"""


def refuse(refusal: RequestRefused, current: Request) -> Response:
    """Return the response to a refused request. If the app caused the refusal, log the error and
    send got_request_exception.
    """
    if isinstance(refusal, CannotStart):
        logger.error(
            "A request to endpoint %s was refused because of an error in the app: %s",
            current.endpoint, refusal.__cause__ or refusal, exc_info=refusal,
        )  # fmt: skip
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        try:
            got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=refusal)
        except Exception:
            logger.exception(
                "A receiver of got_request_exception failed for a request to endpoint %s.",
                current.endpoint,
            )
    return problem_response(refusal, current.headers.get("Accept"), current.path)


def problem_response(refusal: RequestRefused, accept: str | None, instance: str) -> Response:
    """Return a response with an RFC 9457 problem.

    Unprintable characters in the detail are escaped, because clients can send them.

    :param accept: the request's Accept header.
    :param instance: the request's decoded path; omitted if over 2,000 characters when encoded.
    """
    try:
        media_type = negotiate(accept, PROBLEM_TYPES)
    except NotAcceptable:
        media_type = PROBLEM_TYPES[0]
    if is_browser(accept or ""):
        media_type = "application/json"  # browsers download the other type
    document = problem_of(refusal, instance)
    headers = []
    if refusal.retry_after is not None:
        headers.append(("Retry-After", str(refusal.retry_after)))
    if refusal.status == 401:
        headers.append(("WWW-Authenticate", CHALLENGE))
    return render(document, media_type, "Problem", refusal.status, headers)


def problem_of(refusal: RequestRefused, instance: str) -> dict[str, Any]:
    """Return the RFC 9457 problem of a refused request; see :func:`problem_response`."""
    detail = _printable(refusal.detail)
    document: dict[str, Any] = {
        "type": f"tag:flask-asyncroute.readthedocs.io,2026:{refusal.slug}",
        "title": refusal.title,
        "status": refusal.status,
        "detail": detail,
    }
    path = quote(instance[: MAX_INSTANCE + 1], safe="/:@!$&'()*+,;=", errors="replace")
    if 0 < len(path) <= MAX_INSTANCE:
        document["instance"] = path
    if refusal.task_id is not None:
        document["Id"] = _printable(refusal.task_id)
    document["Error"] = detail
    return document


def _printable(text: str) -> str:
    """Truncate a text; escape control characters, line breaks and bidirectional controls."""
    text = clean_text(text, MAX_DETAIL)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
