"""The store interfaces. One test suite checks all implementations against these docstrings.

Methods are thread-safe unless noted. Each write to a task is one transaction, which increases the
store's change number. Change numbers follow the commit order, with gaps. A method raises
`StoreUnavailable` if the storage is unavailable, and `CommitUnknown` if the connection failed
during a commit, so that its success is unknown.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from ..callbacks.model import Delivery
from ..errors import ConfigurationError
from ..query import Condition, Position, Sort
from ..snapshot import Body
from ..task import AsyncRouteTask, State, now_us
from .outbox import Outbox

AHEAD_US = 2_000_000
LARGE_RESULT = 64 * 1024  # lists omit larger results
MAX_EVENTS = 1000  # at least this many of a task's latest view events are kept
STATE, PROGRESS = "task.state", "task.progress"


@dataclass(frozen=True, slots=True)
class Expect:
    """Conditions on a task before a write (compare-and-set). None matches any value."""

    states: tuple[State, ...]  # the task's state is one of these
    owner: str | None = None  # the name of the worker that claimed the task
    epoch: int | None = None  # the number of the claim
    stopping: bool | None = None  # whether the code still runs after an abort


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that a worker has just claimed, and its request from `snapshot.encode`."""

    task: AsyncRouteTask
    request: bytes


@dataclass(frozen=True, slots=True)
class Readers:
    """The tasks that a caller may list: those that match at least one field."""

    user: str | None = None
    granted: tuple[tuple[str, str], ...] = ()  # granted to any of these (kind, name) pairs
    anonymous: bool = False  # tasks with neither a user nor a permission


@dataclass(frozen=True, slots=True)
class StartKey:
    """The ``Idempotency-Key`` of a request."""

    name: str  # hash of the caller, route and key: 64 characters
    fingerprint: str  # hash of the method, URL and body: 64 characters


class Waiting(NamedTuple):
    """A NotStarted task."""

    id: str
    endpoint: str
    due_us: int  # its start time, or else its creation time


@dataclass(frozen=True, slots=True)
class ViewEvent:
    name: str
    data: bytes  # JSON on one line
    number: int  # position among a run's events, from 1


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a task, for streams.

    ``task`` is the current record or, in a `STATE` event without ``data``, the record after the
    change. The record has no result.
    """

    change: int  # only the latest progress has an event
    name: str  # `STATE`, `PROGRESS`, or a view event's name
    task: AsyncRouteTask
    data: bytes | None = None  # JSON from the view, or of the task in an earlier run


@dataclass(frozen=True, slots=True)
class Events:
    """All selected events up to ``change``, in order."""

    change: int
    events: Sequence[Event]


@dataclass(frozen=True, slots=True)
class Changes:
    change: int  # the ``since`` to pass to the next call
    tasks: Sequence[AsyncRouteTask]  # oldest change first
    sent: Collection[str] = ()  # ids of tasks with new view events


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process, as the store lists it."""

    name: str  # stored as ``owner`` of its tasks
    lock_file: str  # the name of its lock file, see `heartbeat`; empty: no file
    number: int  # the byte that it locks in the lock file
    process: str  # from its `process_lock.this_process()`
    endpoints: frozenset[str]  # the endpoints whose tasks it runs
    beat: int = 0  # number of heartbeats written
    views: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """From its `app_identity.views_of()`, by endpoint of its app; empty if unknown."""


