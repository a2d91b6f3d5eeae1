"""The list query as SQL: conditions, order, page and permission in one statement, each reader an index range.

A statement depends on the shape of a query alone (which fields, operators and readers), never on its values; shapes are
kept compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import and_, bindparam, case, func, literal_column, or_, select, union
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import FromClause, Select

from ...query import ESCAPE, FIELDS, Condition, Operator, Position, Sort, sql_like
from ...states import TERMINAL, State
from ..base import LARGE_RESULT, Readers
from .statement import Statement
from .tables import RECORD, grants, tasks

MOST_RANGES = 40
"""A caller in more groups and roles than this has them searched together: right, but slower."""

Shape = tuple[tuple[str, Operator], ...]

_COMPARE = {
    Operator.EQ: "__eq__",
    Operator.NE: "__ne__",
    Operator.GT: "__gt__",
    Operator.LT: "__lt__",
    Operator.GE: "__ge__",
    Operator.LE: "__le__",
}
_TERMINAL = sorted(state.value for state in TERMINAL)
_size: ColumnElement[int] = literal_column("coalesce(length(asyncroute_tasks.result_json), 0)")
_small_result = case((_size > bindparam("large", LARGE_RESULT), None), else_=tasks.c.result_json).label("result_json")
_LISTED: list[Any] = [_small_result if column.name == "result_json" else column for column in RECORD]


class Queries:
    """The statements of list queries for one dialect; each shape is compiled once, and the last few hundred are kept."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._single = lru_cache(256)(lambda *shape: Statement(_single(*shape), dialect))
        self._merged = lru_cache(256)(lambda *shape: Statement(_merged(*shape), dialect))
        self._listed = lru_cache(16)(self._make_listed)

    def statement(
        self, conditions: Sequence[Condition], sort: Sort, position: Position | None, readers: Readers | None
    ) -> tuple[Statement, bool]:
        """Return the statement for a query, and whether it gives ids alone: it does where it merges several index ranges."""
        shape = tuple((condition.field.name, condition.operator) for condition in conditions)
        place = None if position is None else (position.value is None)
        if ("State", Operator.EQ) in shape and (readers is None or (readers.user is None and not readers.granted)):
            return self._single(shape, sort.field.name, sort.descending, place, readers is not None), False
        who = None if readers is None else (readers.user is not None, readers.anonymous, len(readers.granted))
        return self._merged(shape, sort.field.name, sort.descending, place, who), True

    def listed(self, ids: Sequence[str]) -> tuple[Statement, dict[str, str]]:
        """Return the statement that gives tasks as lists show them, and the values for these ids."""
        # Few different lengths, so that few statements are compiled, here and in the database.
        count = 1 << (len(ids) - 1).bit_length()
        padded = [*ids, *[ids[-1]] * (count - len(ids))]
        return self._listed(count), {f"id_{number}": task_id for number, task_id in enumerate(padded)}

    def _make_listed(self, count: int) -> Statement:
        ids = [bindparam(f"id_{number}", type_=tasks.c.id.type) for number in range(count)]
        return Statement(
            select(*_LISTED).where(tasks.c.namespace == bindparam("ns"), tasks.c.id.in_(ids)), self._dialect
        )


def values(
    conditions: Sequence[Condition], limit: int, position: Position | None, readers: Readers | None
) -> dict[str, Any]:
    """Return the values for the statement of a query."""
    given: dict[str, Any] = {"most": limit}
    for number, condition in enumerate(conditions):
        value: Any = condition.value
        if condition.operator in (Operator.LIKE, Operator.NOTLIKE):
            value = sql_like(str(value))
        elif isinstance(value, bool):
            value = int(value)
        given[f"value_{number}"] = value
    if position is not None:
        given.update(after_value=position.value, after_created=position.created_us, after_id=position.id)
    if readers is not None:
        given.update(reader="" if readers.user is None else readers.user, nobody="")
        for number, (kind, name) in enumerate(readers.granted):
            given[f"granted_{number}"] = reader_key(kind, name)
    return given


def reader_key(kind: str, name: str) -> str:
    """Return how a grant to (kind, name) is stored."""
    return f"{kind[0]}:{name}"


def _single(shape: Shape, sort: str, descending: bool, place: bool | None, anonymous: bool) -> Select[Any]:
    where = [tasks.c.namespace == bindparam("ns"), *_conditions(shape, None), *_after(sort, descending, place)]
    if anonymous:
        where.append(tasks.c.user == bindparam("nobody"))
    return select(*_LISTED).where(*where).order_by(*_order(sort, descending)).limit(bindparam("most"))


