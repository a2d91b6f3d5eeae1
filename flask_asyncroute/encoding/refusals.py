"""Why a result cannot be stored: what was found, where, and what to return instead. `results` raises and reads these.

A message names keys and types; it never holds a value or the repr of one.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

from werkzeug.local import LocalProxy

_MAX_STEP, _MAX_PATH = 40, 240
_RESPONSES = ("Response", "HTTPException")


class Unfit(Exception):
    """Something that JSON does not hold. Each level that it passes on its way out adds its step of the path."""

    def __init__(self, found: str, advice: str, *, is_placed: bool = True) -> None:
        super().__init__(found)
        self.found = found
        self.advice = advice
        self.is_placed = is_placed
        self.steps: list[tuple[int, str]] = []

    def passed(self, holder: object, step: str | int | None) -> None:
        """Add one step to the path, innermost first: a key, an index, or None for a value that stood for another."""
        if isinstance(step, int):
            shown = f"[{step}]"
        elif step is None:
            shown = ""
        elif len(step) > _MAX_STEP or not step.isidentifier():
            shown = f"[{step[:_MAX_STEP]!r}{'…' if len(step) > _MAX_STEP else ''}]"
        else:
            shown = f".{step}"
        self.steps.append((id(holder), shown))

    def told(self, where: str) -> str:
        """Return the message. An object that was passed twice on the way in is a cycle, and is named as one.

        :param where: how it begins, as in "The view returned".
        """
        if not self.is_placed:
            return f"{where} {self.found}: {self.advice}."
        steps = self.steps[::-1]
        found, advice = self.found, self.advice
        first_seen: dict[int, int] = {}
        for index, (holder, _) in enumerate(steps):
            if first_seen.setdefault(holder, index) != index:
                found, advice = "an object that contains itself", "return data without cycles"
                steps = steps[:index]
                break
        path = "".join(shown for _, shown in steps)
        if len(path) > _MAX_PATH:
            path = f"{path[: _MAX_PATH // 2]}…{path[-_MAX_PATH // 2 :]}"
        return f"{where} {found} at ${path}: {advice}."


def too_large(max_bytes: int, key: str | None) -> Unfit:
    """Return the refusal of a value that is over the limit.

    :param key: the configuration key that sets it; None where it is fixed.
    """
    found = f"more than {max_bytes:,} bytes" if key is None else f"more than {key} ({max_bytes:,} bytes) allows"
    advice = "keep the data elsewhere, and here where that is"
    return Unfit(
        found,
        advice if key is None else "return less, for example where the data is kept, or raise the limit",
        is_placed=False,
    )


def refuse(value: Any) -> None:
    """Raise for what a provider or msgspec would take for data, and what deserves better advice than "not JSON"."""
    if issubclass(type(value), LocalProxy):  # a proxy takes itself for what it stands for
        raise Unfit(_a(value), "return the data that you need of what it stands for")
    if isinstance(value, (set, frozenset)):
        raise Unfit(_a(value), "return a list, for example sorted(…)")
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise Unfit(_a(value), "return text (decode it, or base64), or where the bytes are kept")
    if isinstance(value, io.IOBase):
        raise _open_file(value)
    if any(base.__module__.startswith("werkzeug.") and base.__name__ in _RESPONSES for base in type(value).__mro__):
        raise Unfit(f"a response ({type_name(value)})", "return the data alone; raise with abort(…) for an error")
    if inspect.iscoroutine(value):
        value.close()  # it will never be awaited: no warning about that later
    if isinstance(value, (Awaitable, AsyncIterator)):
        raise Unfit(_a(value), "await it, and return what it gives")
    if isinstance(value, Iterator):
        raise Unfit(_a(value), "return list(…) of it; progress goes through current_task")


def undefaulted(value: object, error: Exception) -> Unfit:
    """Return the refusal of a value with which the app's JSON provider could do nothing."""
    if not isinstance(error, TypeError):
        return Unfit(_a(value), f"the app's JSON provider raised {type(error).__name__} for it")
    if hasattr(value, "read") and hasattr(value, "close"):
        return _open_file(value)
    return Unfit(_a(value), "return data: dict, list, str, int, float, bool or None")


def _open_file(value: object) -> Unfit:
    return Unfit(f"an open file ({type_name(value)})", "return what it holds as text or data, and close it")


def _a(value: object) -> str:
    name = type_name(value)
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def type_name(value: object) -> str:
    """Return the name of a value's type, with its module unless that is builtins."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
