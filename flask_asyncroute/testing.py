"""Helpers for an app's tests: tasks inside requests, and a fake current task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask, Request, request, request_started
from flask.json.provider import DefaultJSONProvider

from .current_task import CurrentTask, running
from .executors.execution import Execution
from .runtime import runtime_of


class inline:  # noqa: N801
    """Run each task of ``app`` inside the request that starts it, with the store ``memory://``.

    Call it once before the app's first request, or use it as a context manager, which deletes its
    tasks at the end. The response status is still 202, but the task is finished.
    """

    def __init__(self, app: Flask) -> None:
        self._runtime = runtime_of(app)
        self._before = self._runtime.is_inline
        self._runtime.reset(is_inline=True)

    def __enter__(self) -> inline:
        return self

    def __exit__(self, *error: object) -> None:
        self._runtime.reset(is_inline=self._before)


@contextmanager
def fake_task(
    task_id: str = "fake", user: str | None = None, timeout: float | None = None
) -> Iterator[CurrentTask]:
    """Create a fake :data:`~flask_asyncroute.current_task`, to call a view in a unit test.

    Inside the block, calling an async route calls its view, except in requests of a test client.
    Progress can be read from the task; events are dropped; nothing is stored.

    :param timeout: in seconds; None: no timeout.
    """

    def wake() -> None:
        execution.take_events()  # so that send_event() never waits

    execution = Execution(task_id, wake=wake)
    execution.begin(user, 1, timeout)
    dispatched: set[Request] = set()

    def note(app: Flask, **extra: Any) -> None:
        dispatched.add(request._get_current_object())  # type: ignore[attr-defined]

    with (
        request_started.connected_to(note),
        running(execution, DefaultJSONProvider.default, dispatched) as task,
    ):
        yield task


__all__ = ["fake_task", "inline"]
