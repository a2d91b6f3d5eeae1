"""The events of one namespace in SQL: what views have sent, and how tasks went from state to state, in one order.

The states of a task's present run are read off its own row, which costs no write; only what a restart overwrites is put
into a row of its own, as what a view sends is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import LargeBinary, bindparam, cast, delete, func, insert, literal_column, null, select, union_all
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import Select

from ...encoding import encode_json
from ...execution import ViewEvent
from ...states import State
from ...task import AsyncRouteTask
from ..events import MAX_EVENTS, PROGRESS, STATE, Event
from .cursors import one, run
from .database import Cursor
from .records import record_of
from .statement import Statement
from .statements import Statements
from .tables import RECORD, events, tasks

TRIM_EVERY = 100
"""How many events a task may have over the most before those are removed: to look costs, and more are no harm."""


class EventLog:
    """The statements for events, for one dialect. `store` calls it inside its transactions."""

    def __init__(self, statements: Statements) -> None:
        self._raise_change = statements.raise_change
        self._read: dict[tuple[bool, bool], Statement] = {}
        self._statements = statements
        is_of_task = (events.c.namespace == bindparam("ns")) & (events.c.task_id == bindparam("task_id"))
        self._add = statements.compiled(
            insert(events).values({column.name: bindparam(column.name) for column in events.columns})
        )
        kept = (
            select(events.c.change).where(is_of_task).order_by(events.c.change.desc()).offset(MAX_EVENTS).limit(1)
        ).scalar_subquery()
        self._trim = statements.compiled(delete(events).where(is_of_task, events.c.change <= kept))
        self.drop = statements.compiled(delete(events).where(is_of_task))
        self._last = statements.compiled(
            select(events.c.epoch, events.c.number).where(is_of_task).order_by(events.c.change.desc()).limit(1)
        )
        self.written = statements.compiled(
            select(events.c.task_id)
            .where(events.c.namespace == bindparam("ns"), events.c.change > bindparam("since"))
            .distinct()
        )

    def put(self, cursor: Cursor, ns: int, task_id: str, epoch: int, sent: Sequence[ViewEvent]) -> None:
        """Add what a run has sent, if it is new, under numbers of its own, and remove what is over the most."""
        last_epoch, last_number = one(cursor, self._last, ns=ns, task_id=task_id) or (0, 0)
        # Some of them may be there: a run sends again what it does not know to be stored, with what it has sent since.
        sent = [event for event in sent if (epoch, event.number) > (last_epoch, last_number)]
        if not sent:
            return
        last = one(cursor, self._raise_change, ns=ns, count=len(sent))[0]
        for change, event in enumerate(sent, last - len(sent) + 1):
            self._put(cursor, ns, task_id, change, event, epoch)
        if sent[-1].number // TRIM_EVERY != (sent[0].number - 1) // TRIM_EVERY:
            run(cursor, self._trim, ns=ns, task_id=task_id)

    def keep_states(self, cursor: Cursor, ns: int, task: AsyncRouteTask) -> None:
        """Put the states of a run that is about to be forgotten into rows of their own."""
        for state, change in (
            (State.NOT_STARTED, task.waiting_change),
            (State.RUNNING, task.started_change),
        ):
            if change is not None:
                event = ViewEvent(STATE, encode_json(task.as_in(state).to_wire()), 0)
                self._put(cursor, ns, task.id, change, event, task.epoch)

    def read(self, ns: int, since: int, most: int, task_id: str | None, group: str | None) -> tuple[str, Any]:
        """Return a statement that gives events in order, for :meth:`event_of`, and its values."""
        shape = task_id is not None, group is not None
        statement = self._read.get(shape)
        if statement is None:
            statement = self._read[shape] = self._statements.compiled(_happened(*shape))
        return statement.sql, statement.values(ns=ns, since=since, most=most, task_id=task_id, group=group)

    @staticmethod
    def event_of(row: Any) -> Event:
        """Return the event that a row of :meth:`read` tells of."""
        change, name, data = row[:3]
        task = record_of(row[3:])
        if data is not None or name == PROGRESS:
            return Event(change, name, task, data)
        return Event(change, STATE, task.as_in(State(name)))

    def _put(self, cursor: Cursor, ns: int, task_id: str, change: int, event: ViewEvent, epoch: int) -> None:
        run(
            cursor, self._add, namespace=ns, task_id=task_id, change=change, name=event.name, data=event.data,
            epoch=epoch, number=event.number,
        )  # fmt: skip


def _happened(of_task: bool, of_group: bool) -> Select[Any]:
    """Return what gives all events after a number, each with its task as that is now, without its result."""
    changed = [tasks.c.namespace == bindparam("ns"), tasks.c.change > bindparam("since")]
    of_events: list[ColumnElement[bool]] = [
        events.c.namespace == bindparam("ns"),
        events.c.change > bindparam("since"),
    ]
    if of_task:
        changed.append(tasks.c.id == bindparam("task_id"))
        of_events.append(events.c.task_id == bindparam("task_id"))

    def part(change: ColumnElement[Any], name: Any, *where: ColumnElement[bool]) -> Select[Any]:
        return select(
            change.label("number"),
            tasks.c.id.label("task_id"),
            name.label("name"),
            cast(null(), LargeBinary).label("data"),
        ).where(*changed, *where)

    begun = func.coalesce(tasks.c.waiting_change, tasks.c.change)
    after: ColumnElement[Any] = bindparam("since")
    is_waiting = tasks.c.state == literal_column(f"'{State.NOT_STARTED}'")
    is_running = tasks.c.state == literal_column(f"'{State.RUNNING}'")
    parts = [
        part(begun, literal_column(f"'{State.NOT_STARTED}'"), begun > after,
             is_waiting | tasks.c.waiting_change.is_not(None)),
        part(tasks.c.started_change, literal_column(f"'{State.RUNNING}'"), tasks.c.started_change > after),
        part(tasks.c.completed_change, tasks.c.state, tasks.c.completed_change > after),
        part(tasks.c.change, literal_column(f"'{PROGRESS}'"), is_running, tasks.c.change != tasks.c.started_change),
        select(events.c.change.label("number"), events.c.task_id, events.c.name, events.c.data).where(*of_events),
    ]  # fmt: skip
    # For itself, and before the tasks are joined: while a new database has no statistics yet, PostgreSQL would look for the
    # events anew beside each task that there is.
    found = union_all(*parts).cte("happened").prefix_with("MATERIALIZED", dialect="postgresql")
    record = [null().label("result_json") if column.name == "result_json" else column for column in RECORD]
    listed = (
        select(found.c.number, found.c.name, found.c.data, *record)
        .join_from(found, tasks, (tasks.c.namespace == bindparam("ns")) & (tasks.c.id == found.c.task_id))
        .where(tasks.c.sse_group.is_not(None))
    )
    if of_group:
        listed = listed.where(tasks.c.sse_group == bindparam("group"))
    return listed.order_by(found.c.number).limit(bindparam("most"))