class TaskStore(ABC):
    """Stores the tasks, requests and shared values of one namespace."""

    is_shared: ClassVar[bool] = False
    """Whether the store is a :class:`SharedTaskStore`, which several processes can use at once."""
    label: str  # its name in messages, without password
    outbox: Outbox

    @abstractmethod
    def open(self) -> None:
        """Create missing files, tables and keys. Further calls in a process do nothing.

        :raises ConfigurationError: if the storage cannot work as configured.
        """

    @abstractmethod
    def close(self) -> None:
        """Close connections and files. The next call reopens them."""

    @abstractmethod
    def secret(self) -> bytes:
        """Return the namespace's random 32-byte secret, the same in all processes."""

    @abstractmethod
    def add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None,
        grants: Collection[tuple[str, str]], key: StartKey | None = None, quota: int | None = None,
        delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        """Store a new task and its request in one transaction; then close the body.

        :param grants: (kind, name) pairs that may list the task, besides its user.
        :param key: the idempotency key, stored until the task is removed.
        :param quota: maximum unfinished tasks of the user, including this one; None: no limit.
        :param delivery: the callback to send when the task ends.
        :raises UniqueTaken: if an unfinished task has the task's ``unique_key``.
        :raises KeyTaken: if another task has a key with this name.
        :raises TooManyTasks: if the user would exceed the quota.
        :raises IdTaken: if another task has this id.
        """

    @abstractmethod
    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        """Return the task that was started with a key, and the fingerprint of its request; None if
        the key is unknown.

        :param key_name: the name of a `StartKey`, or the ``unique_key`` of an unfinished task,
            which has an empty fingerprint.
        """

    @abstractmethod
    def count_unfinished(self, user: str, limit: int) -> int:
        """Return the number of a user's unfinished tasks, counted up to ``limit``."""

    @abstractmethod
    def get(self, task_id: str) -> AsyncRouteTask | None:
        """Return a task's current record; None if the id is unknown."""

    def now_us(self) -> int:
        """Return the time of the clock that all processes share, for ``start_at_us``."""
        return now_us()

    @abstractmethod
    def claim(self, task_id: str, owner: str, now_us: int) -> Claim | None:
        """Move a task from NotStarted to Running, with this ``owner`` and a new epoch. Return None
        if the task is not NotStarted, if its ``start_at_us`` is after the store's :meth:`now_us`,
        or if its ``start_by_us`` is not after ``now_us``.

        A task with retries that has no attempt yet gets the attempt 1. StartingTime is the later of
        ``now_us`` and CreationTime. ExpireTime is StartingTime plus the timeout.
        """

    @abstractmethod
    def body(self, task_id: str) -> Body:
        """Return a claimed task's request body. The caller must close it."""

    @abstractmethod
    def update(self, task_id: str, expect: Expect, values: dict[str, Any]) -> AsyncRouteTask | None:
        """If the task matches ``expect``, write ``values`` (by record field) and increment the
        revision.

        Writing a terminal state removes the request and body, releases the ``unique_key``, and
        makes the callback due. Then also pass ``completed_us``; if it is before StartingTime,
        StartingTime is stored. Writing NotStarted begins a new run; the previous run's states
        remain as events.

        :return: the new record; None, with nothing written, if the task does not match.
        """

    @abstractmethod
    def add_events(
        self, task_id: str, expect: Expect, sent: Sequence[ViewEvent]
    ) -> Sequence[int] | None:
        """Store view events of the run with the expected epoch. Return their change numbers; None
        if the task does not match ``expect``.

        Events whose number is already stored are skipped. If over :data:`MAX_EVENTS` are stored,
        the oldest can be removed. The revision does not change.

        :param sent: at least one event, in order.
        """

    @abstractmethod
    def delete(self, task_id: str, expect: Expect) -> str | None:
        """Remove a task and its callback if the task matches ``expect``.

        :return: the task's endpoint, or None if the task does not match; an empty string if the
            connection failed during the commit and the task is gone: this call or another process
            has removed it.
        """

    @abstractmethod
    def query(
        self, conditions: Sequence[Condition], sort: Sort, limit: int, position: Position | None,
        readers: Readers | None,
    ) -> list[AsyncRouteTask]:  # fmt: skip
        """Return the first ``limit`` tasks that meet all conditions. A record has no result if the
        result is larger than 64 KiB.

        :param position: return only tasks after this position in ``sort`` order.
        :param readers: return only tasks that these readers may list; None: all tasks.
        """

    @abstractmethod
    def past_retention(self, now_us: int, limit: int) -> list[str]:
        """Return up to ``limit`` ids of finished tasks whose retention has expired, whose code has
        ended, and whose callback is not pending.
        """

    @abstractmethod
    def not_started_in_time(self, now_us: int, owner: str, limit: int) -> list[AsyncRouteTask]:
        """Return up to ``limit`` NotStarted tasks whose ``start_by_us`` has been reached, the
        earliest first.

        Tasks that only one process can run are returned only to that process, the ``owner``. If the
        clock was set back after a task's creation, it is returned later by as much.
        """

    @abstractmethod
    def waiting(
        self, most: Mapping[str, int], before_us: int | None, start_before_us: int | None = None,
        owner: str = "",
    ) -> list[Waiting]:  # fmt: skip
        """Return NotStarted tasks, the earliest due first: those created before ``before_us``
        (None: no such tasks), and those with a start time before ``start_before_us`` (None:
        ``before_us``). Omit tasks that only another process than ``owner`` can run.

        Tasks created over :data:`AHEAD_US` after ``before_us`` are included: the clock was set back
        after their creation. A store of a single process may omit all tasks without a start time.

        :param most: the maximum number of tasks per endpoint. Tasks of other endpoints are omitted.
        """

    @abstractmethod
    def newest(self) -> int:
        """Return the newest change number."""

    @abstractmethod
    def events(
        self, since: int, most: int, task_id: str | None = None, group: str | None = None
    ) -> Events:
        """Return the first ``most`` events after ``since``, optionally only of one task or Sse
        group. Events of tasks without an Sse group are omitted.
        """

    @abstractmethod
    def read_value(self, key: str) -> tuple[bytes, int] | None:
        """Return a shared value and its version; None if there is no such key."""

    @abstractmethod
    def write_value(self, key: str, value: bytes | None, version: int | None) -> bool:
        """Write a shared value, or remove it (None).

        :param version: the required current version (0: no such key); None: any version.
        :return: whether a value was written or removed.
        """

    @abstractmethod
    def value_keys(self) -> Iterable[str]:
        """Return the sorted keys of all shared values."""


