"""Connections to one SQLite file, per process: one that writes, under a lock, and a few that read.

Write-ahead log, ``BEGIN IMMEDIATE`` for every write, five seconds of patience with other processes. A connection must not
be used after a fork; `runtime` makes a new store there.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import ConfigurationError, StoreUnavailable

logger = logging.getLogger("flask_asyncroute")

BUSY_SECONDS = 5.0
READERS = 8
"""Idle reading connections that are kept."""
CHECKPOINT_PAGES = 8000
"""At how many pages of log a commit tidies up itself, where no runner does it in time."""
MINIMUM = (3, 24, 0)


class SQLiteDatabase:
    """Opens, lends and closes the connections. Thread-safe."""

    def __init__(self, path: Path, synchronous: str = "NORMAL") -> None:
        if sqlite3.sqlite_version_info < MINIMUM:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for ASYNCROUTE_STORE; {'.'.join(map(str, MINIMUM))} is needed."
            )
        self.path = path
        self._synchronous = synchronous
        self._write_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._readers: deque[sqlite3.Connection] = deque()
        self._observer: sqlite3.Connection | None = None

    def write(self) -> WriteTransaction:
        """Return a context manager for one write transaction; inside, a cursor."""
        return WriteTransaction(self)

    def read(self) -> ReadConnection:
        """Return a context manager that lends a connection to read from."""
        return ReadConnection(self)

    def fetch_one(self, sql: str, values: tuple[Any, ...]) -> Any:
        """Return one row, or None: what :meth:`read` does, for the way that is taken most."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self.connect()
        try:
            row = connection.execute(sql, values).fetchone()
        except sqlite3.Error as error:
            connection.close()
            raise unavailable(error, self.path) from error
        self._readers.append(connection)
        return row

    def write_one(self, sql: str, values: tuple[Any, ...]) -> None:
        """Execute one writing statement, which is a transaction by itself, and waits for others as ``BEGIN IMMEDIATE`` does.

        :raises sqlite3.IntegrityError: as it is.
        """
        with self._write_lock:
            if self._writer is None:
                self._writer = self.connect()
            try:
                self._writer.execute(sql, values)
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise unavailable(error, self.path) from error

    def version(self) -> int:
        """Return a number that differs from the last call's where somebody has committed in between. One thread only."""
        try:
            if self._observer is None:
                self._observer = self.connect()
            return int(self._observer.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            self._observer = None
            raise unavailable(error, self.path) from error

    def checkpoint(self) -> None:
        """Move what the log holds into the file, as far as nobody is reading it."""
        with ReadConnection(self) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

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
            raise unavailable(error, self.path) from error


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


def unavailable(error: Exception, path: Path) -> StoreUnavailable:
    """Log what went wrong and return what the client hears of it."""
    logger.error("The store cannot be used: %s: %s (ASYNCROUTE_STORE, %s)", type(error).__name__, error, path)
    return StoreUnavailable("The task store cannot be used at the moment. Try again.", retry_after=5)


class WriteTransaction:
    """``BEGIN IMMEDIATE`` … ``COMMIT``, or ``ROLLBACK`` where the block raises or asks for it."""

    def __init__(self, database: SQLiteDatabase) -> None:
        self._database = database
        self._rolled_back = False

    def __enter__(self) -> WriteTransaction:
        database = self._database
        database._write_lock.acquire()
        try:
            connection = database._writer
            if connection is None:
                connection = database._writer = database.connect()
            self.cursor = connection.cursor()
            self.cursor.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            database._write_lock.release()
            raise unavailable(error, database.path) from error
        except BaseException:
            database._write_lock.release()
            raise
        return self

    def rollback(self) -> None:
        """Take everything back; nothing may be executed afterwards."""
        self._rolled_back = True
        self.cursor.execute("ROLLBACK")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._rolled_back:
                self.cursor.execute("COMMIT")
            elif not self._rolled_back:
                self.cursor.execute("ROLLBACK")
        except sqlite3.Error as failure:
            self._reset()
            if kind is None:
                raise unavailable(failure, self._database.path) from failure
        finally:
            self._database._write_lock.release()
        if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
            raise unavailable(error, self._database.path) from error

    def _reset(self) -> None:
        writer, self._database._writer = self._database._writer, None
        if writer is not None:
            writer.close()


class ReadConnection:
    """Lends a connection and takes it back; a broken one is closed instead."""

    def __init__(self, database: SQLiteDatabase) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        try:
            self._connection = self._database._readers.pop()
        except IndexError:
            self._connection = self._database.connect()
        return self._connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and len(self._database._readers) < READERS:
            self._database._readers.append(self._connection)
        else:
            self._connection.close()
        if isinstance(error, sqlite3.Error):
            raise unavailable(error, self._database.path) from error
