"""Conditions and order on records in memory: what `stores.memory` lists by, and what the SQL store must agree with."""

from __future__ import annotations

import operator as comparison
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from ..task import AsyncRouteTask
from .fields import Operator
from .patterns import is_like
from .terms import Condition, Position, Sort

SortKey: TypeAlias = tuple[bool, int, int, str]

_COMPARE: dict[Operator, Callable[[Any, Any], bool]] = {
    Operator.EQ: comparison.eq,
    Operator.NE: comparison.ne,
    Operator.GT: comparison.gt,
    Operator.LT: comparison.lt,
    Operator.GE: comparison.ge,
    Operator.LE: comparison.le,
    Operator.LIKE: is_like,
    Operator.NOTLIKE: lambda text, pattern: not is_like(text, pattern),
}


def matches(task: AsyncRouteTask, conditions: Iterable[Condition]) -> bool:
    """Return whether all conditions hold for the task."""
    return all(holds(condition, getattr(task, condition.field.attribute)) for condition in conditions)


def holds(condition: Condition, value: Any) -> bool:
    """Return whether the condition holds for a field that has this value; for one that is missing (None) none does."""
    return value is not None and _COMPARE[condition.operator](value, condition.value)


def ordered(tasks: Iterable[AsyncRouteTask], sort: Sort) -> list[AsyncRouteTask]:
    """Return the tasks in the order of the sort."""
    return sorted(tasks, key=lambda task: sort_key(position_of(task, sort), sort), reverse=sort.descending)


def position_of(task: AsyncRouteTask, sort: Sort) -> Position:
    """Return where the task stands in that order."""
    return Position(getattr(task, sort.field.attribute), task.created_us, task.id)


def sort_key(position: Position, sort: Sort) -> SortKey:
    """Return what to compare: rising keys are the order of the sort, falling ones where it is descending."""
    missing = position.value is None
    return (missing is not sort.descending, position.value or 0, position.created_us, position.id)


def is_after(task: AsyncRouteTask, sort: Sort, position: Position) -> bool:
    """Return whether the task comes after that position in the order of the sort, and so on a later page."""
    key, last = sort_key(position_of(task, sort), sort), sort_key(position, sort)
    return key < last if sort.descending else key > last
