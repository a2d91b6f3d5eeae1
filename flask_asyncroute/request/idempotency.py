"""Hash an ``Idempotency-Key``; fingerprint the request, to detect another request with the key."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable

from flask import Request

from ..errors import InvalidRequest
from ..permissions import Caller

HEADER = "HTTP_IDEMPOTENCY_KEY"  # in the WSGI environ

# A structured-field string (RFC 9651) without spaces, or the same without quotes. Servers join
# repeated headers with a comma, so an unquoted comma is refused.
_QUOTED = re.compile(r'"(?:[\x21\x23-\x5b\x5d-\x7e]|\\["\\])+"')
_BARE = re.compile(r"[\x21\x23-\x2b\x2d-\x7e][\x21-\x2b\x2d-\x7e]*")
_ESCAPED = re.compile(r'\\(["\\])')
_MAX_LENGTH = 255
_RANDOM_LENGTH = 22
"""Minimum length of a key without credentials: that of 128 random bits in base64."""


def key_name(current: Request, caller: Caller | None, secret: bytes) -> str:
    """Return the hash under which a request's idempotency key is stored.

    Unknown callers are distinguished by their credentials. Without credentials, the key itself
    identifies the caller, so it must have at least 22 characters. The namespace's ``secret``
    prevents readers of the store from guessing keys or credentials.

    :raises InvalidRequest: if the key is malformed or sent twice, or too short for an unknown
        caller without credentials.
    """
    key = _key(current.environ[HEADER])
    if caller is not None:
        scope = ["user", caller.id]
    else:
        credentials = _credentials(current)
        if credentials:
            scope = ["sent", *credentials]
        elif len(key) >= _RANDOM_LENGTH:
            scope = ["key"]
        else:
            raise InvalidRequest(
                "Idempotency-Key is too short for a request without credentials; use a random key "
                f"of at least {_RANDOM_LENGTH} characters, such as a UUID. To use a shorter key, "
                "sign in, or send a Cookie or Authorization header."
            )
    # The first item differs between users, credentials and neither, so their keys never match.
    return _digest(secret, [*scope, current.endpoint or "", key]).hexdigest()


def unique_name(
    current: Request, endpoint: str, caller: Caller | None, key: str, secret: bytes
) -> str:
    """Return the hash under which a task's ``unique`` key is stored.

    All callers that the app has identified share the keys of a route, and so do callers without
    credentials. A caller whose credentials the app could not identify has its own keys, so that
    such callers do not learn the ids of each other's tasks.
    """
    scope = [] if caller is not None else _credentials(current)
    return _digest(secret, ["unique", *scope, endpoint, key]).hexdigest()


def has_credentials(current: Request) -> bool:
    """Return whether a request contains an Authorization or Cookie header."""
    return bool(_credentials(current))


def _credentials(current: Request) -> list[str]:
    values = [current.environ.get(f"HTTP_{name}", "") for name in ("AUTHORIZATION", "COOKIE")]
    return values if any(values) else []


def fingerprint(
    current: Request, url: str, pieces: Iterable[bytes], boundary: bytes | None, secret: bytes
) -> str:
    """Return a digest of the method, the URL with its raw query, and the body without the multipart
    ``boundary``.
    """
    digest = _digest(secret, [current.method, url, current.environ.get("QUERY_STRING", "")])
    for piece in _without(pieces, boundary) if boundary else pieces:
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
            "Idempotency-Key is invalid; send it once, with 1 to 255 visible ASCII characters. "
            "Quote a key that contains a comma."
        )
    return key


def _digest(secret: bytes, parts: list[str]) -> hmac.HMAC:
    return hmac.new(secret, json.dumps(parts).encode("ascii"), hashlib.sha256)


def _without(pieces: Iterable[bytes], boundary: bytes) -> Iterable[bytes]:
    """Yield the pieces without the boundary, which can span two pieces."""
    rest = b""
    for piece in pieces:
        rest = (rest + piece).replace(boundary, b"")
        whole = max(len(rest) - len(boundary), 0)
        yield rest[:whole]
        rest = rest[whole:]
    yield rest
