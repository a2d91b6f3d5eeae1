"""What users of the package need in their own tests: routes that run inside the request, and a current task without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from flask.json.provider import DefaultJSONProvider

from .context import running
from .current import CurrentTask
from .execution import Execution
from .runtime import runtime_of

if TYPE_CHECKING:
    from flask import Flask


class inline:  # noqa: N801
    """Have every route of ``app`` run inside the request that starts it, on ``memory://``.

    Call it before the first request of the app, for good; or use it as a context manager, whose tasks are gone at its end.
    The start still answers 202, and the State in it is terminal.
    """

    def __init__(self, app: Flask) -> None:
        self._runtime = runtime_of(app)
        self._before = self._runtime.is_inline
        self._runtime.reset(is_inline=True)

    def __enter__(self) -> inline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runtime.reset(is_inline=self._before)


@contextmanager
def fake_task(task_id: str = "fake", user: str | None = None, timeout: float | None = None) -> Iterator[CurrentTask]:
    """Make a :data:`~flask_asyncroute.current_task` for the block, so that a plain view can be called in a unit test.

    Progress is kept and can be read from it; nothing is stored, and events go nowhere.

    :param timeout: seconds that `remaining()` counts down from; None: no limit.
    """

    def wake() -> None:
        execution.take_events()  # so that it never waits for room

    execution = Execution(task_id, wake=wake)
    execution.begin(user, 1, timeout)
    with running(execution, DefaultJSONProvider.default) as task:
        yield task


__all__ = ["fake_task", "inline"]
