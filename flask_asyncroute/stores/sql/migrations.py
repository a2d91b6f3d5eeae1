"""Create missing tables and the app's namespace. Refuse tables of another schema version.

A namespace is the part of the tables that one app uses.
"""

from __future__ import annotations

import os
import secrets
import threading

from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement

from ...errors import ConfigurationError
from .database import Cursor, Database, logger
from .statements import Statements
from .tables import metadata, schema

# Tables of other versions are refused, because there are no upgrades.
VERSION = 3
"""The schema version of `tables`. Increment it in each release that changes the schema."""


class Namespace:
    """The key and the secret of one namespace, set by :meth:`open`. Thread-safe.

    :param may_create: whether to create missing tables (``ASYNCROUTE_CREATE_TABLES``).
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
        """Read the key and the secret. Create the tables and the namespace if they are missing.

        Further calls do nothing.

        :raises ConfigurationError: if the tables are missing and must not be created, or if they
            have another version.
        """
        if self.key:
            return
        with self._lock:
            if not self.key:
                # Try to read first, because reading also works on a locked or read-only file.
                found = self._database.read(self._find) or self._database.write(self._create)
                self.secret, self.key = found

    def _find(self, cursor: Cursor) -> tuple[bytes, int] | None:
        if not self._database.has_table(cursor, schema.name) or _version(cursor) != VERSION:
            return None
        row = cursor.execute(self._sql.get_namespace, {"name": self._name}).fetchone()
        return None if row is None else (row.secret, row.key)

    def _create(self, cursor: Cursor) -> tuple[bytes, int]:
        self._create_tables(cursor)
        found = self._find(cursor)
        if found is None:
            # Choose a random key, so that a write to a wrong database matches no other app's
            # namespace.
            found = os.urandom(32), secrets.randbelow(2**31 - 1) + 1
            values = {"key": found[1], "name": self._name, "secret": found[0]}
            cursor.execute(self._sql.add_namespace, values)
        return found

    def _create_tables(self, cursor: Cursor) -> None:
        database = self._database
        database.lock_schema(cursor)
        if not database.has_table(cursor, schema.name):
            if not self._may_create:
                raise ConfigurationError(
                    f"{database.label} (ASYNCROUTE_STORE) has no tables of flask_asyncroute, and "
                    "ASYNCROUTE_CREATE_TABLES is False; create the tables with 'flask asyncroute "
                    "init-db' or with a migration from flask_asyncroute.metadata, or set "
                    "ASYNCROUTE_CREATE_TABLES to True."
                )
            for table in metadata.sorted_tables:
                indexes = sorted(table.indexes, key=lambda index: str(index.name))
                clauses: list[DDLElement] = [CreateTable(table), *map(CreateIndex, indexes)]
                for clause in clauses:
                    cursor.execute(str(clause.compile(dialect=database.dialect)))
            logger.info("Created the tables of flask_asyncroute in %s.", database.label)
        version = _version(cursor)
        if version is None:
            # Tables created by a migration of the app have no version yet.
            cursor.execute(f"INSERT INTO asyncroute_schema (version) VALUES ({VERSION})")
        elif version != VERSION:
            raise ConfigurationError(
                f"The tables in {database.label} (ASYNCROUTE_STORE) have version {version}, but "
                f"this release of flask_asyncroute needs version {VERSION}. They cannot be "
                "upgraded: delete the tables and restart the app to create new ones, or set "
                "ASYNCROUTE_STORE to another database."
            )


def _version(cursor: Cursor) -> int | None:
    rows = cursor.execute("SELECT max(version) FROM asyncroute_schema").fetchall()
    return rows[0][0]  # type: ignore[no-any-return]
