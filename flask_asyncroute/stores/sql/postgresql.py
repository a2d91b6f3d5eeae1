"""The `Database` implementation for PostgreSQL, with an SQLAlchemy Engine and psycopg."""

from __future__ import annotations

import os
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from psycopg import Connection as DriverConnection
from psycopg import Error, Notify
from psycopg import IntegrityError as DriverIntegrityError
from psycopg.rows import namedtuple_row
from sqlalchemy import create_engine
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from ...errors import ConfigurationError, StoreUnavailable
from ...task import skipped_us
from ..base import Listener
from .database import Cursor, Database, Duplicate, logger, read_url
from .joined import LOCK_NOT_AVAILABLE, LOCKED, ConnectionCursor
from .statements import NOW
from .store import SQLTaskStore

T = TypeVar("T")
OwnPids = WeakValueDictionary[int, DriverConnection[Any]]
"""The open connections of this process, by the process id of the PostgreSQL server process."""

TIMEOUTS = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
"""Timeouts of libpq: seconds to connect, and milliseconds until sent data must be acknowledged."""
TRIES = 3
CLOSE_SECONDS = 1.0
MEASUREMENTS = 3  # Queries per measurement of the server's clock.
CLOCK_SECONDS = 30.0  # Minimum interval between measurements of the server's clock.
RECONNECT_SECONDS = 1.0
SCHEMA_LOCK = 0x6173796E63  # Key of the advisory lock for creating tables.
_ROLLED_BACK = ("40001", "40P01")  # SQLSTATEs to retry: serialization failure, deadlock.


def check_setting(label: str, setting: str | Engine) -> None:
    """Validate a URL or an Engine in ``ASYNCROUTE_STORE``.

    :raises ConfigurationError: if the URL names no database, or the Engine does not use PostgreSQL
        with psycopg.
    """
    if isinstance(setting, str):
        if not read_url(label, setting).database:
            raise ConfigurationError(
                f"{label} must name a database: 'postgresql+psycopg://user@host/database'."
            )
        return
    name, driver = setting.dialect.name, setting.dialect.driver
    if name == "sqlite":
        raise ConfigurationError(
            f"{label}: an Engine for SQLite is not supported, because the store needs its own "
            "connection settings; use the URL 'sqlite:///path'. The app may use the same file."
        )
    if (name, driver) != ("postgresql", "psycopg"):
        raise ConfigurationError(
            f"{label}: an Engine for {name} with {driver} is not supported; create it with a URL "
            "that begins with 'postgresql+psycopg://'."
        )


def make_store(
    setting: str | Engine | Callable[[], Engine], folder: str, namespace: str, create_tables: bool
) -> SQLTaskStore:
    """Create a store for a validated setting, without opening it.

    :raises ConfigurationError: if the setting is a function that does not return a supported
        Engine.
    """
    if isinstance(setting, str):
        url = make_url(setting)
        limits = {name: value for name, value in TIMEOUTS.items() if name not in url.query}
        engine = create_engine(url, connect_args=limits, isolation_level="AUTOCOMMIT")
        return SQLTaskStore(EngineDatabase(engine, is_owned=True), namespace, create_tables)
    engine = setting if isinstance(setting, Engine) else setting()
    if not isinstance(engine, Engine):
        raise ConfigurationError(
            f"ASYNCROUTE_STORE: the function returned a {type(engine).__name__}; it must return an "
            "SQLAlchemy Engine."
        )
    check_setting("ASYNCROUTE_STORE", engine)
    return SQLTaskStore(EngineDatabase(engine, is_owned=False), namespace, create_tables)


