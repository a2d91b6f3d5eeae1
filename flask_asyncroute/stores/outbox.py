"""The outbox: stores callbacks, and assigns each to one process, which sends it.

A callback is a request that reports the end of a task to another server. A process claims a
callback before sending it, so that no other process sends it too. A claim does not expire. It ends
when the process releases the callback, shuts down, or is found dead.
"""

# A callback is stored and removed with its task. The transaction that ends the task makes the
# callback due.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..callbacks.model import Delivery
from ..task import AsyncRouteTask

AT_ONCE = 0
"""The due time of a callback that must be sent immediately, whatever the clock says."""
# No retry waits this long, so the clock was set back.
LONGEST_US = 7_200_000_000
"""Maximum microseconds until a callback is due. A callback with a later due time is sent now."""
PER_HOST = 2
"""Maximum number of callbacks that all processes together send to one host at the same time."""


@dataclass(frozen=True, slots=True)
class Due:
    """A callback that this process has claimed and must send.

    :param attempts: the number of attempts so far. It starts again at 0 if a client requests that
        the callback is sent again.
    """

    task: AsyncRouteTask
    delivery: Delivery
    attempts: int


class Outbox(ABC):
    """Stores the callbacks of the tasks in one namespace (the part of a store that one app uses).

    Methods can raise StoreUnavailable.
    """

    # A transaction that changes `callback_state` or `callback_attempts` of a task also increments
    # the task's revision and the change number.

    @abstractmethod
    def next_due(self, now_us: int) -> int | None:
        """Return the time when the next callback is due, in microseconds since the epoch.

        Callbacks that a process has claimed do not count.

        :return: :data:`AT_ONCE` if a callback is due now; None if no callback has a due time.
        """

    @abstractmethod
    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        """Claim callbacks that are due, so that only the process ``holder`` sends them.

        Those due earliest come first. At most :data:`PER_HOST` callbacks to one host are claimed at
        a time. The state of a new callback changes from NotStarted to Running.

        :param limit: maximum number of callbacks to claim.
        """

    @abstractmethod
    def record_attempt(
        self, task_id: str, holder: str, state: str, due_us: int | None
    ) -> AsyncRouteTask | None:
        """Store the outcome of an attempt to send a callback, and release the callback.

        :param holder: the process that has claimed the callback.
        :param state: the callback's new state. A final state removes the stored headers.
        :param due_us: when the next attempt is due; None: never.
        :return: the new task record; None if the task was removed or ``holder`` has lost its claim.
        """

    @abstractmethod
    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        """Release the callbacks that a process has claimed, so that other processes can send them.

        :param holder: the process.
        :param keep: ids of tasks whose callbacks are not released.
        """

    @abstractmethod
    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        """Make a finished task's callback due now, and restart the count of attempts.

        The ``webhook_id`` does not change. A callback that is being sent now is left unchanged.

        :param headers: the headers to send if the stored headers were removed.
        :return: the new task record; None if the task does not exist, has not ended or has no
            callback.
        """
