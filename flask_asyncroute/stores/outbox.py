"""The interface of the outbox, which stores callbacks and assigns them to processes.

A callback is stored and removed with its task. The transaction that ends the task makes the
callback due. A claim does not expire. It ends when it is released, or when its process shuts down
or is detected as dead. Methods raise the errors of `base.TaskStore`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..callbacks.model import Delivery
from ..task import AsyncRouteTask

AT_ONCE = 0
"""The due time of a callback that must be sent immediately, whatever the clock says."""
LONGEST_US = 7_200_000_000
"""A callback due more than this after now is due now: no retry waits this long, so the clock was
set back.
"""
PER_HOST = 2
"""Maximum simultaneous callbacks to one host from all processes together."""


@dataclass(frozen=True, slots=True)
class Due:
    """A callback that a process has claimed.

    :param attempts: the number of attempts so far; a redelivery restarts the count.
    """

    task: AsyncRouteTask
    delivery: Delivery
    attempts: int


class Outbox(ABC):
    """Stores the callbacks of one namespace; processes claim and send them.

    A transaction that changes ``callback_state`` or ``callback_attempts`` of a task also increments
    the task's revision and the change number.
    """

    @abstractmethod
    def next_due(self, now_us: int) -> int | None:
        """Return the time when the first unclaimed callback is due: :data:`AT_ONCE` if it is due
        already; None if no callback has a due time.
        """

    @abstractmethod
    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        """Claim up to ``limit`` due callbacks for the process ``holder``, earliest due first.

        The limit :data:`PER_HOST` applies. NotStarted callbacks become Running.
        """

    @abstractmethod
    def record_attempt(
        self, task_id: str, holder: str, state: str, due_us: int | None
    ) -> AsyncRouteTask | None:
        """Record and count a sending attempt, and release the callback; return the new task record.

        :param state: the callback's new state. A final state removes the stored headers.
        :param due_us: when the next attempt is due; None: never.
        :return: None if the task was removed, or the claim of ``holder`` has ended.
        """

    @abstractmethod
    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        """Release the callbacks that ``holder`` has claimed, except those of the tasks in
        ``keep``.
        """

    @abstractmethod
    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        """Make a finished task's callback due now, and reset its attempts; return the new task
        record. The ``webhook_id`` does not change.

        A callback that is being sent is left unchanged.

        :param headers: to send if the stored headers were removed.
        :return: None if the task does not exist, has not ended or has no callback.
        """
