"""The three query styles, read into one `Query`; conditions and order on records in memory; the cursor.

Called by `http.operations`, `AsyncRoute.query` and the stores. Pure: it knows neither Flask nor a store.
"""

from __future__ import annotations

from .cursor import open_cursor, seal_cursor
from .fields import FIELDS, Field, Operator, find_field, find_operator
from .matching import holds, is_after, matches, ordered, position_of, sort_key
from .patterns import ESCAPE, like_parts, sql_like
from .styles import parse_get, parse_mapping, parse_post
from .terms import NEWEST_FIRST, Condition, Position, Query, Sort

__all__ = [
    "ESCAPE",
    "FIELDS",
    "NEWEST_FIRST",
    "Condition",
    "Field",
    "Operator",
    "Position",
    "Query",
    "Sort",
    "find_field",
    "find_operator",
    "holds",
    "is_after",
    "like_parts",
    "matches",
    "open_cursor",
    "ordered",
    "parse_get",
    "parse_mapping",
    "parse_post",
    "position_of",
    "seal_cursor",
    "sort_key",
    "sql_like",
]
