"""The `Database` implementation for an SQLite file.

The file is created with mode 0600. If it is deleted or replaced, processes that use it raise
`StoreUnavailable` until they are restarted.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Dialect, make_url

from ...errors import ConfigurationError, StoreUnavailable
from .database import UNAVAILABLE, Cursor, Database, Duplicate, logger, read_url
from .store import SQLTaskStore

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")
Identity = tuple[int, int]  # The device and inode of a file.

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
BUSY_SECONDS = 5.0  # Maximum wait for locks of other processes or threads.
CHECK_SECONDS = 0.5  # Interval of the check for a replaced file.
READERS = 8  # Maximum read connections; one per thread would need too much memory.
# Usually, maintenance runs a checkpoint earlier.
CHECKPOINT_PAGES = 8000
"""The number of pages in the write-ahead log after which a commit runs a checkpoint."""
_WRITABLE = "Give the user of this process read and write access to the file and its folder."
_DAMAGED = (
    "Stop the app, restore a backup of the file or move it away to begin with an empty store, and "
    "start the app again."
)
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "Find the program that locks the file, and check if its disk is slow.",
    sqlite3.SQLITE_CANTOPEN: _WRITABLE,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_FULL: "Free space on its disk.",
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_PERM: _WRITABLE,
    sqlite3.SQLITE_READONLY: _WRITABLE,
}
"""What an operator can do about an error, by SQLite's primary result code."""


def check_setting(label: str, setting: str) -> None:
    """Validate a URL in ``ASYNCROUTE_STORE``.

    :raises ConfigurationError: if the URL names no file, or has unknown parameters.
    """
    url = read_url(label, setting)
    if url.database in (None, "", ":memory:") or url.query.get("mode") == "memory":
        raise ConfigurationError(
            f"{label}: an SQLite database in memory is not supported; use 'memory://' instead."
        )
    has_unread_query = "?" in setting and not url.query
    if url.host or url.username or url.port or "\x00" in setting or has_unread_query:
        # Do not show the value, because it can contain a password.
        raise ConfigurationError(
            f"{label} must be 'sqlite:///path', without a user or host; only '?synchronous=…' may "
            "follow the path."
        )
    for name, value in url.query.items():
        if name != "synchronous" or str(value).upper() not in SYNCHRONOUS:
            raise ConfigurationError(
                f"{label}: the parameter {name}={value} is invalid; the only parameter is "
                f"synchronous, with one of {', '.join(SYNCHRONOUS)}."
            )


def make_store(setting: str, folder: str, namespace: str, create_tables: bool) -> SQLTaskStore:
    """Create a store for a validated URL, without opening it.

    :param folder: the base of a relative path.
    """
    url = make_url(setting)
    synchronous = str(url.query.get("synchronous", "NORMAL")).upper()
    database = SQLiteDatabase(Path(folder) / str(url.database), synchronous)
    return SQLTaskStore(database, namespace, create_tables)


class _Row(sqlite3.Row):
    # The columns are attributes, as in the rows of SQLAlchemy.
    __slots__ = ()
    __getattr__ = sqlite3.Row.__getitem__


