"""Connections to one SQLite file, per process: one that writes, under a lock, and a few that read.

Write-ahead log, ``BEGIN IMMEDIATE`` for every write, five seconds of patience with other processes. A connection must not
be used after a fork; `runtime` makes a new store there.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Dialect

from ...errors import ConfigurationError
from .database import Cursor, Database, Duplicate, logger
from .file import Identity, StoreFile

T = TypeVar("T")

BUSY_SECONDS = 5.0
READERS = 8
"""Idle reading connections that are kept."""
CHECKPOINT_PAGES = 8000
"""At how many pages of log a commit tidies up itself, where no runner does it in time."""
MINIMUM = (3, 35, 0)
_WRITABLE = "Make the file and its folder readable and writable for the user of this process."
_DAMAGED = "Put a backup in the file's place, or move it away to begin with a new one."
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "See which other program holds its lock.",
    sqlite3.SQLITE_CANTOPEN: _WRITABLE,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_FULL: "Make room on its disk.",
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_PERM: _WRITABLE,
    sqlite3.SQLITE_READONLY: _WRITABLE,
}
"""By the primary result code."""


class SQLiteDatabase(Database):
    """Opens, lends and closes the connections. Thread-safe."""

    dialect: Dialect = sqlite.dialect()

    def __init__(self, path: Path, synchronous: str = "NORMAL") -> None:
        if sqlite3.sqlite_version_info < MINIMUM:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for ASYNCROUTE_STORE; {'.'.join(map(str, MINIMUM))} is needed."
            )
        # Where the file is, and not where a link to it is: that is where SQLite keeps the log, and where it can be made.
        path = path.resolve()
        self.path = path
        self._file = StoreFile(path)
        self.label = str(path)
        self.lock_path = path.with_name(f"{path.name}-workers")
        self._synchronous = synchronous
        self._write_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._readers: deque[sqlite3.Connection] = deque()
        self._observer = _Own(self)
        self._apart = _Own(self)

    def open(self, look: Callable[[Cursor], T | None], make: Callable[[Cursor], T]) -> T:
        try:
            identity = self._file.make()
        except OSError as error:
            raise self.unavailable(error) from error
        connection = self.connect(identity)
        try:
            # What is there already is only read, so that it can be opened while it is locked, or may not be written.
            found = look(connection)
            done = self._in_transaction(connection, make) if found is None else found
        except sqlite3.Error as error:
            connection.close()
            raise self.unavailable(error) from error
        except BaseException:
            connection.close()
            raise
        is_another = self._file.opened is not None
        self._file.use(identity)
        self._readers, readers = deque([connection]), self._readers
        with self._write_lock:
            writer, self._writer = self._writer, None
        _close_all(readers)
        if writer is not None:
            writer.close()
        if is_another:
            logger.warning(
                "The file of the store, %s, was deleted or replaced. From here on the one that is there now is used.",
                self.path,
            )
        return done

    def is_replaced(self) -> bool:
        return self._file.is_replaced()

    def write(self, work: Callable[[Cursor], T]) -> T:
        with self._writing() as connection:
            return self._in_transaction(connection, work)

    def write_one(self, sql: str, values: Sequence[Any]) -> Any:
        # One statement is a transaction by itself, and waits for other writers as BEGIN IMMEDIATE does.
        with self._writing() as connection:
            rows = connection.execute(sql, values).fetchall()
        return rows[0] if rows else None

    def read(self, work: Callable[[Cursor], T]) -> T:
        def read(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN")
            done = work(connection)
            connection.execute("ROLLBACK")
            return done

        return self._read(read)

    def fetch_one(self, sql: str, values: Sequence[Any]) -> Any:
        return self._read(lambda connection: connection.execute(sql, values).fetchone())

    def fetch_all(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        return self._read(lambda connection: connection.execute(sql, values).fetchall())

    def write_apart(self, sql: str, values: Sequence[Any]) -> int:
        return self._apart.execute(sql, values).rowcount

    def version(self) -> Hashable:
        found = self._observer.execute("PRAGMA data_version").fetchone()[0]
        # That number is the connection's own: the same of another would be chance.
        return self._observer.number, found

    def lock_schema(self, cursor: Cursor) -> None:
        """``BEGIN IMMEDIATE`` has done so."""

    def has_table(self, cursor: Cursor, name: str) -> bool:
        return cursor.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None

    def tend(self) -> None:
        """Move what the log holds into the file, as far as nobody is reading it."""
        self.fetch_all("PRAGMA wal_checkpoint(PASSIVE)", ())

    def close(self) -> None:
        """Close what is not lent out."""
        with self._write_lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        _close_all(self._readers)
        self._observer.close()
        self._apart.close()

    def connect(self, wanted: Identity | None = None) -> sqlite3.Connection:
        """Open a connection.

        :param wanted: to this file; None: to the one that is in use, or to whichever there is before any is.
        """
        try:
            if self._file.opened is None:
                self._file.make()
            with self._file.kept() as found:
                if found != (wanted or self._file.opened or found):
                    raise FileNotFoundError("the file was deleted or replaced")
                # Made by nobody else than who also takes away what a deleted one has left.
                connection = sqlite3.connect(
                    f"{self.path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None,
                    check_same_thread=False, cached_statements=256,
                )  # fmt: skip
                try:
                    _use_log(connection)
                    connection.execute(f"PRAGMA synchronous={self._synchronous}")
                    connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
                except BaseException:
                    connection.close()
                    raise
            return connection
        except (OSError, sqlite3.Error) as error:
            raise self.unavailable(error) from error

    def remedy(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            code = sqlite3.SQLITE_BUSY
        elif isinstance(error, OSError):
            code = sqlite3.SQLITE_CANTOPEN
        else:
            code = getattr(error, "sqlite_errorcode", 0)
        return _REMEDIES.get(code & 0xFF, "Look at the file and its disk.")

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Read on a connection that nobody else uses meanwhile. What fails is tried once more, on a new one."""
        for is_last in (False, True):
            readers = self._readers
            try:
                connection = readers.pop()
            except IndexError:
                connection = self.connect()
            try:
                done = work(connection)
            except BaseException as error:
                connection.close()
                if not isinstance(error, sqlite3.Error):
                    raise
                if is_last:
                    raise self.unavailable(error) from error
                continue
            if len(readers) < READERS:
                readers.append(connection)
                if readers is not self._readers:
                    _close_all(readers)
            else:
                connection.close()
            return done
        raise AssertionError("the last try returns or raises")

    def _writing(self) -> _Writing:
        return _Writing(self)

    @staticmethod
    def _in_transaction(connection: sqlite3.Connection, work: Callable[[Cursor], T]) -> T:
        """Return what ``work`` does between ``BEGIN IMMEDIATE`` and ``COMMIT``, or take it back."""
        cursor = connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            done = work(cursor)
            cursor.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                cursor.execute("ROLLBACK")
            raise
        return done


