"""The option ``retry``, and the schedule of retries that is stored with a task."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec

from .validators import instance_of, refuse, seconds, whole

MAX_TIMES = 1_000_000


class Schedule(msgspec.Struct, frozen=True):
    """How often and when a failed task runs again. Times are in seconds."""

    times: int
    delay: float
    factor: float
    max_delay: float
    jitter: float

    def seconds_before(self, retry: int) -> float:
        """Return the time to wait before a retry. The first retry has the number 1."""
        try:
            delay = min(self.delay * self.factor ** (retry - 1), self.max_delay)
        except OverflowError:
            delay = self.max_delay if self.delay else 0.0
        return delay * random.uniform(1 - self.jitter, 1 + self.jitter)


@dataclass(frozen=True, slots=True)
class Retry:
    """How a task runs again after a failed attempt.

    The time before retry number n is ``delay * factor ** (n - 1)``, at most ``max_delay``, plus or
    minus a random part of it.

    :param times: the maximum number of retries after the first attempt; 0 to 1,000,000.
    :param on: the exceptions after which the task runs again: a class or a tuple of classes.
        HTTPExceptions with a status from 400 to 499, other than 408, 425 and 429, always end the
        task.
    :param delay: seconds or timedelta before the first retry.
    :param factor: the growth of the delay from one retry to the next; at least 1.
    :param max_delay: the longest delay, as seconds or timedelta, before the random part.
    :param jitter: the largest random part, as a fraction of the delay; 0 to 1.
    :raises ConfigurationError: if a value is invalid.
    """

    times: int = 3
    on: type[BaseException] | tuple[type[BaseException], ...] = (Exception,)
    delay: float | timedelta = 1.0
    factor: float = 2.0
    max_delay: float | timedelta = 600.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        whole(0)("Retry(times=…)", self.times)
        if self.times > MAX_TIMES:
            raise refuse("Retry(times=…)", f"at most {MAX_TIMES:,}", self.times)
        for kind in self.classes:
            if not isinstance(kind, type) or not issubclass(kind, BaseException):
                raise refuse("Retry(on=…)", "an exception class or a tuple of them", kind)
        for name in ("delay", "max_delay"):
            object.__setattr__(self, name, seconds(f"Retry({name}=…)", getattr(self, name)))
        for name, least, most in (("factor", 1, 1000), ("jitter", 0, 1)):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise refuse(f"Retry({name}=…)", f"a number from {least} to {most}", value)

    @property
    def classes(self) -> tuple[type[BaseException], ...]:
        """The exceptions of ``on`` as a tuple."""
        return self.on if isinstance(self.on, tuple) else (self.on,)

    @property
    def schedule(self) -> Schedule:
        """The part that is stored with a task."""
        delay, max_delay = seconds("delay", self.delay), seconds("max_delay", self.max_delay)
        return Schedule(self.times, delay, float(self.factor), max_delay, float(self.jitter))


def checked(label: str, value: Any) -> Retry | None:
    """Check the option ``retry``. Return None if failed tasks do not run again."""
    if isinstance(value, int) and not isinstance(value, bool):
        whole(0)(label, value)
        if value > MAX_TIMES:
            raise refuse(label, f"at most {MAX_TIMES:,}", value)
        value = Retry(times=value)
    found: Retry = instance_of(Retry, "an integer of at least 0, or a Retry")(label, value)
    return found if found.times else None
