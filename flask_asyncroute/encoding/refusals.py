"""Explain why a value cannot be stored as JSON. Messages name keys and types, never values."""

from __future__ import annotations

import inspect
import io
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

from werkzeug.local import LocalProxy

_MAX_STEP, _MAX_PATH = 40, 240
_RESPONSES = ("Response", "HTTPException")
# A decorator below task() may have created the response.
BELOW = "Put decorators that create responses above task()"
"""Advice for a view that returned a response."""


class NotStorable(Exception):
    """A value cannot be stored as JSON.

    The error has a path to the value. Each container around the value adds its key or index with
    :meth:`add_step`.
    """

    def __init__(self, found: str, advice: str, *, has_path: bool = True) -> None:
        super().__init__(found)
        self.found = found
        self.advice = advice
        self.has_path = has_path
        self.steps: list[tuple[int, str]] = []

    def add_step(self, holder: object, step: str | int | None) -> None:
        """Put a key or an index before the path to the value. Call this for inner containers first.

        :param holder: the container with this key or index.
        :param step: the key or index; None if ``holder`` is not a container but was converted.
        """
        if isinstance(step, int):
            shown = f"[{step}]"
        elif step is None:
            shown = ""
        elif len(step) > _MAX_STEP:
            shown = f"[{step[:_MAX_STEP]!r}…]"
        else:
            shown = f".{step}" if step.isidentifier() else f"[{step!r}]"
        self.steps.append((id(holder), shown))

    def message(self, where: str) -> str:
        """Return the text of the error: ``where``, the reason, the path and the advice."""
        # A container that occurs twice in the path contains itself.
        found, advice = self.found, self.advice
        if not self.has_path:
            return f"{where} {found}: {advice}."
        path = ""
        seen: set[int] = set()
        for holder, shown in reversed(self.steps):
            if holder in seen:
                found, advice = "an object that contains itself", "return data without cycles"
                break
            seen.add(holder)
            path += shown
        if len(path) > _MAX_PATH:
            path = f"{path[: _MAX_PATH // 2]}…{path[-_MAX_PATH // 2 :]}"
        return f"{where} {found} at ${path}: {advice}."


def too_large(max_bytes: int, key: str | None) -> NotStorable:
    """Create the error for a value that exceeds ``max_bytes``.

    :param key: the configuration key that sets the limit; None if the limit is fixed.
    """
    if key is None:
        found = f"more than {max_bytes:,} bytes"
        advice = "store the data elsewhere, and only its location here"
    else:
        found = f"more than {key} ({max_bytes:,} bytes) allows"
        advice = "return less, for example the location of the data, or raise the limit"
    return NotStorable(found, advice, has_path=False)


def refuse(value: Any) -> None:
    """Raise NotStorable for types that views return by mistake, such as sets and responses.

    The error contains advice for the developer.
    """
    # The JSON provider or msgspec would accept some of these types.
    if issubclass(type(value), LocalProxy):  # isinstance() would check the proxied object
        raise NotStorable(_a(value), "return the data that you need from the object")
    if isinstance(value, (set, frozenset)):
        raise NotStorable(_a(value), "return a list, for example sorted(…)")
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise NotStorable(
            _a(value), "return text (decode it, or base64), or the location of the bytes"
        )
    if isinstance(value, io.IOBase):
        raise _open_file(value)
    bases = type(value).__mro__
    if any(one.__module__.startswith("werkzeug.") and one.__name__ in _RESPONSES for one in bases):
        advice = f"return only the data; for an error, call abort(…). {BELOW}"
        raise NotStorable(f"a response ({type_name(value)})", advice)
    if inspect.iscoroutine(value):
        value.close()  # prevents Python's warning that it was never awaited
    if isinstance(value, (Awaitable, AsyncIterator)):
        raise NotStorable(_a(value), "await it and return the result")
    if isinstance(value, Iterator):
        raise NotStorable(_a(value), "return list(…) of it; report progress with current_task")


def unconverted(value: object, error: Exception) -> NotStorable:
    if not isinstance(error, TypeError):
        return NotStorable(
            _a(value), f"the app's JSON provider raised {type(error).__name__} for it"
        )
    if hasattr(value, "read") and hasattr(value, "close"):
        return _open_file(value)
    return NotStorable(_a(value), "return data: dict, list, str, int, float, bool or None")


def _open_file(value: object) -> NotStorable:
    found = f"an open file ({type_name(value)})"
    return NotStorable(found, "return its content as text or data, and close it")


def _a(value: object) -> str:
    name = type_name(value)
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def type_name(value: object) -> str:
    """Return the name of a value's type. The module is included unless it is ``builtins``."""
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"
