"""The states of a task and the steps between them. `lifecycle` takes the steps; nobody else does."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a task stands. The values are those of the wire."""

    NOT_STARTED = "NotStarted"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    ABORTED = "Aborted"

    @property
    def is_terminal(self) -> bool:
        """Whether a task never leaves this state."""
        return self in TERMINAL


TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.ABORTED})
UNFINISHED = frozenset(State) - TERMINAL

TRANSITIONS: dict[State, frozenset[State]] = {
    State.NOT_STARTED: frozenset({State.RUNNING, State.ABORTED}),
    State.RUNNING: TERMINAL | {State.NOT_STARTED},
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.ABORTED: frozenset(),
}
"""Which states may follow which. Back to NotStarted goes a task that is to be restarted, see `lifecycle`."""