class SQLiteDatabase(Database):
    """An SQLite file and the connections to it. Thread-safe.

    SQLite allows one writer at a time, so all threads share one write connection.
    """

    dialect: Dialect = sqlite.dialect(paramstyle="named")

    def __init__(self, path: Path, synchronous: str = "NORMAL") -> None:
        if sqlite3.sqlite_version_info < (3, 35):  # older versions lack RETURNING
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for ASYNCROUTE_STORE; use 3.35 or "
                "newer."
            )
        # Resolve links, because SQLite puts the log next to the file itself, not next to a link to
        # it.
        self.path = path.resolve()
        self.label = str(self.path)
        self.lock_path = self.path.with_name(f"{self.path.name}-workers")
        self._synchronous = synchronous
        self._file: Identity | None = None  # the file in use; None before the first connection
        self._is_replaced = False
        self._check_at = 0.0
        self._check_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._readers: deque[sqlite3.Connection] = deque()  # idle; the last one is used first
        self._read_slots = _FairSemaphore(READERS)

    def fetch_one(self, sql: str, values: Mapping[str, Any]) -> Any:
        return self._read(lambda connection: connection.execute(sql, values).fetchone())

    def fetch_all(self, sql: str, values: Mapping[str, Any]) -> Sequence[Any]:
        return self._read(lambda connection: connection.execute(sql, values).fetchall())

    def read(self, work: Callable[[Cursor], T]) -> T:
        def read(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN")
            done = work(connection)
            connection.execute("ROLLBACK")
            return done

        return self._read(read)

    def write_one(self, sql: str, values: Mapping[str, Any]) -> Any:
        # A single statement is a transaction. It waits for other writers like BEGIN IMMEDIATE.
        rows = self._write(lambda connection: connection.execute(sql, values).fetchall())
        return rows[0] if rows else None

    def write_unpooled(self, sql: str, values: Mapping[str, Any]) -> int:
        return self._write(lambda connection: connection.execute(sql, values).rowcount)

    def write(self, work: Callable[[Cursor], T]) -> T:
        def write(connection: sqlite3.Connection) -> T:
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

        return self._write(write)

    def lock_schema(self, cursor: Cursor) -> None:
        """Do nothing, because ``BEGIN IMMEDIATE`` has already locked the file."""

    def has_table(self, cursor: Cursor, name: str) -> bool:
        found = cursor.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,))
        return found.fetchone() is not None

    def maintain(self) -> None:
        """Run a checkpoint of the write-ahead log without waiting for readers."""
        self.fetch_all("PRAGMA wal_checkpoint(PASSIVE)", {})

    def close(self) -> None:
        with self._write_lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        with suppress(IndexError):  # another thread can take the last connection
            while True:
                self._readers.pop().close()

    def remedy(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return _REMEDIES[sqlite3.SQLITE_BUSY]
        if isinstance(error, OSError):
            return _WRITABLE
        code = getattr(error, "sqlite_errorcode", 0)
        return _REMEDIES.get(code & 0xFF, "Check the file and its disk.")

    def connect(self) -> sqlite3.Connection:
        """Open a connection.

        The first connection of this process creates the file if it is missing.

        :raises StoreUnavailable: if the file cannot be used, or was deleted or replaced after the
            first connection.
        """
        try:
            if self._file is None:
                _create(self.path)
            found = self._check_file()
            connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS,
                isolation_level=None, check_same_thread=False, cached_statements=256,
            )  # fmt: skip
            connection.row_factory = _Row
            try:
                # Wait here, because SQLite does not wait for other processes that execute this
                # statement.
                _wait_until_free(lambda: connection.execute("PRAGMA journal_mode=WAL").fetchone())
                connection.execute(f"PRAGMA synchronous={self._synchronous}")
                connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
                with self._check_lock:
                    self._file = self._file or found
                # SQLite opens the file and then its log by their names. If the file was replaced in
                # between, the log belongs to the new file.
                if self._check_file() != found:
                    self._refuse_replaced()
            except BaseException:
                connection.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise self.unavailable(error) from error
        return connection

    def _check(self) -> None:
        """Check, at most twice a second, that the file was not deleted or replaced.

        :raises StoreUnavailable: if the file was deleted or replaced. All later calls raise it too.
        """
        now = time.monotonic()
        if self._is_replaced or now >= self._check_at:
            self._check_at = now + CHECK_SECONDS
            try:
                self._check_file()
            except OSError as error:
                raise self.unavailable(error) from error

    def _check_file(self) -> Identity | None:
        found = _identity(self.path)
        if self._is_replaced or self._file not in (None, found):
            self._refuse_replaced()
        return found

    def _refuse_replaced(self) -> NoReturn:
        with self._check_lock:
            is_first, self._is_replaced = not self._is_replaced, True
        if is_first:
            logger.error(
                "The store file %s was deleted or replaced while this process used it. Restart the "
                "app.",
                self.path,
            )
        raise StoreUnavailable(UNAVAILABLE, retry_after=5)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        # Retry once after an error, on another connection.
        self._check()
        if not self._read_slots.acquire(BUSY_SECONDS):
            raise self.unavailable(
                TimeoutError(f"all {READERS} read connections of this process stayed in use")
            )
        try:
            try:
                return self._read_once(work)
            except sqlite3.Error:
                return self._read_once(work)
        except sqlite3.Error as error:
            raise self.unavailable(error) from error
        finally:
            self._read_slots.release()

    def _read_once(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self.connect()
        try:
            done = work(connection)
        except BaseException:
            connection.close()
            raise
        self._readers.append(connection)
        return done

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        # A failed write changes nothing. It is not retried, because it has already waited for
        # locks.
        self._check()
        if not self._write_lock.acquire(timeout=BUSY_SECONDS):
            raise self.unavailable(TimeoutError("the write connection stayed in use"))
        try:
            if self._writer is None:
                self._writer = self.connect()
            return work(self._writer)
        except sqlite3.IntegrityError as error:
            raise Duplicate from error
        except sqlite3.Error as error:
            if self._writer is not None:
                self._writer.close()
            self._writer = None
            raise self.unavailable(error) from error
        finally:
            self._write_lock.release()


class _FairSemaphore:
    """A semaphore that serves waiting threads in their order."""

    # With `threading.Semaphore`, a thread could release a slot and acquire it again at once, while
    # other threads wait until they time out.

    def __init__(self, slots: int) -> None:
        self._lock = threading.Lock()
        self._free = slots
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        if turn.acquire(timeout=timeout):
            return True
        with self._lock:
            if turn not in self._waiting:
                return True  # `release` has passed the slot just after the timeout
            self._waiting.remove(turn)
            return False

    def release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


def _identity(path: Path) -> Identity | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _create(path: Path) -> None:
    if _identity(path) is not None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _creation_lock(path.parent):
        if _identity(path) is not None:
            return
        # Delete the files of a deleted database. Processes that still use it have them open, and
        # SQLite would share them.
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    logger.info("Created the store file %s.", path)


@contextmanager
def _creation_lock(folder: Path) -> Iterator[None]:
    """Within the block, keep other processes from creating a database in a folder."""
    # Without the lock, a second process that also found no database could delete the "-wal" file of
    # the new one. Windows needs no lock, because it does not delete open files.
    if sys.platform == "win32":
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        _wait_until_free(lambda: fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB))
        yield
    finally:
        # Closing the descriptor does not release the lock if a child process was forked meanwhile.
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _wait_until_free(attempt: Callable[[], object]) -> None:
    """Call ``attempt``. While it fails because of a lock, retry for up to five seconds.

    :raises TimeoutError: if a folder is still locked after that.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            attempt()
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError("another process has locked the folder") from None
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(0.01)
