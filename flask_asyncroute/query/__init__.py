"""Parse and apply the conditions and the sort order of requests that list tasks."""

from __future__ import annotations

from .cursor import open_cursor, seal_cursor
from .matching import ESCAPE, is_after, matches, ordered, position_of, sql_like
from .model import FIELDS, NEWEST_FIRST, Condition, Operator, Position, Query, Sort
from .parsing import parse_get, parse_mapping, parse_post, parse_python

__all__ = ["FIELDS", "NEWEST_FIRST", "Condition", "Operator", "Position", "Query", "Sort"]
__all__ += ["ESCAPE", "is_after", "matches", "ordered", "position_of", "sql_like"]
__all__ += ["open_cursor", "parse_get", "parse_mapping", "parse_post", "parse_python"]
__all__ += ["seal_cursor"]
