"""The interface of SQL databases: connections, cursors and transactions.

`sqlite` and `postgresql` implement it. They do not depend on the tables, and the store does not
depend on a driver.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError

from ...errors import CommitUnknown, ConfigurationError, StoreUnavailable
from ...task import now_us
from ..base import Listener

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")

LOG_AGAIN_SECONDS = 60.0  # Seconds until the same error is logged again.
UNAVAILABLE = "The task store is unavailable at the moment. Try again."


class Duplicate(Exception):
    """A row with the same key exists. The transaction was rolled back."""


class Rows(Protocol):
    """The result of a statement, as in PEP 249. Each row has its columns as attributes."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> Sequence[Any]: ...


class Cursor(Protocol):
    """Executes statements inside one transaction."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Rows: ...


class Database(ABC):
    """Executes statements and transactions in a database. Thread-safe unless noted.

    If the database is unavailable, a method logs the cause and raises `StoreUnavailable`. If only
    the connection was lost, the method first retries on a new connection. A write that was possibly
    committed is not retried. The method then raises `CommitUnknown`; see :func:`ensure_written`.
    """

    dialect: Dialect
    """The SQLAlchemy dialect with which statements are compiled. It uses named parameters."""
    label: str
    """The name of the database in messages. It contains no password."""
    can_join: ClassVar[bool] = False
    """Whether the app's own transactions can add tasks; see `joined`."""
    _logged = ""
    _log_again_at = 0.0
    lock_path: Path
    """The path of a lock file for the worker processes on this host that share the database."""

    @abstractmethod
    def fetch_one(self, sql: str, values: Mapping[str, Any]) -> Any:
        """Execute a query and return its first row, or None."""

    @abstractmethod
    def fetch_all(self, sql: str, values: Mapping[str, Any]) -> Sequence[Any]:
        """Execute a query and return all its rows."""

    @abstractmethod
    def write_one(self, sql: str, values: Mapping[str, Any]) -> Any:
        """Execute one write statement as a transaction. Return its first row, or None.

        :raises Duplicate: if a row with this key exists.
        :raises CommitUnknown: if the connection was lost after the statement was sent.
        """

    @abstractmethod
    def write_unpooled(self, sql: str, values: Mapping[str, Any]) -> int:
        """Execute a write statement and return the number of changed rows.

        It does not wait for a pooled connection, and can be executed twice. Call this from one
        thread only.
        """

    @abstractmethod
    def write(self, work: Callable[[Cursor], T]) -> T:
        """Call ``work`` in one write transaction and return its result.

        If ``work`` raises an exception, the transaction is rolled back.

        :param work: can be called again, so it must use only its cursor.
        :raises Duplicate: if a row with this key exists.
        :raises CommitUnknown: if the connection was lost during the commit.
        """

    @abstractmethod
    def read(self, work: Callable[[Cursor], T]) -> T:
        """Call ``work`` on one snapshot of the database and return its result.

        :param work: can be called again. It must use only its cursor, because nested reads could
            deadlock.
        """

    def now_us(self) -> int:
        """Return the time of the clock that all processes share."""
        return now_us()

    def listen(
        self, channel: str, calls: Mapping[str, Callable[[], None]], of_others: Container[str]
    ) -> Listener | None:
        """Call the function of a payload in ``calls`` for each later notification with this payload
        on a channel.

        :param of_others: the payloads for which only notifications of other processes count.
        :return: an object that stops this; None if the database sends no notifications.
        """
        return None

    @abstractmethod
    def lock_schema(self, cursor: Cursor) -> None:
        """Prevent other processes from creating tables until the transaction ends."""

    @abstractmethod
    def has_table(self, cursor: Cursor, name: str) -> bool:
        """Check whether a table with this name exists."""

    def maintain(self) -> None:  # noqa: B027 - optional
        """Run regular maintenance. This is never called on a thread that serves a request."""

    @abstractmethod
    def close(self) -> None:
        """Close all idle connections. Later calls open new connections."""

    def forget(self) -> None:  # noqa: B027 - optional
        """Drop all connections without closing them. Call this in a child process after a fork."""

    @abstractmethod
    def remedy(self, error: BaseException) -> str:
        """Return a sentence for the log that explains how to fix the cause of an error."""

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """Log an error of the database. Return the exception that the caller must raise."""
        self._log(error)
        return StoreUnavailable(UNAVAILABLE, retry_after=5)

    def unknown(self, error: BaseException) -> CommitUnknown:
        """Log an error of a commit. Return the exception that the caller must raise."""
        self._log(error)
        return CommitUnknown(UNAVAILABLE, retry_after=5)

    def _log(self, error: BaseException) -> None:
        # Log an error only once a minute: background jobs retry several times a second.
        text, now = f"{type(error).__name__}: {error}", time.monotonic()
        if text == self._logged and now < self._log_again_at:
            return
        self._logged, self._log_again_at = text, now + LOG_AGAIN_SECONDS
        logger.error(
            "The store cannot be used: %s: %s (ASYNCROUTE_STORE, %s). %s",
            type(error).__name__, error, self.label, self.remedy(error),
        )  # fmt: skip


def ensure_written(write: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Call ``write`` and return its result, even if the connection is lost during the commit.

    If ``write`` raises `CommitUnknown`, ``find`` checks whether the commit succeeded. If it did
    not, ``write`` is called again.

    :param write: returns a true value if it has changed something.
    :param find: returns the result of the successful ``write``; None if its commit failed.
    :raises StoreUnavailable: if the database is unavailable.
    :raises CommitUnknown: if the database is still unavailable after the lost commit. It is unknown
        whether the commit succeeded.
    """
    try:
        return write()
    except CommitUnknown:
        pass
    try:
        return _ensured(write, find)
    except CommitUnknown:
        raise
    except StoreUnavailable as error:
        # The first commit can have succeeded, so the caller must not take the write for failed.
        raise CommitUnknown(UNAVAILABLE, retry_after=5) from error


def _ensured(write: Callable[[], T], find: Callable[[], T | None]) -> T:
    found = find()
    if found is not None:
        return found
    # The server may still be executing the first write, because it notices late that the client has
    # disconnected. If the first write commits first, the second changes nothing or is refused,
    # for example because the first has taken the key.
    try:
        done = write()
    except StoreUnavailable:
        raise
    except Exception:
        found = find()
        if found is None:
            raise
        return found
    found = None if done else find()
    return done if found is None else found


def read_url(label: str, value: str) -> URL:
    """Parse the URL of a database.

    :raises ConfigurationError: if the URL is invalid. The message does not show the URL, because it
        can contain a password.
    """
    try:
        return make_url(value)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"{label} is not a valid URL; check its port, and percent-encode special characters."
        ) from None
