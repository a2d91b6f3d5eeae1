"""The events of the tasks in one namespace, in the order of their commits.

Events are the changes of a task's State, and the events that views send. The store gives each event
an increasing change number.
"""

# The events table has a row per view event. The states of the current run are read from the task's
# row, which saves a write. A restart copies earlier states to the events table.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...encoding import encode_json
from ...task import AsyncRouteTask, State
from ..base import PROGRESS, STATE, Changes, Event, Events, ViewEvent
from .database import Cursor, Database
from .migrations import Namespace
from .rows import record_of
from .statements import Statements

# Counting the events is slow, so the oldest are not removed for each new event.
TRIM_EVERY = 100
"""The number of events by which a task may exceed `base.MAX_EVENTS`."""

CHANGES_PAGE = 1000
"""Maximum number of changed tasks per read."""


class EventLog:
    """Reads the events of tasks, and adds events in transactions of the store."""

    def __init__(self, database: Database, sql: Statements, namespace: Namespace) -> None:
        self._database = database
        self._sql = sql
        self._namespace = namespace

    def add(
        self, cursor: Cursor, task_id: str, epoch: int, sent: Sequence[ViewEvent]
    ) -> Sequence[int]:
        """Add events that a view has sent. Return the numbers that the store has given to them.

        If the task then has too many events, the oldest are removed. Events that are already stored
        are skipped.

        :param epoch: the number of the task's current run (execution).
        """
        ns = self._namespace.key
        which = {"ns": ns, "task_id": task_id}
        last = cursor.execute(self._sql.get_last_event, which).fetchone()
        if last is not None:
            # After CommitUnknown, a run sends its events again, even if they are stored
            # already.
            stored = (last.epoch, last.number)
            sent = [event for event in sent if (epoch, event.number) > stored]
            if not sent:
                return ()
        count = {"ns": ns, "count": len(sent)}
        changes = [row.change for row in cursor.execute(self._sql.take_changes, count).fetchall()]
        if len(changes) < len(sent):  # SQLite returns only the last one
            changes = list(range(changes[-1] - len(sent) + 1, changes[-1] + 1))
        for number, event in zip(changes, sent, strict=True):
            self._add(cursor, task_id, number, event, epoch)
        if sent[-1].number // TRIM_EVERY != (sent[0].number - 1) // TRIM_EVERY:
            cursor.execute(self._sql.trim_events, which)
        return changes

    def keep_states(self, cursor: Cursor, task: AsyncRouteTask) -> None:
        """Store the past States of a task as events, before a new run (execution) of the task."""
        for state, change in (
            (State.NOT_STARTED, task.waiting_change),
            (State.RUNNING, task.started_change),
        ):
            if change is not None:
                event = ViewEvent(STATE, encode_json(task.as_in(state).to_wire()), 0)
                self._add(cursor, task.id, change, event, task.epoch)

    def read(self, since: int, most: int, task_id: str | None, group: str | None) -> Events:
        """Return at most ``most`` events after the change with the number ``since``.

        See `TaskStore.events`.
        """
        change = self.newest()
        statement = self._sql.events_since(task_id is not None, group is not None)
        values = {
            "ns": self._namespace.key, "since": since, "newest": change, "limit": most,
            "task_id": task_id, "group": group,
        }  # fmt: skip
        found = [_event_of(row) for row in self._database.fetch_all(statement, values)]
        last = found[-1].change if found else 0
        return Events(last if len(found) == most else change, found)

    def changes_since(self, since: int, worker: str | None) -> Changes:
        """Return the tasks that have changed after the change with the number ``since``.

        See `SharedTaskStore.changes_since`.
        """
        change = self.newest()
        if change < since:
            # The database was restored or failed over to an older copy, so its change numbers went
            # back.
            since = 0
        if not 0 <= since < change:
            return Changes(change, ())
        values = {
            "ns": self._namespace.key, "since": since, "newest": change, "limit": CHANGES_PAGE,
            "worker": worker,
        }  # fmt: skip
        statement = self._sql.changed_tasks if worker is None else self._sql.ended_tasks
        tasks = [record_of(row) for row in self._database.fetch_all(statement, values)]
        sent: set[str] = set()
        if worker is None:
            rows = self._database.fetch_all(self._sql.tasks_with_events, values)
            sent = {row.task_id for row in rows}
        if len(tasks) == CHANGES_PAGE:
            return Changes(tasks[-1].change, tasks, sent)
        return Changes(change, tasks, sent)

    def newest(self) -> int:
        """Return the highest number that the store has given to a change."""
        row = self._database.fetch_one(self._sql.get_change, {"ns": self._namespace.key})
        return int(row.change)

    def _add(self, cursor: Cursor, task_id: str, change: int, event: ViewEvent, epoch: int) -> None:
        values = {
            "ns": self._namespace.key, "task_id": task_id, "change": change, "name": event.name,
            "data": event.data, "epoch": epoch, "number": event.number,
        }  # fmt: skip
        cursor.execute(self._sql.add_event, values)


def _event_of(row: Any) -> Event:
    task, number, name, data = record_of(row), row.number, row.name, row.data
    if data is not None or name == PROGRESS:
        return Event(number, name, task, data)
    return Event(number, STATE, task.as_in(State(name)))
