"""Encode JSON, decode request bodies, and replace characters that stores cannot hold."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import msgspec

from ..errors import InvalidQuery

MAX_BODY_DEPTH = 64
MAX_BODY_DIGITS = 300  # a longer integer cannot be compared with a float

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# An unterminated string matches to the end of the text. Searching inside it would be slow.
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)
"""Matches strings and brackets in JSON."""

encode_json = msgspec.json.Encoder().encode
"""Encode a document as UTF-8 JSON. The document may contain :class:`msgspec.Raw` values.

Use :func:`~flask_asyncroute.encoding.encode_result` for the return values of views.
"""


def clean_text(text: str, limit: int) -> str:
    """Return the first ``limit`` characters of a text that any store can hold.

    NUL and lone surrogates are replaced by U+FFFD.
    """
    return without_surrogates(text[:limit]).replace("\0", "\ufffd")


def without_surrogates(text: str) -> str:
    """Convert a string to valid Unicode.

    A surrogate pair becomes the character that it stands for. A lone surrogate becomes U+FFFD.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def decode_json(data: bytes, what: str) -> Any:
    """Decode the JSON body of a request strictly: RFC 8259, UTF-8, and no duplicate names.

    :param data: the body. The caller must have limited its size.
    :param what: the subject of error messages, such as ``The query``.
    :raises InvalidQuery: for invalid JSON, nesting over 64 levels, NUL, lone surrogates, numbers
        that are not finite, and integers of over 300 digits.
    """

    def refused(problem: str) -> InvalidQuery:
        return InvalidQuery(f"{what} {problem}.")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise refused(f"has the name {_shown(name)} twice in one object; remove one")
            found[name] = value
        return found

    def whole(digits: str) -> int:
        size = len(digits)
        if size > MAX_BODY_DIGITS:
            raise refused(f"contains an integer of {size} digits; the limit is {MAX_BODY_DIGITS}")
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise refused(f"contains {_shown(digits)}, which is out of range")
        return number

    def constant(name: str) -> NoReturn:
        raise refused(f"contains {name}, which is not JSON")

    def check(value: Any, path: str) -> None:
        if isinstance(value, str) and _UNSTORABLE.search(value):
            raise refused(f"contains a NUL or a lone surrogate in the string at {path}")
        if isinstance(value, list):
            for index, item in enumerate(value):
                check(item, f"{path}[{index}]")
        elif isinstance(value, dict):
            for name, item in value.items():
                if _UNSTORABLE.search(name):
                    found = f"a lone surrogate in the name {_shown(name)} at {path}"
                    raise refused(f"contains a NUL or {found}")
                check(item, f"{path}.{clean_text(name, 40)}")

    if not data.strip():
        raise refused("is empty; send a JSON value")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise refused("begins with a byte order mark; send UTF-8 without one")
    if 0 in data[:4]:
        raise refused("is in UTF-16 or UTF-32; send it in UTF-8")
    if is_deep(data):
        raise refused(f"is nested more than {MAX_BODY_DEPTH} levels deep")
    hooks: dict[str, Any] = {"parse_int": whole, "parse_float": real, "parse_constant": constant}
    try:
        value = json.loads(data.decode(), object_pairs_hook=members, **hooks)
    except UnicodeDecodeError as error:
        at = error.start
        raise refused(f"is not UTF-8: byte 0x{data[at]:02x} at offset {at}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise refused(f"is not JSON: {error.msg} at {where}") from None
    if b"\\u" in data:  # JSON contains NUL and surrogates only as \u escapes
        check(value, "$")
    return value


def is_deep(data: bytes, most: int = MAX_BODY_DEPTH) -> bool:
    """Check whether JSON is nested more than ``most`` levels deep, without parsing it."""
    # The parser is recursive C code. It would crash on a small stack, such as the 128 KiB of
    # threads on Alpine.
    if data.count(b"[") + data.count(b"{") <= most:
        return False
    depth = 0
    for token in _TOKENS.finditer(data):
        if token[0] in (b"[", b"{"):
            depth += 1
            if depth > most:
                return True
        elif token[0] in (b"]", b"}"):
            depth -= 1
    return False


def _shown(text: str) -> str:
    return repr(clean_text(text, 40))