class EngineDatabase(Database):
    """A PostgreSQL database, used through an SQLAlchemy Engine.

    Thread-safe. Not usable after a fork.

    :param is_owned: whether :meth:`close` disposes of the engine.
    """

    can_join = True

    def __init__(self, engine: Engine, is_owned: bool) -> None:
        make_dialect: Any = type(engine.dialect)
        self.dialect = make_dialect(paramstyle="pyformat")
        self.label = engine.url.render_as_string(hide_password=True)
        user = os.geteuid() if hasattr(os, "geteuid") else "user"
        self.lock_path = Path(tempfile.gettempdir()) / f"flask-asyncroute-{user}-workers"
        self._engine = engine
        self._is_owned = is_owned
        self._unpooled: Connection | None = None
        self._own_pids: OwnPids = WeakValueDictionary()
        self._clock_lock = threading.Lock()
        self._ahead_us: int | None = None
        """The server's clock minus the monotonic clock of this process; None before the first
        measurement.
        """
        self._measure_at = 0.0
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._several = engine.execution_options(isolation_level="READ COMMITTED")
        self._snapshot = engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    def fetch_one(self, sql: str, values: Mapping[str, Any]) -> Any:
        rows = self._execute(sql, values)
        return rows[0] if rows else None

    def fetch_all(self, sql: str, values: Mapping[str, Any]) -> Sequence[Any]:
        return self._execute(sql, values)

    def read(self, work: Callable[[Cursor], T]) -> T:
        def read(attempt: _Attempt) -> T:
            with self._snapshot.connect() as connection:
                return work(ConnectionCursor(connection))

        return self._retry(read)

    def write_one(self, sql: str, values: Mapping[str, Any]) -> Any:
        rows = self._execute(sql, values, is_write=True)
        return rows[0] if rows else None

    def write_unpooled(self, sql: str, values: Mapping[str, Any]) -> int:
        def write(attempt: _Attempt) -> int:
            try:
                if self._unpooled is None:
                    self._unpooled = self._single.connect()
                    # Detach it, so that it is available even if all pooled connections are in use.
                    self._unpooled.detach()
                return self._unpooled.exec_driver_sql(sql, dict(values)).rowcount
            except SQLAlchemyError:
                self._close_unpooled()
                raise

        return self._retry(write)

    def write(self, work: Callable[[Cursor], T]) -> T:
        def write(attempt: _Attempt) -> T:
            with self._several.connect() as connection, connection.begin() as transaction:
                done = work(ConnectionCursor(connection))
                attempt.may_be_committed = True
                transaction.commit()
                return done

        return self._retry(write)

    def now_us(self) -> int:
        """Return the time of the server's clock, also if the clock of this host is set.

        The server's clock is measured at most every :data:`CLOCK_SECONDS` and continued with the
        monotonic clock. If the server is unavailable, the last measurement still applies.
        """
        with self._clock_lock:
            if self._ahead_us is None or time.monotonic() >= self._measure_at:
                self._measure_at = time.monotonic() + CLOCK_SECONDS
                try:
                    self._ahead_us = self._measure_clock()
                except StoreUnavailable:
                    if self._ahead_us is None:
                        raise
            return self._ahead_us + _monotonic_us() + skipped_us()

    def _measure_clock(self) -> int:
        """Return the server's clock minus the monotonic clock of this process."""
        measured = []
        for _ in range(MEASUREMENTS):
            sent_us = _monotonic_us()
            now_us = self.fetch_one(f"SELECT {NOW} AS now", {}).now
            took_us = _monotonic_us() - sent_us
            measured.append((took_us, now_us - sent_us - took_us // 2))
        return int(min(measured)[1])  # the fastest answer is the most exact

    def listen(
        self, channel: str, calls: Mapping[str, Callable[[], None]], of_others: Container[str]
    ) -> Listener:
        return PostgreSQLListener(self._single, channel, calls, of_others, self._own_pids)

    def lock_schema(self, cursor: Cursor) -> None:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))

    def has_table(self, cursor: Cursor, name: str) -> bool:
        # Do not use to_regclass(), which can read a stale server cache after a wait for the schema
        # lock.
        found = cursor.execute(
            "SELECT 1 FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = "
            "c.relnamespace WHERE c.relname = %s AND n.nspname = ANY (current_schemas(false))",
            (name,),
        )
        return found.fetchone() is not None

    def close(self) -> None:
        self._close_unpooled()
        if not self._is_owned:
            return
        # dispose() does not close connections in use, so wait for short statements to end.
        pool = self._engine.pool
        deadline = time.monotonic() + CLOSE_SECONDS
        while isinstance(pool, QueuePool) and pool.checkedout() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._engine.dispose()

    def forget(self) -> None:
        # Two processes must not use one socket. The app can use its own engine in the child too, so
        # replace the engine's pool without closing the old connections.
        if not self._is_owned:
            self._engine.dispose(close=False)

    def remedy(self, error: BaseException) -> str:
        return "Check that the database server is running, and read its log."

    def _log(self, error: BaseException) -> None:
        # SQLAlchemy's message contains the statement's parameters, which must not be logged.
        super()._log(getattr(error, "orig", None) or error)

    def _close_unpooled(self) -> None:
        unpooled, self._unpooled = self._unpooled, None
        if unpooled is not None:
            with suppress(SQLAlchemyError):  # the connection can already be lost
                unpooled.close()

    def _execute(
        self, sql: str, values: Mapping[str, Any], is_write: bool = False
    ) -> Sequence[Any]:
        # Call the driver directly, because SQLAlchemy's Connection would use six times the CPU.

        def execute(attempt: _Attempt) -> Sequence[Any]:
            with self._driver_connection(attempt) as connection:
                attempt.may_be_committed = is_write
                pid = connection.pgconn.backend_pid
                if self._own_pids.get(pid) is not connection:
                    self._own_pids[pid] = connection
                cursor = connection.cursor(row_factory=namedtuple_row)
                cursor.execute(sql, values)
                return () if cursor.rownumber is None else cursor.fetchall()

        return self._retry(execute)

    @contextmanager
    def _driver_connection(self, attempt: _Attempt) -> Iterator[DriverConnection[Any]]:
        # Use autocommit: each statement is a transaction.
        pool = self._engine.pool
        lent = self._engine.raw_connection()
        try:
            connection: Any = lent.driver_connection
            was_autocommit = connection.autocommit
            if not was_autocommit:
                connection.autocommit = True
            try:
                yield connection
            except Error:
                if not (was_autocommit or connection.closed):
                    connection.autocommit = False
                raise
            if not was_autocommit:
                connection.autocommit = False
        except BaseException as error:
            attempt.is_lost = connection.closed
            if attempt.is_lost or not isinstance(error, Error):
                # If the statement was interrupted, the connection can still be executing it.
                lent.invalidate(error)
            # Other connections were probably lost too. SQLAlchemy also replaces all of them.
            if attempt.is_lost and self._engine.pool is pool:
                self._engine.dispose()
            raise
        finally:
            lent.close()

    def _retry(self, work: Callable[[_Attempt], T]) -> T:
        """Call ``work`` at most three times, until it succeeds, and return its result.

        A failed call is repeated after a deadlock, a serialization failure or a lost connection,
        unless it was possibly committed.
        """
        for tries_left in reversed(range(TRIES)):
            attempt = _Attempt()
            try:
                return work(attempt)
            except (IntegrityError, DriverIntegrityError) as error:
                raise Duplicate from error
            except (SQLAlchemyError, Error) as error:
                is_lost = attempt.is_lost or (
                    isinstance(error, DBAPIError) and error.connection_invalidated
                )
                if is_lost and attempt.may_be_committed:
                    raise self.unknown(error) from error
                sqlstate = getattr(getattr(error, "orig", error), "sqlstate", None)
                if sqlstate == LOCK_NOT_AVAILABLE:
                    raise StoreUnavailable(LOCKED, retry_after=5) from error
                if not tries_left or not (is_lost or sqlstate in _ROLLED_BACK):
                    raise self.unavailable(error) from error
        raise AssertionError("the last attempt returns or raises")


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


