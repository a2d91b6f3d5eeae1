"""The port of SQL databases: what the task store needs of connections, cursors and transactions.

`sqlite` and `engine` are its adapters. A database knows no table but those it is asked to make; the store knows no driver.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy.engine import Dialect

from ...errors import CommitUnknown, StoreUnavailable
from ..base import Listener

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")


class Duplicate(Exception):
    """A row with this key exists; the transaction was taken back."""


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
    def open(self, look: Callable[[Cursor], T | None], make: Callable[[Cursor], T]) -> T:
        """Begin with the database that is there now, and with no other from here on.

        :param look: reads what there is to know of it; None where something is missing.
        :param make: makes what is missing, in a transaction that writes.
        :return: what one of them has.
        """

    @abstractmethod
    def is_replaced(self) -> bool:
        """Return whether there is another database than the one that was opened; quick enough for every request."""

    @abstractmethod
    def write(self, work: Callable[[Cursor], T]) -> T:
        """Return what ``work`` does in one transaction that writes; it is taken back where ``work`` raises.

        :param work: called again where a connection was lost before the commit: it does nothing but to use its cursor.
        :raises Duplicate: where a row with that key exists.
        :raises CommitUnknown: see there.
        """

    @abstractmethod
    def read(self, work: Callable[[Cursor], T]) -> T:
        """Return what ``work`` reads; all of it sees the database as it is at the first. It may be called again."""

    @abstractmethod
    def version(self) -> Hashable:
        """Return a value that differs from the last call's where somebody has committed in between; None: not known.

        Called by one thread only.
        """

    def listen(self, channel: str, payload: str, heard: Callable[[], None]) -> Listener | None:
        """Have ``heard`` called when the database tells ``payload`` on a channel; None where it tells nothing."""
        return None

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

    def forget(self) -> None:  # noqa: B027 - most have nothing that would be used again
        """Leave what is open to the parent process; called in a child after a fork, which uses this object no more."""

    @abstractmethod
    def remedy(self, error: BaseException) -> str:
        """Return what an operator can do about an error, as a sentence."""

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """Log what went wrong and return what the client hears of it."""
        self._log(error)
        return StoreUnavailable(UNAVAILABLE, retry_after=5)

    def unknown(self, error: BaseException) -> CommitUnknown:
        """As :meth:`unavailable`, where a commit was under way."""
        self._log(error)
        return CommitUnknown(UNAVAILABLE, retry_after=5)

    def _log(self, error: BaseException) -> None:
        logger.error(
            "The store cannot be used: %s: %s (ASYNCROUTE_STORE, %s). %s",
            type(error).__name__, error, self.label, self.remedy(error),
        )  # fmt: skip


UNAVAILABLE = "The task store cannot be used at the moment. Try again."
