"""The record of a task and its wire form.

Stores make records, everybody reads them, nobody changes one: a change is a new record from the store. Times are kept as
whole microseconds since the epoch (UTC), so that every store orders and compares them alike; JSON values as UTF-8 bytes.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import msgspec

from .delivery import NOT_STARTED, Shown
from .permissions import Permission
from .states import State

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_ERROR = 2000
MAX_MESSAGE = 500


class AsyncRouteTask(msgspec.Struct, frozen=True):
    """One task as it stood at ``revision``.

    Frozen. The fields of the task object are here in snake case: those below and the properties; what else a record
    holds (``endpoint``, ``owner``, ``epoch``, ``change``, …) is for the package itself and may change.

    ``waiting_change``, ``started_change`` and ``completed_change`` are the numbers of the changes that brought it to its
    states. While it waits, ``waiting_change`` is None: it is ``change`` then.
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
    retention_us: int = 0
    on_loss: str = "abort"
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
        """When the request was accepted (aware, UTC)."""
        return moment(self.created_us)

    @property
    def starting_time(self) -> datetime | None:
        """When a worker began to run it."""
        return None if self.started_us is None else moment(self.started_us)

    @property
    def completed_time(self) -> datetime | None:
        """When it reached its terminal state."""
        return None if self.completed_us is None else moment(self.completed_us)

    @property
    def expire_time(self) -> datetime | None:
        """When it will be aborted, if it still runs."""
        return None if self.expires_us is None else moment(self.expires_us)

    @property
    def result(self) -> Any:
        """What the view returned, as JSON holds it; None where there is none."""
        return None if self.result_json is None else msgspec.json.decode(self.result_json)

    @property
    def permission(self) -> Permission | None:
        """Who may read and write it, the owner included; None for a task that nobody owns."""
        if self.user is None:
            return None
        return (self.granted or Permission()).with_owner(self.user)

    @property
    def granted(self) -> Permission | None:
        """What the route's permission gave to others than the owner."""
        return None if self.permission_json is None else msgspec.json.decode(self.permission_json, type=Permission)

    @property
    def callback(self) -> Shown | None:
        """Where its outcome is sent, as far as people may see it; None for a task without a callback."""
        return None if self.callback_json is None else msgspec.json.decode(self.callback_json, type=Shown)

    def as_in(self, state: State) -> AsyncRouteTask:
        """Return the task as it was when it came to a state that it has been in since it last began to wait."""
        if (
            state is self.state and state is not State.RUNNING
        ):  # what a run has reported since is no part of its beginning
            return self
        later = _AFTER_THE_START if state is State.RUNNING else _AFTER_THE_CREATION
        callback_state = None if self.callback_json is None else NOT_STARTED
        return msgspec.structs.replace(self, state=state, callback_state=callback_state, **later)

    def to_dict(self) -> dict[str, Any]:
        """Return the task object as clients see it: PascalCase, times in RFC 3339, fields that do not apply left out."""
        wire = self.to_wire()
        if "Result" in wire:
            wire["Result"] = self.result
        return wire

    def to_wire(self) -> dict[str, Any]:
        """Return the task object for the JSON encoder, the result still encoded."""
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
        if self.user is not None:
            wire["User"] = self.user
        if self.progress is not None:
            wire["Progress"] = int(self.progress) if self.progress == int(self.progress) else self.progress
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
        permission = self.permission
        if permission is not None:
            wire["Permission"] = permission.to_dict()
        if self.callback_json is not None and (callback := self.callback) is not None:
            wire["CallbackSettings"] = callback.settings()
            wire["CallbackInfo"] = {
                "State": self.callback_state,
                "Tentative": self.callback_attempts,
                "Url": callback.url,
            }
        if self.sse_url is not None:
            wire["Sse"] = {"Group": self.sse_group, "Url": self.sse_url, "SendResult": self.sse_result}
        return wire


_AFTER_THE_START: dict[str, Any] = {
    **dict.fromkeys(("completed_us", "progress", "progress_message", "result_json", "error", "error_status")),
    "stopping": False,
    "callback_attempts": 0,
}
_AFTER_THE_CREATION: dict[str, Any] = {**_AFTER_THE_START, "started_us": None, "expires_us": None}


def now_us() -> int:
    """Return the wall clock in whole microseconds since the epoch."""
    return time.time_ns() // 1000


def moment(microseconds: int) -> datetime:
    """Return an aware UTC datetime."""
    return EPOCH + timedelta(microseconds=microseconds)


def rfc3339(microseconds: int) -> str:
    """Return a time as RFC 3339 has it, always with six digits and ``Z``."""
    return f"{_second(microseconds // 1_000_000)}.{microseconds % 1_000_000:06d}Z"


@lru_cache(1024)
def _second(seconds: int) -> str:
    """Return a whole second without its zone; times of one task, and of neighbours in a list, share it."""
    return (EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()
