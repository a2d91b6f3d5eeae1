"""What stores tell of tasks: how they went from state to state, their progress, and what their views have sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..task import AsyncRouteTask

STATE, PROGRESS = "task.state", "task.progress"
MAX_EVENTS = 1000
"""How many events of its view are kept for each task at the least: the last ones."""


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a task.

    :param change: its number; that of progress stands for all progress up to it.
    :param name: :data:`STATE`, :data:`PROGRESS`, or that of a view's event.
    :param task: as it was then at a change of state that has no ``data``, else as it is now; without its result.
    :param data: what the view has sent, or the task object of a run that was lost, as JSON.
    """

    change: int
    name: str
    task: AsyncRouteTask
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Events:
    """What happened since a change number, in order, and the number up to which that is all.

    That one is lower where there is another store by now, whose numbers began anew.
    """

    change: int
    events: Sequence[Event]
