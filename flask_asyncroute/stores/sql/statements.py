"""The statements for tasks and namespaces, each written once with SQLAlchemy's Core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal_column,
    null,
    select,
    update,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ColumnElement, CompilerElement

from ...delivery import PENDING
from ...states import State
from ..base import AHEAD_US, Expect
from .statement import Statement, made_once
from .tables import RECORD, grants, namespaces, tasks


def _is_task() -> ColumnElement[bool]:
    return (tasks.c.namespace == bindparam("ns")) & (tasks.c.id == bindparam("task_id"))


def _as_expected(shape: Shape) -> list[ColumnElement[bool]]:
    """The values follow as ``state_0`` …, ``is_owner``, ``is_epoch``, ``is_stopping``: see :func:`expectation`."""
    states, has_owner, has_epoch, has_stopping = shape
    where = [_is_task()]
    given = [tasks.c.state == bindparam(f"state_{number}") for number in range(states)]
    where.append(given[0] if states == 1 else tasks.c.state.in_([part.right for part in given]))
    if has_owner:
        where.append(tasks.c.owner == bindparam("is_owner"))
    if has_epoch:
        where.append(tasks.c.epoch == bindparam("is_epoch"))
    if has_stopping:
        where.append(tasks.c.stopping == bindparam("is_stopping"))
    return where


def expectation(expect: Expect) -> dict[str, Any]:
    """Return the values for a statement made for ``expect``."""
    values: dict[str, Any] = {f"state_{number}": state.value for number, state in enumerate(expect.states)}
    values.update(
        is_owner=expect.owner,
        is_epoch=expect.epoch,
        is_stopping=None if expect.stopping is None else int(expect.stopping),
    )
    return values


Shape = tuple[int, bool, bool, bool]
"""How many states an expectation has, and whether it has an owner, an epoch, a stopping."""


def _shape(expect: Expect) -> Shape:
    return len(expect.states), expect.owner is not None, expect.epoch is not None, expect.stopping is not None


_newest = (
    select(func.coalesce(func.max(tasks.c.change), 0)).where(tasks.c.namespace == bindparam("ns")).scalar_subquery()
)
_floor = select(namespaces.c.change).where(namespaces.c.key == bindparam("ns")).scalar_subquery()
_change: ColumnElement[int] = case((_newest > _floor, _newest), else_=_floor)

_is_namespace = namespaces.c.key == bindparam("ns")
CHANNEL = "asyncroute"
_told = func.pg_notify(literal_column(f"'{CHANNEL}'"), cast(namespaces.c.key, Text))
"""Has PostgreSQL tell all who listen, once the transaction is committed, in which namespace something is new."""
_is_grant_of_task = (grants.c.namespace == bindparam("ns")) & (grants.c.task_id == bindparam("task_id"))
_started = case((tasks.c.created_us > bindparam("now"), tasks.c.created_us), else_=bindparam("now"))


_is_plain = and_(
    tasks.c.permission_json.is_(None), tasks.c.callback_json.is_(None), tasks.c.body_size == literal_column("0")
)
"""Whether no row of another table goes along with a task from state to state, so that one statement is all that is needed."""

_UNKNOWN_AT_FIRST = {"waiting_change", "started_change", "completed_change"}
"""Columns that are empty in a new task."""
_waiting_change = func.coalesce(tasks.c.waiting_change, tasks.c.change)


class Statements:
    """All fixed statements, and those whose shape depends on what is asked, for one dialect.

    Change numbers are in the order of commits. SQLite has one writer at a time, so the next is one more than the highest;
    elsewhere the namespace's counter row is raised by the same statement that uses the number: its lock, held until the
    commit, is the order. A statement that would change nothing takes no number, waits for nobody and wakes nobody.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._updates: dict[tuple[tuple[str, ...], Shape, bool], Statement] = {}
        self._deletes: dict[Shape, Statement] = {}
        self._finds: dict[Shape, Statement] = {}
        raised: ColumnElement[int] = _change + 1 if dialect.name == "sqlite" else namespaces.c.change + 1
        self.note_removed = self.compiled(update(namespaces).where(_is_namespace).values(change=raised))
        """Before a task is removed: change numbers go on from here, even if it had the highest."""
        raised_by = raised - 1 + bindparam("count", type_=BigInteger)
        told = [] if dialect.name == "sqlite" else [_told]
        self.raise_change = self.compiled(
            update(namespaces).where(_is_namespace).values(change=raised_by).returning(namespaces.c.change, *told)
        )
        """Take so many numbers; it gives the last of them."""

    def compiled(self, clause: CompilerElement) -> Statement:
        """Return a statement for this dialect."""
        return Statement(clause, self._dialect)

    def next_change(self, where: Sequence[ColumnElement[bool]] = ()) -> ColumnElement[int]:
        """Return the number for a statement that changes a task; one object for all of a statement.

        :param where: which task is changed; none where there is one in any case.
        """
        if self._dialect.name == "sqlite":
            return _change + 1
        if_any = (
            [select(literal_column("1")).select_from(tasks).where(*where).correlate(None).exists()] if where else []
        )
        counter = (
            update(namespaces)
            .where(_is_namespace, *if_any)
            .values(change=namespaces.c.change + 1)
            .returning(namespaces.c.change, _told)
            .cte("counter")
        )
        return select(counter.c.change).scalar_subquery()

    @made_once
    def change(self) -> Statement:
        return self.compiled(select(_change))

    @made_once
    def add(self) -> Statement:
        given: dict[str, Any] = {
            column.name: bindparam(column.name) for column in RECORD if column.name not in _UNKNOWN_AT_FIRST
        }
        return self.compiled(
            insert(tasks).values(
                {"namespace": bindparam("ns"), **given, "change": self.next_change(), "request": bindparam("request")}
            ).inline()
        )  # fmt: skip

    @made_once
    def add_grant(self) -> Statement:
        return self.compiled(insert(grants).values({column.name: bindparam(column.name) for column in grants.columns}))

    @made_once
    def get(self) -> Statement:
        return self.compiled(select(*RECORD).where(_is_task()))

    @made_once
    def drop_grants(self) -> Statement:
        return self.compiled(delete(grants).where(_is_grant_of_task))

    @made_once
    def move_grants(self) -> Statement:
        return self.compiled(update(grants).where(_is_grant_of_task).values(state=bindparam("new_state")))

    @made_once
    def claimed(self) -> Statement:
        return self.compiled(select(*RECORD, tasks.c.request).where(_is_task()))

    @made_once
    def claim(self) -> Statement:
        return self._claim(_is_task())

    @made_once
    def claim_plain(self) -> Statement:
        """Claim a task of which no other table has anything."""
        return self._claim(_is_task(), _is_plain)

    def _claim(self, *which: ColumnElement[bool]) -> Statement:
        where = [*which, tasks.c.state == State.NOT_STARTED.value]
        change = self.next_change(where)
        return self.compiled(
            update(tasks)
            .where(*where)
            .values(
                state=State.RUNNING.value,
                owner=bindparam("new_owner"),
                epoch=tasks.c.epoch + 1,
                started_us=_started,
                expires_us=_started + tasks.c.timeout_us,
                revision=tasks.c.revision + 1,
                change=change,
                waiting_change=_waiting_change,
                started_change=change,
            )
            .returning(*RECORD, tasks.c.request)
        )

    @made_once
    def waiting(self) -> Statement:
        return self.compiled(
            select(tasks.c.id, tasks.c.endpoint)
            .where(
                tasks.c.namespace == bindparam("ns"),
                tasks.c.state == State.NOT_STARTED.value,
                (tasks.c.created_us < bindparam("before")) | (tasks.c.created_us - AHEAD_US > bindparam("before")),
            )
            .order_by(tasks.c.created_us)
        )

    @made_once
    def outlived(self) -> Statement:
        return self.compiled(
            select(tasks.c.id)
            .where(
                tasks.c.namespace == bindparam("ns"),
                tasks.c.outlived_us < bindparam("now"),
                tasks.c.stopping == 0,
                tasks.c.callback_state.is_(None)
                | tasks.c.callback_state.not_in([literal_column(f"'{state}'") for state in PENDING]),
            )
            .order_by(tasks.c.outlived_us)
            .limit(bindparam("most"))
        )

    @made_once
    def news(self) -> Statement:
        return self.compiled(
            select(*RECORD)
            .where(tasks.c.namespace == bindparam("ns"), tasks.c.change > bindparam("since"))
            .order_by(tasks.c.change)
            .limit(bindparam("most"))
        )

    @made_once
    def namespace(self) -> Statement:
        return self.compiled(
            select(namespaces.c.key, namespaces.c.secret).where(namespaces.c.name == bindparam("name"))
        )

    @made_once
    def add_namespace(self) -> Statement:
        return self.compiled(
            insert(namespaces).values(
                key=bindparam("key"), name=bindparam("name"), change=0, secret=bindparam("secret")
            )
        )

    @made_once
    def lock_namespace(self) -> Statement:
        """What is checked before it is written is checked after this: nobody else writes until the commit."""
        return self.compiled(select(namespaces.c.key).where(_is_namespace).with_for_update())

    def update_of(self, fields: tuple[str, ...], expect: Expect, is_plain: bool = False) -> Statement:
        """Return the compare-and-set that writes these record fields, named ``new_<field>``, and gives the record back.

        :param is_plain: only of a task of which no other table has anything.
        """
        key = (fields, _shape(expect), is_plain)
        statement = self._updates.get(key)
        if statement is None:
            statement = self._updates[key] = self._update_of(*key)
        return statement

    def delete_of(self, expect: Expect) -> Statement:
        """Return the statement that removes a task that is as expected."""
        shape = _shape(expect)
        statement = self._deletes.get(shape)
        if statement is None:
            statement = self._deletes[shape] = self.compiled(delete(tasks).where(*_as_expected(shape)))
        return statement

    def find_of(self, expect: Expect) -> Statement:
        """Return the statement that tells whether a task is as expected."""
        shape = _shape(expect)
        statement = self._finds.get(shape)
        if statement is None:
            statement = self._finds[shape] = self.compiled(select(tasks.c.id).where(*_as_expected(shape)))
        return statement

    def _update_of(self, fields: tuple[str, ...], shape: Shape, is_plain: bool) -> Statement:
        where = [*_as_expected(shape), *([_is_plain] if is_plain else [])]
        change = self.next_change(where)
        values: dict[str, Any] = {name: bindparam(f"new_{name}", type_=tasks.c[name].type) for name in fields}
        values.update(revision=tasks.c.revision + 1, change=change)
        if "state" in values:
            values.update(waiting_change=null(), started_change=null())
        if "completed_us" in values:
            begun = func.coalesce(tasks.c.started_us, tasks.c.created_us)
            completed = case((begun > values["completed_us"], begun), else_=values["completed_us"])
            values.update(completed_us=completed, outlived_us=completed + tasks.c.retention_us, request=null())
            values.update(
                waiting_change=_waiting_change,
                started_change=tasks.c.started_change,
                completed_change=change,
            )
        return self.compiled(update(tasks).where(*where).values(values).returning(*RECORD))
