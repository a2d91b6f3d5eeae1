"""The ``Idempotency-Key`` of a start: whose it is, what it stands for, and what was sent with it.

`dispatcher` makes one in the request; stores keep it as long as the task. It never holds the key as the client sent it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from flask import Request

from .errors import InvalidRequest
from .permissions import Caller

HEADER = "HTTP_IDEMPOTENCY_KEY"
"""Where WSGI has it."""

# A structured-field string (RFC 9651) without spaces, or the same characters bare. Not a comma: servers join a header that
# is given twice with one.
_QUOTED = re.compile(r'"(?:[\x21\x23-\x5b\x5d-\x7e]|\\["\\])+"')
_BARE = re.compile(r"[\x21\x23-\x2b\x2d-\x7e][\x21-\x2b\x2d-\x7e]*")
_ESCAPED = re.compile(r'\\(["\\])')
_MAX_LENGTH = 255


@dataclass(frozen=True, slots=True)
class StartKey:
    """One key of one caller on one route, and the request that it came with.

    :param name: 64 characters; the same for the same caller, route and key.
    :param fingerprint: 64 characters; the same for the same method, URL and body.
    """

    name: str
    fingerprint: str


def key_name(current: Request, caller: Caller | None, secret: bytes) -> str:
    """Return the name under which the key of a request is kept.

    A caller that the app does not know is told apart by the Authorization and the Cookies it sends.

    :param secret: of the namespace, so that nobody who reads the store can try out keys, or credentials.
    :raises InvalidRequest: where it is no key, two, or nobody's.
    """
    key = _key(current.environ[HEADER])
    if caller is not None:
        whose = ["user", caller.id]
    else:
        whose = ["sent", current.environ.get("HTTP_AUTHORIZATION", ""), current.environ.get("HTTP_COOKIE", "")]
        if not any(whose[1:]):
            raise InvalidRequest(
                "Idempotency-Key needs a caller who can be told from others: sign in, or send a Cookie or Authorization. "
                "Or send the request without it."
            )
    return _digest(secret, [*whose, current.endpoint or "", key]).hexdigest()


def fingerprint(current: Request, url: str, pieces: Iterable[bytes], boundary: bytes | None, secret: bytes) -> str:
    """Return what tells one request from another: method, URL with its query as it was sent, and body.

    :param url: absolute, without the query.
    :param pieces: of the body.
    :param boundary: what in the body is random, since it was written anew; None: nothing.
    """
    digest = _digest(secret, [current.method, url, current.environ.get("QUERY_STRING", "")])
    for piece in pieces if boundary is None else _without(pieces, boundary):
        digest.update(piece)
    return digest.hexdigest()


def _key(sent: str) -> str:
    key = sent.strip(" \t")
    if _QUOTED.fullmatch(key):
        key = _ESCAPED.sub(r"\1", key[1:-1])
    elif not _BARE.fullmatch(key):
        key = ""
    if not 0 < len(key) <= _MAX_LENGTH:
        raise InvalidRequest(
            "Idempotency-Key must be given once: 1 to 255 visible ASCII characters, in quotes or without (and then without "
            "a comma)."
        )
    return key


def _digest(secret: bytes, parts: list[str]) -> hmac.HMAC:
    return hmac.new(secret, json.dumps(parts).encode("ascii"), hashlib.sha256)


def _without(pieces: Iterable[bytes], boundary: bytes) -> Iterable[bytes]:
    """Yield the body without a boundary that may lie across two pieces."""
    held = b""
    for piece in pieces:
        held = (held + piece).replace(boundary, b"")
        whole = max(len(held) - len(boundary), 0)
        yield held[:whole]
        held = held[whole:]
    yield held
