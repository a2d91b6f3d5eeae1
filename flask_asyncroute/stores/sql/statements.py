"""Statements of SQLAlchemy Core, compiled once, for plain driver cursors.

Running a Core statement the usual way costs several times what the database takes. Here it is compiled to SQL text once,
and only its values change; columns hold plain types, so nothing has to be converted on the way.
"""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter
from typing import Any

from sqlalchemy import bindparam, case, delete, func, insert, null, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.elements import ColumnElement, CompilerElement

from ...states import State
from ..base import Expect
from .tables import RECORD, bodies, grants, namespaces, shared_values, tasks

_dialect = sqlite.dialect()


class Statement:
    """SQL text and the order of its parameters. Every value is named with `bindparam` or fixed in the statement."""

    def __init__(self, clause: CompilerElement) -> None:
        compiled: Any = clause.compile(dialect=_dialect)
        self.sql = str(compiled)
        names: list[str] = list(compiled.positiontup or ())
        # One more name, so that it gives a tuple for a single one too.
        self._in_order = itemgetter(*names, "")
        self._fixed: dict[str, Any] = {name: value for name, value in compiled.params.items() if value is not None}

    def values(self, **given: Any) -> tuple[Any, ...]:
        """Return the parameters in the order that :attr:`sql` has them."""
        given[""] = None
        return self._in_order({**self._fixed, **given} if self._fixed else given)[:-1]  # type: ignore[no-any-return]


def _is_task() -> ColumnElement[bool]:
    return (tasks.c.namespace == bindparam("ns")) & (tasks.c.id == bindparam("task_id"))


def _as_expected(expect: Expect) -> list[ColumnElement[bool]]:
    """The values follow as ``state_0`` …, ``is_owner``, ``is_epoch``, ``is_stopping``: see :func:`expectation`."""
    where = [_is_task()]
    states = [tasks.c.state == bindparam(f"state_{number}") for number in range(len(expect.states))]
    where.append(states[0] if len(states) == 1 else tasks.c.state.in_([part.right for part in states]))
    if expect.owner is not None:
        where.append(tasks.c.owner == bindparam("is_owner"))
    if expect.epoch is not None:
        where.append(tasks.c.epoch == bindparam("is_epoch"))
    if expect.stopping is not None:
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


def _shape(expect: Expect) -> tuple[int, bool, bool, bool]:
    return len(expect.states), expect.owner is not None, expect.epoch is not None, expect.stopping is not None


_newest = (
    select(func.coalesce(func.max(tasks.c.change), 0)).where(tasks.c.namespace == bindparam("ns")).scalar_subquery()
)
_removed = select(namespaces.c.removed_change).where(namespaces.c.key == bindparam("ns")).scalar_subquery()
_change: ColumnElement[int] = case((_newest > _removed, _newest), else_=_removed)
_next_change = _change + 1

CHANGE = Statement(select(_change))
NOTE_REMOVED = Statement(
    update(namespaces).where(namespaces.c.key == bindparam("ns")).values(removed_change=_next_change)
)
"""Before a task is removed: change numbers go on from here, even if it had the highest."""
ADD = Statement(
    insert(tasks).values(
        {"namespace": bindparam("ns"), **{column.name: bindparam(column.name) for column in RECORD},
         "change": _next_change, "request": bindparam("request")}
    )
)  # fmt: skip
ADD_GRANT = Statement(insert(grants).values({column.name: bindparam(column.name) for column in grants.columns}))
ADD_PART = Statement(insert(bodies).values({column.name: bindparam(column.name) for column in bodies.columns}))
GET = Statement(select(*RECORD).where(_is_task()))
GET_CLAIMED = Statement(select(*RECORD, tasks.c.request).where(_is_task()))
PARTS = Statement(
    select(bodies.c.data)
    .where(bodies.c.namespace == bindparam("ns"), bodies.c.task_id == bindparam("task_id"))
    .order_by(bodies.c.part)
)
DROP_PARTS = Statement(
    delete(bodies).where(bodies.c.namespace == bindparam("ns"), bodies.c.task_id == bindparam("task_id"))
)
DROP_GRANTS = Statement(
    delete(grants).where(grants.c.namespace == bindparam("ns"), grants.c.task_id == bindparam("task_id"))
)
MOVE_GRANTS = Statement(
    update(grants)
    .where(grants.c.namespace == bindparam("ns"), grants.c.task_id == bindparam("task_id"))
    .values(state=bindparam("new_state"))
)

