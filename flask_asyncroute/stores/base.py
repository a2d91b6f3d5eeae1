"""The port of all stores. Its docstrings are the contract; one test suite proves it on every adapter.

Every method may be called from any thread. Each write of a task is one transaction and raises the store's change number,
in the order of the commits; numbers may be left out. What the underlying storage cannot do now is raised as `StoreUnavailable`;
where it may have done it all the same, as `CommitUnknown`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..delivery import Delivery
from ..execution import ViewEvent
from ..query import Condition, Position, Sort
from ..snapshot import Body
from ..start_key import StartKey
from ..states import State
from ..task import AsyncRouteTask
from .events import Events
from .outbox import Outbox

AHEAD_US = 2_000_000
LARGE_RESULT = 64 * 1024
"""Lists leave out results over this many bytes."""


@dataclass(frozen=True, slots=True)
class Expect:
    """What a task must be for a write to happen (compare-and-set).

    :param states: it is in one of these.
    :param owner: this worker holds it; None: whoever.
    :param epoch: this is the claim that runs it; None: whichever.
    :param stopping: its code still runs, or does not; None: either.
    """

    states: tuple[State, ...]
    owner: str | None = None
    epoch: int | None = None
    stopping: bool | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that a worker has just taken, with the request it runs on (see `snapshot.encode`)."""

    task: AsyncRouteTask
    request: bytes


@dataclass(frozen=True, slots=True)
class Readers:
    """Under which names a caller may list tasks: any task that fits one of these.

    :param user: tasks that this user owns.
    :param granted: tasks that were granted to one of these (kind, name).
    :param anonymous: tasks that nobody owns.
    """

    user: str | None = None
    granted: tuple[tuple[str, str], ...] = ()
    anonymous: bool = False


