"""Convert return values, shared values and event data to JSON, or explain why that is impossible.

Values far over the size limit are refused before they are encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, TypeAlias
from uuid import UUID

import msgspec
from flask.json.provider import DefaultJSONProvider, JSONProvider

from ..errors import ResultError
from .json import encode_json, without_surrogates
from .refusals import BELOW, NotStorable, refuse, too_large, type_name, unconverted

MAX_DEPTH = 200
MAX_DIGITS = 4300  # Python's default limit for converting integers to str.

Default: TypeAlias = Callable[[Any], Any]

_TOO_LONG = 10**MAX_DIGITS
_PLAIN = frozenset({float, bool, type(None)})  # msgspec writes NaN and the infinities as null


def json_default(provider: JSONProvider) -> Default:
    """Return a function that converts values as the app's JSON provider (``app.json``) does."""
    if isinstance(provider, DefaultJSONProvider):
        return provider.default
    return lambda value: json.loads(provider.dumps(value))


def encode_value(value: Any, default: Default, max_bytes: int) -> bytes:
    """Encode a shared value or the data of an event as UTF-8 JSON.

    Values are converted as by :func:`encode_result`. A tuple becomes an array.
    """
    return _encoded(value, default, max_bytes, "the value contains", None)


def encode_result(value: Any, default: Default, max_bytes: int) -> bytes:
    """Encode the return value of a view as UTF-8 JSON.

    The following values are converted. All other values are passed to ``default``.

    - datetime, date and time become strings in the formats of RFC 3339. A datetime without a time
      zone is UTC.
    - UUID and Decimal become strings. Enum members become their values.
    - Dataclasses and msgspec Structs become objects. A Struct's object uses its encoded names, and
      its tag comes first.
    - Nested tuples become arrays. A Mapping becomes an object if ``default`` cannot convert it.
    - NaN and infinities, also of Decimal, become null. A lone surrogate becomes U+FFFD.
    - Keys that are int, float, bool or None become strings as in :mod:`json`, such as ``"true"``.

    :param default: from :func:`json_default`. It raises :exc:`TypeError` if it cannot convert a
        value.
    :param max_bytes: limit of the encoded result.
    :raises ResultError: if a value cannot be converted or is too large. The message contains the
        path to the value and a remedy.
    """
    if isinstance(value, tuple):
        raise ResultError(
            "The view returned a tuple: return only the data, without status and headers, or "
            f"list(…) for an array. {BELOW}."
        )
    return _encoded(value, default, max_bytes, "The view returned", "ASYNCROUTE_MAX_RESULT")


def _encoded(value: Any, default: Default, max_bytes: int, where: str, key: str | None) -> bytes:
    try:
        body = encode_json(_Converter(default, max_bytes, key).value(value, 0))
    except NotStorable as error:
        raise ResultError(error.message(where)) from error.__cause__
    except RecursionError:
        raise ResultError(f"{where} data that is nested too deeply: return flatter data.") from None
    except Exception as error:
        what = "the value" if key is None else "the return value of the view"
        raise ResultError(f"Reading {what} raised {type(error).__name__}.") from error
    if len(body) > max_bytes:
        raise ResultError(too_large(max_bytes, key).message(where))
    return body


