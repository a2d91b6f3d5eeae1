"""Apply conditions and sort orders in memory, and create LIKE patterns for SQL."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from ..task import AsyncRouteTask
from .model import ASCII_LOWER, ORDER, Condition, Operator, Position, Sort

ESCAPE = "!"


def sql_like(text: str) -> str:
    """Convert a LIKE pattern of a client (with ``*`` and ``?``) to a pattern for SQL's LIKE.

    The escape character is :data:`ESCAPE`. The letters A–Z become lower case, so apply ``lower()``
    to the column too. In PostgreSQL, ``lower()`` needs ``COLLATE "C"`` to convert only A–Z.
    """
    escaped = re.sub(r"([%_!])", r"!\1", text.translate(ASCII_LOWER))
    return re.sub(r"\*+", "%", f"*{escaped}*").replace("?", "_")


def is_like(text: str, pattern: str) -> bool:
    folded, start = text.translate(ASCII_LOWER), 0
    for finder in _regular_expressions(pattern):
        # The first match leaves the most text for the next part, so others are not tried.
        found = finder.search(folded, start)
        if found is None:
            return False
        start = found.end()
    return True


@lru_cache(maxsize=256)
def _regular_expressions(pattern: str) -> list[re.Pattern[str]]:
    # There is one for each part of the pattern between "*". They have no quantifiers, so a search
    # does not backtrack.
    # The expressions have no quantifiers, so a search does not backtrack.
    parts = filter(None, pattern.translate(ASCII_LOWER).split("*"))
    return [re.compile(".".join(map(re.escape, part.split("?"))), re.DOTALL) for part in parts]


_COMPARE: dict[Operator, Callable[[Any, Any], bool]] = {
    **{one: getattr(operator, one.lower()) for one in ORDER},
    Operator.LIKE: is_like,
    Operator.NOTLIKE: lambda text, pattern: not is_like(text, pattern),
}


def matches(task: AsyncRouteTask, conditions: Iterable[Condition]) -> bool:
    return all(holds(one, getattr(task, one.field.attribute)) for one in conditions)


def holds(condition: Condition, value: Any) -> bool:
    """Check whether a value satisfies a condition. None satisfies no condition."""
    return value is not None and _COMPARE[condition.operator](value, condition.value)


def ordered(tasks: Iterable[AsyncRouteTask], sort: Sort) -> list[AsyncRouteTask]:
    return sorted(
        tasks, key=lambda task: _sort_key(position_of(task, sort), sort), reverse=sort.descending
    )


def position_of(task: AsyncRouteTask, sort: Sort) -> Position:
    return Position(getattr(task, sort.field.attribute), task.created_us, task.id)


def is_after(task: AsyncRouteTask, sort: Sort, position: Position) -> bool:
    key, last = _sort_key(position_of(task, sort), sort), _sort_key(position, sort)
    return key < last if sort.descending else key > last


def _sort_key(position: Position, sort: Sort) -> tuple[bool, int, int, str]:
    missing = position.value is None
    return (missing is not sort.descending, position.value or 0, position.created_us, position.id)
