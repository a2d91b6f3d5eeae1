"""Convert between database rows and task records. Columns have the same names as fields.

Booleans are stored as 0 and 1. An empty ``user`` means no user; see `tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import asdict

from ...task import AsyncRouteTask, State

_FIELDS = AsyncRouteTask.__struct_fields__
_RECORD = slice(-len(_FIELDS), None)
_STATES = {state.value: state for state in State}
_BOOLEANS = ("cancellable", "stopping", "sse_result")

_AT_STATE = _FIELDS.index("state")
_AT_USER = _FIELDS.index("user")
_AT_BOOLEANS = [_FIELDS.index(name) for name in _BOOLEANS]


def columns_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert some fields of a task record to column values."""
    columns = dict(fields)
    if "state" in columns:
        columns["state"] = columns["state"].value
    if "user" in columns:
        columns["user"] = columns["user"] or ""
    for name in _BOOLEANS:
        if name in columns:
            columns[name] = int(columns[name])
    return columns


def row_of(task: AsyncRouteTask) -> dict[str, Any]:
    """Convert a task record to the values of all columns."""
    return columns_of(asdict(task))


def record_of(row: Any) -> AsyncRouteTask:
    """Convert a row to a task record. The last columns must be those of `statements.RECORD`."""
    values = [*row[_RECORD]]
    values[_AT_STATE] = _STATES[values[_AT_STATE]]
    values[_AT_USER] = values[_AT_USER] or None
    for index in _AT_BOOLEANS:
        values[index] = values[index] == 1
    return AsyncRouteTask(*values)
