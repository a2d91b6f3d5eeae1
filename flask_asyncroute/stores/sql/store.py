"""The task store in SQL: every method of the port as one short transaction."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from msgspec.structs import astuple
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from ...errors import ConfigurationError, IdTaken
from ...query import Condition, Position, Sort
from ...snapshot import Body
from ...states import State
from ...task import AsyncRouteTask
from ..base import Claim, Expect, News, Readers, TaskStore
from . import queries
from . import statements as sql
from .sqlite import SQLiteDatabase, logger
from .statements import Statement
from .tables import VERSION, metadata

NEWS_PAGE = 1000
_STATES = {state.value: state for state in State}


class SQLTaskStore(TaskStore):
    """Keeps the tasks of one namespace in an SQLite file, shared by all processes of a machine."""

    is_shared = True

    def __init__(self, database: SQLiteDatabase, namespace: str, create_tables: bool) -> None:
        self._database = database
        self._namespace = namespace
        self._create_tables = create_tables
        self._ns = 0
        self._secret = b""
        self._seen: tuple[int, int] | None = None

    def open(self) -> None:
        if self._ns:
            return
        with self._database.write() as transaction:
            self._make_tables(transaction.cursor)
            row = _one(transaction.cursor, sql.NAMESPACE, name=self._namespace)
            if row is None:
                _run(transaction.cursor, sql.ADD_NAMESPACE, name=self._namespace, secret=os.urandom(32))
                row = _one(transaction.cursor, sql.NAMESPACE, name=self._namespace)
        assert row is not None
        self._ns, self._secret = row

    def close(self) -> None:
        self._database.close()
        self._seen = None

    def add(self, task: AsyncRouteTask, request: bytes, body: Body | None, grants: Collection[tuple[str, str]]) -> None:
        values = sql.ADD.values(ns=self._ns, request=request, **_row(task))
        try:
            if body is None and not grants:
                self._database.write_one(sql.ADD.sql, values)
                return
            with self._database.write() as transaction:
                cursor = transaction.cursor
                cursor.execute(sql.ADD.sql, values)
                for kind, name in set(grants):
                    _run(
                        cursor, sql.ADD_GRANT, namespace=self._ns, task_id=task.id, reader=queries.reader_key(kind, name),
                        user=task.user or "", state=task.state.value, created_us=task.created_us,
                    )  # fmt: skip
                if body is not None:
                    for part, data in enumerate(body.pieces()):
                        _run(cursor, sql.ADD_PART, namespace=self._ns, task_id=task.id, part=part, data=data)
        except sqlite3.IntegrityError:
            raise IdTaken(f"A task with the id {task.id!r} exists.") from None
        if body is not None:
            body.close()

    def get(self, task_id: str) -> AsyncRouteTask | None:
        row = self._database.fetch_one(sql.GET.sql, (self._ns, task_id))
        return None if row is None else _record(row)

    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        with self._database.write() as transaction:
            cursor = transaction.cursor
            _run(cursor, sql.CLAIM, ns=self._ns, task_id=task_id, new_owner=owner, now=now_us)
            if cursor.rowcount == 0:
                transaction.rollback()
                return None
            row = _one(cursor, sql.GET_CLAIMED, ns=self._ns, task_id=task_id)
            assert row is not None
            task = _record(row[:-1])
            self._move_grants(cursor, task)
        return Claim(task, row[-1])

    def body(self, task_id: str) -> Body:
        body = Body()
        with self._database.read() as connection:
            for (data,) in connection.execute(sql.PARTS.sql, sql.PARTS.values(ns=self._ns, task_id=task_id)):
                body.write(data)
        return body

    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        statement = sql.update_of(tuple(values), expect)
        given = {f"new_{name}": _plain(value) for name, value in values.items()}
        with self._database.write() as transaction:
            cursor = transaction.cursor
            _run(cursor, statement, ns=self._ns, task_id=task_id, **given, **sql.expectation(expect))
            if cursor.rowcount == 0:
                transaction.rollback()
                return None
            row = _one(cursor, sql.GET, ns=self._ns, task_id=task_id)
            assert row is not None
            task = _record(row)
            if "state" in values:
                self._move_grants(cursor, task)
                if task.body_size and task.state.is_terminal:
                    _run(cursor, sql.DROP_PARTS, ns=self._ns, task_id=task_id)
        return task

    def delete(self, task_id: str, expect: Expect) -> bool:
        with self._database.write() as transaction:
            cursor = transaction.cursor
            _run(cursor, sql.NOTE_REMOVED, ns=self._ns)
            _run(cursor, sql.delete_of(expect), ns=self._ns, task_id=task_id, **sql.expectation(expect))
            if cursor.rowcount == 0:
                transaction.rollback()
                return False
            _run(cursor, sql.DROP_GRANTS, ns=self._ns, task_id=task_id)
            _run(cursor, sql.DROP_PARTS, ns=self._ns, task_id=task_id)
        return True

    def query(
        self,
        conditions: Sequence[Condition],
        sort: Sort,
        limit: int,
        position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:
        if readers is not None and readers == Readers():
            return []
        statement, ids_alone = queries.statement(conditions, sort, position, readers)
        given = queries.values(conditions, limit, position, readers)
        with self._database.read() as connection:
            if not ids_alone:
                rows = connection.execute(statement.sql, statement.values(ns=self._ns, **given)).fetchall()
                return [_record(row) for row in rows]
            connection.execute("BEGIN")
            found = connection.execute(statement.sql, statement.values(ns=self._ns, **given)).fetchall()
            listed = queries.LISTED
            rows = [
                connection.execute(listed.sql, listed.values(ns=self._ns, task_id=task_id)).fetchone()
                for (task_id,) in found
            ]
            connection.execute("COMMIT")
        return [_record(row) for row in rows]

    def waiting(self, endpoints: Collection[str], before_us: int, limit: int) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        statement = sql.WAITING_ALL
        with self._database.read() as connection:
            cursor = connection.execute(statement.sql, statement.values(ns=self._ns, before=before_us, most=-1))
            for task_id, endpoint in cursor:
                if endpoint in endpoints:
                    found.append((task_id, endpoint))
                    if len(found) == limit:
                        break
            cursor.close()
        return found

    def overdue(self, now_us: int, limit: int) -> list[str]:
        return self._ids(sql.OVERDUE, now=now_us, most=limit)

    def outlived(self, now_us: int, limit: int) -> list[str]:
        return self._ids(sql.OUTLIVED, now=now_us, most=limit)

    def news(self, since: int) -> News:
        version = self._database.version()
        if self._seen == (version, since):
            return News(since, ())
        with self._database.read() as connection:
            connection.execute("BEGIN")
            (change,) = connection.execute(sql.CHANGE.sql, sql.CHANGE.values(ns=self._ns)).fetchone()
            given = sql.NEWS.values(ns=self._ns, since=since, most=NEWS_PAGE)
            rows = [] if since < 0 else connection.execute(sql.NEWS.sql, given).fetchall()
            connection.execute("COMMIT")
        tasks = [_record(row) for row in rows]
        if len(tasks) == NEWS_PAGE:
            return News(tasks[-1].change, tasks)
        self._seen = (version, change)
        return News(change, tasks)

    def secret(self) -> bytes:
        return self._secret

    def read_value(self, key: str) -> tuple[bytes, int] | None:
        statement = sql.READ_VALUE
        with self._database.read() as connection:
            row: Any = connection.execute(statement.sql, statement.values(ns=self._ns, value_key=key)).fetchone()
        return row  # type: ignore[no-any-return]

    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        with self._database.write() as transaction:
            cursor = transaction.cursor
            present = _one(cursor, sql.READ_VALUE, ns=self._ns, value_key=key)
            if version is not None and version != (0 if present is None else present[1]):
                return False
            if value is None:
                if present is not None:
                    _run(cursor, sql.DROP_VALUE, ns=self._ns, value_key=key)
                return present is not None
            statement = sql.ADD_VALUE if present is None else sql.SET_VALUE
            # Not a count: a value that was removed and set again must not have a version that somebody holds.
            _run(cursor, statement, ns=self._ns, value_key=key, new_value=value, new_version=secrets.randbits(62) + 1)
        return True

    def value_keys(self) -> Iterable[str]:
        return self._ids(sql.VALUE_KEYS)

    def tend(self) -> None:
        self._database.checkpoint()

    def _ids(self, statement: Statement, **given: Any) -> list[str]:
        with self._database.read() as connection:
            return [row[0] for row in connection.execute(statement.sql, statement.values(ns=self._ns, **given))]

    def _move_grants(self, cursor: sqlite3.Cursor, task: AsyncRouteTask) -> None:
        if task.permission_json is not None:
            _run(cursor, sql.MOVE_GRANTS, ns=self._ns, task_id=task.id, new_state=task.state.value)

    def _make_tables(self, cursor: sqlite3.Cursor) -> None:
        """Make the tables, or refuse a database whose tables are of another version. Inside the write transaction."""
        known = cursor.execute("SELECT name FROM sqlite_master WHERE name = 'asyncroute_schema'").fetchone()
        if known is None:
            if not self._create_tables:
                raise ConfigurationError(
                    f"{self._database.path} (ASYNCROUTE_STORE) has no tables of flask_asyncroute and ASYNCROUTE_CREATE_TABLES "
                    "is False; make them by a migration from flask_asyncroute.metadata, or set it True."
                )
            for ddl in _definitions():
                cursor.execute(ddl)
            cursor.execute("INSERT INTO asyncroute_schema (version) VALUES (?)", (VERSION,))
            logger.info("Made the tables of flask_asyncroute in %s.", self._database.path)
            return
        row = cursor.execute("SELECT max(version) FROM asyncroute_schema").fetchone()
        if row[0] != VERSION:
            raise ConfigurationError(
                f"The tables in {self._database.path} (ASYNCROUTE_STORE) are of version {row[0]}; this flask_asyncroute works "
                f"with version {VERSION}. Install the release that made them, or give a new ASYNCROUTE_STORE."
            )


def _definitions() -> list[str]:
    """Return the statements that make tables and indexes."""
    made: list[str] = []
    engine: Any = create_engine("sqlite://", poolclass=StaticPool)
    metadata.create_all(engine)
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        for (text,) in cursor.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall():
            made.append(text)
        cursor.close()
    engine.dispose()
    return made


def _run(cursor: sqlite3.Cursor, statement: Statement, **given: Any) -> None:
    cursor.execute(statement.sql, statement.values(**given))


def _one(cursor: sqlite3.Cursor, statement: Statement, **given: Any) -> Any:
    return cursor.execute(statement.sql, statement.values(**given)).fetchone()


def _plain(value: Any) -> Any:
    if isinstance(value, State):
        return value.value
    return int(value) if isinstance(value, bool) else value


def _row(task: AsyncRouteTask) -> dict[str, Any]:
    values = dict(zip(task.__struct_fields__, astuple(task), strict=True))
    values.update(
        state=task.state.value, user=task.user or "", cancellable=int(task.cancellable), stopping=int(task.stopping)
    )
    return values


def _record(row: Any) -> AsyncRouteTask:
    (
        task_id, route, endpoint, state, cancellable, user, url, method, created, started, completed, expires, progress,
        message, result, error, status, stopping, permission, timeout, retention, on_loss, body, owner, epoch, revision, change,
    ) = row  # fmt: skip
    return AsyncRouteTask(
        task_id, route, endpoint, _STATES[state], cancellable == 1, user or None, url, method, created, started, completed,
        expires, progress, message, result, error, status, stopping == 1, permission, timeout, retention, on_loss, body,
        owner, epoch, revision, change,
    )  # fmt: skip
