"""Computes statistics of a table column value by value, with bounded memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

MISSING = frozenset({"", "na", "n/a", "nan", "none", "null"})
MAX_DISTINCT = 50_000
"""Maximum number of different values that are counted, over all columns."""
MAX_VALUE = 100
"""Values that differ only after this many characters count as one value."""
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
"""The type of a column is the first kind that fits all its values, or text if none fits. Values
with a leading zero or more than 15 digits, such as postcodes, are not numbers.
"""


class Column:
    """The statistics of a column after the values so far.

    :param max_distinct: maximum number of different values that are counted.
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
        """Add one value."""
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
        """Return the statistics that apply to the type of the column."""
        kind = "empty" if not self._count else next(iter(self._kinds), "text")
        summary: dict[str, Any] = {
            "name": self.name,
            "type": kind,
            "count": self._count,
            "missing": self._missing,
        }
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
                "top": [
                    {"value": value, "count": count}
                    for value, count in self._counts.most_common(TOP)
                ],
            }
        return summary

    def _tally(self, text: str) -> None:
        if len(text) > MAX_VALUE:
            # Values with the same beginning count as one value.
            text = text[:MAX_VALUE]
            self._is_exact = False
        if text in self._counts or len(self._counts) < self._max_distinct:
            self._counts[text] += 1
        else:
            self._is_exact = False

    def _measure(self, number: float) -> None:
        """Update mean and variance with Welford's algorithm, which is numerically stable."""
        self._smallest = min(self._smallest, number)
        self._largest = max(self._largest, number)
        delta = number - self._mean
        self._mean += delta / self._count
        self._squares += delta * (number - self._mean)


def _short(number: float) -> float:
    """Round a number to 12 digits to remove floating-point noise."""
    return float(f"{number:.12g}")
