"""Statistics over one column of a table, value by value, in memory that does not grow with the file."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

MISSING = frozenset({"", "na", "n/a", "nan", "none", "null"})
MAX_DISTINCT = 50_000
"""Different values that are counted, over all columns."""
MAX_VALUE = 100
"""Characters of a value that are told apart."""
TOP = 5

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,14})")
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]{0,14})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_DATE = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])")
_BOOLEANS = frozenset({"true", "false", "yes", "no"})

KINDS: dict[str, Callable[[str], object]] = {
    "boolean": lambda text: text.lower() in _BOOLEANS,
    "integer": _INTEGER.fullmatch,
    "number": lambda text: _NUMBER.fullmatch(text) and math.isfinite(float(text)),
    "date": _DATE.fullmatch,
}
"""From the narrowest on. What begins with a zero or has more than 15 digits is no number but a name: a postcode, an
article number. A column is of the first kind that all its values are of, else text."""


class Column:
    """What is known of a column after the values so far.

    :param max_distinct: how many different values are counted one by one.
    """

    def __init__(self, name: str, max_distinct: int) -> None:
        self.name = name
        self._max_distinct = max_distinct
        self._count = 0
        self._missing = 0
        self._kinds = dict(KINDS)
        self._counts: Counter[str] = Counter()
        self._is_exact = True
        self._first = self._last = ""
        self._smallest = math.inf
        self._largest = -math.inf
        self._mean = 0.0
        self._squares = 0.0

    def add(self, value: str) -> None:
        """Take one more value."""
        text = value.strip()
        if text.lower() in MISSING:
            self._missing += 1
            return
        self._count += 1
        self._tally(text)
        for kind in [kind for kind, fits in self._kinds.items() if not fits(text)]:
            del self._kinds[kind]
        if "number" in self._kinds:
            self._measure(float(text))
        elif "date" in self._kinds:
            self._first = min(self._first or text, text)
            self._last = max(self._last, text)

    def summary(self) -> dict[str, Any]:
        """Return the statistics, those that go with the kind of the column."""
        kind = "empty" if not self._count else next(iter(self._kinds), "text")
        summary: dict[str, Any] = {"name": self.name, "type": kind, "count": self._count, "missing": self._missing}
        if kind in ("integer", "number"):
            whole = int if kind == "integer" else float
            stdev = math.sqrt(self._squares / (self._count - 1)) if self._count > 1 else None
            summary |= {
                "min": whole(self._smallest),
                "max": whole(self._largest),
                "mean": _short(self._mean),
                "stdev": None if stdev is None else _short(stdev),
            }
        elif kind == "date":
            summary |= {"min": self._first, "max": self._last}
        if kind in ("text", "boolean", "date"):
            summary |= {
                "distinct": len(self._counts),
                "distinct_is_exact": self._is_exact,
                "top": [{"value": value, "count": count} for value, count in self._counts.most_common(TOP)],
            }
        return summary

    def _tally(self, text: str) -> None:
        if len(text) > MAX_VALUE:
            # Two that begin alike are counted as one.
            text = text[:MAX_VALUE]
            self._is_exact = False
        if text in self._counts or len(self._counts) < self._max_distinct:
            self._counts[text] += 1
        else:
            self._is_exact = False

    def _measure(self, number: float) -> None:
        """Take a number into mean and variance (Welford, 1962), which stays exact where sums of squares do not."""
        self._smallest = min(self._smallest, number)
        self._largest = max(self._largest, number)
        delta = number - self._mean
        self._mean += delta / self._count
        self._squares += delta * (number - self._mean)


def _short(number: float) -> float:
    """Return a number without the digits that floating point made up."""
    return float(f"{number:.12g}")