class Joined(Protocol):
    """Adds tasks in a transaction of the app. Not thread-safe."""

    def add(
        self, task: AsyncRouteTask, request: bytes, body: Body | None,
        grants: Collection[tuple[str, str]], delivery: Delivery | None = None,
    ) -> None:  # fmt: skip
        """Store a new, unpublished task; see :meth:`TaskStore.add` for parameters and errors. After
        an error, the transaction can continue.
        """

    def started_with(self, key_name: str) -> tuple[AsyncRouteTask, str] | None:
        """As :meth:`TaskStore.started_with`. Also finds tasks that this transaction has added."""


class SharedTaskStore(TaskStore):
    """A store that several processes can use at once, with a list of their workers."""

    is_shared = True
    workers: Workers
    has_unpublished: bool = False
    """Whether :meth:`joined` is supported, so that there can be unpublished tasks."""

    def joined(self, connection: Any) -> Joined:
        """Return an object that adds tasks in the open transaction of ``connection``.

        The tasks are *unpublished*: they have no change number (``change`` is 0), because a number
        must follow the commit order. They cannot start, and :meth:`waiting` omits them, until
        :meth:`publish` is called after the commit.

        :param connection: an SQLAlchemy Connection, Session or scoped_session.
        :raises ConfigurationError: if the store does not support this, or if the connection is not
            in a transaction on the store's database.
        :raises TypeError: if ``connection`` is something else.
        """
        raise ConfigurationError(
            f"submit(connection=…) needs a PostgreSQL store, but ASYNCROUTE_STORE is {self.label}. "
            "Call submit() without a connection after your commit."
        )

    def unpublished(self, limit: int) -> list[AsyncRouteTask]:
        """Return up to ``limit`` unpublished tasks that are committed, the oldest first."""
        return []

    def publish(self, task_id: str) -> AsyncRouteTask | None:
        """Give an unpublished task its change number. Return the new record; None if the task is
        already published or does not exist.
        """
        return None

    @abstractmethod
    def changes_since(self, since: int, worker: str | None = None) -> Changes:
        """Return the changes after the change number ``since``.

        :param since: -1 to read only the newest number. If it exceeds the newest number, as after a
            restore of the database, all tasks are returned.
        :param worker: return only two kinds of changes: stops of the tasks of the worker with this
            name, and tasks that another process has taken from it or has ended. That is enough
            while no client waits in its process.
        """

    def last_assigned(self) -> int:
        """Return the highest change number that any process has assigned so far. Unlike
        :meth:`newest`, this does not wait until all changes up to this number are committed.
        """
        return self.newest()

    def keep_notifying(self, seconds: float) -> None:  # noqa: B027 - optional
        """For ``seconds``, make each write of any process send a notification. At other times,
        stores can send notifications only for stops; see :meth:`listen`.
        """

    def listen(
        self,
        notify: Callable[[], None],
        submitted: Callable[[], None] = lambda: None,
        delayed: Callable[[], None] = lambda: None,
    ) -> Listener | None:
        """Begin to call ``notify``, on any thread, soon after another process has stopped a task.
        While :meth:`keep_notifying` applies, it is also called after each other write of another
        process. Call ``submitted`` soon after unpublished tasks of any process are committed, and
        ``delayed`` soon after :meth:`add` has stored a task with a start time, which can be now.

        Return a listener to close, or None if the store sends no notifications.

        Notifications are lost while the connection is down, so poll :meth:`changes_since` as well.
        """
        return None

    def maintain(self) -> None:  # noqa: B027 - optional
        """Maintain the storage. Called about once a second, never on a thread that serves a
        request.
        """

    def forget(self) -> None:  # noqa: B027 - optional
        """In a forked child, drop all connections without closing them, because the parent process
        uses them. The child then discards the store.
        """