_started = case((tasks.c.created_us > bindparam("now"), tasks.c.created_us), else_=bindparam("now"))
CLAIM = Statement(
    update(tasks)
    .where(_is_task(), tasks.c.state == State.NOT_STARTED.value)
    .values(
        state=State.RUNNING.value,
        owner=bindparam("new_owner"),
        epoch=tasks.c.epoch + 1,
        started_us=_started,
        expires_us=_started + tasks.c.timeout_us,
        revision=tasks.c.revision + 1,
        change=_next_change,
    )
)
WAITING_ALL = Statement(
    select(tasks.c.id, tasks.c.endpoint)
    .where(
        tasks.c.namespace == bindparam("ns"),
        tasks.c.state == State.NOT_STARTED.value,
        tasks.c.created_us < bindparam("before"),
    )
    .order_by(tasks.c.created_us)
    .limit(bindparam("most"))
)
OVERDUE = Statement(
    select(tasks.c.id)
    .where(
        tasks.c.namespace == bindparam("ns"),
        tasks.c.state == State.RUNNING.value,
        tasks.c.expires_us < bindparam("now"),
    )
    .limit(bindparam("most"))
)
OUTLIVED = Statement(
    select(tasks.c.id)
    .where(tasks.c.namespace == bindparam("ns"), tasks.c.outlived_us < bindparam("now"), tasks.c.stopping == 0)
    .order_by(tasks.c.outlived_us)
    .limit(bindparam("most"))
)
NEWS = Statement(
    select(*RECORD)
    .where(tasks.c.namespace == bindparam("ns"), tasks.c.change > bindparam("since"))
    .order_by(tasks.c.change)
    .limit(bindparam("most"))
)
NAMESPACE = Statement(select(namespaces.c.key, namespaces.c.secret).where(namespaces.c.name == bindparam("name")))
ADD_NAMESPACE = Statement(
    insert(namespaces).values(name=bindparam("name"), removed_change=0, secret=bindparam("secret"))
)

_is_value = (shared_values.c.namespace == bindparam("ns")) & (shared_values.c.key == bindparam("value_key"))
READ_VALUE = Statement(select(shared_values.c.value, shared_values.c.version).where(_is_value))
ADD_VALUE = Statement(
    insert(shared_values).values(
        namespace=bindparam("ns"),
        key=bindparam("value_key"),
        value=bindparam("new_value"),
        version=bindparam("new_version"),
    )
)
SET_VALUE = Statement(
    update(shared_values).where(_is_value).values(value=bindparam("new_value"), version=bindparam("new_version"))
)
DROP_VALUE = Statement(delete(shared_values).where(_is_value))
VALUE_KEYS = Statement(
    select(shared_values.c.key).where(shared_values.c.namespace == bindparam("ns")).order_by(shared_values.c.key)
)


def update_of(fields: tuple[str, ...], expect: Expect) -> Statement:
    """Return the compare-and-set that writes these record fields; their values are named ``new_<field>``."""
    return _update_of(fields, _shape(expect))


def delete_of(expect: Expect) -> Statement:
    """Return the statement that removes a task that is as expected."""
    return _delete_of(_shape(expect))


def _expect_of(shape: tuple[int, bool, bool, bool]) -> Expect:
    states, owner, epoch, stopping = shape
    return Expect((State.RUNNING,) * states, "" if owner else None, 0 if epoch else None, False if stopping else None)


@lru_cache(64)
def _update_of(fields: tuple[str, ...], shape: tuple[int, bool, bool, bool]) -> Statement:
    values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in fields}
    values.update(revision=tasks.c.revision + 1, change=_next_change)
    if "completed_us" in values:
        begun = func.coalesce(tasks.c.started_us, tasks.c.created_us)
        completed = case((begun > values["completed_us"], begun), else_=values["completed_us"])
        values.update(completed_us=completed, outlived_us=completed + tasks.c.retention_us, request=null())
    return Statement(update(tasks).where(*_as_expected(_expect_of(shape))).values(values))


@lru_cache(16)
def _delete_of(shape: tuple[int, bool, bool, bool]) -> Statement:
    return Statement(delete(tasks).where(*_as_expected(_expect_of(shape))))
