"""LIKE: a substring in which ``*`` is any text and ``?`` any one character; nothing else is special.

`matching` uses it in memory, the SQL store in its statements; both from the same parts, so that they agree. There is no
way to ask for a literal ``*`` or ``?``. A–Z and a–z are alike, other letters are not folded, as with SQLite's LIKE.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .fields import ASCII_LOWER

ESCAPE = "!"


def like_parts(text: str) -> tuple[str, ...]:
    """Return what must be found one after another, A–Z folded; a ``?`` in it is any one character."""
    return tuple(part for part in text.translate(ASCII_LOWER).split("*") if part)


def sql_like(text: str) -> str:
    """Return the pattern for SQL's LIKE, A–Z folded, with :data:`ESCAPE` as the escape character.

    The column must be folded alike: ``lower()`` does so in SQLite, and in PostgreSQL under ``COLLATE "C"``.
    """
    parts = (re.sub(r"([%_!])", r"!\1", part).replace("?", "_") for part in like_parts(text))
    return "%".join(("", *parts, "")) or "%"


def is_like(text: str, pattern: str) -> bool:
    """Return whether the text holds the pattern. Linear but for the length of the pattern, which the query bounds."""
    folded = text.translate(ASCII_LOWER)
    start = 0
    for finder in _finders(pattern):
        # The first place is the right one: what comes after it has the most text left.
        found = finder.search(folded, start)
        if found is None:
            return False
        start = found.end()
    return True


@lru_cache(maxsize=256)
def _finders(pattern: str) -> tuple[re.Pattern[str], ...]:
    # No quantifier: each search tries each place once, so nothing can blow up.
    return tuple(
        re.compile(".".join(re.escape(literal) for literal in part.split("?")), re.DOTALL)
        for part in like_parts(pattern)
    )
