"""`current_task`: a view reads its task's id and stop requests, and sends progress and events."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

from flask import Request
from werkzeug.local import LocalProxy

from .encoding import encode_value
from .errors import NoCurrentTask, RetryRequested
from .executors.execution import Execution, TimedProgress
from .validators import is_name, plain, seconds

T = TypeVar("T")

MAX_EVENT = 64 * 1024  # bytes of an event's data


class ProgressRange:
    """Progress in equal steps: iterate over the range, or call :meth:`tick` after each step."""

    def __init__(
        self, execution: Execution, start: float, end: float, step: float, top: float, decimal: bool
    ) -> None:
        if not step or (end - start) / step < 0 or not math.isfinite((end - start) / step):
            raise ValueError(
                f"progress_range({start}, {end}, step={step}) is invalid; use a step that leads "
                "from start to end."
            )
        self._execution = execution
        self._start = start
        self._step = step
        self._count = math.ceil((end - start) / step)
        self._base = execution.progress
        self._top = top
        self._decimal = decimal
        self._done = 0

    def tick(self, message: str | None = None) -> None:
        """Count one more step. Steps past the end change nothing."""
        self._done = min(self._done + 1, self._count)
        value = self._base + (self._top - self._base) * self._done / max(self._count, 1)
        self._execution.advance(value if self._decimal else math.floor(value + 1e-9), message)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._count):
            yield self._start + number * self._step
            self.tick()


class CurrentTask:
    """The running task. The view uses it through the proxy :data:`flask_asyncroute.current_task`.

    The proxy fails in threads that the view starts: pass them the object itself
    (``current_task._get_current_object()``). Progress is stored in the background, at most ten
    times a second; only the newest value is stored.
    """

    def __init__(
        self,
        execution: Execution,
        json_default: Callable[[Any], Any],
        dispatched: Container[Request] | None = None,
    ) -> None:
        self._execution = execution
        self._json_default = json_default
        self._dispatched = dispatched

    @property
    def id(self) -> str:
        """The task's id."""
        return self._execution.task_id

    @property
    def user(self) -> str | None:
        """The id of the caller that started the task, or None if the caller is unknown."""
        return self._execution.user

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; see the option ``retry``."""
        return self._execution.attempt

    def retry(self, after: float | timedelta | None = None, reason: str | None = None) -> NoReturn:
        """End this attempt, and run the task again. This uses one of its retries; if none is left,
        the task fails.

        :param after: seconds or timedelta until the next attempt; None: as in the option ``retry``.
        :param reason: becomes a part of the ``LastError`` or ``Error``.
        :raises RetryRequested: always. It is a BaseException, so ``except Exception`` does not
            catch it.
        :raises ConfigurationError: if ``after`` is invalid.
        :raises TypeError: if ``reason`` is not a string.
        """
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"A reason must be a string, not {type(reason).__name__}.")
        delay = None if after is None else seconds("after", after)
        raise RetryRequested(reason or "", delay)

    @property
    def progress(self) -> float:
        """Progress in per cent, from 0 to 100; initially 0. It never decreases."""
        value = self._execution.progress
        return int(value) if value == int(value) else value

    @progress.setter
    def progress(self, value: float) -> None:
        self.set_progress(value)

    def set_progress(self, value: float, message: str | None = None) -> None:
        """Set progress and, optionally, a message.

        :param value: per cent, clipped to 0–100 and rounded to two decimals. NaN and values below
            the current progress are ignored.
        :param message: truncated to 500 characters.
        :raises TypeError: if the value is not a number or the message is not a string.
        """
        number = _number("progress", value)
        if message is not None and not isinstance(message, str):
            raise TypeError(f"A progress message must be a string, not {type(message).__name__}.")
        self._execution.advance(number, message)

    def track(
        self, iterable: Iterable[T], total: int | None = None, max_progress: float = 100
    ) -> Iterator[T]:
        """Yield the items of ``iterable``; increase progress after each, up to ``max_progress``.

        :param total: the number of items; defaults to ``len(iterable)``. If neither is available,
            progress changes only at the end.
        """
        top = _top(max_progress)
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        base = self._execution.progress
        for count, item in enumerate(iterable, 1):
            yield item
            if total:
                self._execution.advance(base + (top - base) * min(count / total, 1.0))
        self._execution.advance(top)

    def progress_range(
        self,
        start: float,
        end: float,
        step: float = 1,
        max_progress: float = 100,
        decimal: bool = False,
    ) -> ProgressRange:
        """Return a range whose steps increase progress equally, up to ``max_progress``.

        A view can use several ranges in turn, such as one up to 80, then one up to 100.

        :param decimal: whether progress can have decimals.
        :raises ValueError: if ``step`` does not lead from ``start`` to ``end``.
        """
        return ProgressRange(self._execution, start, end, step, _top(max_progress), decimal)

    def progress_over(
        self, duration: float, interval: float = 5, max_progress: float = 100
    ) -> None:
        """Increase progress to ``max_progress`` within ``duration`` seconds; return immediately.

        Progress increases in the background, every ``interval`` seconds, until the task ends or
        the view sets progress.

        :raises ValueError: unless ``duration`` is at least 0 and ``interval`` greater than 0.
        """
        if not _number("duration", duration) >= 0 or not _number("interval", interval) > 0:
            raise ValueError(
                "progress_over() needs a duration of at least 0 s and an interval of more than 0 s."
            )
        base = self._execution.progress
        timed_progress = TimedProgress(base, _top(max_progress), duration, interval)
        self._execution.advance(base, timed_progress=timed_progress)

    def send_event(self, data: Any, event: str = "message") -> None:
        """Send an event to the subscribers of the task.

        Events are stored in the background, so clients that reconnect also receive them. The call
        blocks while 1,000 events wait to be stored. The last 1,000 events of a task are kept.
        Events sent after the task was stopped are dropped.

        :param data: any value that a view may return, at most 64 KiB of JSON.
        :param event: its name: 1 to 255 printable characters without leading or trailing blanks,
            not beginning with ``task.``.
        :raises ValueError: if the name is invalid.
        :raises ResultError: if the data is too large or has no JSON form.
        :raises TaskAborted: if the task is stopped or times out while the call blocks.
        """
        if (
            not is_name(event)
            or not event.isprintable()
            or event != event.strip()
            or event.startswith("task.")
        ):
            raise ValueError(
                f"send_event(…, event={event!r}): the name is invalid; use 1 to 255 printable "
                "characters without leading or trailing blanks, and not 'task.' at the beginning."
            )
        self._execution.send_event(plain(event), encode_value(data, self._json_default, MAX_EVENT))

    @property
    def stop_requested(self) -> bool:
        """Whether the task was stopped or has timed out."""
        return self._execution.stop.is_set() or self._execution.is_time_up

    def check(self) -> None:
        """Raise if the task was stopped or has timed out. Call this method in long loops.

        :raises TaskAborted: do not suppress it; clean up in ``finally``.
        """
        self._execution.check()

    def sleep(self, seconds: float) -> bool:
        """Sleep; return early if the task is stopped or times out.

        :return: whether the full time passed.
        """
        wanted = min(max(_number("seconds", seconds), 0.0), threading.TIMEOUT_MAX)
        left = self.remaining()
        is_short = left is not None and left < wanted
        return not self._execution.stop.wait(left if is_short else wanted) and not is_short

    def remaining(self) -> float | None:
        """Return the seconds until the timeout, at least 0, or None without a timeout."""
        deadline = self._execution.deadline
        return None if deadline is None else max(deadline - time.monotonic(), 0.0)


_running: ContextVar[CurrentTask] = ContextVar("flask_asyncroute.current_task")
REBUILT = "_asyncroute_rebuilt"
"""Attribute that marks a request as rebuilt for a task."""


def _current() -> CurrentTask:
    try:
        return _running.get()
    except LookupError:
        raise NoCurrentTask(
            "current_task was used outside a running task. Use it in the view of an async route; "
            "in tests, use flask_asyncroute.testing.fake_task()."
        ) from None


current_task = cast(CurrentTask, LocalProxy(_current))
"""The running task (a :class:`CurrentTask`); any use outside a task raises `NoCurrentTask`."""


def is_in_task(current: Request | None) -> bool:
    """Return whether the calling code runs in a task.

    True if the current request was rebuilt for a task, even on a thread without a current task.
    False in code that handles another request, such as one that the view sends to the same app.
    """
    if hasattr(current, REBUILT):
        return True
    task = _running.get(None)
    if task is None or current is None:
        return task is not None
    return task._dispatched is not None and current not in task._dispatched


@contextmanager
def running(
    execution: Execution,
    json_default: Callable[[Any], Any],
    dispatched: Container[Request] | None = None,
) -> Iterator[CurrentTask]:
    """Make ``execution`` the current task of this context.

    :param dispatched: for a fake task, the requests received since it began. Code that handles
        these requests does not run in the task.
    """
    task = CurrentTask(execution, json_default, dispatched)
    token = _running.set(task)
    try:
        yield task
    finally:
        _running.reset(token)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, not {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}.") from None
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _top(value: Any) -> float:
    number = _number("max_progress", value)
    return 100.0 if math.isnan(number) else min(max(number, 0.0), 100.0)
