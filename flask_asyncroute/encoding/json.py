"""JSON documents out, request bodies in, and text that a store can hold.

`http` calls it for every answer and every body of an operation. It never hands on a value that JSON, XML or a database
cannot hold: a NaN, a NUL, half a surrogate pair, a name given twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import msgspec

from ..errors import InvalidQuery

MAX_BODY_DEPTH = 64
MAX_BODY_DIGITS = 300
"""Of one whole number; a longer one could not even be compared with a float."""

REPLACEMENT = "\ufffd"
_UNFIT = re.compile("[\x00\ud800-\udfff]")
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)
"""Strings and brackets. A string without its end is taken up to the end of the input, so that no input is slow."""

_encode = msgspec.json.Encoder().encode


def encode_json(document: Any) -> bytes:
    """Return a document as UTF-8 JSON. It may hold :class:`msgspec.Raw`: JSON that is encoded already.

    For documents of our own, whose text has been through :func:`clean_text`; results of views go through
    :func:`~flask_asyncroute.encoding.encode_result`.
    """
    return _encode(document)


def clean_text(text: str, limit: int) -> str:
    """Return text that every store and format can hold: NUL and lone surrogates become U+FFFD.

    :param limit: characters kept; what is longer is cut.
    """
    return without_surrogates(text[:limit]).replace("\0", REPLACEMENT)


def without_surrogates(text: str) -> str:
    """Return text that UTF-8 can hold: a surrogate pair becomes its character, a lone one U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def decode_json(data: bytes, what: str) -> Any:
    """Return the JSON value of a request body, read strictly (RFC 8259, UTF-8, no name twice in one object).

    :param data: the body; its size has been limited before.
    :param what: what the errors call it, as a noun at the start of a sentence: ``The query``.
    :raises InvalidQuery: for anything that is not one JSON value, or holds what no task holds: nesting over 64 levels,
        NUL and lone surrogates, numbers that are not finite or have over 300 digits. The detail names it.
    """
    text = _text_of(data, what)
    if _is_deep(data):
        raise InvalidQuery(f"{what} is nested more than {MAX_BODY_DEPTH} levels deep.")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = _first_repeated(name for name, _ in pairs)
            raise InvalidQuery(f"{what} gives the name {_shown(twice)} twice in one object; give it once.")
        return found

    def whole(digits: str) -> int:
        if len(digits) > MAX_BODY_DIGITS:
            raise InvalidQuery(f"{what} holds a number of {len(digits)} digits; at most {MAX_BODY_DIGITS} are read.")
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise InvalidQuery(f"{what} holds {_shown(digits)}, a number that is out of range.")
        return number

    def constant(name: str) -> NoReturn:
        raise InvalidQuery(f"{what} holds {name}, which is not JSON.")

    try:
        value = json.loads(text, object_pairs_hook=members, parse_int=whole, parse_float=real, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise InvalidQuery(f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    if b"\\u" in data:  # the only way in: a bare NUL is no JSON, a bare surrogate no UTF-8
        _refuse_unfit(value, what, "$")
    return value


def _text_of(data: bytes, what: str) -> str:
    if not data.strip():
        raise InvalidQuery(f"{what} is empty; send a JSON value.")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise InvalidQuery(f"{what} begins with a byte order mark; send plain UTF-8 without one.")
    if 0 in data[:4]:
        raise InvalidQuery(f"{what} is in UTF-16 or UTF-32; send it in UTF-8.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidQuery(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}.") from None


def _is_deep(data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= MAX_BODY_DEPTH:
        return False
    depth = 0
    for token in _TOKENS.finditer(data):
        bracket = token[0]
        if bracket in (b"[", b"{"):
            depth += 1
            if depth > MAX_BODY_DEPTH:
                return True
        elif bracket in (b"]", b"}"):
            depth -= 1
    return False


def _refuse_unfit(value: Any, what: str, path: str) -> None:
    if isinstance(value, str):
        if _UNFIT.search(value):
            raise InvalidQuery(f"{what} holds a NUL or half a surrogate pair in the text at {path}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unfit(item, what, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            if _UNFIT.search(name):
                raise InvalidQuery(f"{what} holds a NUL or half a surrogate pair in the name {_shown(name)} at {path}.")
            _refuse_unfit(item, what, f"{path}.{clean_text(name, 40)}")


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("called without a repeated name")


def _shown(text: str) -> str:
    return repr(clean_text(text, 40))
