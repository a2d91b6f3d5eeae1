"""The events of tasks in memory: what views have sent, and how tasks went from state to state. `memory` holds its lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from msgspec.structs import replace

from ..encoding import encode_json
from ..execution import ViewEvent
from ..states import State
from ..task import AsyncRouteTask
from .events import MAX_EVENTS, PROGRESS, STATE, Event


class MemoryEvents:
    """Keeps the last events of each task, by number. Not thread-safe."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[tuple[int, str, bytes]]] = {}
        self._last: dict[str, tuple[int, int]] = {}

    def put(self, task_id: str, epoch: int, change: int, sent: Sequence[ViewEvent]) -> int:
        """Add what a run has sent, under the numbers after ``change``, if it is new; return the last number."""
        last = self._last.get(task_id, (0, 0))
        sent = [event for event in sent if (epoch, event.number) > last]
        if not sent:
            return change
        self._last[task_id] = epoch, sent[-1].number
        kept = self._kept.setdefault(task_id, deque(maxlen=MAX_EVENTS))
        for number, event in enumerate(sent, change + 1):
            kept.append((number, event.name, event.data))
        return change + len(sent)

    def keep_states(self, task: AsyncRouteTask) -> None:
        """Keep the states of a run that is about to be forgotten."""
        kept = self._kept.setdefault(task.id, deque(maxlen=MAX_EVENTS))
        for state, change in ((State.NOT_STARTED, task.waiting_change), (State.RUNNING, task.started_change)):
            if change is not None:
                kept.append((change, STATE, encode_json(task.as_in(state).to_wire())))

    def drop(self, task_id: str) -> None:
        """Forget those of a task."""
        self._kept.pop(task_id, None)
        self._last.pop(task_id, None)

    def written(self, since: int) -> list[str]:
        """Return the ids of the tasks whose views have sent something after a number."""
        return [task_id for task_id, kept in self._kept.items() if kept and kept[-1][0] > since]

    def since(self, since: int, tasks: Sequence[AsyncRouteTask]) -> list[Event]:
        """Return what happened to these tasks after a number, in order; the tasks without their results."""
        found: list[Event] = []
        for whole in tasks:
            task = replace(whole, result_json=None)
            waiting = task.change if task.state is State.NOT_STARTED else task.waiting_change
            for change, state in (
                (waiting, State.NOT_STARTED),
                (task.started_change, State.RUNNING),
                (task.completed_change, task.state),
            ):
                if change is not None and change > since:
                    found.append(Event(change, STATE, task.as_in(state)))
            if task.state is State.RUNNING and task.change > since and task.change != task.started_change:
                found.append(Event(task.change, PROGRESS, task))
            for change, name, data in self._kept.get(task.id, ()):
                if change > since:
                    found.append(Event(change, name, task, data))
        return sorted(found, key=lambda event: event.change)
