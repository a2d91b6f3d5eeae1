"""The record of a task, and its states."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any

import msgspec

from .callbacks.model import NOT_STARTED, Shown
from .permissions import Permission
from .retries import Schedule


class State(StrEnum):
    """The state of a task, as clients see it."""

    NOT_STARTED = "NotStarted"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    ABORTED = "Aborted"

    @property
    def is_terminal(self) -> bool:
        """Whether a task never leaves this state."""
        return self in TERMINAL


TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.ABORTED})
UNFINISHED = frozenset(State) - TERMINAL

TRANSITIONS: dict[State, frozenset[State]] = {
    State.NOT_STARTED: frozenset({State.RUNNING, State.ABORTED}),
    State.RUNNING: TERMINAL | {State.NOT_STARTED},
    **dict.fromkeys(TERMINAL, frozenset()),
}
"""Maps each state to the states that can follow it. A restarted task returns to NotStarted."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_ERROR = 2000
MAX_MESSAGE = 500


class AsyncRouteTask(msgspec.Struct, frozen=True, gc=False):
    """An immutable record of a task at one revision.

    The fields of the JSON task object are attributes in snake case. Others (``endpoint``,
    ``owner``, ``epoch``, ``change``, …) are internal and may change.

    ``waiting_change``, ``started_change`` and ``completed_change`` are the change numbers of the
    transitions to NotStarted, Running and a terminal state. While a task is NotStarted,
    ``waiting_change`` is None, and ``change`` is the number of that transition.

    ``start_by_us`` is the time before which the first run must start. None: there is no limit, or
    the task has been restarted. ``start_at_us`` is the time before which no run, or no retry, may
    start.

    ``attempt`` is None before the first run, and in tasks without retries. While a task waits for a
    retry, it is the number of the next attempt.
    """

    id: str
    async_route_id: str
    endpoint: str
    state: State
    cancellable: bool
    user: str | None
    url: str
    method: str
    created_us: int
    started_us: int | None = None
    completed_us: int | None = None
    expires_us: int | None = None
    progress: float | None = None
    progress_message: str | None = None
    result_json: bytes | None = None
    error: str | None = None
    error_status: int | None = None
    stopping: bool = False
    permission_json: bytes | None = None
    timeout_us: int | None = None
    start_by_us: int | None = None
    start_at_us: int | None = None
    retention_us: int = 0
    on_loss: str = "abort"
    retry_json: bytes | None = None
    attempt: int | None = None
    last_error: str | None = None
    unique_key: str | None = None
    body_size: int = 0
    callback_json: bytes | None = None
    callback_state: str | None = None
    callback_attempts: int = 0
    owner: str | None = None
    epoch: int = 0
    restarts: int = 0
    revision: int = 1
    change: int = 0
    waiting_change: int | None = None
    started_change: int | None = None
    completed_change: int | None = None
    sse_group: str | None = None
    sse_url: str | None = None
    sse_result: bool = False

    @property
    def is_completed(self) -> bool:
        """Whether the task has reached a terminal state."""
        return self.state.is_terminal

    @property
    def creation_time(self) -> datetime:
        """When the request was accepted (an aware datetime in UTC)."""
        return moment(self.created_us)

    @property
    def starting_time(self) -> datetime | None:
        """When a worker process began to run the task."""
        return None if self.started_us is None else moment(self.started_us)

    @property
    def completed_time(self) -> datetime | None:
        """When the task reached its terminal state."""
        return None if self.completed_us is None else moment(self.completed_us)

    @property
    def expire_time(self) -> datetime | None:
        """When the task times out; None without a timeout or before the start."""
        return None if self.expires_us is None else moment(self.expires_us)

    @property
    def next_attempt_time(self) -> datetime | None:
        """When the next attempt starts at the earliest; None unless the task waits for a retry."""
        return moment(self.start_at_us) if self._waits_for_retry and self.start_at_us else None

    @property
    def retry(self) -> Schedule | None:
        """When failed attempts run again; None if they do not."""
        if self.retry_json is None:
            return None
        return msgspec.json.decode(self.retry_json, type=Schedule)

    @property
    def retries_left(self) -> int:
        """How often the task runs again if its next attempts fail."""
        return 0 if self.retry is None else self.retry.times + 1 - (self.attempt or 1)

    @property
    def _waits_for_retry(self) -> bool:
        return self.state is State.NOT_STARTED and self.attempt is not None

    @property
    def result(self) -> Any:
        """The return value of the view as JSON values; None if there is no result."""
        return None if self.result_json is None else msgspec.json.decode(self.result_json)

    @property
    def permission(self) -> Permission | None:
        """Who may read and write the task, including its user; None if the task has neither a user
        nor a permission from the route.
        """
        if self.user is None:
            return self.granted
        return (self.granted or Permission()).with_owner(self.user)

    @property
    def granted(self) -> Permission | None:
        """The permission from the route, without the task's user."""
        if self.permission_json is None:
            return None
        return msgspec.json.decode(self.permission_json, type=Permission)

    @property
    def callback(self) -> Shown | None:
        """The callback without its secrets; None if there is no callback."""
        if self.callback_json is None:
            return None
        return msgspec.json.decode(self.callback_json, type=Shown)

    def as_in(self, state: State) -> AsyncRouteTask:
        """Return the task as it was when it entered a state.

        :param state: NotStarted, Running, or the state that the task has now.
        """
        if state is self.state and state is not State.RUNNING:
            return self
        earlier = _AT_THE_START if state is State.RUNNING else _AT_THE_CREATION
        if state is State.NOT_STARTED and self.epoch <= 1:
            earlier = {**earlier, "attempt": None}  # the task had not started yet
        callback_state = None if self.callback_json is None else NOT_STARTED
        return msgspec.structs.replace(self, state=state, callback_state=callback_state, **earlier)

    def to_dict(self) -> dict[str, Any]:
        """Return the task object as clients see it, with PascalCase names and RFC 3339 times,
        without fields that do not apply.
        """
        wire = self.to_wire()
        if "Result" in wire:
            wire["Result"] = self.result
        return wire

    def to_wire(self) -> dict[str, Any]:
        """Return the task object for the JSON encoder, with the result as a
        :class:`msgspec.Raw`.
        """
        wire: dict[str, Any] = {
            "Id": self.id,
            "AsyncRouteId": self.async_route_id,
            "State": self.state.value,
            "IsCompleted": self.state.is_terminal,
            "Cancellable": self.cancellable,
            "CreationTime": rfc3339(self.created_us),
        }
        if self.started_us is not None:
            wire["StartingTime"] = rfc3339(self.started_us)
        if self.completed_us is not None:
            wire["CompletedTime"] = rfc3339(self.completed_us)
        if self.expires_us is not None:
            wire["ExpireTime"] = rfc3339(self.expires_us)
        if self.attempt is not None:
            wire["Attempt"] = self.attempt
            if self.last_error is not None:
                wire["LastError"] = self.last_error
            if self.start_at_us is not None and self._waits_for_retry:
                wire["NextAttemptTime"] = rfc3339(self.start_at_us)
        if self.user is not None:
            wire["User"] = self.user
        if self.progress is not None:
            whole = int(self.progress)
            wire["Progress"] = whole if self.progress == whole else self.progress
        if self.progress_message is not None:
            wire["ProgressMessage"] = self.progress_message
        if self.result_json is not None:
            wire["Result"] = msgspec.Raw(self.result_json)
        if self.error is not None:
            wire["Error"] = self.error
        if self.stopping:
            wire["Stopping"] = True
        wire["Url"] = self.url
        wire["Method"] = self.method
        if (permission := self.permission) is not None:
            wire["Permission"] = permission.to_dict()
        if (callback := self.callback) is not None:
            wire["CallbackSettings"] = callback.settings()
            wire["CallbackInfo"] = {
                "State": self.callback_state,
                "Tentative": self.callback_attempts,
                "Url": callback.url,
            }
        if self.sse_url is not None:
            group, url, result = self.sse_group, self.sse_url, self.sse_result
            wire["Sse"] = {"Group": group, "Url": url, "SendResult": result}
        return wire


