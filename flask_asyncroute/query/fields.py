"""The fields of a task that a query can name, and the operators: the allow list.

`styles` and `values` look names up here, the stores read `Field.attribute`. A name that comes from outside goes no
further than the look-up: what leaves this module is one of the constants below, never the text that was sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from ..errors import InvalidQuery

Kind: TypeAlias = Literal["string", "state", "boolean", "time", "number"]

MAX_SHOWN = 80

ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
ASCII_UPPER = {lower: upper for upper, lower in ASCII_LOWER.items()}


class Operator(StrEnum):
    """How a condition compares. The values are those of the wire."""

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
    """One field that conditions can be about.

    :param name: the name on the wire.
    :param kind: decides which values it is compared with. "state" is a string that has five values; they are ordered
        by their names, as other strings are.
    :param attribute: the attribute of :class:`~flask_asyncroute.task.AsyncRouteTask` that holds it.
    :param operators: those that may be used with it.
    :param upper: whether its values are upper case, so that any letter case may be asked for.
    """

    name: str
    kind: Kind
    attribute: str
    operators: tuple[Operator, ...]
    upper: bool = False


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
    )
}
"""By name on the wire."""

SORTABLE = (CREATION_TIME, STARTING_TIME, COMPLETED_TIME)

# Only A–Z is folded: str.upper would let "l\u0131ke" (a dotless i) pass for LIKE, str.lower a Kelvin sign for a k.
_FIELDS = {name.translate(ASCII_LOWER): field for name, field in FIELDS.items()}
_OPERATORS = {operator.value: operator for operator in Operator}


def find_field(name: str, hint: str = "") -> Field:
    """Return the field of this name, in any letter case.

    :param hint: a further sentence for the client, with a space before it, should there be no such field.
    :raises InvalidQuery: there is none; the detail names those that there are.
    """
    field = _FIELDS.get(name.translate(ASCII_LOWER))
    if field is None:
        raise InvalidQuery(f"There is no field {shown(name)}. The fields are {', '.join(FIELDS)}.{hint}")
    return field


def find_operator(name: str, field: Field) -> Operator:
    """Return the operator of this name, in any letter case.

    :raises InvalidQuery: there is none, or it cannot be used with ``field``; the detail names those that can.
    """
    operator = _OPERATORS.get(name.translate(ASCII_UPPER))
    if operator not in field.operators:
        problem = "is no operator" if operator is None else f"does not go with {field.name}"
        raise InvalidQuery(f"{shown(name)} {problem}. The operators for {field.name} are {', '.join(field.operators)}.")
    return operator


def shown(text: str) -> str:
    """Return ``text`` as an error may quote it: in quotes, printable ASCII, at most 80 characters or so."""
    quoted = ascii(text[:MAX_SHOWN])
    if len(text) <= MAX_SHOWN and len(quoted) <= MAX_SHOWN:
        return quoted
    return f"{quoted[: MAX_SHOWN - 2]}…{quoted[-1]}"
