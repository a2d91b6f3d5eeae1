"""The port of the outbox: which callbacks are to be sent, and which process is at one. Each store has one, see `base`.

A row is stored with its task, becomes due in the transaction in which the task ends, and leaves with the task. There is no
lease: a row that a process holds is free again when that process leaves or is found dead. Methods raise as those of
`base.TaskStore` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..delivery import Delivery
from ..task import AsyncRouteTask

AT_ONCE = 0
"""When a callback is due that need not wait; no clock is asked for that."""
LONGEST_US = 7_200_000_000
"""What is due later than this is due now: the clock was set back. No attempt waits for so long."""
PER_HOST = 2
"""Callbacks that are sent to one host at once, by all processes."""


@dataclass(frozen=True, slots=True)
class Due:
    """A callback that a process has taken to send it.

    :param attempts: how many there were before, since it was last due for the first time.
    """

    task: AsyncRouteTask
    delivery: Delivery
    attempts: int


class Outbox(ABC):
    """Keeps the callbacks of one namespace. What changes a task's ``callback_state`` or ``callback_attempts`` raises its
    revision and the change number, in the same transaction."""

    @abstractmethod
    def next_due(self, now_us: int) -> int | None:
        """Return when the first callback is due that nobody holds; :data:`AT_ONCE` where one is. None: there is none."""

    @abstractmethod
    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        """Take up to ``limit`` callbacks that are due, and return them with their tasks: first those that need not wait, then the
        longest due.

        At most :data:`PER_HOST` of one host are held at once, over all processes. A callback that was NotStarted is Running.
        """

    @abstractmethod
    def settle(self, task_id: str, holder: str, state: str, due_us: int | None) -> AsyncRouteTask | None:
        """Write that an attempt is over, count it, and let go of the callback; return the task as it is then.

        :param state: of the callback from here on. In a final one its headers are gone.
        :param due_us: when the next attempt is; None: there is none.
        :return: None where the task is gone, or the callback is another's by now.
        """

    @abstractmethod
    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        """Let go of all that ``holder`` holds but the callbacks of the tasks in ``keep``: others may send them."""

    @abstractmethod
    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        """Make the callback of a finished task due at once, its attempts counted anew, with the same ``webhook_id``.

        One that is being sent at this moment is left as it is.

        :param headers: sent where those that were stored are gone.
        :return: the task as it is then; None where there is none that has ended and has a callback.
        """
