"""The port of SQL databases: what the task store needs of connections, cursors and transactions.

`sqlite` and `engine` are its adapters. A database knows no table but those it is asked to make; the store knows no driver.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy.engine import Dialect

from ...errors import StoreUnavailable

logger = logging.getLogger("flask_asyncroute")


class Duplicate(Exception):
    """A row with this key exists; the transaction was taken back."""


class CommitUnknown(StoreUnavailable):
    """The connection was lost while a commit was under way: it may have happened or not."""


class Rows(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int:
        """How many rows it wrote."""
        ...

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        ...

    def fetchall(self) -> Sequence[Any]:
        """Return all rows that are left."""
        ...


class Cursor(Protocol):
    """What executes statements inside one transaction."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Rows:
        """Execute one statement, with its parameters in order."""
        ...


class Database(ABC):
    """Opens, lends and closes connections. Every method may be called from any thread.

    What the database cannot do now is raised as `StoreUnavailable`, with a log record that names the cause; a lost
    connection is replaced, and what only reads is then tried once more.
    """

    dialect: Dialect
    """What statements are compiled for; its parameters are positional."""
    label: str
    """How messages name the database; without a password."""
    lock_path: Path
    """Where workers of this host that share the database keep their locks."""

    @abstractmethod
    def fetch_one(self, sql: str, values: Sequence[Any]) -> Any:
        """Return the first row of a reading statement, or None."""

    @abstractmethod
    def fetch_all(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        """Return all rows of a reading statement."""

    @abstractmethod
    def write_one(self, sql: str, values: Sequence[Any]) -> Any:
        """Execute one writing statement as a transaction; return the row that it gives, or None.

        :raises Duplicate: where a row with that key exists.
        :raises CommitUnknown: see there.
        """

    @abstractmethod
    def write_apart(self, sql: str, values: Sequence[Any]) -> int:
        """As :meth:`write_one`, on a connection kept for this alone; return how many rows it wrote.

        Called by one thread only.
        """

    @abstractmethod
    def write(self) -> AbstractContextManager[Cursor]:
        """Return a context manager for one transaction that writes; it is taken back where the block raises.

        :raises Duplicate: where a row with that key exists.
        :raises CommitUnknown: see there.
        """

    @abstractmethod
    def read(self) -> AbstractContextManager[Cursor]:
        """Return a context manager for reads that all see the database as it is at the first."""

    @abstractmethod
    def version(self) -> int | None:
        """Return a number that differs from the last call's where somebody has committed in between; None: not known.

        Called by one thread only.
        """

    @abstractmethod
    def lock_schema(self, cursor: Cursor) -> None:
        """Keep others from making or changing tables until the transaction ends."""

    @abstractmethod
    def has_table(self, cursor: Cursor, name: str) -> bool:
        """Return whether there is a table with this name."""

    @abstractmethod
    def tend(self) -> None:
        """Do upkeep, off the way of requests."""

    @abstractmethod
    def close(self) -> None:
        """Close what is not lent out; the next use opens it again."""

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """Log what went wrong and return what the client hears of it."""
        self._log(error)
        return StoreUnavailable(UNAVAILABLE, retry_after=5)

    def unknown(self, error: BaseException) -> CommitUnknown:
        """As :meth:`unavailable`, where a commit was under way."""
        self._log(error)
        return CommitUnknown(UNAVAILABLE, retry_after=5)

    def _log(self, error: BaseException) -> None:
        logger.error("The store cannot be used: %s: %s (ASYNCROUTE_STORE, %s)", type(error).__name__, error, self.label)


UNAVAILABLE = "The task store cannot be used at the moment. Try again."
