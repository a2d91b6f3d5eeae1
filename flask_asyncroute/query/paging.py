"""How a list is cut into pages: the parameters ``limit``, ``sort`` and ``cursor`` as text.

`styles` calls it. Opening a cursor needs the key and the caller, and is done by `cursor`.
"""

from __future__ import annotations

import re

from ..errors import InvalidQuery
from .cursor import MAX_CURSOR, invalid_cursor
from .fields import ASCII_LOWER, SORTABLE, shown
from .terms import MAX_LIMIT, Sort

_DIGITS = re.compile(r"[0-9]+")
_SORTS = {
    f"{sign}{field.name.translate(ASCII_LOWER)}": Sort(field, descending=sign == "-")
    for field in SORTABLE
    for sign in ("", "-")
}


def read_limit(text: str) -> int:
    """Return how many tasks a page has at most: what was asked for, or 500 where that is more.

    :raises InvalidQuery: the text is not a whole number above 0.
    """
    digits = text.lstrip("0") if _DIGITS.fullmatch(text) else ""
    if not digits:
        raise InvalidQuery(f"limit: {shown(text)} will not do; give a whole number from 1 to {MAX_LIMIT}.")
    # Counted before it is converted: int() takes long over thousands of digits, then refuses.
    return MAX_LIMIT if len(digits) > len(str(MAX_LIMIT)) else min(int(digits), MAX_LIMIT)


def read_sort(text: str) -> Sort:
    """Return the order that is asked for, the field in any letter case.

    :raises InvalidQuery: lists cannot be sorted like that.
    """
    sort = _SORTS.get(text.translate(ASCII_LOWER))
    if sort is None:
        names = ", ".join(field.name for field in SORTABLE)
        raise InvalidQuery(f"sort: {shown(text)} will not do; give one of {names}, with - before it for newest first.")
    return sort


def read_cursor(text: str) -> str:
    """Return the cursor, still sealed.

    :raises InvalidQuery: it is empty or too long to be one.
    """
    if not 0 < len(text) <= MAX_CURSOR:
        raise invalid_cursor()
    return text