_AT_THE_START: dict[str, Any] = {
    "completed_us": None, "progress": None, "progress_message": None, "result_json": None,
    "error": None, "error_status": None, "stopping": False, "callback_attempts": 0,
}  # fmt: skip
_AT_THE_CREATION: dict[str, Any] = {**_AT_THE_START, "started_us": None, "expires_us": None}


_skipped_us = 0


def now_us() -> int:
    return time.time_ns() // 1000 + _skipped_us


def skipped_us() -> int:
    """Return by how much `skip` has set this clock ahead."""
    return _skipped_us


def skip(microseconds: int) -> None:
    """Set the clock of this process ahead, or back again. Only `testing.Clock` does this."""
    global _skipped_us
    _skipped_us += microseconds


def moment(microseconds: int) -> datetime:
    """Convert microseconds since the epoch to an aware datetime in UTC."""
    return EPOCH + timedelta(microseconds=microseconds)


def rfc3339(microseconds: int) -> str:
    """Convert microseconds since the epoch to RFC 3339, with six decimals and ``Z``."""
    return f"{_second(microseconds // 1_000_000)}.{microseconds % 1_000_000:06d}Z"


@lru_cache(1024)
def _second(seconds: int) -> str:
    # A task's times are often in the same second. Without this cache, a get is 15 % slower.
    return (EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()
