"""The value of a condition: out of text from a query string, or out of JSON or Python.

`styles` calls it. Text is read strictly: what is not plainly a value of the field's kind is refused, never guessed.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from ..errors import InvalidQuery
from ..states import State
from ..task import EPOCH
from .fields import ASCII_LOWER, ASCII_UPPER, Field, Operator, shown
from .terms import Condition

MAX_VALUE = 256
MAX_WILDCARDS = 8

# [0-9] and not \d, which takes the digits of every script.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?"
    r"(?:[Zz]|([+\- ])([01][0-9]|2[0-3]):([0-5][0-9]))?"
)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_STATES = {state.value.translate(ASCII_LOWER): state.value for state in State}
_BOOLEANS = {"true": True, "false": False}


def condition_from_text(field: Field, operator: Operator, text: str) -> Condition:
    """Return the condition whose value a query string holds, decoded.

    :raises InvalidQuery: the text is not a value of the field's kind, or is over 256 characters.
    """
    _check_text(field, text)
    match field.kind:
        case "boolean":
            value = _BOOLEANS.get(text.translate(ASCII_LOWER))
            if value is None:
                raise _refused(field, shown(text), "true or false")
            return Condition(field, operator, value)
        case "number":
            if not _NUMBER.fullmatch(text):
                raise _refused(field, shown(text), "a number such as 50 or 33.3")
            return Condition(field, operator, _finite(field, float(text)))
    return Condition(field, operator, _from_checked(field, operator, text))


def condition_from_value(field: Field, operator: Operator, value: Any) -> Condition:
    """Return the condition whose value is one of JSON, or, from Python, also a datetime or a State.

    A datetime without a time zone is in UTC, as text without an offset is.

    :raises InvalidQuery: the value is not of the field's kind (true is no number, ``"1"`` neither), or a text over 256
        characters.
    """
    match field.kind:
        case "boolean":
            if not isinstance(value, bool):
                raise _refused(field, _described(value), "true or false")
            return Condition(field, operator, value)
        case "number":
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise _refused(field, _described(value), "a number")
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            return Condition(field, operator, _finite(field, number))
        case "time" if isinstance(value, datetime):
            aware = value if value.utcoffset() is not None else value.replace(tzinfo=UTC)
            return Condition(field, operator, (aware - EPOCH) // timedelta(microseconds=1))
    if not isinstance(value, str):
        wanted = "a string with an RFC 3339 time" if field.kind == "time" else "a string"
        raise _refused(field, _described(value), wanted)
    text = str.__str__(value)  # of a State too, whatever its own __str__ says
    _check_text(field, text)
    return Condition(field, operator, _from_checked(field, operator, text))


def microseconds(text: str) -> int:
    """Return an RFC 3339 time in microseconds since the epoch; further digits are cut off.

    Without an offset it is UTC. A space where the offset has its sign is a ``+`` that a query string has turned into
    one. Leap seconds (``:60``) have no instant of their own here and are refused.

    :raises ValueError: the text is not such a time.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(text)
    *numbers, fraction, sign, hours, minutes = found.groups()
    second = datetime(*map(int, numbers), tzinfo=UTC)  # type: ignore[arg-type, misc]
    # Whole numbers from here on: an offset can lead out of the years that a datetime knows.
    result = (second - EPOCH) // timedelta(microseconds=1) + int((fraction or "")[:6].ljust(6, "0"))
    if sign is None:
        return result
    offset = (int(hours) * 60 + int(minutes)) * 60_000_000
    return result + offset if sign == "-" else result - offset


def _from_checked(field: Field, operator: Operator, text: str) -> str | int:
    """Return the value of a string, state or time field."""
    if field.kind == "time":
        try:
            return microseconds(text)
        except ValueError:
            raise _refused(field, shown(text), "an RFC 3339 time such as 2026-01-31T12:00:00Z") from None
    if operator in (Operator.LIKE, Operator.NOTLIKE):
        if text.count("*") + text.count("?") > MAX_WILDCARDS:
            raise InvalidQuery(f"{field.name}: {shown(text)} has over {MAX_WILDCARDS} wildcards (* and ?); use fewer.")
        return text
    if field.kind == "state":
        state = _STATES.get(text.translate(ASCII_LOWER))
        if state is None:
            raise _refused(field, shown(text), f"one of {', '.join(_STATES.values())}")
        return state
    return text.translate(ASCII_UPPER) if field.upper else text


def _check_text(field: Field, text: str) -> None:
    if len(text) > MAX_VALUE:
        raise InvalidQuery(f"{field.name}: the value {shown(text)} is over {MAX_VALUE} characters; ask for less.")
    # No store keeps either, and drivers raise on both.
    if _UNSTORABLE.search(text):
        raise InvalidQuery(f"{field.name}: {shown(text)} holds a NUL or half a surrogate pair; leave it out.")


def _finite(field: Field, number: float) -> float:
    if not math.isfinite(number):
        raise InvalidQuery(f"{field.name}: the number is out of range; it must fit a 64-bit float.")
    return number


def _refused(field: Field, what: str, wanted: str) -> InvalidQuery:
    return InvalidQuery(f"{field.name}: {what} will not do; give {wanted}.")


def _described(value: Any) -> str:
    """Return what kind of thing a value is; not the value, which can be deep or long."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the string {shown(value)}"
    for kind, name in ((bool, "a boolean"), ((int, float), "a number"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return f"a Python {type(value).__name__}"
