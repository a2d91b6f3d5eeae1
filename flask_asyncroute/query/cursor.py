"""Create and verify cursors, with which a client requests the next page of a list of tasks.

A cursor contains the position of the previous page's last task. It is valid for one query and one
caller.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec
from itsdangerous import Signer
from itsdangerous.encoding import base64_decode, base64_encode

from ..errors import InvalidQuery
from .model import Position, Query

MAX_CURSOR = 512

_SALT = "flask-asyncroute cursor 2 "  # version: increase it if the content changes


def seal_cursor(position: Position, query: Query, caller_id: str | None, key: bytes) -> str:
    """Create the cursor for the page that follows ``position``.

    The cursor is signed, not encrypted.

    :param query: the signature covers the conditions and the sort order, but not the limit.
    :param key: a secret that all processes share.
    """
    content = msgspec.json.encode((position.value, position.created_us, position.id))
    return _signer(query, caller_id, key).sign(base64_encode(content)).decode()


def open_cursor(cursor: str, query: Query, caller_id: str | None, key: bytes) -> Position:
    """Verify a cursor and return the position in it.

    :raises InvalidQuery: if the cursor was altered, or was created for another query, caller or
        key.
    """
    if not cursor.isascii():
        raise invalid_cursor()
    content = cursor.rpartition(".")[0]
    # Signer.unsign() would ignore characters that are not base64.
    expected = _signer(query, caller_id, key).sign(content).decode()
    if not hmac.compare_digest(expected, cursor):
        raise invalid_cursor()
    return Position(*msgspec.json.decode(base64_decode(content)))


def invalid_cursor() -> InvalidQuery:
    """Create the error for an invalid cursor."""
    # The message does not contain the reason, because the reason would help a forger.
    return InvalidQuery(
        "The cursor was altered, or belongs to another query, sort or caller. Follow the Link of "
        "the previous page unchanged, or start again without a cursor."
    )


def _signer(query: Query, caller_id: str | None, key: bytes) -> Signer:
    conditions = sorted((one.field.name, one.operator.value, one.value) for one in query.conditions)
    # ascii() is unambiguous for these plain values and accepts lone surrogates.
    bound_to = ascii((query.sort.field.name, query.sort.descending, conditions, caller_id))
    return Signer(key, salt=_SALT + bound_to, key_derivation="hmac", digest_method=hashlib.sha256)
