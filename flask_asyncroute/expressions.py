"""Runtime expressions of OpenAPI 3.1 (section 4.8.20.4): what a `Callback` takes from the request that starts a task.

`options` parses them where they are written; `callbacks.resolving` resolves them when a task is started, which is why
``$response`` and ``$statusCode`` are none. Nothing here knows Flask.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNREADABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_BAD_ESCAPE = re.compile(r"~(?![01])")
_BARE = re.compile(r"\$(?:url|method|statusCode|request|response)(?![A-Za-z0-9_])")
_KINDS = "$url, $method, $request.query.…, $request.header.…, $request.path.… and $request.body#/…"


class BadExpression(ValueError):
    """An expression that cannot be parsed; the message says what and at which character, counted from 1."""


class NotText(ValueError):
    """An expression that yields something else than a text."""


class Source(Protocol):
    """The request that expressions are resolved against. What it does not have is None."""

    @property
    def url(self) -> str:
        """The absolute URL with its query."""
        ...

    @property
    def method(self) -> str:
        """The request method."""
        ...

    def query(self, name: str) -> str | None:
        """Return the first query parameter of this name."""
        ...

    def header(self, name: str) -> str | None:
        """Return a header field."""
        ...

    def path(self, name: str) -> str | None:
        """Return a variable of the URL."""
        ...

    def body(self, pointer: str) -> Any:
        """Return what a JSON pointer (RFC 6901) finds in the body."""
        ...


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression.

    :param text: as it was written.
    :param kind: ``url``, ``method``, ``query``, ``header``, ``path`` or ``body``.
    :param name: what it names there; of the body a JSON pointer.
    """

    text: str
    kind: str
    name: str = ""

    def value(self, source: Source) -> Any:
        """Return what it yields for this request; None where that is missing or null."""
        if self.kind in ("url", "method"):
            return getattr(source, self.kind)
        return getattr(source, self.kind)(self.name)


@dataclass(frozen=True, slots=True)
class Template:
    """Literal text and expressions, in their order."""

    parts: tuple[str | Expression, ...]

    @property
    def is_literal(self) -> bool:
        """Whether there is no expression in it."""
        return not any(isinstance(part, Expression) for part in self.parts)

    @property
    def is_alone(self) -> bool:
        """Whether it is a single expression and nothing else."""
        return len(self.parts) == 1 and isinstance(self.parts[0], Expression)

    @property
    def beginning(self) -> str:
        """The literal text before the first expression."""
        return self.parts[0] if self.parts and isinstance(self.parts[0], str) else ""

    def resolve(self, source: Source, embedded: Callable[[str], str] = str) -> str | None:
        """Return the text for one request; None where an expression yields nothing.

        :param embedded: what becomes of a value that stands in a text; not called where the expression is all there is.
        :raises NotText: where one yields a number, a list or the like.
        """
        pieces = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
                continue
            value = part.value(source)
            if value is None:
                return None
            if not isinstance(value, str):
                raise NotText(f"{part.text} is {_kind_of(value)}; it must be a text")
            pieces.append(value if self.is_alone else embedded(value))
        return "".join(pieces)


@lru_cache(maxsize=512)
def parse(text: str) -> Template:
    """Parse a text that is an expression (it begins with ``$``), or holds some in braces, or none.

    :raises BadExpression: saying what is wrong and where.
    """
    if text.startswith("$"):
        return Template((_expression(text, 1),))
    parts: list[str | Expression] = []
    position = 0
    while position < len(text):
        opened = text.find("{", position)
        literal = text[position:] if opened < 0 else text[position:opened]
        _check_literal(literal, position + 1)
        if literal:
            parts.append(literal)
        if opened < 0:
            break
        closed = text.find("}", opened)
        if closed < 0:
            raise BadExpression(f"the {{ at character {opened + 1} has no }}")
        parts.append(_expression(text[opened + 1 : closed], opened + 2))
        position = closed + 1
    return Template(tuple(parts))


def _check_literal(text: str, at: int) -> None:
    if "}" in text:
        raise BadExpression(f"the }} at character {at + text.index('}')} closes nothing")
    bare = _BARE.search(text)
    if bare is not None:
        raise BadExpression(f"{bare[0]} at character {at + bare.start()} stands in a text: put the expression in {{ }}")


def _expression(text: str, at: int) -> Expression:
    """Return the expression that ``text`` is, which begins at character ``at``."""
    if text in ("$url", "$method"):
        return Expression(text, text[1:])
    if text == "$statusCode" or text.startswith("$response"):
        raise BadExpression(f"{text!r} at character {at} is not known yet when the task is started. There are {_KINDS}")
    kind, dot, name = text.removeprefix("$request.").partition(".")
    if not text.startswith("$request."):
        raise BadExpression(f"{text[:40]!r} at character {at} is no expression. There are {_KINDS}")
    at += len("$request.")
    if kind.startswith("body"):
        return Expression(text, "body", _pointer(text, at + len("body")))
    if kind not in ("query", "header", "path") or not dot:
        raise BadExpression(f"{kind[:40]!r} at character {at} is no part of a request. There are {_KINDS}")
    at += len(kind) + 1
    if not name:
        raise BadExpression(f"a name is missing at character {at}")
    unreadable = _UNREADABLE.search(name)
    if unreadable is not None:
        raise BadExpression(f"there is a control character at character {at + unreadable.start()}")
    if kind == "header" and _TOKEN.fullmatch(name) is None:
        raise BadExpression(f"{name[:40]!r} at character {at} is no name of a header field")
    return Expression(text, kind, name)


def _pointer(text: str, at: int) -> str:
    """Return the JSON pointer after ``$request.body``; empty for the whole body."""
    rest = text.removeprefix("$request.body")
    if not rest:
        return ""
    pointer = rest[1:]
    if not rest.startswith("#") or (pointer and not pointer.startswith("/")):
        raise BadExpression(f"after $request.body comes # and a JSON pointer such as /callbackUrl, not {rest[:40]!r} "
                            f"(character {at})")  # fmt: skip
    escape = _BAD_ESCAPE.search(pointer)
    if escape is not None:
        raise BadExpression(f"the ~ at character {at + 1 + escape.start()} must be ~0 (for ~) or ~1 (for /)")
    return pointer


def is_token(text: str) -> bool:
    """Return whether a text is a token of RFC 9110: what methods and names of header fields are."""
    return _TOKEN.fullmatch(text) is not None


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "a list" if isinstance(value, list) else "an object"