def _close_all(connections: deque[sqlite3.Connection]) -> None:
    while connections:
        try:
            connections.pop().close()
        except IndexError:
            return  # somebody else does the same


def _use_log(connection: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log. SQLite does not wait for others that do the same, so this does."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


class _Writing:
    """The one connection that writes, for one thread; a new one after anything but a row that exists already."""

    def __init__(self, database: SQLiteDatabase) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        database = self._database
        if not database._write_lock.acquire(timeout=BUSY_SECONDS):
            raise database.unavailable(TimeoutError("other threads of this process are writing"))
        try:
            if database._writer is None:
                database._writer = database.connect()
            return database._writer
        except BaseException:
            database._write_lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        database = self._database
        try:
            if isinstance(error, sqlite3.IntegrityError):
                raise Duplicate from error
            if isinstance(error, sqlite3.Error):
                writer, database._writer = database._writer, None
                if writer is not None:
                    writer.close()
                raise database.unavailable(error) from error
        finally:
            database._write_lock.release()


class _Own:
    """A connection for one thread alone; a new one after a failure, and for another file."""

    def __init__(self, database: SQLiteDatabase) -> None:
        self._database = database
        self._connection: sqlite3.Connection | None = None
        self._file: Identity | None = None
        self.number = 0
        """How many there have been."""

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        database = self._database
        try:
            if self._connection is None or self._file != database._file.opened:
                self.close()
                self._file = database._file.opened
                self._connection = database.connect()
                self.number += 1
            return self._connection.execute(sql, values)
        except sqlite3.Error as error:
            self.close()
            raise database.unavailable(error) from error

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
