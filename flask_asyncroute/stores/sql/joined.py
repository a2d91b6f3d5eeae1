"""Adds tasks in a transaction of the app, on the app's own connection to PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from ...callbacks.model import Delivery
from ...errors import ConfigurationError, IdTaken, StoreUnavailable, UniqueTaken
from ...snapshot import Body
from ...task import AsyncRouteTask
from .database import Cursor, Rows
from .migrations import Namespace
from .rows import record_of, row_of
from .statements import Statements

DRIVERS = ("psycopg", "psycopg2")
"""The drivers whose parameter style is that of the statements."""
LOCK_NOT_AVAILABLE = "55P03"  # SQLSTATE after lock_timeout
LOCKED = "Another transaction is starting a task with the same unique key. Try again."


class ConnectionCursor:
    """Executes statements on an SQLAlchemy Connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Any = (), /) -> Rows:
        return self._connection.exec_driver_sql(sql, parameters)


class JoinedTransaction:
    """See `stores.base.Joined`.

    The transaction of the app delays no other task and no reader. Only another start with the same
    ``unique`` key waits for it.

    :param add_related: adds the rows of a task in other tables; see `SQLTaskStore.add_related`.
    """

    def __init__(
        self,
        connection: Any,
        sql: Statements,
        namespace: Namespace,
        add_related: Callable[..., None],
    ) -> None:
        self._connection = _checked(connection)
        self._sql = sql
        self._ns = namespace.key
        self._add_related = add_related
        with self._savepoint() as cursor:
            found = None
            if cursor.execute("SELECT to_regclass('asyncroute_namespaces')").fetchone()[0]:
                found = cursor.execute(sql.get_secret, {"ns": self._ns}).fetchone()
            if found is None or bytes(found.secret) != namespace.secret:
                raise ConfigurationError(
                    "submit(connection=…): the connection does not use the tables of "
                    "ASYNCROUTE_STORE. Connect it to the same database and schema."
                )

    def add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None,
        grants: Collection[tuple[str, str]], delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        row = row_of(task)
        row.update(ns=self._ns, request=request)
        with self._savepoint() as cursor:
            if task.unique_key is not None:
                if cursor.execute(self._sql.add_key_of_app, row).fetchone() is None:
                    raise UniqueTaken("An unfinished task has this unique key.")
            if cursor.execute(self._sql.add_unpublished_task, row).fetchone() is None:
                raise IdTaken(f"Another task has the id {task.id!r}.")
            self._add_related(cursor, row, body, grants, delivery)
            cursor.execute(self._sql.notify_submitted, {"ns": self._ns})
        if body is not None:
            body.close()

    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        with self._savepoint() as cursor:
            values = {"ns": self._ns, "name": key_name}
            row = cursor.execute(self._sql.get_task_of_key, values).fetchone()
        return None if row is None else (record_of(row), row.fingerprint)

    @contextmanager
    def _savepoint(self) -> Iterator[Cursor]:
        """After an error, roll back only the statements of the block."""
        try:
            with self._connection.begin_nested():
                yield ConnectionCursor(self._connection)
        except DBAPIError as error:
            error.hide_parameters = True  # they contain the request
            if _sqlstate(error) == LOCK_NOT_AVAILABLE:
                raise StoreUnavailable(LOCKED, retry_after=5) from error
            raise


def _checked(connection: Any) -> Connection:
    from sqlalchemy.orm import Session, scoped_session

    given = connection
    if isinstance(connection, scoped_session):  # such as `db.session` of Flask-SQLAlchemy
        connection = connection()
    if isinstance(connection, Session):
        connection = connection.connection()
    if not isinstance(connection, Connection):
        raise TypeError(
            "submit(connection=…) takes an SQLAlchemy Connection or Session, not a "
            f"{type(given).__name__}. For an asynchronous one, call submit() in its run_sync()."
        )
    dialect = connection.dialect
    if dialect.name != "postgresql" or dialect.driver not in DRIVERS:
        raise ConfigurationError(
            f"submit(connection=…): a connection to {dialect.name} with {dialect.driver} is not "
            "supported. Create its engine with a URL that begins with 'postgresql+psycopg://'."
        )
    if getattr(connection.connection.driver_connection, "autocommit", False):
        raise ConfigurationError(
            "submit(connection=…): the connection is in AUTOCOMMIT mode, so it has no transaction. "
            "Use a connection with another isolation level, or call submit() without a connection."
        )
    return connection


def _sqlstate(error: DBAPIError) -> str | None:
    original = error.orig
    return getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
