"""A task that runs in this process.

`worker` makes an :class:`Execution` for every run; `dispatcher` asks it to stop; `housekeeping` reads what it has to
report. `current` is the view's face of it. Nothing here writes to a store.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .encoding import clean_text
from .errors import TaskAborted
from .task import MAX_MESSAGE

MOST_UNWRITTEN = 1000
"""How many events of one run wait to be stored; whoever sends one more waits too."""


@dataclass(frozen=True, slots=True)
class ViewEvent:
    """What a view has sent.

    :param data: JSON on one line.
    :param number: how many its run has sent with it.
    """

    name: str
    data: bytes
    number: int


class Execution:
    """One run of one task. Methods may be called from any thread.

    It is there before the task is claimed, so that a stop that comes right after the claim finds it.

    :param interrupt_after: seconds between asking to stop and interrupting; None: never.
    :param wake: called when there is something to report; must return at once.
    """

    def __init__(
        self, task_id: str, interrupt_after: float | None = None, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.task_id = task_id
        self.user: str | None = None
        self.epoch = 0
        self.deadline: float | None = None
        self.is_expired = False
        self.stop = threading.Event()
        self.interrupt_at: float | None = None
        self.thread_lock = threading.Lock()
        """Held while it is checked that this task runs on a thread and that thread is interrupted, and by it to leave."""
        self.thread_id: int | None = None
        self.is_over = False
        """Whether its code has ended, and only its outcome is still to be stored."""
        self.is_shutting_down = False
        """Whether the process is about to exit: the outcome is then `Lifecycle.cut_short`'s."""
        self.restarts_on_loss = False
        self.is_interrupted = False
        """Whether an exception was raised in that thread."""
        self.reported_at = -math.inf
        self._interrupt_after = interrupt_after
        self._wake = wake
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self.writing = threading.Lock()
        """Held while its events are stored, so that they are in order."""
        self._sent: list[ViewEvent] = []
        self._sent_so_far = 0
        self._cancel: Callable[[], object] | None = None
        self._progress: float | None = None
        self._message: str | None = None
        self._is_dirty = False
        self._climb: Climb | None = None

    def begin(self, user: str | None, epoch: int, seconds: float | None, restarts_on_loss: bool = False) -> None:
        """Take what the claim told.

        :param seconds: until the time is up; None for no limit.
        :param restarts_on_loss: whether the task is to be run again where its process cannot finish it.
        """
        self.restarts_on_loss = restarts_on_loss
        self.user = user
        self.epoch = epoch
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def ask_to_stop(self, within: float = math.inf, ago: float = 0.0) -> bool:
        """Ask the view to stop; return whether this was the first time. What can be cancelled is, at once.

        :param within: seconds after which to interrupt at the latest, where that is done at all.
        :param ago: seconds since the task was stopped; the view has so much less until it is interrupted.
        """
        with self._lock:
            is_first = not self.stop.is_set()
            if not is_first and within == math.inf:
                return False
            self.stop.set()
            self._has_room.notify_all()
            self._climb = None
            cancel = self._cancel
            if cancel is None and self._interrupt_after is not None:
                self.interrupt_at = time.monotonic() + max(min(self._interrupt_after, within) - ago, 0.0)
        if cancel is not None:
            cancel()
        self._wake()
        return is_first

    def cancel_with(self, cancel: Callable[[], object] | None) -> None:
        """Say how to cancel the coroutine or child that runs from now on; None: there is none any more."""
        with self._lock:
            self._cancel = cancel
            self.interrupt_at = None
            is_stopped = self.stop.is_set()
        if is_stopped and cancel is not None:
            cancel()

    @property
    def is_time_up(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def check(self) -> None:
        """Raise where a stop was asked for or the time is up.

        :raises TaskAborted: then.
        """
        if self.stop.is_set():
            raise TaskAborted("A stop was asked for.")
        if self.is_time_up:
            raise TaskAborted("The time is up.")

    @property
    def progress(self) -> float:
        """Progress so far, 0 before any."""
        return self._progress or 0.0

    def advance(self, value: float, message: str | None = None, climb: Climb | None = None) -> None:
        """Take new progress: clipped to 0–100, rounded to two decimals, never back; NaN is left out.

        :param climb: goes on by itself from here; None ends one that does.
        """
        with self._lock:
            self._climb = climb
            self._take(value, message)
        self._wake_if_dirty()

    def send_event(self, name: str, data: bytes) -> None:
        """Have an event of the view stored, after all that it has sent before. Waits while too many are not stored yet.

        :param data: JSON on one line.
        :raises TaskAborted: where it had to wait, and a stop was asked for or the time was up.
        """
        with self._lock:
            while len(self._sent) >= MOST_UNWRITTEN:
                self.check()
                self._has_room.wait(1.0)
            self._sent_so_far += 1
            self._sent.append(ViewEvent(name, data, self._sent_so_far))
        self._wake()

    @property
    def has_events(self) -> bool:
        """Whether :meth:`take_events` has something to give."""
        return bool(self._sent)

    def take_events(self) -> Sequence[ViewEvent]:
        """Return the events that wait to be stored, in order."""
        with self._lock:
            sent, self._sent = self._sent, []
            self._has_room.notify_all()
        return sent

    def return_events(self, sent: Sequence[ViewEvent]) -> None:
        """Take back what :meth:`take_events` gave, since it could not be stored."""
        with self._lock:
            self._sent = [*sent, *self._sent]

    def climb(self, now: float) -> float | None:
        """Take the next step of a progress that advances by itself; return when the one after is due."""
        with self._lock:
            climb = self._climb
            if climb is None or self.stop.is_set():
                return None
            due = climb.due_after(now)
            was_dirty = self._is_dirty
            self._take(climb.value_at(now), None)
            if due is None:
                self._climb = None
            has_news = self._is_dirty and not was_dirty
        if has_news:
            self._wake()
        return due

    def take_report(self) -> tuple[float | None, str | None] | None:
        """Return progress and message if they changed since the last call, else None."""
        with self._lock:
            if not self._is_dirty:
                return None
            self._is_dirty = False
            return self._progress, self._message

    def return_report(self) -> None:
        """Take back what :meth:`take_report` gave, since it could not be written: the next report has it, or newer."""
        self._is_dirty = True

    def end(self) -> None:
        """Take note that the code has ended: nothing is due for it any more."""
        with self._lock:
            self.is_over = True
            self.deadline = self.interrupt_at = self._climb = None
            self._is_dirty = False

    def final_report(self) -> tuple[float | None, str | None]:
        """Return progress and message as they are, and count them as reported."""
        with self._lock:
            self._is_dirty = False
            self._climb = None
            return self._progress, self._message

    @property
    def has_report(self) -> bool:
        """Whether :meth:`take_report` has something to give."""
        return self._is_dirty

    def _take(self, value: float, message: str | None) -> None:
        if not math.isnan(value):
            value = round(min(max(float(value), 0.0), 100.0), 2)
            if self._progress is None or value > self._progress:
                self._progress = value
                self._is_dirty = True
        if message is not None:
            text = clean_text(message, MAX_MESSAGE)
            if text != self._message:
                self._message = text
                self._is_dirty = True
                if self._progress is None:
                    self._progress = 0.0

    def _wake_if_dirty(self) -> None:
        if self._is_dirty or self._climb is not None:
            self._wake()


class Climb:
    """Progress that goes from one value to another over a time, in steps."""

    def __init__(self, base: float, top: float, duration: float, interval: float) -> None:
        self._base = base
        self._top = top
        self._duration = duration
        # Progress is written ten times a second at most; smaller steps would keep the housekeeper busy for nothing.
        self._interval = max(interval, 0.1)
        self._began = time.monotonic()

    def value_at(self, now: float) -> float:
        """Return the progress of the last step that was due at ``now``."""
        steps = math.floor((now - self._began) / self._interval + 1e-9)
        part = min(steps * self._interval / self._duration, 1.0) if self._duration > 0 else 1.0
        if now - self._began >= self._duration:
            part = 1.0
        return self._base + (self._top - self._base) * part

    def due_after(self, now: float) -> float | None:
        """Return when the next step is due; None after the last."""
        if now - self._began >= self._duration:
            return None
        steps = math.floor((now - self._began) / self._interval + 1e-9) + 1
        return self._began + min(steps * self._interval, self._duration)
