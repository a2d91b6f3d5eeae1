"""The tables as they are in a database: made at first use, brought up to date, or refused.

`store` calls it when it opens. Several processes may do so at once; one of them works, under the schema's lock.
"""

from __future__ import annotations

from sqlalchemy.schema import CreateIndex, CreateTable

from ...errors import ConfigurationError
from .database import Cursor, Database, logger
from .tables import metadata, schema
from .upgrades import VERSION, steps


def is_current(database: Database, cursor: Cursor) -> bool:
    """Return whether there are tables, of this release's version. Only reads."""
    if not database.has_table(cursor, schema.name):
        return False
    return cursor.execute("SELECT max(version) FROM asyncroute_schema").fetchall()[0][0] == VERSION  # type: ignore[no-any-return]


def prepare(database: Database, cursor: Cursor, may_create: bool) -> None:
    """Bring the tables to this release's version. Inside a transaction that writes.

    :param may_create: ``ASYNCROUTE_CREATE_TABLES``: whether missing tables may be made and older ones changed.
    :raises ConfigurationError: where that is not allowed, or the tables belong to a newer release.
    """
    database.lock_schema(cursor)
    if not database.has_table(cursor, schema.name):
        if not may_create:
            raise ConfigurationError(
                f"{database.label} (ASYNCROUTE_STORE) has no tables of flask_asyncroute and ASYNCROUTE_CREATE_TABLES "
                "is False; make them by a migration from flask_asyncroute.metadata, or set it True."
            )
        for statement in definitions(database):
            cursor.execute(statement)
        _note(cursor, VERSION)
        logger.info("Made the tables of flask_asyncroute in %s.", database.label)
        return
    row = cursor.execute("SELECT max(version) FROM asyncroute_schema").fetchone()
    version = row[0]
    if version is None:
        # A migration of the app made them; it makes tables and no rows.
        _note(cursor, VERSION)
        return
    if version > VERSION:
        raise ConfigurationError(
            f"The tables in {database.label} (ASYNCROUTE_STORE) are of version {version}, which is newer than the version "
            f"{VERSION} of this flask_asyncroute. Install the release that made them, or give a new ASYNCROUTE_STORE."
        )
    if version < VERSION and not may_create:
        raise ConfigurationError(
            f"The tables in {database.label} (ASYNCROUTE_STORE) are of version {version}, and this flask_asyncroute works with "
            f"version {VERSION}. Upgrade them by a migration and set the version in asyncroute_schema, or set "
            "ASYNCROUTE_CREATE_TABLES to True."
        )
    for step in range(version + 1, VERSION + 1):
        for statement in steps(step, database.dialect.name):
            cursor.execute(statement)
        _note(cursor, step)
        logger.info("Upgraded the tables of flask_asyncroute in %s to version %s.", database.label, step)


def definitions(database: Database) -> list[str]:
    """Return the statements that make all tables and indexes."""
    made = []
    for table in metadata.sorted_tables:
        made.append(str(CreateTable(table).compile(dialect=database.dialect)))
        made += [
            str(CreateIndex(index).compile(dialect=database.dialect))
            for index in sorted(table.indexes, key=lambda index: str(index.name))
        ]
    return made


def _note(cursor: Cursor, version: int) -> None:
    cursor.execute("DELETE FROM asyncroute_schema")
    cursor.execute(f"INSERT INTO asyncroute_schema (version) VALUES ({version:d})")
