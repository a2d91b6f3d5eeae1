"""What a query is, once read: values that stores are given. `styles` makes them; nothing here reads text."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import CREATION_TIME, Field, Operator

DEFAULT_LIMIT = 50
MAX_LIMIT = 500


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison. It is false for a task that does not have the field, whatever the operator.

    :param value: of the field's kind: a time in microseconds since the epoch (UTC), a number as a float, a state by its
        name on the wire, a method in upper case; with LIKE and NOTLIKE the text as it was sent.
    """

    field: Field
    operator: Operator
    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class Sort:
    """The order of a list: by a time, missing ones last in both directions.

    Ties are broken by the creation time, then the id (by code point), both in the direction of the sort.
    """

    field: Field
    descending: bool


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the last task on it.

    :param value: its time that the sort goes by, in microseconds since the epoch; None where it has none.
    """

    value: int | None
    created_us: int
    id: str


NEWEST_FIRST = Sort(CREATION_TIME, descending=True)


@dataclass(frozen=True, slots=True)
class Query:
    """What to list: tasks for which all conditions hold, in which order, how many, from where.

    :param limit: 1 to 500.
    :param cursor: still sealed; never empty.
    """

    conditions: tuple[Condition, ...] = ()
    sort: Sort = NEWEST_FIRST
    limit: int = DEFAULT_LIMIT
    cursor: str | None = None
