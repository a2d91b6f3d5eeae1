"""Build the SQL statements that list tasks, with SQLAlchemy.

One statement applies the conditions, the order, the page and the permissions. A reader is a user,
group, role or scope name with which the caller may read tasks.
"""

# The statement searches one index range for each reader. A statement depends on the shape of a
# query (its fields, operators and readers), not on its values. The last few hundred statements are
# cached.

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import and_, bindparam, case, func, literal_column, or_, select, union
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import FromClause, Select

from ...query import ESCAPE, FIELDS, Condition, Operator, Position, Sort, sql_like
from ...task import TERMINAL, State
from ..base import LARGE_RESULT, Readers
from .tables import RECORD, grants, tasks

# Beyond it, one slower index range covers all of them.
MAX_RANGES = 40
"""Maximum number of groups, roles and scopes of a caller that are searched one by one."""

Shape = tuple[tuple[str, Operator], ...]

_COMPARE: dict[Operator, Callable[[Any, Any], Any]] = {
    Operator.EQ: operator.eq,
    Operator.NE: operator.ne,
    Operator.GT: operator.gt,
    Operator.LT: operator.lt,
    Operator.GE: operator.ge,
    Operator.LE: operator.le,
    Operator.LIKE: lambda column, value: func.lower(column).like(value, escape=ESCAPE),
    Operator.NOTLIKE: lambda column, value: func.lower(column).not_like(value, escape=ESCAPE),
}
# Constants are literals, so that only `values` are parameters. On SQLite, SQLAlchemy would
# otherwise also make OFFSET a parameter.
_ZERO: Any = literal_column("0")
_ONE: Any = literal_column("1")
_NO_USER: Any = literal_column("''")
_TERMINAL: list[Any] = [literal_column(f"'{state}'") for state in sorted(TERMINAL)]
_size: ColumnElement[int] = literal_column("coalesce(length(asyncroute_tasks.result_json), 0)")
_small_result = case(
    (_size > literal_column(str(LARGE_RESULT)), None), else_=tasks.c.result_json
).label("result_json")
_LISTED: list[Any] = [
    _small_result if column.name == "result_json" else column for column in RECORD
]
_IS_ANONYMOUS = (tasks.c.user == _NO_USER, tasks.c.permission_json.is_(None))
_IS_IN_NAMESPACE = tasks.c.namespace == bindparam("ns")
# For queries with a condition on the id: `+ 0` keeps PostgreSQL from using an index that begins
# with the namespace; see `tables`.
_IS_ALSO_IN_NAMESPACE = tasks.c.namespace + _ZERO == bindparam("ns")


class Queries:
    """Compiles statements that list tasks for one SQL dialect, and caches them."""

    def __init__(self, dialect: Dialect) -> None:
        self._single = lru_cache(256)(lambda *shape: str(_single(*shape).compile(dialect=dialect)))
        self._merged = lru_cache(256)(lambda *shape: str(_merged(*shape).compile(dialect=dialect)))
        self._listed = lru_cache(16)(lambda count: str(_with_ids(count).compile(dialect=dialect)))

    def statement(
        self, conditions: Sequence[Condition], sort: Sort, position: Position | None,
        readers: Readers | None,
    ) -> tuple[str, bool]:  # fmt: skip
        """Return the SQL statement of a query, and whether it selects ids instead of task records.

        :param readers: the names with which the caller may read tasks; None: all tasks are
            selected.
        """
        # A statement that merges several index ranges selects ids.
        shape = tuple((condition.field.name, condition.operator) for condition in conditions)
        is_after_missing = None if position is None else position.value is None
        order = shape, sort.field.name, sort.descending, is_after_missing
        is_for_names = readers is not None and (readers.user is not None or readers.granted)
        if ("State", Operator.EQ) in shape and not is_for_names:
            return self._single(*order, readers is not None), False
        reader_shape = None
        if readers is not None:
            reader_shape = (readers.user is not None, readers.anonymous, len(readers.granted))
        return self._merged(*order, reader_shape), True

    def listed(self, ids: Sequence[str]) -> tuple[str, dict[str, str]]:
        """Return the statement that selects tasks by id, and its parameter values.

        The statement does not select large results.
        """
        # Pad the ids to a power of two, so that few different statements are compiled.
        count = 1 << (len(ids) - 1).bit_length()
        padded = [*ids, *[ids[-1]] * (count - len(ids))]
        values = {f"id_{number}": task_id for number, task_id in enumerate(padded)}
        return self._listed(count), values


def values(
    conditions: Sequence[Condition], limit: int, position: Position | None, readers: Readers | None
) -> dict[str, Any]:
    """Return the parameter values of the statement of a query, except the namespace ``ns``."""
    parameters: dict[str, Any] = {"limit": limit}
    for number, condition in enumerate(conditions):
        value: Any = condition.value
        if condition.operator in (Operator.LIKE, Operator.NOTLIKE):
            value = sql_like(str(value))
        elif isinstance(value, bool):
            value = int(value)
        parameters[f"value_{number}"] = value
    if position is not None:
        parameters.update(
            after_value=position.value, after_created=position.created_us, after_id=position.id
        )
    if readers is not None:
        parameters["user"] = readers.user
        for number, (kind, name) in enumerate(readers.granted):
            parameters[f"granted_{number}"] = reader_key(kind, name)
    return parameters


