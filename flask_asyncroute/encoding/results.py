"""What a view returned, to JSON. `worker` calls it in the thread, child or Celery worker that ran the view.

One walk over the value says no to what JSON does not hold and gives back the same object where nothing has to change,
so that msgspec can do the rest. It never shows a value or its repr in an error, and never encodes much more than the
limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec

from ..errors import ResultError
from .json import encode_json, without_surrogates
from .refusals import Unfit, refuse, too_large, type_name, undefaulted

MAX_DEPTH = 200
MAX_DIGITS = 4300
"""Of one whole number: as many as Python itself reads and writes by default."""

_TOO_LONG = 10**MAX_DIGITS
_PLAIN = frozenset({float, bool, type(None)})
"""Types that need no look. msgspec writes NaN and the infinities as null."""


def encode_value(value: Any, default: Callable[[Any], Any], max_bytes: int) -> bytes:
    """Return a shared value as UTF-8 JSON; as :func:`encode_result`, but that a tuple is an array here too."""
    return _encoded(value, default, max_bytes, "found", None)


def encode_result(value: Any, default: Callable[[Any], Any], max_bytes: int) -> bytes:
    """Return what a view returned as UTF-8 JSON.

    Beside what JSON has: datetime (RFC 3339; one without a zone is taken as UTC), date, time, UUID, Decimal (a string),
    Enum (its value), dataclasses and msgspec Structs (objects; the tag first, names as encoded), then what ``default``
    makes of it, then any Mapping. NaN and the infinities, of Decimal too, become null. Tuples inside are arrays.
    Keys that are int, float, bool or None become strings as in :mod:`json` (``1`` → ``"1"``, ``True`` → ``"true"``).
    A lone surrogate becomes U+FFFD.

    :param default: the ``default`` of the app's JSON provider: returns something encodable or raises :exc:`TypeError`.
    :param max_bytes: of the encoded result.
    :raises ResultError: for everything else; the message says what was found, where, and what to return instead.
    """
    if isinstance(value, tuple):
        raise ResultError(
            "The view returned a tuple: return the data alone (a status and headers are the library's to write), "
            "or list(…) for an array."
        )
    return _encoded(value, default, max_bytes, "The view returned", "ASYNCROUTE_MAX_RESULT")


def _encoded(value: Any, default: Callable[[Any], Any], max_bytes: int, where: str, key: str | None) -> bytes:
    try:
        body = encode_json(_Walk(default, max_bytes, key).value(value, 0))
    except Unfit as unfit:
        raise ResultError(unfit.told(where)) from unfit.__cause__
    except RecursionError:
        raise ResultError(f"{where} data that is nested too deep: return it flatter.") from None
    except Exception as error:
        what = "It" if key is None else "What the view returned"
        raise ResultError(f"{what} cannot be read: that raised {type(error).__name__}.") from error
    if len(body) > max_bytes:
        raise ResultError(too_large(max_bytes, key).told(where))
    return body


class _Walk:
    """One pass over one result. ``room`` counts down by the least number of bytes that what was seen can take."""

    __slots__ = ("default", "key", "max_bytes", "room")

    def __init__(self, default: Callable[[Any], Any], max_bytes: int, key: str | None) -> None:
        self.default = default
        self.key = key
        self.max_bytes = max_bytes
        self.room = max_bytes

    def value(self, value: Any, depth: int) -> Any:
        """Return ``value``, or what stands for it in JSON."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is str:
            return self._text(value)
        if kind is int:
            return _whole(value)
        if kind is dict:
            return self._object(value, depth)
        if kind is list:
            return self._array(value, depth)
        return self._other(value, depth)

    def _object(self, value: Mapping[Any, Any], depth: int, origin: object = None) -> Any:
        self._enter(5 * len(value), depth)
        used = 0
        changed: dict[str, Any] | None = None
        count = 0
        for key, item in value.items():
            kind = type(item)
            new_key, new = key, item
            if type(key) is str and key.isascii():
                used += len(key)
            else:
                new_key = self._key(key)
            if kind is str and item.isascii():
                used += len(item)
            elif kind not in _PLAIN and not (kind is int and -0x8000000000000000 <= item <= 0xFFFFFFFFFFFFFFFF):
                try:
                    new = self.value(item, depth + 1)
                except Unfit as unfit:
                    unfit.passed(value if origin is None else origin, new_key)
                    raise
            if changed is None:
                if new is item and new_key is key:
                    continue
                changed = {}
                for kept, its in value.items():
                    if kept is key:
                        break
                    changed[kept] = its
                count = len(changed)
            changed[new_key] = new
            count += 1
            if len(changed) < count:
                raise Unfit("two keys that are the same in JSON", "use strings as keys")
        self._use(used)
        return value if changed is None else changed

    def _array(self, value: list[Any] | tuple[Any, ...], depth: int, origin: object = None) -> Any:
        self._enter(2 * len(value), depth)
        used = 0
        changed: list[Any] | None = None
        for index, item in enumerate(value):
            kind = type(item)
            if kind in _PLAIN or (kind is int and -0x8000000000000000 <= item <= 0xFFFFFFFFFFFFFFFF):
                new = item
            elif kind is str and item.isascii():
                used += len(item)
                new = item
            else:
                try:
                    new = self.value(item, depth + 1)
                except Unfit as unfit:
                    unfit.passed(value if origin is None else origin, index)
                    raise
            if changed is not None:
                changed.append(new)
            elif new is not item:
                changed = [*value[:index], new]
        self._use(used)
        return value if changed is None else changed

    def _enter(self, least: int, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise Unfit(f"data nested more than {MAX_DEPTH} levels deep", "return it flatter")
        self._use(least)

    def _use(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise too_large(self.max_bytes, self.key)

    def _text(self, value: str) -> str:
        self._use(len(value))
        return value if value.isascii() else without_surrogates(value)

    def _key(self, key: Any) -> str:
        if isinstance(key, Enum):
            key = key.value
        if isinstance(key, str):
            return self._text(str.__str__(key))
        if key is None or key is True or key is False:
            return {None: "null", True: "true", False: "false"}[key]
        if isinstance(key, int):
            return int.__repr__(_whole(int.__int__(key)))
        if isinstance(key, float):
            return float.__repr__(key)
        raise Unfit(f"an object with a key of type {type_name(key)}", "use strings as keys")

    def _other(self, value: Any, depth: int) -> Any:
        if isinstance(value, Enum):
            return self.value(value.value, depth + 1)
        if isinstance(value, str):
            return self._text(str.__str__(value))
        if isinstance(value, int):
            return _whole(int.__int__(value))
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, dict):
            return self._object(dict(value.items()), depth, value)
        if isinstance(value, (list, tuple)):
            return self._array(list(value), depth, value)
        if isinstance(value, datetime):
            return _rfc3339(value)
        if isinstance(value, (date, time)):
            return value.isoformat()
        if isinstance(value, UUID):
            return str(value)
        if isinstance(value, Decimal):
            return str(value) if value.is_finite() else None
        if isinstance(value, msgspec.Struct):
            return self._object(_members_of_struct(value), depth, value)
        if is_dataclass(value) and not isinstance(value, type):
            return self._object({field.name: getattr(value, field.name) for field in fields(value)}, depth, value)
        refuse(value)
        return self._by_default(value, depth)

    def _by_default(self, value: Any, depth: int) -> Any:
        try:
            made = self.default(value)
        except TypeError as error:
            if isinstance(value, Mapping):
                return self._object(dict(value.items()), depth, value)
            raise undefaulted(value, error) from error
        except Exception as error:
            raise undefaulted(value, error) from error
        try:
            self._enter(0, depth)  # what it makes may need it again, without end
            return self.value(made, depth + 1)
        except Unfit as unfit:
            unfit.passed(value, None)
            raise


def _whole(value: int) -> int:
    if -_TOO_LONG < value < _TOO_LONG:
        return value
    raise Unfit(f"a whole number of more than {MAX_DIGITS} digits", "return a float or a str")


def _rfc3339(value: datetime) -> str:
    offset = value.utcoffset()
    if offset is None:
        return f"{value.replace(tzinfo=None).isoformat()}Z"
    if offset.total_seconds() % 60:  # RFC 3339 has no seconds in an offset
        value = value.astimezone(UTC)
        offset = value.utcoffset()
    return value.isoformat() if offset else f"{value.replace(tzinfo=None).isoformat()}Z"


def _members_of_struct(value: msgspec.Struct) -> dict[Any, Any]:
    config = value.__struct_config__
    members: dict[Any, Any] = {} if config.tag is None else {config.tag_field: config.tag}
    for name, encoded in zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True):
        item = getattr(value, name)
        if item is not msgspec.UNSET:
            members[encoded] = item
    return members