@dataclass(slots=True)
class _Attempt:
    may_be_committed: bool = False
    is_lost: bool = False  # whether the driver has lost the connection


class PostgreSQLListener:
    """Calls a function for each notification (``LISTEN``) until it is closed. Thread-safe.

    The listener has its own thread and connection. Notifications are lost while the connection is
    down, so all functions are also called after each reconnection.

    :param engine: provides the connection, which is detached from the engine's pool.
    :param calls: the functions by payload. They are called on the listener's thread, and must not
        block or raise exceptions.
    :param of_others: the payloads that are ignored if this process has sent them.
    :param own_pids: ids of PostgreSQL server processes that serve this process.
    """

    def __init__(
        self,
        engine: Engine,
        channel: str,
        calls: Mapping[str, Callable[[], None]],
        of_others: Container[str],
        own_pids: Container[int],
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._calls = calls
        self._of_others = of_others
        self._own_pids = own_pids
        self._closed = threading.Event()
        # Closing one socket wakes the thread at the other, so that an idle process does not poll.
        self._closer, self._closing = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="asyncroute-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Wait at most five seconds for its end."""
        self._closed.set()
        self._closer.close()
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        with self._closing:
            self._listen()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                with self._engine.connect() as connection:
                    driver: Any = connection.connection.driver_connection
                    connection.detach()
                    connection.exec_driver_sql(f"LISTEN {self._channel}")
                    for call in self._calls.values():
                        call()
                    with selectors.DefaultSelector() as selector:
                        for source in (driver, self._closing):
                            selector.register(source, selectors.EVENT_READ)
                        while not self._closed.is_set():
                            for notification in driver.notifies(timeout=0):
                                self._on_notification(notification)
                            selector.select()
            except Exception as error:
                # SQLAlchemy and the driver raise errors of different classes.
                if not self._closed.is_set():
                    logger.warning(
                        "The LISTEN connection to PostgreSQL failed: %s. It is reopened; until "
                        "then the store is polled four times a second.",
                        type(error).__name__,
                    )
            self._closed.wait(RECONNECT_SECONDS)

    def _on_notification(self, notification: Notify) -> None:
        payload = notification.payload
        is_own = notification.pid in self._own_pids
        if payload in self._calls and not (is_own and payload in self._of_others):
            self._calls[payload]()