class Listener(Protocol):
    """Calls a function for each notification until it is closed."""

    def close(self) -> None:
        """Stop the calls. Thread-safe."""


class Workers(ABC):
    """Lists a namespace's workers and the tasks that they hold. Does not change tasks.

    A worker *holds* the tasks that it has claimed and whose code still runs, and the NotStarted
    tasks that only it can run.
    """

    lock_path: Path
    """The lock file of the workers on this host; see `process_lock`."""

    @abstractmethod
    def enter(self, worker: Worker) -> None:
        """Add a worker, replacing any worker of the same name."""

    @abstractmethod
    def beat(self, name: str) -> bool:
        """Record a heartbeat, even if all pooled connections are in use; return whether the worker
        is listed.
        """

    @abstractmethod
    def listed(self) -> list[Worker]:
        """Return all listed workers."""

    @abstractmethod
    def leave(self, name: str) -> None:
        """Remove a worker; release its callbacks, so that other workers can send them."""

    @abstractmethod
    def owners(self) -> list[str]:
        """Return the names of all workers that hold tasks or callbacks, also of those that
        :meth:`listed` does not return.
        """

    @abstractmethod
    def held(self, name: str) -> list[AsyncRouteTask]:
        """Return the tasks that a worker holds."""

    @abstractmethod
    def wanted(self) -> list[str]:
        """Return the distinct endpoints of the NotStarted tasks."""


def first_due(waiting: Iterable[Waiting], most: Mapping[str, int]) -> list[Waiting]:
    """Return the tasks with the earliest ``due_us`` first, at most ``most[endpoint]`` of each
    endpoint.
    """
    left = dict(most)
    found = []
    for task in sorted(waiting, key=lambda task: task.due_us):
        if left.get(task.endpoint, 0) > 0:
            left[task.endpoint] -= 1
            found.append(task)
    return found


def can_start(task: AsyncRouteTask, now_us: int, store_now_us: int) -> bool:
    """Return whether a task can be claimed at this time; see `TaskStore.claim`. Unpublished tasks
    cannot; see :meth:`SharedTaskStore.joined`.
    """
    if task.state is not State.NOT_STARTED:
        return False
    is_late = task.start_by_us is not None and task.start_by_us <= now_us
    is_early = task.start_at_us is not None and task.start_at_us > store_now_us
    return task.change > 0 and not (is_late or is_early)
