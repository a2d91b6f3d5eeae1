"""A database behind an SQLAlchemy Engine: PostgreSQL through psycopg 3, the app's own Engine included.

The engine's pool lends the connections; statements go to the driver as text. A single statement is a transaction by itself
(AUTOCOMMIT); others are READ COMMITTED, so that a compare-and-set that had to wait looks again. No connection is tried out
before it is used: one that turns out to be lost takes all others of the pool along, and what it was wanted for is done again,
but for a commit that may have happened, of which `store` finds out.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from ..base import Listener
from .database import Cursor, Database, Duplicate, Rows, logger

T = TypeVar("T")

SCHEMA_LOCK = 0x6173796E63
"""Key of the advisory lock under which tables are made."""
TRIES = 3
CLOSE_SECONDS = 1.0
_AGAIN = ("40001", "40P01")
"""SQLSTATE of what has not happened and may be tried again: serialization failure, deadlock."""


class _Cursor:
    """Executes statements on one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Any = (), /) -> Rows:
        return self._connection.exec_driver_sql(sql, tuple(parameters))


class EngineDatabase(Database):
    """Works on connections of an engine. Thread-safe, as engines are; not to be used across a fork.

    :param engine: for PostgreSQL with psycopg.
    :param is_owned: whether the engine belongs to this object, which then closes it.
    """

    def __init__(self, engine: Engine, is_owned: bool) -> None:
        make_dialect: Any = type(engine.dialect)
        self.dialect = make_dialect(paramstyle="format")
        self.label = engine.url.render_as_string(hide_password=True)
        user = os.geteuid() if hasattr(os, "geteuid") else "user"
        self.lock_path = Path(tempfile.gettempdir()) / f"flask-asyncroute-{user}-workers"
        self._engine = engine
        self._is_owned = is_owned
        self._apart: Connection | None = None
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._several = engine.execution_options(isolation_level="READ COMMITTED")
        self._snapshot = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    def fetch_one(self, sql: str, values: Sequence[Any]) -> Any:
        return self._read_again(self._single, lambda cursor: cursor.execute(sql, values).fetchone())

    def fetch_all(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        return self._read_again(self._single, lambda cursor: cursor.execute(sql, values).fetchall())

    def write_one(self, sql: str, values: Sequence[Any]) -> Any:
        for tries_left in reversed(range(TRIES)):
            is_under_way = False
            try:
                with self._single.connect() as connection:
                    is_under_way = True
                    rows = connection.exec_driver_sql(sql, tuple(values))
                    return rows.fetchone() if rows.returns_rows else None
            except IntegrityError as error:
                raise Duplicate from error
            except SQLAlchemyError as error:
                if tries_left and (_may_be_tried_again(error) or (_is_lost(error) and not is_under_way)):
                    continue
                raise (self.unknown(error) if is_under_way and _is_lost(error) else self.unavailable(error)) from error
        raise AssertionError("the last try returns or raises")

    def write_apart(self, sql: str, values: Sequence[Any]) -> int:
        for tries_left in reversed(range(TRIES)):
            try:
                if self._apart is None:
                    self._apart = self._single.connect()
                    # Out of the pool, so that it is there even when all others are lent out.
                    self._apart.detach()
                return self._apart.exec_driver_sql(sql, tuple(values)).rowcount
            except SQLAlchemyError as error:
                self._close_apart()
                if not tries_left or not _is_lost(error):
                    raise self.unavailable(error) from error
        raise AssertionError("the last try returns or raises")

    def open(self, look: Callable[[Cursor], T | None], make: Callable[[Cursor], T]) -> T:
        found = self.read(look)
        return self.write(make) if found is None else found

    def is_replaced(self) -> bool:
        """Where the server is, is its own affair."""
        return False

    def write(self, work: Callable[[Cursor], T]) -> T:
        for tries_left in reversed(range(TRIES)):
            is_committing = False
            try:
                with self._several.connect() as connection, connection.begin() as transaction:
                    done = work(_Cursor(connection))
                    is_committing = True
                    transaction.commit()
                    return done
            except IntegrityError as error:
                raise Duplicate from error
            except SQLAlchemyError as error:
                if tries_left and (_may_be_tried_again(error) or (_is_lost(error) and not is_committing)):
                    continue
                raise (self.unknown(error) if is_committing and _is_lost(error) else self.unavailable(error)) from error
        raise AssertionError("the last try returns or raises")

    def read(self, work: Callable[[Cursor], T]) -> T:
        return self._read_again(self._snapshot, work)

    def version(self) -> None:
        return None

    def listen(self, channel: str, payload: str, heard: Callable[[], None]) -> Listener:
        from .listening import PostgreSQLListener

        return PostgreSQLListener(self._single, channel, payload, heard)

    def lock_schema(self, cursor: Cursor) -> None:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))

    def has_table(self, cursor: Cursor, name: str) -> bool:
        # Not to_regclass(): after waiting for the lock above it may still answer from what the server had remembered before.
        found = cursor.execute(
            "SELECT 1 FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace "
            "WHERE c.relname = %s AND n.nspname = ANY (current_schemas(false))",
            (name,),
        )
        return found.fetchone() is not None

    def tend(self) -> None:
        """PostgreSQL sees to itself."""

    def close(self) -> None:
        self._close_apart()
        if not self._is_owned:
            return
        # What is lent out when a pool is disposed of is left to the garbage collector; a statement takes no longer than this.
        pool = self._engine.pool
        deadline = time.monotonic() + CLOSE_SECONDS
        while isinstance(pool, QueuePool) and pool.checkedout() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._engine.dispose()

    def _close_apart(self) -> None:
        apart, self._apart = self._apart, None
        if apart is not None:
            try:
                apart.close()
            except SQLAlchemyError:
                logger.debug("A connection that was lost could not be closed.", exc_info=True)

    def forget(self) -> None:
        # Two processes that speak on one socket break both. The app's engine is this process's too, so it gets a new pool;
        # the connections of the old one are neither used nor closed.
        if not self._is_owned:
            self._engine.dispose(close=False)

    def remedy(self, error: BaseException) -> str:
        return "See whether the database server runs, and its log."

    def _log(self, error: BaseException) -> None:
        # What SQLAlchemy says of an error holds the statement's values, which are not the log's affair.
        super()._log(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)

    def _read_again(self, engine: Engine, read: Callable[[Cursor], T]) -> T:
        for tries_left in reversed(range(TRIES)):
            try:
                with engine.connect() as connection:
                    return read(_Cursor(connection))
            except SQLAlchemyError as error:
                if not tries_left or not _is_lost(error):
                    raise self.unavailable(error) from error
        raise AssertionError("the last try returns or raises")


def _is_lost(error: SQLAlchemyError) -> bool:
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _may_be_tried_again(error: SQLAlchemyError) -> bool:
    """Return whether the server says that it has done nothing, and that another try may have more luck."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _AGAIN
