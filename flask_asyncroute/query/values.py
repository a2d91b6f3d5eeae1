"""Parse the value of a condition from a query string, JSON or Python."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from ..errors import InvalidQuery
from ..task import EPOCH, State
from .model import ASCII_LOWER, ASCII_UPPER, Condition, Field, Operator, shown

MAX_VALUE = 256
MAX_WILDCARDS = 8

# \d would match the digits of every script.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?"
    r"(?:[Zz]|([+\- ])([01][0-9]|2[0-3]):([0-5][0-9]))?"
)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_STATES = {state.value.translate(ASCII_LOWER): state.value for state in State}
_BOOLEANS = {"true": True, "false": False}
_KINDS = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


def condition_from_text(field: Field, operator: Operator, text: str) -> Condition:
    """Create a condition from a value in a query string.

    :param text: the decoded value.
    :raises InvalidQuery: if the value is invalid or has over 256 characters.
    """
    _check_text(field, text)
    value: Any = text
    if field.kind == "boolean":
        value = _BOOLEANS.get(text.translate(ASCII_LOWER))
        if value is None:
            raise _refused(field, shown(text), "true or false")
    elif field.kind == "number":
        if not _NUMBER.fullmatch(text):
            raise _refused(field, shown(text), "a number such as 50 or 33.3")
        value = float(text)
    return condition_from_value(field, operator, value)


def condition_from_value(field: Field, operator: Operator, value: Any) -> Condition:
    """Create a condition from a value in JSON, or from a datetime or State in Python.

    A datetime without a time zone is UTC. Values are not converted to other types.

    :raises InvalidQuery: if the value is invalid.
    """
    if field.kind == "boolean":
        if not isinstance(value, bool):
            raise _refused(field, _described(value), "true or false")
    elif field.kind == "number":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _refused(field, _described(value), "a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise field.error("the number is out of range; it must fit a 64-bit float")
    elif field.kind == "time" and isinstance(value, datetime):
        aware = value if value.utcoffset() is not None else value.replace(tzinfo=UTC)
        value = (aware - EPOCH) // timedelta(microseconds=1)
    elif isinstance(value, str):
        value = _from_text(field, operator, str.__str__(value))
    else:
        wanted = "a string with an RFC 3339 time" if field.kind == "time" else "a string"
        raise _refused(field, _described(value), wanted)
    return Condition(field, operator, value)


def microseconds(text: str) -> int:
    """Convert an RFC 3339 time to microseconds since the epoch. Smaller fractions are dropped.

    A time without an offset is UTC. A leap second (``:60``) is invalid.

    :raises ValueError: if the time is invalid.
    """
    # URL decoding turns "+" into a space, so a space before the offset is read as "+".
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(text)
    *numbers, fraction, sign, hours, minutes = found.groups()
    second = datetime(*map(int, numbers), tzinfo=UTC)  # type: ignore[arg-type, misc]
    # Add the offset to the integer: adding it to a datetime could exceed the range of years.
    result = (second - EPOCH) // timedelta(microseconds=1) + int((fraction or "")[:6].ljust(6, "0"))
    if sign is None:
        return result
    offset = (int(hours) * 60 + int(minutes)) * 60_000_000
    return result + offset if sign == "-" else result - offset


def _from_text(field: Field, operator: Operator, text: str) -> str | int:
    _check_text(field, text)
    if field.kind == "time":
        try:
            return microseconds(text)
        except ValueError:
            wanted = "an RFC 3339 time such as 2026-01-31T12:00:00Z"
            raise _refused(field, shown(text), wanted) from None
    if operator in (Operator.LIKE, Operator.NOTLIKE):
        if text.count("*") + text.count("?") > MAX_WILDCARDS:
            problem = f"has over {MAX_WILDCARDS} wildcards (* and ?); use fewer"
            raise field.error(f"{shown(text)} {problem}")
        return text
    if field.kind == "state":
        state = _STATES.get(text.translate(ASCII_LOWER))
        if state is None:
            raise _refused(field, shown(text), f"one of {', '.join(_STATES.values())}")
        return state
    return text.translate(ASCII_UPPER) if field.upper else text


def _check_text(field: Field, text: str) -> None:
    if len(text) > MAX_VALUE:
        raise field.error(f"the value {shown(text)} has over {MAX_VALUE} characters; shorten it")
    # Stores cannot hold such text.
    if _UNSTORABLE.search(text):
        raise field.error(f"{shown(text)} contains a NUL or a lone surrogate; remove it")


def _refused(field: Field, what: str, wanted: str) -> InvalidQuery:
    return field.error(f"{what} is invalid; use {wanted}")


def _described(value: Any) -> str:
    # Describe most values by their type, because their text can be long.
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the string {shown(value)}"
    return _KINDS.get(type(value), f"a Python {type(value).__name__}")
