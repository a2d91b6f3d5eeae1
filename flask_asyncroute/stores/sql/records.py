"""Rows as records and back: the columns of a task in the order of the record's fields."""

from __future__ import annotations

from typing import Any

from msgspec.structs import astuple

from ...states import State
from ...task import AsyncRouteTask
from ..base import Claim

_STATES = {state.value: state for state in State}


def plain(value: Any) -> Any:
    """Return a field's value as its column has it."""
    if isinstance(value, State):
        return value.value
    return int(value) if isinstance(value, bool) else value


def row_of(task: AsyncRouteTask) -> dict[str, Any]:
    """Return a record's columns, by name."""
    values = dict(zip(task.__struct_fields__, astuple(task), strict=True))
    values.update(
        state=task.state.value,
        user=task.user or "",
        cancellable=int(task.cancellable),
        stopping=int(task.stopping),
        sse_result=int(task.sse_result),
    )
    return values


def record_of(row: Any) -> AsyncRouteTask:
    """Return the record that a row of the columns in `tables.RECORD` makes."""
    (
        task_id, route, endpoint, state, cancellable, user, url, method, created, started, completed, expires, progress,
        message, result, error, status, stopping, permission, timeout, retention, on_loss, body, callback, callback_state,
        callback_attempts, owner, epoch, restarts, revision, change, waiting_change, started_change, completed_change,
        sse_group, sse_url, sse_result,
    ) = row  # fmt: skip
    return AsyncRouteTask(
        task_id, route, endpoint, _STATES[state], cancellable == 1, user or None, url, method, created, started, completed,
        expires, progress, message, result, error, status, stopping == 1, permission, timeout, retention, on_loss, body,
        callback, callback_state, callback_attempts, owner, epoch, restarts, revision, change, waiting_change, started_change,
        completed_change, sse_group, sse_url, sse_result == 1,
    )  # fmt: skip


def claim_of(row: Any) -> Claim | None:
    """Return the claim that the columns of a record and the request make; None for no row."""
    return None if row is None else Claim(record_of(row[:-1]), row[-1])


def is_same_start(found: AsyncRouteTask | None, task: AsyncRouteTask) -> bool:
    """Return whether a task that was found is the one that was to be stored."""
    return found is not None and (found.created_us, found.url, found.user) == (task.created_us, task.url, task.user)
