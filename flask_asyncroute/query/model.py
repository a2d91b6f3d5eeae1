"""The fields and operators of requests that list tasks, and the parsed request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ..errors import InvalidQuery

MAX_LIMIT = 500
MAX_SHOWN = 80

# Unlike str.upper() and str.lower(), these tables leave other letters, such as a dotless i.
ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
ASCII_UPPER = {lower: upper for upper, lower in ASCII_LOWER.items()}
"""A table for `str.translate` that converts a–z to upper case; ``ASCII_LOWER`` is the reverse."""


class Operator(StrEnum):
    """The comparison operators that a request can use in a condition."""

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
    """A field of the task object that a condition can compare.

    :param name: the name in requests.
    :param kind: the type of the values. A "state" is one of the five states, ordered by name.
    :param attribute: the name of the attribute in `AsyncRouteTask`.
    :param operators: the operators that conditions on this field can use.
    :param upper: whether stored values are upper case. Requests can use any letter case.
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
    """Return the field with this name, in any letter case.

    :param hint: added to the end of the error message.
    :raises InvalidQuery: if no field has this name.
    """
    field = _FIELDS.get(name.translate(ASCII_LOWER))
    if field is None:
        known = ", ".join(FIELDS)
        raise InvalidQuery(f"{shown(name)} is not a field. The fields are {known}.{hint}")
    return field


def find_operator(name: str, field: Field) -> Operator:
    """Return the operator with this name, in any letter case.

    :raises InvalidQuery: if the operator does not exist or ``field`` does not support it.
    """
    operator = Operator.__members__.get(name.translate(ASCII_UPPER))
    if operator not in field.operators:
        problem = "is not an operator" if operator is None else "is not supported here"
        known = ", ".join(field.operators)
        raise InvalidQuery(f"{shown(name)} {problem}. The operators for {field.name} are {known}.")
    return operator


def shown(text: str) -> str:
    """Quote ``text`` in printable ASCII for an error message.

    Longer text is cut at about 80 characters.
    """
    quoted = ascii(text[:MAX_SHOWN])
    if len(text) <= MAX_SHOWN and len(quoted) <= MAX_SHOWN:
        return quoted
    return f"{quoted[: MAX_SHOWN - 2]}…{quoted[-1]}"


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a field with a value. A task without a value in the field does not match.

    :param value: a time is in microseconds since the epoch (UTC), a number is a float, a state is
        its name, and a method is in upper case. For LIKE and NOTLIKE, this is the pattern as sent.
    """

    field: Field
    operator: Operator
    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class Sort:
    """A sort order of tasks by one time field.

    Tasks without that time come last in both directions. Tasks with equal times are sorted by
    creation time, then by id (by code point), in the same direction.
    """

    field: Field
    descending: bool


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a task in a sorted list.

    :param value: the task's time in the field of the sort order; None if the task has no such time.
    """

    value: int | None
    created_us: int
    id: str


NEWEST_FIRST = Sort(CREATION_TIME, descending=True)


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed request for a list of tasks.

    :param limit: maximum number of tasks, from 1 to 500.
    :param cursor: not verified yet. It is not empty.
    """

    conditions: tuple[Condition, ...] = ()
    sort: Sort = NEWEST_FIRST
    limit: int = 50
    cursor: str | None = None
