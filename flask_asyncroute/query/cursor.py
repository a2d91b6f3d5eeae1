"""The cursor: where a page ended, sealed so that a client can carry it and cannot change it.

`http.operations` seals one for the next page and opens those that come back. It holds for one caller and one query: the
seal covers both, though neither travels in it. Signed, not encrypted: it tells a client nothing that the page did not.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode

from ..errors import InvalidQuery
from .terms import Position, Query

MAX_CURSOR = 512

_VERSION = b"\x01"
_SEAL_SIZE = 16
_PURPOSE = b"flask-asyncroute cursor"
_HEAD = struct.Struct(">?qq")
_BASE64URL = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_CURSOR}}}")


def seal_cursor(position: Position, query: Query, caller_id: str | None, key: bytes) -> str:
    """Return the cursor that leads ``caller_id`` to what comes after ``position`` in the list of ``query``.

    :param query: its conditions and its sort are sealed in; the limit and the cursor that led here are not.
    :param key: secret, the same in all processes that may see the cursor again.
    """
    head = _HEAD.pack(position.value is not None, position.value or 0, position.created_us)
    body = head + position.id.encode()
    return _text(_VERSION + _seal(body, query, caller_id, key) + body)


def open_cursor(cursor: str, query: Query, caller_id: str | None, key: bytes) -> Position:
    """Return the position that was sealed.

    :raises InvalidQuery: the cursor was altered, or is of another caller, query, key or version.
    """
    # Base64 leaves some bits of the last character without a meaning: only the one spelling that we write is taken.
    data = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)) if _is_base64url(cursor) else b""
    seal, body = data[1 : 1 + _SEAL_SIZE], data[1 + _SEAL_SIZE :]
    if (
        data[:1] != _VERSION
        or _text(data) != cursor
        or not hmac.compare_digest(seal, _seal(body, query, caller_id, key))
    ):
        raise invalid_cursor()
    has_value, value, created_us = _HEAD.unpack_from(body)
    return Position(value if has_value else None, created_us, body[_HEAD.size :].decode())


def invalid_cursor() -> InvalidQuery:
    """Return the one refusal of a cursor. Why is not said: that would help only who forges one."""
    return InvalidQuery(
        "The cursor was altered, or belongs to another query, sort or caller. Follow the Link of the page before as it "
        "is, or begin again without a cursor."
    )


def _seal(body: bytes, query: Query, caller_id: str | None, key: bytes) -> bytes:
    conditions = sorted((one.field.name, one.operator.value, one.value) for one in query.conditions)
    # ascii() writes these plain values so that two different ones never look alike, half surrogate pairs included.
    asked = ascii((query.sort.field.name, query.sort.descending, conditions, caller_id)).encode()
    covered = b"".join((_VERSION, hashlib.sha256(asked).digest(), body))
    return hmac.digest(key, _PURPOSE + covered, "sha256")[:_SEAL_SIZE]


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _is_base64url(cursor: str) -> bool:
    return _BASE64URL.fullmatch(cursor) is not None and len(cursor) % 4 != 1
