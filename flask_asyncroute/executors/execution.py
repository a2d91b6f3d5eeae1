"""The state of a running task in memory.

Here, a run is one execution of a task's view. Each run has an `Execution`, which `run_task`
creates. The dispatcher stops it, `maintenance` stores its progress and events, and the view uses it
as `current_task`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..encoding import clean_text
from ..errors import TaskAborted
from ..stores.base import ViewEvent
from ..task import MAX_MESSAGE

MAX_UNWRITTEN = 1000
"""Maximum number of events of one run that are not stored yet. Beyond it, `send_event` blocks."""


class Execution:
    """The progress, events and stop request of one run of a task. Thread-safe.

    :param interrupt_after: seconds from a stop request until the view is interrupted; None: never.
    :param wake: called when progress, events or a stop request must be handled. Must not block.
    """

    # The object is created before the process claims the task in the store, so that an immediate
    # stop request has an effect.

    def __init__(
        self, task_id: str, interrupt_after: float | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.task_id = task_id
        self.user: str | None = None
        self.epoch = 0
        self.deadline: float | None = None
        self.is_expired = False
        self.stop = threading.Event()
        self.interrupt_at: float | None = None
        self.thread_lock = threading.RLock()  # held while `thread_id` is used or reset
        self.thread_id: int | None = None
        self.is_over = False  # the view's code has ended; its outcome is perhaps not yet stored
        self.is_shutting_down = False  # stopped by a shutdown; see `Lifecycle.cut_short`
        self.restarts_on_loss = False
        self.attempt = 1
        self.retries_left = 0
        self.is_interrupted = False  # `interrupt` raised an exception in the thread
        self.reported_at = -math.inf
        self.has_report = False  # progress or message changed since `take_report`
        self.writing = threading.Lock()  # held to store events in order
        self._interrupt_after = interrupt_after
        self._wake = wake
        self._lock = threading.Lock()
        self._has_capacity = threading.Condition(self._lock)
        self._sent: list[ViewEvent] = []
        self._sent_so_far = 0
        self._cancel: Callable[[], object] | None = None
        self._progress: float | None = None
        self._message: str | None = None
        self._timed_progress: TimedProgress | None = None

    def begin(
        self, user: str | None, epoch: int, seconds: float | None, restarts_on_loss: bool = False,
        attempt: int = 1, retries_left: int = 0,
    ) -> None:  # fmt: skip
        """Set the values that are known only after this process has claimed (reserved) the task.

        :param epoch: the number of this run of the task.
        :param seconds: the time limit; None: no limit.
        :param restarts_on_loss: whether the task runs again if this process cannot finish it.
        """
        self.restarts_on_loss = restarts_on_loss
        self.attempt = attempt
        self.retries_left = retries_left
        self.user = user
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.epoch = epoch  # set last: then the other values are known, too

    def ask_to_stop(self, within: float = math.inf, ago: float = 0.0) -> bool:
        """Ask the view to stop.

        A coroutine or child process is cancelled. For a view on a thread, an interruption is
        scheduled.

        :param within: maximum seconds until the interruption, even if ``interrupt_after`` is
            longer.
        :param ago: seconds since the client requested the stop. The interruption is that much
            earlier.
        :return: False if the view was already asked to stop. Then this call can bring the
            interruption forward, but not delay it.
        """
        with self._lock:
            is_first = not self.stop.is_set()
            if not is_first and within == math.inf:
                return False
            self.stop.set()
            self._has_capacity.notify_all()
            self._timed_progress = None
            cancel = self._cancel
            if cancel is None and self._interrupt_after is not None:
                seconds = max(min(self._interrupt_after, within) - ago, 0.0)
                self.interrupt_at = time.monotonic() + seconds
        if cancel is not None:
            cancel()
        self._wake()
        return is_first

    def cancel_with(self, cancel: Callable[[], object] | None) -> None:
        """Set the function that cancels the view's coroutine or child process; None after its end.

        If a stop was already requested, the function is called now.
        """
        with self._lock:
            self._cancel = cancel
            self.interrupt_at = None
            is_stopped = self.stop.is_set()
        if is_stopped and cancel is not None:
            cancel()

    def skip(self, seconds: float) -> None:
        """Bring the deadline forward, if there is one. Only `testing.Clock` does this."""
        with self._lock:
            if self.deadline is not None:
                self.deadline -= seconds

    @property
    def is_time_up(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def check(self) -> None:
        """Raise TaskAborted if a stop was requested or the time limit has passed."""
        if self.stop.is_set():
            raise TaskAborted("A stop was requested.")
        if self.is_time_up:
            raise TaskAborted("The timeout has expired.")

    @property
    def progress(self) -> float:
        return self._progress or 0.0

    def advance(
        self,
        value: float | None,
        message: str | None = None,
        timed_progress: TimedProgress | None = None,
    ) -> None:
        """Set the progress, limited to 0–100 and rounded to two decimals.

        NaN and lower values are ignored.

        :param timed_progress: raises the progress over time. An earlier `TimedProgress` ends.
        """
        with self._lock:
            self._timed_progress = timed_progress
            self._set(value, message)
        if self.has_report or timed_progress is not None:
            self._wake()

    def send_event(self, name: str, data: bytes) -> None:
        """Queue an event of the view until it is stored. Block while the queue is full.

        :param data: JSON on one line.
        :raises TaskAborted: if the task is stopped or times out while this method blocks.
        """
        with self._lock:
            while len(self._sent) >= MAX_UNWRITTEN:
                self.check()
                self._has_capacity.wait(1.0)
            self._sent_so_far += 1
            self._sent.append(ViewEvent(name, data, self._sent_so_far))
        self._wake()

    @property
    def has_events(self) -> bool:
        return bool(self._sent)

    def take_events(self) -> Sequence[ViewEvent]:
        """Remove the events from the queue and return them in order."""
        with self._lock:
            sent, self._sent = self._sent, []
            self._has_capacity.notify_all()
        return sent

    def return_events(self, sent: Sequence[ViewEvent]) -> None:
        """Put events that could not be stored back into the queue."""
        with self._lock:
            self._sent = [*sent, *self._sent]

    def advance_by_time(self, now: float) -> float | None:
        """Raise the progress to the value that the current `TimedProgress` has at ``now``.

        :return: the time of the next step; None if there is no further step.
        """
        with self._lock:
            timed_progress = self._timed_progress
            if timed_progress is None or self.stop.is_set():
                return None
            had_report = self.has_report
            value, due = timed_progress.step(now)
            self._set(value, None)
            if due is None:
                self._timed_progress = None
            is_new = self.has_report and not had_report
        if is_new:
            self._wake()
        return due

    def take_report(self) -> tuple[float | None, str | None] | None:
        """Return progress and message. Return None if neither has changed since the last call."""
        with self._lock:
            if not self.has_report:
                return None
            self.has_report = False
            return self._progress, self._message

    def return_report(self) -> None:
        """Make :meth:`take_report` return the same values again after they could not be stored."""
        self.has_report = True

    def end(self) -> None:
        """Record that the view's code has ended.

        The time limit and a planned interruption are cancelled.
        """
        with self._lock:
            self.is_over = True
            self.deadline = self.interrupt_at = self._timed_progress = None
            self.has_report = False

    def final_report(self) -> tuple[float | None, str | None]:
        """Stop raising the progress over time. Return the last progress and message."""
        with self._lock:
            self.has_report = False
            self._timed_progress = None
            return self._progress, self._message

    def _set(self, value: float | None, message: str | None) -> None:
        if value is not None and not math.isnan(value):
            value = round(min(max(float(value), 0.0), 100.0), 2)
            if self._progress is None or value > self._progress:
                self._progress = value
                self.has_report = True
        if message is not None:
            text = clean_text(message, MAX_MESSAGE)
            if text != self._message:
                self._message = text
                self._progress = self._progress or 0.0
                self.has_report = True


@dataclass
class TimedProgress:
    """Raises the progress in equal steps from ``base`` to ``top`` within ``duration`` seconds.

    :param interval: seconds between two steps; at least 0.1.
    """

    base: float
    top: float
    duration: float
    interval: float

    def __post_init__(self) -> None:
        self.interval = max(self.interval, 0.1)  # more frequent progress is not stored
        self.began = time.monotonic()

    def step(self, now: float) -> tuple[float, float | None]:
        """Return the progress at ``now`` and the time of the next step.

        The time is None after the last step.
        """
        passed = now - self.began
        if passed >= self.duration:
            return self.top, None
        steps = math.floor(passed / self.interval + 1e-9)
        part = min(steps * self.interval / self.duration, 1.0)
        due = self.began + min((steps + 1) * self.interval, self.duration)
        return self.base + (self.top - self.base) * part, due
