"""Connections to one SQLite file, per process: one that writes, under a lock, and a few that read.

Write-ahead log, ``BEGIN IMMEDIATE`` for every write, five seconds of patience with other processes. A connection must not
be used after a fork; `runtime` makes a new store there.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Dialect

from ...errors import ConfigurationError
from .database import Cursor, Database, Duplicate

BUSY_SECONDS = 5.0
READERS = 8
"""Idle reading connections that are kept."""
CHECKPOINT_PAGES = 8000
"""At how many pages of log a commit tidies up itself, where no runner does it in time."""
MINIMUM = (3, 35, 0)


class SQLiteDatabase(Database):
    """Opens, lends and closes the connections. Thread-safe."""

    dialect: Dialect = sqlite.dialect()

    def __init__(self, path: Path, synchronous: str = "NORMAL") -> None:
        if sqlite3.sqlite_version_info < MINIMUM:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for ASYNCROUTE_STORE; {'.'.join(map(str, MINIMUM))} is needed."
            )
        self.path = path
        self.label = str(path)
        self.lock_path = path.with_name(f"{path.name}-workers")
        self._synchronous = synchronous
        self._write_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._readers: deque[sqlite3.Connection] = deque()
        self._observer: sqlite3.Connection | None = None
        self._apart: sqlite3.Connection | None = None

    def write(self) -> WriteTransaction:
        return WriteTransaction(self)

    def read(self) -> ReadTransaction:
        return ReadTransaction(self)

    def fetch_one(self, sql: str, values: Sequence[Any]) -> Any:
        connection = self.lend()
        try:
            row = connection.execute(sql, values).fetchone()
        except sqlite3.Error as error:
            connection.close()
            raise self.unavailable(error) from error
        self._readers.append(connection)
        return row

    def fetch_all(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        connection = self.lend()
        try:
            rows = connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            connection.close()
            raise self.unavailable(error) from error
        self.take_back(connection)
        return rows

    def write_one(self, sql: str, values: Sequence[Any]) -> Any:
        # One statement is a transaction by itself, and waits for other writers as BEGIN IMMEDIATE does.
        with self._write_lock:
            if self._writer is None:
                self._writer = self.connect()
            try:
                rows = self._writer.execute(sql, values).fetchall()
            except sqlite3.IntegrityError as error:
                raise Duplicate from error
            except sqlite3.Error as error:
                raise self.unavailable(error) from error
        return rows[0] if rows else None

    def write_apart(self, sql: str, values: Sequence[Any]) -> int:
        try:
            if self._apart is None:
                self._apart = self.connect()
            return self._apart.execute(sql, values).rowcount
        except sqlite3.Error as error:
            apart, self._apart = self._apart, None
            if apart is not None:
                apart.close()
            raise self.unavailable(error) from error

    def version(self) -> int:
        try:
            if self._observer is None:
                self._observer = self.connect()
            return int(self._observer.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            self._observer = None
            raise self.unavailable(error) from error

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
        while self._readers:
            self._readers.pop().close()
        if self._observer is not None:
            self._observer.close()
            self._observer = None
        if self._apart is not None:
            self._apart.close()
            self._apart = None

    def connect(self) -> sqlite3.Connection:
        """Open a connection; make the file, for its owner's eyes only, where there is none."""
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            _use_log(connection)
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
            return connection
        except (OSError, sqlite3.Error) as error:
            raise self.unavailable(error) from error

    def lend(self) -> sqlite3.Connection:
        """Return a connection to read from."""
        try:
            return self._readers.pop()
        except IndexError:
            return self.connect()

    def take_back(self, connection: sqlite3.Connection) -> None:
        """Keep a connection that was lent, or close it."""
        if len(self._readers) < READERS:
            self._readers.append(connection)
        else:
            connection.close()


def _use_log(connection: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log. SQLite does not wait for others that do the same, so this does."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").fetchone()
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


class WriteTransaction:
    """``BEGIN IMMEDIATE`` … ``COMMIT``, or ``ROLLBACK`` where the block raises."""

    def __init__(self, database: SQLiteDatabase) -> None:
        self._database = database

    def __enter__(self) -> Cursor:
        database = self._database
        database._write_lock.acquire()
        try:
            connection = database._writer
            if connection is None:
                connection = database._writer = database.connect()
            self._cursor = connection.cursor()
            self._cursor.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            database._write_lock.release()
            raise database.unavailable(error) from error
        except BaseException:
            database._write_lock.release()
            raise
        return self._cursor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._cursor.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error as failure:
            # Whatever state the connection is in, a new one is in none.
            writer, self._database._writer = self._database._writer, None
            if writer is not None:
                writer.close()
            if kind is None:
                raise self._database.unavailable(failure) from failure
        finally:
            self._database._write_lock.release()
        if isinstance(error, sqlite3.IntegrityError):
            raise Duplicate from error
        if isinstance(error, sqlite3.Error):
            raise self._database.unavailable(error) from error


class ReadTransaction:
    """Reads of one state of the file, on a connection that is lent; a broken one is closed."""

    def __init__(self, database: SQLiteDatabase) -> None:
        self._database = database

    def __enter__(self) -> Cursor:
        self._connection = self._database.lend()
        try:
            self._connection.execute("BEGIN")
        except sqlite3.Error as error:
            self._connection.close()
            raise self._database.unavailable(error) from error
        return self._connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._connection.close()
            if isinstance(error, sqlite3.Error):
                raise self._database.unavailable(error) from error
            return
        try:
            self._connection.execute("ROLLBACK")
        except sqlite3.Error as failure:
            self._connection.close()
            raise self._database.unavailable(failure) from failure
        self._database.take_back(self._connection)