class _Converter:
    """Converts one value and its members to types that msgspec can encode."""

    # `remaining` is the size limit minus the minimum encoded size of the members so far. For speed
    # (up to twofold), containers are copied only if a member changes, and plain members are checked
    # without a call.

    def __init__(self, default: Default, max_bytes: int, key: str | None) -> None:
        self.default = default
        self.key = key
        self.max_bytes = max_bytes
        self.remaining = max_bytes

    def value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is dict:
            return self._object(value, value, depth)
        if kind is list:
            return self._array(value, value, depth)
        if isinstance(value, Enum):
            return self.value(value.value, depth + 1)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            return _whole(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, dict):
            return self._object(dict(value.items()), value, depth)
        if isinstance(value, (list, tuple)):
            return self._array(list(value), value, depth)
        if isinstance(value, datetime):
            return _rfc3339(value)
        if isinstance(value, (date, time)):
            return value.isoformat()
        if isinstance(value, UUID):
            return str(value)
        if isinstance(value, Decimal):
            return str(value) if value.is_finite() else None
        if isinstance(value, msgspec.Struct):
            return self._object(_members_of_struct(value), value, depth)
        if is_dataclass(value) and not isinstance(value, type):
            members = {field.name: getattr(value, field.name) for field in fields(value)}
            return self._object(members, value, depth)
        refuse(value)
        return self._by_default(value, depth)

    def _object(self, members: dict[Any, Any], holder: object, depth: int) -> dict[str, Any]:
        self._enter(5 * len(members), depth)
        used = 0
        names: dict[Any, str] = {}
        changed: dict[Any, Any] = {}
        for key, item in members.items():
            if type(key) is str and key.isascii():
                used += len(key)
            else:
                names[key] = self._key(key)
            kind = type(item)
            if kind is str and item.isascii():
                used += len(item)
            elif kind not in _PLAIN and (kind is not int or abs(item) >= _TOO_LONG):
                try:
                    new = self.value(item, depth + 1)
                except NotStorable as error:
                    error.add_step(holder, names.get(key, key))
                    raise
                if new is not item:
                    changed[key] = new
        self._use(used)
        replaced = members | changed if changed else members
        if names:
            replaced = {names.get(key, key): item for key, item in replaced.items()}
            if len(replaced) < len(members):
                raise NotStorable("two keys that are the same in JSON", "use strings as keys")
        return replaced

    def _array(self, items: list[Any], holder: object, depth: int) -> list[Any]:
        self._enter(2 * len(items), depth)
        used = 0
        changed: dict[int, Any] = {}
        for index, item in enumerate(items):
            kind = type(item)
            if kind is str and item.isascii():
                used += len(item)
            elif kind not in _PLAIN and (kind is not int or abs(item) >= _TOO_LONG):
                try:
                    new = self.value(item, depth + 1)
                except NotStorable as error:
                    error.add_step(holder, index)
                    raise
                if new is not item:
                    changed[index] = new
        self._use(used)
        if not changed:
            return items
        return [changed.get(index, item) for index, item in enumerate(items)]

    def _enter(self, least: int, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise NotStorable(
                f"data nested more than {MAX_DEPTH} levels deep", "return flatter data"
            )
        self._use(least)

    def _use(self, size: int) -> None:
        self.remaining -= size
        if self.remaining < 0:
            raise too_large(self.max_bytes, self.key)

    def _text(self, value: str) -> str:
        text = str.__str__(value)
        self._use(len(text))
        return without_surrogates(text)

    def _key(self, key: Any) -> str:
        if isinstance(key, Enum):
            key = key.value
        if isinstance(key, str):
            return self._text(key)
        if key is None or key is True or key is False:
            return {None: "null", True: "true", False: "false"}[key]
        if isinstance(key, int):
            return int.__repr__(_whole(key))
        if isinstance(key, float):
            return float.__repr__(key)
        raise NotStorable(f"an object with a key of type {type_name(key)}", "use strings as keys")

    def _by_default(self, value: Any, depth: int) -> Any:
        try:
            converted = self.default(value)
        except Exception as error:
            if isinstance(error, TypeError) and isinstance(value, Mapping):
                return self._object(dict(value.items()), value, depth)
            raise unconverted(value, error) from error
        try:
            self._enter(0, depth)  # limits the recursion if a provider never returns JSON values
            return self.value(converted, depth + 1)
        except NotStorable as error:
            error.add_step(value, None)
            raise


def _whole(value: int) -> int:
    number = int.__int__(value)
    if abs(number) >= _TOO_LONG:
        raise NotStorable(f"an integer of more than {MAX_DIGITS} digits", "return a float or a str")
    return number


def _rfc3339(value: datetime) -> str:
    offset = value.utcoffset()
    if offset is not None and offset.total_seconds() % 60:  # RFC 3339 offsets have no seconds
        value = value.astimezone(UTC)
    if value.utcoffset():
        return value.isoformat()
    return f"{value.replace(tzinfo=None).isoformat()}Z"


def _members_of_struct(value: msgspec.Struct) -> dict[Any, Any]:
    config = value.__struct_config__
    members: dict[Any, Any] = {} if config.tag is None else {config.tag_field: config.tag}
    for name, encoded in zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True):
        item = getattr(value, name)
        if item is not msgspec.UNSET:
            members[encoded] = item
    return members
