"""Checks of options, configuration values and names.

A check takes a label for its error message and a value, and returns the value in its stored
form.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import Enum
from types import MappingProxyType
from typing import Any, TypeGuard

from .errors import ConfigurationError

MAX_NAME = 255

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def can_be_stored(text: str) -> bool:
    """Return whether every store can hold a text: it has no NUL or lone surrogate."""
    return _UNSTORABLE.search(text) is None


def is_name(value: object) -> TypeGuard[str]:
    """Return whether a value is a string of 1 to 255 characters that every store can hold."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and can_be_stored(value)


def plain(text: str) -> str:
    """Convert to a plain :class:`str`, because encoders and databases refuse subclasses."""
    return text if type(text) is str else str.__str__(text)


def name_of(value: Any) -> str:
    """Convert an id or a name to the string that is compared; an Enum becomes its value.

    :raises ValueError: for None, bytes and booleans, which are not valid names.
    """
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Enum):
        return name_of(value.value)
    if value is None or isinstance(value, (bytes, bytearray, bool)):
        raise ValueError(f"a name cannot be of type {type(value).__name__}")
    return str(value)


DAY = 24 * 60 * 60

Check = Callable[[str, Any], Any]


def setting(check: Check, default: Any) -> Any:
    """Return a dataclass field whose metadata contains the check of its values."""
    return dataclasses.field(default=default, metadata={"check": check})


def refuse(label: str, wanted: str, value: Any) -> ConfigurationError:
    """Return the error for an invalid value; ``wanted`` describes the valid ones."""
    shown = repr(value)
    return ConfigurationError(
        f"{label} must be {wanted}, not {shown if len(shown) <= 80 else shown[:77] + '...'}."
    )


def optional(check: Check) -> Check:
    return lambda label, value: None if value is None else check(label, value)


def instance_of(kind: type[Any], wanted: str) -> Check:

    def check(label: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise refuse(label, wanted, value)
        return value

    return check


boolean = instance_of(bool, "True or False")


def whole(minimum: int) -> Check:

    def check(label: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise refuse(label, f"an integer of at least {minimum}", value)
        return value

    return check


def matching(pattern: str, wanted: str) -> Check:

    def check(label: str, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise refuse(label, wanted, value)
        return value

    return check


text = matching(r"(?s:.){1,2048}", "a string of 1 to 2,048 characters")


def short_name(label: str, value: Any) -> str:
    if not is_name(value):
        wanted = f"a name of 1 to {MAX_NAME} characters, without NUL and in valid Unicode"
        raise refuse(label, wanted, value)
    return plain(value)


def names(label: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise refuse(label, "a list of names", value)
    return tuple(short_name(f"a member of {label}", name) for name in value)


def some_of(*allowed: str) -> Check:
    """Return a check for a non-empty list of allowed words without duplicates."""
    wanted = "a non-empty list of any of " + ", ".join(map(repr, allowed))

    def check(label: str, value: Any) -> tuple[str, ...]:
        is_list = isinstance(value, (list, tuple)) and value
        if not is_list or any(word not in allowed for word in value):
            raise refuse(label, wanted, value)
        if len(set(value)) != len(value):
            raise refuse(label, wanted + ", without duplicates", value)
        return tuple(value)

    return check


def seconds(label: str, value: Any, least: float = 0.0) -> float:
    """Accept a finite number of seconds or a timedelta, at least ``least`` seconds."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_integer = is_number and isinstance(value, int)  # isfinite() takes no huge integer
    if not is_number or not (is_integer or math.isfinite(value)) or value < least:
        raise refuse(label, f"a number of seconds or a timedelta, at least {least:g}", value)
    if value > 100 * 365 * DAY:
        raise refuse(label, "at most a hundred years", value)
    return float(value)


def retention_time(label: str, value: Any) -> int:
    """Accept what `seconds` accepts; return microseconds."""
    return round(seconds(label, value) * 1_000_000)


def time_limit(label: str, value: Any) -> int | None:
    """Accept more than 0 seconds, or -1 or None for no limit; return microseconds."""
    if value is None or (value == -1 and not isinstance(value, (bool, timedelta))):
        return None
    limit = retention_time(label, value)
    if limit <= 0:
        raise refuse(label, "more than 0 seconds, or -1 or None for no limit", value)
    return limit


def wait_limit(label: str, value: Any) -> int | None:
    """Accept more than 0 seconds, or None for no limit; return microseconds."""
    if value is None:
        return None
    # The message for -1 must mention None, because -1 means no limit in `time_limit`.
    limit = -1 if value == -1 else retention_time(label, value)
    if limit <= 0:
        raise refuse(label, "more than 0 seconds, or None for no limit", value)
    return limit


def function(label: str, value: Any) -> Callable[[], Any]:
    """Accept a callable; refuse classes, and async functions, because no event loop runs."""
    if not callable(value) or isinstance(value, type) or inspect.iscoroutinefunction(value):
        raise refuse(label, "a function that is not async", value)
    return value  # type: ignore[no-any-return]


def decorators(label: str, value: Any) -> tuple[Callable[..., Any], ...]:
    if not isinstance(value, (list, tuple)) or not all(map(callable, value)):
        raise refuse(label, "a list of decorators", value)
    return tuple(value)


def arguments(label: str, value: Any) -> Mapping[str, Any]:
    """Accept a mapping whose keys are valid parameter names."""
    if not isinstance(value, Mapping):
        raise refuse(label, "a mapping", value)
    for name in value:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise refuse(f"a key of {label}", "a valid name of a parameter", name)
    return MappingProxyType(dict(value))