@dataclass(frozen=True, slots=True)
class News:
    """What was written since a change number: the newest number, the tasks, oldest change first, and the ids of those
    whose views have sent events.
    """

    change: int
    tasks: Sequence[AsyncRouteTask]
    sent: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that runs tasks, as other processes know it.

    :param name: what the tasks that it runs have as ``owner``.
    :param place: names the lock file that it uses (see `presence`); empty where it has none.
    :param number: the byte of that file which it keeps locked while it lives.
    :param process: what `locks.this_process` told there.
    :param endpoints: whose tasks it can run.
    :param beat: how often it has said that it lives.
    """

    name: str
    place: str
    number: int
    process: str
    endpoints: frozenset[str]
    beat: int = 0


class Workers(ABC):
    """Keeps which workers of one namespace there are, and tells what each holds. None of this is a change of a task."""

    lock_path: Path
    """The file in which those of this host keep their locks, see `locks`."""

    @abstractmethod
    def enter(self, worker: Worker) -> None:
        """List a worker, in the place of one with its name."""

    @abstractmethod
    def beat(self, name: str) -> bool:
        """Count one beat more, without waiting for any other use of the store; return whether the worker is listed."""

    @abstractmethod
    def listed(self) -> list[Worker]:
        """Return all that have entered and not left."""

    @abstractmethod
    def leave(self, name: str) -> None:
        """List a worker no longer, and let go of the callbacks that it holds: others send them."""

    @abstractmethod
    def owners(self) -> list[str]:
        """Return the names under which tasks run, are Stopping, or wait for nobody else, or callbacks are being sent; whether
        they are listed or not.
        """

    @abstractmethod
    def held(self, name: str) -> list[AsyncRouteTask]:
        """Return the tasks that run, are Stopping, or wait for nobody else, under this name."""

    @abstractmethod
    def wanted(self) -> list[str]:
        """Return the endpoints whose tasks are waiting, each once."""


class Listener(Protocol):
    """What listens to a store until it is closed."""

    def close(self) -> None:
        """Listen no longer; may be called from any thread."""
        ...


class TaskStore(ABC):
    """Keeps the tasks, their requests and the shared values of one namespace."""

    workers: Workers | None = None
    """Who else reads and writes the same tasks; None where no other process does."""
    outbox: Outbox
    """The callbacks of these tasks."""

    @property
    def is_shared(self) -> bool:
        """Whether other processes read and write the same tasks."""
        return self.workers is not None

    @abstractmethod
    def open(self) -> None:
        """Make what is missing, in this process; called again it does nothing.

        :raises ConfigurationError: where the storage can never work as it is.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and files; the next call opens them again."""

    def forget(self) -> None:  # noqa: B027 - most leave nothing behind that would be used again
        """Leave what is open to the parent process; called in a child after a fork, which uses this store no more."""

    @abstractmethod
    def add(
        self,
        task: AsyncRouteTask,
        request: bytes,
        body: Body | None,
        grants: Collection[tuple[str, str]],
        key: StartKey | None = None,
        quota: int | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        """Store a new task with its request, all or nothing.

        The body belongs to the store from here on.

        :param grants: each (kind, name) that may list the task beside its owner.
        :param key: kept until the task is removed; no two tasks are started with one.
        :param quota: how many unfinished tasks the user of this one may have, this one included; None: any number.
        :param delivery: what is to be sent when the task has ended.
        :raises KeyTaken: where a task was started with a key of that name.
        :raises TooManyTasks: where the user has as many.
        :raises IdTaken: where a task has that id.
        """

    @abstractmethod
    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        """Return the task that was started with the key of this name, as it is now, and the key's fingerprint."""

    @abstractmethod
    def get(self, task_id: str) -> AsyncRouteTask | None:
        """Return a task as it is now."""

    @abstractmethod
    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        """Move a task from NotStarted to Running under ``owner``, with a new epoch; None where it is not waiting (any more).

        StartingTime is ``now_us``, or CreationTime where that is later; ExpireTime follows from the task's timeout.
        """

    @abstractmethod
    def body(self, task_id: str) -> Body:
        """Return the body of a claimed task's request, for the caller to close."""

    @abstractmethod
    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        """Write ``values`` (by record field) and raise the revision, if the task is as expected; return the new record.

        A terminal state takes the request and body out of the store and makes the task's callback due; ``completed_us`` comes
        with it, and never before the start. NotStarted begins a new run: what the last one has told stays among its events.

        :return: None where the task is unknown or not as expected; nothing is written then.
        """

    @abstractmethod
    def add_events(self, task_id: str, expect: Expect, sent: Sequence[ViewEvent]) -> bool:
        """Add what the run with the expected epoch has sent, if the task is as expected; return whether it is.

        What was added before, by its number, is not added again.

        Of more than `events.MAX_EVENTS` of a task the older ones may be removed. No revision is raised.

        :param sent: one at the least, in order.
        """

    @abstractmethod
    def delete(self, task_id: str, expect: Expect) -> bool:
        """Remove a task that is as expected, and its callback with it; return whether it did."""

    @abstractmethod
    def query(
        self,
        conditions: Sequence[Condition],
        sort: Sort,
        limit: int,
        position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:
        """Return the first ``limit`` tasks that fit, without results over 64 KiB.

        :param position: only what comes after it in the order of ``sort``.
        :param readers: only what they may list; None: all.
        """

    @abstractmethod
    def waiting(self, most: Mapping[str, int], before_us: int) -> list[tuple[str, str]]:
        """Return (id, endpoint) of tasks that are NotStarted since before ``before_us``, the oldest first; also of those from
        after :data:`AHEAD_US` later, when a clock was ahead that has been set back.

        :param most: of which endpoints, and how many of each.
        """

    @abstractmethod
    def outlived(self, now_us: int, limit: int) -> list[str]:
        """Return ids of finished tasks whose retention is over, whose code has ended, and whose callback is not pending."""

    @abstractmethod
    def news(self, since: int) -> News:
        """Return what was written after the change number ``since``; cheap where nothing was. One thread at a time.

        :param since: -1 to learn the newest number alone.
        """

    @abstractmethod
    def newest(self) -> int:
        """Return the newest change number."""

    @abstractmethod
    def events(self, since: int, most: int, task_id: str | None = None, group: str | None = None) -> Events:
        """Return the first ``most`` events after the change number ``since``, of tasks that have an Sse group.

        :param task_id: those of this task alone.
        :param group: those of this group alone.
        """

    def listen(self, heard: Callable[[], None]) -> Listener | None:
        """Have ``heard`` called, in some thread, soon after anybody has written; None where the store cannot tell.

        What is missed while a connection is lost is not told of later: ask for the news now and then all the same.
        """
        return None

    @abstractmethod
    def secret(self) -> bytes:
        """Return the namespace's random key (32 bytes), made with the tables and the same in all processes."""

    @abstractmethod
    def read_value(self, key: str) -> tuple[bytes, int] | None:
        """Return a shared value and its version."""

    @abstractmethod
    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        """Write a shared value, or remove it (None).

        :param version: write only if this is the present version (0: only if there is none); None: in any case.
        :return: whether it was written or, for a removal, was there.
        """

    @abstractmethod
    def value_keys(self) -> Iterable[str]:
        """Return the keys of all shared values, sorted."""

    def tend(self) -> None:  # noqa: B027
        """Do the storage's own upkeep, off the way of requests; called about every second by a runner."""
