"""Checks of values that a developer writes: each takes a label and a value, and returns the value or says what it must be.

`options` and `config` put them into their tables.
"""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from .errors import ConfigurationError
from .names import MAX_NAME, is_name, plain

EXECUTORS = ("thread", "process", "celery", "immediate")
DAY = 24 * 60 * 60

Check = Callable[[str, Any], Any]


def refuse(label: str, wanted: str, value: Any) -> ConfigurationError:
    """Return the error for a value of the wrong kind."""
    shown = repr(value)
    return ConfigurationError(f"{label} must be {wanted}, not {shown if len(shown) <= 80 else shown[:77] + '...'}.")


def optional(check: Check) -> Check:
    """Return a check that lets None pass too."""
    return lambda label, value: None if value is None else check(label, value)


def boolean(label: str, value: Any) -> bool:
    """Accept True and False alone: a string such as "False" is a mistake, not a value."""
    if not isinstance(value, bool):
        raise refuse(label, "True or False", value)
    return value


def whole(minimum: int) -> Check:
    """Return a check for a whole number from ``minimum`` on."""

    def check(label: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise refuse(label, f"a whole number from {minimum}", value)
        return value

    return check


def text(label: str, value: Any) -> str:
    """Accept a string of 1 to 2,048 characters."""
    if not isinstance(value, str) or not 0 < len(value) <= 2048:
        raise refuse(label, "a text of 1 to 2,048 characters", value)
    return value


def short_name(label: str, value: Any) -> str:
    """Accept a string of 1 to 255 characters that every store can hold."""
    if not is_name(value):
        raise refuse(label, f"a name of 1 to {MAX_NAME} characters, without NUL and in valid Unicode", value)
    return plain(value)


def names(label: str, value: Any) -> tuple[str, ...]:
    """Accept a list or tuple of names."""
    if not isinstance(value, (list, tuple)):
        raise refuse(label, "a list of names", value)
    return tuple(short_name(f"a member of {label}", name) for name in value)


def one_of(*allowed: str) -> Check:
    """Return a check for one of a few words."""

    def check(label: str, value: Any) -> str:
        if value not in allowed or not isinstance(value, str):
            raise refuse(label, "one of " + ", ".join(map(repr, allowed)), value)
        return value

    return check


def some_of(*allowed: str) -> Check:
    """Return a check for a non-empty list of some of a few words, each once."""

    def check(label: str, value: Any) -> tuple[str, ...]:
        wanted = "a non-empty list of some of " + ", ".join(map(repr, allowed))
        if not isinstance(value, (list, tuple)) or not value or any(word not in allowed for word in value):
            raise refuse(label, wanted, value)
        if len(set(value)) != len(value):
            raise refuse(label, wanted + ", each once", value)
        return tuple(value)

    return check


def seconds(label: str, value: Any) -> float:
    """Accept a number of seconds or a timedelta, finite and not negative."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise refuse(label, "a number of seconds or a timedelta, not negative", value)
    if value > 100 * 365 * DAY:
        raise refuse(label, "at most a hundred years", value)
    return float(value)


def retention_time(label: str, value: Any) -> int:
    """Accept what `seconds` accepts; return microseconds."""
    return round(seconds(label, value) * 1_000_000)


def time_limit(label: str, value: Any) -> int | None:
    """Accept seconds over 0, or -1 or None for no limit; return microseconds."""
    if value is None or (value == -1 and not isinstance(value, (bool, timedelta))):
        return None
    limit = retention_time(label, value)
    if limit <= 0:
        raise refuse(label, "over 0 seconds, or -1 or None for no limit", value)
    return limit


def executor(label: str, value: Any) -> str | Executor:
    """Accept a name of ours or an Executor whose threads are in this process."""
    if isinstance(value, ProcessPoolExecutor):
        raise ConfigurationError(
            f'{label} got a ProcessPoolExecutor, whose children cannot run a task; use executor="process" instead.'
        )
    if isinstance(value, Executor):
        return value
    if value not in EXECUTORS:
        raise refuse(label, "one of " + ", ".join(map(repr, EXECUTORS)) + " or a concurrent.futures.Executor", value)
    return str(value)


def function(label: str, value: Any) -> Callable[[], Any]:
    """Accept something that can be called and is not async: it is called in a request or a thread, without an event loop."""
    if not callable(value) or isinstance(value, type) or inspect.iscoroutinefunction(value):
        raise refuse(label, "a plain function", value)
    return value  # type: ignore[no-any-return]


def keyword_arguments(label: str, value: Any) -> Mapping[str, Any]:
    """Accept a mapping whose keys can be names of parameters."""
    if not isinstance(value, Mapping):
        raise refuse(label, "a mapping of parameter names to values", value)
    for name in value:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise refuse(f"a key of {label}", "a name that a parameter can have", name)
    return MappingProxyType(dict(value))


def celery_settings(label: str, value: Any) -> Mapping[str, Any]:
    """Accept a mapping with any of the three settings that a Celery message takes."""
    if not isinstance(value, Mapping):
        raise refuse(label, "a mapping", value)
    for name in value:
        if name not in ("queue", "priority", "routing_key"):
            raise refuse(f"a key of {label}", "'queue', 'priority' or 'routing_key'", name)
    return MappingProxyType(dict(value))


def schema(label: str, value: Any) -> Mapping[str, Any]:
    """Accept a JSON Schema as a mapping."""
    if not isinstance(value, Mapping):
        raise refuse(label, "a JSON Schema as a mapping", value)
    return value