def _merged(
    shape: Shape, sort: str, descending: bool, place: bool | None, who: tuple[bool, bool, int] | None
) -> Select[Any]:
    """Take the first of each index range, one for each reader and state, and of those the first."""
    keys = [tasks.c.id, tasks.c.created_us, tasks.c[FIELDS[sort].attribute].label("sorted")]
    states: list[str | None] = [None] if ("State", Operator.EQ) in shape else [state.value for state in State]
    branches = []

    def add(table: FromClause, source: FromClause, reader: ColumnElement[bool] | None) -> None:
        granted = None if table is tasks else table
        for state in states:
            where = [table.c.namespace == bindparam("ns"), *_conditions(shape, granted)]
            if reader is not None:
                where.append(reader)
            if state is not None:
                where.append(table.c.state == literal_column(f"'{state}'"))
            branches.append(
                select(*keys)
                .select_from(source)
                .where(*where, *_after(sort, descending, place, granted))
                .order_by(*_order(sort, descending, granted))
                .limit(bindparam("most"))
            )

    if who is None:
        add(tasks, tasks, None)
    else:
        user, anonymous, granted = who
        for name in ["reader"] * user + ["nobody"] * anonymous:
            add(tasks, tasks, tasks.c.user == bindparam(name))
        names: list[Any] = [bindparam(f"granted_{number}") for number in range(granted)]
        joined = grants.join(tasks, (tasks.c.namespace == grants.c.namespace) & (tasks.c.id == grants.c.task_id))
        if granted > MOST_RANGES:
            # A task may be granted to several of the names, so it is looked for by its id.
            granted_ids = select(grants.c.task_id).where(
                grants.c.namespace == bindparam("ns"), grants.c.reader.in_(names)
            )
            add(tasks, tasks, tasks.c.id.in_(granted_ids))
        else:
            for name in names:
                add(grants, joined, grants.c.reader == name)
    every = union(*(select(branch.subquery()) for branch in branches)).subquery()
    down = descending
    order = [
        every.c.sorted.is_(None),
        _way(every.c.sorted, down),
        _way(every.c.created_us, down),
        _way(every.c.id, down),
    ]
    return select(every.c.id).order_by(*order).limit(bindparam("most"))


def _conditions(shape: Shape, granted: FromClause | None) -> list[ColumnElement[bool]]:
    """Return the conditions; those that a grant's row can tell are put to it, so that its indexes serve."""
    where = []
    for number, (name, operator) in enumerate(shape):
        attribute = FIELDS[name].attribute
        value: Any = bindparam(f"value_{number}")
        if attribute == "is_completed":
            finished = tasks.c.state.in_([literal_column(f"'{state}'") for state in _TERMINAL])
            number_of = case((finished, 1), else_=0)
            where.append(getattr(number_of, _COMPARE[operator])(value))
            continue
        told = granted is not None and attribute in ("state", "user", "created_us")
        column = granted.c[attribute] if told and granted is not None else tasks.c[attribute]
        if attribute == "user":
            where.append(column != "")
        if operator is Operator.LIKE:
            where.append(func.lower(column).like(value, escape=ESCAPE))
        elif operator is Operator.NOTLIKE:
            where.append(func.lower(column).not_like(value, escape=ESCAPE))
        else:
            where.append(getattr(column, _COMPARE[operator])(value))
    return where


def _after(
    sort: str, descending: bool, place: bool | None, granted: FromClause | None = None
) -> list[ColumnElement[bool]]:
    """Return what holds for tasks after the position; ``place`` is None without one, else whether its value is missing."""
    if place is None:
        return []
    attribute = FIELDS[sort].attribute
    created = tasks.c.created_us if granted is None else granted.c.created_us

    def beyond(column: Any, value: Any) -> ColumnElement[bool]:
        return column < value if descending else column > value  # type: ignore[no-any-return]

    def up_to(column: Any, value: Any) -> ColumnElement[bool]:
        return column <= value if descending else column >= value  # type: ignore[no-any-return]

    after_created: Any = bindparam("after_created")
    tie = and_(
        up_to(created, after_created), or_(beyond(created, after_created), beyond(tasks.c.id, bindparam("after_id")))
    )
    if attribute == "created_us":
        return [up_to(created, after_created), tie]
    column = tasks.c[attribute]
    if place:
        return [column.is_(None), tie]
    value: Any = bindparam("after_value")
    return [or_(beyond(column, value), and_(column == value, tie), column.is_(None))]


def _order(sort: str, descending: bool, granted: FromClause | None = None) -> list[Any]:
    attribute = FIELDS[sort].attribute
    created = tasks.c.created_us if granted is None else granted.c.created_us
    ties = [_way(created, descending), _way(tasks.c.id, descending)]
    if attribute == "created_us":
        return ties
    return [tasks.c[attribute].is_(None), _way(tasks.c[attribute], descending), *ties]


def _way(column: Any, descending: bool) -> Any:
    return column.desc() if descending else column.asc()
