"""Which media type an answer has, and the answer in it. Every answer of the package is made by :func:`render`.

`route` and `http` call it in a request. It reads no request and knows no task: what it needs it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Response
from werkzeug.datastructures import Headers
from werkzeug.http import parse_list_header, parse_options_header

from ..encoding import CONTENT_TYPES, clean_text, encode_json, encode_xml, encode_yaml
from ..errors import NotAcceptable

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

ALIASES: dict[str, tuple[str, ...]] = {
    "application/json": (),
    "application/xml": ("text/xml",),
    "application/yaml": ("text/yaml", "application/x-yaml", "text/x-yaml"),
    "text/event-stream": (),
    "application/problem+json": ("application/json",),
    "application/problem+xml": ("application/xml", "text/xml"),
}
"""Under which other names a client may ask for a type. The answer carries the type's own name."""

NO_STORE = "no-store"
VARY = "Accept, Authorization, Cookie"
"""Of every answer, streams included: it is for whoever asked, and for nobody after."""

_URLS = ("location", "content-location")
_PLAIN_URL = re.compile(r"[A-Za-z0-9_./?=&-]*")
"""In which nothing has to be escaped."""

_WEIGHT = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
"""Wider than RFC 9110: Java's own client sends ``*; q=.2`` where it is not told otherwise."""

_MAX_CACHED = 400
"""Characters of an Accept that is remembered; browsers send about 130."""


def negotiate(accept: str | None, offered: Sequence[str]) -> str:
    """Return the one of ``offered`` that suits the client best (RFC 9110, section 12.5.1).

    The most specific range that names a type decides its quality; an alias counts where the type itself is not named,
    a wildcard where neither is. Among equal qualities a type that is named comes before one that a wildcard lets in,
    then the order of ``offered`` decides. Parameters other than ``q`` are not looked at.

    :param accept: the Accept header; None or empty: the first one offered.
    :param offered: media types, keys of :data:`ALIASES`.
    :raises NotAcceptable: when nothing matches; the detail says what is offered.
    """
    if not accept or accept == "*/*" or accept == offered[0]:
        return offered[0]
    choose = _chosen if len(accept) <= _MAX_CACHED else _choose
    chosen = choose(accept, tuple(offered))
    if chosen is None:
        raise NotAcceptable(f"Nothing here suits Accept {clean_text(accept, 100)!r}; offered: {', '.join(offered)}.")
    return chosen


def render(
    document: Any, media_type: str, root: str, status: int, headers: Iterable[tuple[str, str]] | None = None
) -> Response:
    """Return an answer: the document in its media type, never cached, and the headers that vary it.

    :param document: plain JSON values, or empty bytes for an answer without a body; for JSON they may hold
        :class:`msgspec.Raw`; bytes are a whole document in JSON.
    :param media_type: one that :func:`negotiate` returns.
    :param root: the root element, for XML.
    :param headers: more headers, none of those set here.
    """
    if document == b"":
        body = b""
    elif media_type.endswith("json"):
        body = document if isinstance(document, bytes) else encode_json(document)
    else:
        if isinstance(document, bytes):
            document = msgspec.json.decode(document)
        body = encode_yaml(document) if media_type == "application/yaml" else encode_xml(document, root)
    fields = Headers()
    add = fields.add  # one by one: half the time of a list given to Headers
    add("Content-Type", CONTENT_TYPES[media_type])
    add("Content-Length", str(len(body)))
    add("Cache-Control", NO_STORE)
    add("Vary", VARY)
    for name, value in headers or ():
        add(name, value)
    return _Answer([body], status, fields)


class _Answer(Response):
    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        # Werkzeug copies them here, for a URL that must be made one, and for a length that is missing or must not be sent.
        # Most answers have none of that, and the copy would be an eighth of what a start takes.
        has_length = False
        if self.status_code in (200, 202):
            for name, value in self.headers:
                key = name.lower()
                has_length = has_length or key == "content-length"
                if key in _URLS and not _PLAIN_URL.fullmatch(value):
                    return super().get_wsgi_headers(environ)
        return self.headers if has_length else super().get_wsgi_headers(environ)


def etag_suffix(media_type: str) -> str:
    """Return ``json``, ``xml`` or ``yaml``: what tells the ETags of one revision apart."""
    return media_type.removeprefix("application/").removeprefix("problem+")


def _choose(accept: str, offered: tuple[str, ...]) -> str | None:
    qualities: dict[str, float] = {}
    for item in parse_list_header(accept):
        name, parameters = parse_options_header(item)
        name = name.strip().lower()
        weight = parameters.get("q", "1").strip()
        if not name or _WEIGHT.fullmatch(weight) is None or float(weight) > 1:
            continue  # an empty member; a malformed weight, which says nothing about its range
        if name == "*":
            name = "*/*"
        qualities[name] = max(float(weight), qualities.get(name, 0.0))
    if not qualities:  # an empty list, or nothing in it that can be read: as if none were given
        return offered[0]
    best, chosen = (0.0, 0), None
    for media_type in offered:
        rank = _rank(media_type, qualities)
        if rank > best and rank[0] > 0:
            best, chosen = rank, media_type
    return chosen


_chosen = lru_cache(maxsize=256)(_choose)


def _rank(media_type: str, qualities: dict[str, float]) -> tuple[float, int]:
    """Return the quality of a type, and how exactly the range that gave it named the type."""
    if media_type in qualities:
        return qualities[media_type], 4
    named = [qualities[alias] for alias in ALIASES[media_type] if alias in qualities]
    if named:
        return max(named), 3
    for precision, media_range in ((2, f"{media_type.partition('/')[0]}/*"), (1, "*/*")):
        if media_range in qualities:
            return qualities[media_range], precision
    return 0.0, 0
