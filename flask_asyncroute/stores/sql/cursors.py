"""A statement on a cursor, with its values by name."""

from __future__ import annotations

from typing import Any

from .database import Cursor, Rows
from .statement import Statement


class TakeBack(Exception):
    """Nothing is to be written after all: raised inside a transaction to have it taken back."""


def run(cursor: Cursor, statement: Statement, **given: Any) -> Rows:
    """Execute a statement."""
    return cursor.execute(statement.sql, statement.values(**given))


def one(cursor: Cursor, statement: Statement, **given: Any) -> Any:
    """Return the only row, or None; all is read, so that the statement is over."""
    rows = cursor.execute(statement.sql, statement.values(**given)).fetchall()
    return rows[0] if rows else None
