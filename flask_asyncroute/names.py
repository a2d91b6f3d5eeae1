"""Names of people, roles, routes and pools: text that every store and format can hold, and that compares exactly.

`permissions` and `checks` ask for what a developer writes, `identity` for what a request brings. Nothing is changed to fit.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, TypeGuard

MAX_NAME = 255
"""Characters of the longest name."""

_UNFIT = re.compile("[\0\ud800-\udfff]")


def can_be_stored(text: str) -> bool:
    """Return whether every store can hold a text: no NUL (PostgreSQL) and no half of a surrogate pair (UTF-8)."""
    return _UNFIT.search(text) is None


def is_name(value: object) -> TypeGuard[str]:
    """Return whether a value is a text of 1 to 255 characters that every store can hold."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and can_be_stored(value)


def plain(text: str) -> str:
    """Return a text as exactly a :class:`str`: encoders and databases refuse its kinds. A member of an Enum is its value."""
    return text if type(text) is str else str.__str__(text)


def name_of(value: Any) -> str:
    """Return the text by which a value is compared: itself, the value of an Enum's member, else what :class:`str` makes of it.

    :raises ValueError: for None, bytes and booleans, whose texts are nobody's names.
    """
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Enum):
        return name_of(value.value)
    if value is None or isinstance(value, (bytes, bytearray, bool)):
        raise ValueError(f"{type(value).__name__} is no name")
    return str(value)
