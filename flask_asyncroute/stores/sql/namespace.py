"""One app's share of a database: its key in all tables and its secret, found or made when the store is opened."""

from __future__ import annotations

import os
import secrets
import threading

from ...errors import ConfigurationError
from . import schema
from .database import Cursor, Database
from .statements import Statements

MAX_KEY = 2**31 - 1


class Namespace:
    """Knows key and secret once it is open. Thread-safe.

    :param may_create: whether missing tables may be made, and older ones upgraded.
    """

    def __init__(self, database: Database, sql: Statements, name: str, may_create: bool) -> None:
        self._database = database
        self._sql = sql
        self._name = name
        self._may_create = may_create
        self._lock = threading.Lock()
        self.key = 0
        self.secret = b""

    def open(self) -> None:
        """Look up key and secret, where that is not done or the database is another by now; else return at once.

        :raises ConfigurationError: where the database can never work as it is.
        """
        if self.key and not self._database.is_replaced():
            return
        with self._lock:
            if self.key and not self._database.is_replaced():
                return
            try:
                self.key, self.secret = self._database.open(self._look, self._make)
            except ConfigurationError as error:
                if not self.key:
                    raise
                # It has worked before, so this is trouble with the store rather than with the app.
                raise self._database.unavailable(error) from error

    def _look(self, cursor: Cursor) -> tuple[int, bytes] | None:
        return self._row(cursor) if schema.is_current(self._database, cursor) else None

    def _make(self, cursor: Cursor) -> tuple[int, bytes]:
        schema.prepare(self._database, cursor, self._may_create)
        row = self._row(cursor)
        if row is None:
            add = self._sql.add_namespace
            # By chance, not counted: a write that was on its way to a file that has been replaced finds no namespace in the
            # new one, where it could else meet another app's.
            key = secrets.randbelow(MAX_KEY) + 1
            cursor.execute(add.sql, add.values(key=key, name=self._name, secret=os.urandom(32)))
            row = self._row(cursor)
            assert row is not None, "it was just added"
        return row

    def _row(self, cursor: Cursor) -> tuple[int, bytes] | None:
        find = self._sql.namespace
        rows = cursor.execute(find.sql, find.values(name=self._name)).fetchall()
        return (rows[0][0], rows[0][1]) if rows else None
