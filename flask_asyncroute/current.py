"""What a view sees of the task that it runs in: id, progress, whether to stop. `context` puts it where the view finds it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from .encoding import encode_value
from .execution import Climb, Execution
from .names import is_name, plain

T = TypeVar("T")

MAX_EVENT = 64 * 1024
"""Bytes of the data of an event."""


class ProgressRange:
    """A stretch of progress in equal steps; iterate over it, or call :meth:`tick` after each step yourself."""

    def __init__(self, execution: Execution, start: float, end: float, step: float, top: float, decimal: bool) -> None:
        if not step or (end - start) / step < 0 or not math.isfinite((end - start) / step):
            raise ValueError(f"progress_range({start}, {end}, step={step}) has no steps from start to end.")
        self._execution = execution
        self._start = start
        self._step = step
        self._count = math.ceil((end - start) / step)
        self._base = execution.progress
        self._top = top
        self._decimal = decimal
        self._done = 0

    def tick(self, message: str | None = None) -> None:
        """Count one step more. Steps past the end change nothing."""
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
    """The running task as its view sees it, through :data:`flask_asyncroute.current_task`.

    May be used from threads that the view starts, if they are given the object itself
    (``current_task._get_current_object()``). Progress is written to the store in the background, at most ten times a
    second; only the newest counts.
    """

    def __init__(self, execution: Execution, json_default: Callable[[Any], Any]) -> None:
        self._execution = execution
        self._json_default = json_default

    @property
    def id(self) -> str:
        """The task's id."""
        return self._execution.task_id

    @property
    def user(self) -> str | None:
        """The id of whoever started it; None where nobody was known."""
        return self._execution.user

    @property
    def progress(self) -> float:
        """Progress in per cent, 0 before it was set. It never goes back; what is outside 0–100 is clipped."""
        value = self._execution.progress
        return int(value) if value == int(value) else value

    @progress.setter
    def progress(self, value: float) -> None:
        self.set_progress(value)

    def set_progress(self, value: float, message: str | None = None) -> None:
        """Set progress and, where given, a message.

        :param value: per cent; clipped to 0–100, kept with two decimals. A lower value than before, or NaN, is left out.
        :param message: at most 500 characters, cut where longer.
        :raises TypeError: for a value that is no number or a message that is no text.
        """
        self._execution.advance(_number("progress", value), _message(message))

    def track(self, iterable: Iterable[T], total: int | None = None, max_progress: float = 100) -> Iterator[T]:
        """Yield the items of ``iterable`` and let progress run from where it is to ``max_progress`` on the way.

        :param total: how many items there are, where ``len()`` does not tell. Without either, progress jumps at the end.
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
        self, start: float, end: float, step: float = 1, max_progress: float = 100, decimal: bool = False
    ) -> ProgressRange:
        """Return a range of equal steps from the present progress to ``max_progress``.

        Ranges can follow each other: one to 80, the next from there to 100.

        :param decimal: whether progress has decimals on the way; else whole numbers.
        :raises ValueError: where ``step`` does not lead from ``start`` to ``end``.
        """
        return ProgressRange(self._execution, start, end, step, _top(max_progress), decimal)

    def progress_over(self, duration: float, interval: float = 5, max_progress: float = 100) -> None:
        """Let progress advance by itself, and return at once.

        It takes a step every ``interval`` seconds and reaches ``max_progress`` after ``duration`` seconds, unless the
        task ends or progress is set in another way before.

        :raises ValueError: for a duration below 0 or an interval that is not over 0.
        """
        if not _number("duration", duration) >= 0 or not _number("interval", interval) > 0:
            raise ValueError("progress_over() takes a duration of 0 or more seconds and an interval over 0.")
        base = self._execution.progress
        climb = Climb(base, _top(max_progress), duration, interval)
        self._execution.advance(base, climb=climb)

    def send_event(self, data: Any, event: str = "message") -> None:
        """Send an event to whoever follows the task; it is stored, so that those who come back get it too.

        Returns before it is stored, in the background, but waits while a thousand are not. The last 1,000 of a task are
        kept. Those of a task that was stopped meanwhile are left out.

        :param data: what a view may return; at most 64 KiB of JSON.
        :param event: its name: 1 to 255 characters on one line, not beginning with ``task.``.
        :raises ValueError: for another name.
        :raises ResultError: for data that JSON does not have, or too much of it; the message says what and where.
        """
        if not is_name(event) or not event.isprintable() or event != event.strip() or event.startswith("task."):
            raise ValueError(
                f"send_event(…, event={event!r}): a name has 1 to 255 printable characters, no blank at its ends, and does "
                "not begin with 'task.', which are our own."
            )
        self._execution.send_event(plain(event), encode_value(data, self._json_default, MAX_EVENT))

    @property
    def stop_requested(self) -> bool:
        """Whether somebody has stopped this task or its time is up."""
        return self._execution.stop.is_set() or self._execution.is_time_up

    def check(self) -> None:
        """Raise where a stop was asked for or the time is up; call it in loops that run long.

        :raises TaskAborted: let it pass, after cleaning up.
        """
        self._execution.check()

    def sleep(self, seconds: float) -> bool:
        """Sleep, and wake as soon as a stop is asked for.

        :return: whether the time passed in full.
        """
        wanted = min(max(_number("seconds", seconds), 0.0), threading.TIMEOUT_MAX)
        left = self.remaining()
        is_short = left is not None and left < wanted
        return not self._execution.stop.wait(left if is_short else wanted) and not is_short

    def remaining(self) -> float | None:
        """Return how many seconds the task may still run, 0 at the least; None for no limit."""
        deadline = self._execution.deadline
        return None if deadline is None else max(deadline - time.monotonic(), 0.0)


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
    """Return a `max_progress` within 0 to 100; one that is no number at all counts as 100."""
    number = _number("max_progress", value)
    return 100.0 if math.isnan(number) else min(max(number, 0.0), 100.0)


def _message(message: Any) -> str | None:
    if message is not None and not isinstance(message, str):
        raise TypeError(f"A progress message must be a text, not {type(message).__name__}.")
    return message
