"""The fields and operators of list requests, and the parsed query."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ..errors import InvalidQuery

MAX_LIMIT = 500
MAX_SHOWN = 80

ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
ASCII_UPPER = {lower: upper for upper, lower in ASCII_LOWER.items()}
"""Tables that convert only A–Z. str.upper() also changes other letters, such as a dotless i."""


class Operator(StrEnum):
    """The operators of conditions, by their names in requests."""

    EQ = "EQ"
    NE = "NE"
    GT = "GT"
    LT = "LT"
    GE = "GE"
    LE = "LE"
    LIKE = "LIKE"
    NOTLIKE = "NOTLIKE"


ALL = tuple(Operator)
ORDER = (Operator.EQ, Operator.NE, Operator.GT, Operator.LT, Operator.GE, Operator.LE)
EQUALITY = (Operator.EQ, Operator.NE)


@dataclass(frozen=True, slots=True)
class Field:
    """A field of tasks that conditions can compare.

    :param name: its name in requests.
    :param kind: the type of its values. A "state" is one of the five states, ordered by name.
    :param attribute: its attribute in `AsyncRouteTask`.
    :param upper: whether values are upper case; requests can use any letter case.
    """

    name: str
    kind: Literal["string", "state", "boolean", "time", "number"]
    attribute: str
    operators: tuple[Operator, ...]
    upper: bool = False

    def error(self, problem: str) -> InvalidQuery:
        return InvalidQuery(f"{self.name}: {problem}.")


CREATION_TIME = Field("CreationTime", "time", "created_us", ORDER)
STARTING_TIME = Field("StartingTime", "time", "started_us", ORDER)
COMPLETED_TIME = Field("CompletedTime", "time", "completed_us", ORDER)

FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("Id", "string", "id", ALL),
        Field("AsyncRouteId", "string", "async_route_id", ALL),
        Field("State", "state", "state", ALL),
        Field("IsCompleted", "boolean", "is_completed", EQUALITY),
        Field("Cancellable", "boolean", "cancellable", EQUALITY),
        Field("User", "string", "user", ALL),
        CREATION_TIME,
        STARTING_TIME,
        COMPLETED_TIME,
        Field("ExpireTime", "time", "expires_us", ORDER),
        Field("Error", "string", "error", ALL),
        Field("Url", "string", "url", ALL),
        Field("Method", "string", "method", ALL, upper=True),
        Field("Progress", "number", "progress", ORDER),
        Field("Attempt", "number", "attempt", ORDER),
    )
}

SORTABLE = (CREATION_TIME, STARTING_TIME, COMPLETED_TIME)

_FIELDS = {name.translate(ASCII_LOWER): field for name, field in FIELDS.items()}


def find_field(name: str, hint: str = "") -> Field:
    """Return the field with this name, in any letter case. Error messages end with ``hint``."""
    field = _FIELDS.get(name.translate(ASCII_LOWER))
    if field is None:
        known = ", ".join(FIELDS)
        raise InvalidQuery(f"{shown(name)} is not a field. The fields are {known}.{hint}")
    return field


def find_operator(name: str, field: Field) -> Operator:
    """Return the operator with this name, in any letter case; refuse operators that ``field`` does
    not support.
    """
    operator = Operator.__members__.get(name.translate(ASCII_UPPER))
    if operator not in field.operators:
        problem = "is not an operator" if operator is None else "is not supported here"
        known = ", ".join(field.operators)
        raise InvalidQuery(f"{shown(name)} {problem}. The operators for {field.name} are {known}.")
    return operator


def shown(text: str) -> str:
    """Quote ``text`` in printable ASCII for an error message, truncated to about 80 characters."""
    quoted = ascii(text[:MAX_SHOWN])
    if len(text) <= MAX_SHOWN and len(quoted) <= MAX_SHOWN:
        return quoted
    return f"{quoted[: MAX_SHOWN - 2]}…{quoted[-1]}"


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a field. The condition is false if the task has no value in the field.

    :param value: of the field's kind: a time in microseconds since the epoch (UTC), a number as a
        float, a state by its name, a method in upper case; for LIKE and NOTLIKE, the text as sent.
    """

    field: Field
    operator: Operator
    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class Sort:
    """Sorts a list by a time field. Tasks without that time come last in both directions.

    Tasks with equal times are sorted by creation time, then by id (by code point), in the same
    direction.
    """

    field: Field
    descending: bool


@dataclass(frozen=True, slots=True)
class Position:
    """A task's position in a list. ``value`` is its time in the sort field."""

    value: int | None
    created_us: int
    id: str


NEWEST_FIRST = Sort(CREATION_TIME, descending=True)


@dataclass(frozen=True, slots=True)
class Query:
    """A list request: conditions, order and maximum number of tasks.

    :param limit: 1 to 500.
    :param cursor: not verified yet; never empty.
    """

    conditions: tuple[Condition, ...] = ()
    sort: Sort = NEWEST_FIRST
    limit: int = 50
    cursor: str | None = None