def reader_key(kind: str, name: str) -> str:
    """Return the text that stands for a group, role, scope or user in the table of permissions."""
    return f"{kind[0]}:{name}"


def _with_ids(count: int) -> Select[Any]:
    ids = [bindparam(f"id_{number}", type_=tasks.c.id.type) for number in range(count)]
    return select(*_LISTED).where(_IS_ALSO_IN_NAMESPACE, tasks.c.id.in_(ids))


def _single(
    shape: Shape, sort: str, descending: bool, is_after_missing: bool | None, anonymous: bool
) -> Select[Any]:
    query = select(*_LISTED).where(
        _IS_IN_NAMESPACE,
        *_conditions(shape, tasks),
        *_after_position(sort, descending, is_after_missing),
    )
    if anonymous:
        query = query.where(*_IS_ANONYMOUS)
    return _page(query, _order(sort, descending))


def _merged(
    shape: Shape, sort: str, descending: bool, is_after_missing: bool | None,
    reader_shape: tuple[bool, bool, int] | None,
) -> Select[Any]:  # fmt: skip
    """Build the query that searches one index range for each reader and State, and selects ids."""
    keys = [tasks.c.id, tasks.c.created_us, tasks.c[FIELDS[sort].attribute].label("sorted")]
    states = [None] if ("State", Operator.EQ) in shape else list(State)
    branches = []

    def add(table: FromClause, source: FromClause, *reader: ColumnElement[bool]) -> None:
        after = _after_position(sort, descending, is_after_missing, table)
        for state in states:
            where = [table.c.namespace == bindparam("ns"), *_conditions(shape, table), *reader]
            if state is not None:
                where.append(table.c.state == literal_column(f"'{state}'"))
            branch = select(*keys).select_from(source).where(*where, *after)
            branches.append(_page(branch, _order(sort, descending, table)))

    if reader_shape is None:
        add(tasks, tasks)
    else:
        has_user, has_anonymous, granted = reader_shape
        if has_user:
            add(tasks, tasks, tasks.c.user == bindparam("user"))
        if has_anonymous:
            add(tasks, tasks, *_IS_ANONYMOUS)
        names: list[Any] = [bindparam(f"granted_{number}") for number in range(granted)]
        if granted > MAX_RANGES:
            # A join would return a task once for each matching name.
            granted_ids = select(grants.c.task_id).where(
                grants.c.namespace == bindparam("ns"), grants.c.reader.in_(names)
            )
            add(tasks, tasks, tasks.c.id.in_(granted_ids))
        else:
            joined = grants.join(tasks, (tasks.c.id == grants.c.task_id) & _IS_ALSO_IN_NAMESPACE)
            for name in names:
                add(grants, joined, grants.c.reader == name)
    found = union(*(select(branch.subquery()) for branch in branches)).subquery()
    columns = (found.c.sorted, found.c.created_us, found.c.id)
    order = [found.c.sorted.is_(None), *(_directed(column, descending) for column in columns)]
    return _page(select(found.c.id), order)


def _page(query: Select[Any], order: Sequence[Any]) -> Select[Any]:
    return query.order_by(*order).limit(bindparam("limit")).offset(_ZERO)


def _conditions(shape: Shape, table: FromClause) -> list[ColumnElement[bool]]:
    # Columns that the grants table repeats are taken from `table`, so that its indexes are used.
    where = []
    for number, (name, compare) in enumerate(shape):
        attribute = FIELDS[name].attribute
        value: Any = bindparam(f"value_{number}")
        column: Any
        if attribute == "is_completed":
            column = case((tasks.c.state.in_(_TERMINAL), _ONE), else_=_ZERO)
        else:
            column = (table if attribute in ("state", "user", "created_us") else tasks).c[attribute]
        if attribute == "user":
            where.append(column != _NO_USER)
        where.append(_COMPARE[compare](column, value))
    return where


def _after_position(
    sort: str, descending: bool, is_after_missing: bool | None, table: FromClause = tasks
) -> list[ColumnElement[bool]]:
    """Build the SQL conditions that select only the tasks after the position of the previous page.

    :param is_after_missing: whether the position's sort value is NULL; None if there is no
        position.
    """
    if is_after_missing is None:
        return []
    beyond, up_to = (operator.lt, operator.le) if descending else (operator.gt, operator.ge)
    attribute = FIELDS[sort].attribute
    created: Any = table.c.created_us
    after_created: Any = bindparam("after_created")
    is_up_to = up_to(created, after_created)
    tie = and_(
        is_up_to, or_(beyond(created, after_created), beyond(tasks.c.id, bindparam("after_id")))
    )
    if attribute == "created_us":
        return [is_up_to, tie]
    column: Any = tasks.c[attribute]
    value: Any = bindparam("after_value")
    if is_after_missing:
        return [column.is_(None), tie]
    return [or_(beyond(column, value), and_(column == value, tie), column.is_(None))]


def _order(sort: str, descending: bool, table: FromClause = tasks) -> list[Any]:
    attribute = FIELDS[sort].attribute
    ties = [_directed(table.c.created_us, descending), _directed(tasks.c.id, descending)]
    if attribute == "created_us":
        return ties
    return [tasks.c[attribute].is_(None), _directed(tasks.c[attribute], descending), *ties]


def _directed(column: Any, descending: bool) -> Any:
    return column.desc() if descending else column.asc()
