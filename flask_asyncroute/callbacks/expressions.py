"""Parse OpenAPI 3.1 runtime expressions (section 4.8.20.4), such as ``$request.body#/callbackUrl``.

Expressions insert values of the request that starts a task into the settings of a `Callback`. At
that time there is no response, so ``$response`` and ``$statusCode`` are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

_BRACES = re.compile(r"\{([^}]*)\}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_BAD_ESCAPE = re.compile(r"~(?![01])")
_BARE = re.compile(r"\$(?:url|method|statusCode|request|response)(?![A-Za-z0-9_])")
_KINDS = "$url, $method, $request.query.…, $request.header.…, $request.path.… or $request.body#/…"
_REQUEST = "$request."
_JSON_KINDS = {bool: "a boolean", int: "a number", float: "a number", list: "a list"}


class BadExpression(ValueError):
    """An expression is invalid. The message gives the reason and the character position, from 1."""


class NotText(ValueError):
    """The value of an expression is not a string."""


Source: TypeAlias = Callable[[str, str], Any]
"""A function that reads a value of the request. Its arguments are an expression's kind and name. It
returns None if the request lacks the value.
"""


@dataclass(frozen=True, slots=True)
class Expression:
    """A runtime expression, which reads one value of a request.

    :param kind: ``url``, ``method``, ``query``, ``header``, ``path`` or ``body``.
    :param name: the name of the parameter, header or path variable. For the body, a JSON pointer.
    """

    text: str
    kind: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """The text of a setting, parsed into literal texts and expressions."""

    parts: tuple[str | Expression, ...]

    @property
    def is_literal(self) -> bool:
        return all(isinstance(part, str) for part in self.parts)

    @property
    def is_alone(self) -> bool:
        """Whether the template consists of one expression and no literal text."""
        return len(self.parts) == 1 and isinstance(self.parts[0], Expression)

    @property
    def beginning(self) -> str:
        """The literal text before the first expression; may be empty."""
        return self.parts[0] if self.parts and isinstance(self.parts[0], str) else ""

    def resolve(self, source: Source, embedded: Callable[[str], str] = str) -> str | None:
        """Replace the expressions by their values and return the text.

        :param embedded: encodes each value that is inserted into literal text.
        :return: None if the request lacks the value of an expression.
        :raises NotText: if a value is not a string.
        """
        pieces = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
                continue
            value = source(part.kind, part.name)
            if value is None:
                return None
            if not isinstance(value, str):
                kind = _JSON_KINDS.get(type(value), "an object")
                raise NotText(f"{part.text} is {kind}; it must be a string")
            pieces.append(value if self.is_alone else embedded(value))
        return "".join(pieces)


@lru_cache(maxsize=512)
def parse(text: str) -> Template:
    """Parse the text of a setting.

    A text that begins with ``$`` is one expression. In other texts, expressions are in braces.

    :raises BadExpression: if an expression or a brace is invalid.
    """
    if text.startswith("$"):
        return Template((_expression(text, 1),))
    parts: list[str | Expression] = []
    position = 0
    for braces in _BRACES.finditer(text):
        parts += _checked_literal(text[position : braces.start()], position + 1)
        parts.append(_expression(braces[1], braces.start(1) + 1))
        position = braces.end()
    parts += _checked_literal(text[position:], position + 1)
    return Template(tuple(parts))


def _checked_literal(text: str, at: int) -> list[str]:
    # An empty text is not a part of a template.
    checked, opened, _ = text.partition("{")
    if "}" in checked:
        raise BadExpression(f"the }} at character {at + text.index('}')} has no {{")
    bare = _BARE.search(checked)
    if bare is not None:
        problem = "is inside other text; put the expression in { }"
        raise BadExpression(f"{bare[0]} at character {at + bare.start()} {problem}")
    if opened:
        raise BadExpression(f"the {{ at character {at + len(checked)} has no }}")
    return [text] if text else []


def _expression(text: str, at: int) -> Expression:
    if text in ("$url", "$method"):
        return Expression(text, text[1:])
    if text == "$statusCode" or text.startswith("$response"):
        problem = f"is not known when the task is started; use {_KINDS}"
        raise BadExpression(f"{text!r} at character {at} {problem}")
    if not text.startswith(_REQUEST):
        raise BadExpression(f"{text[:40]!r} at character {at} is not an expression; use {_KINDS}")
    kind, dot, name = text.removeprefix(_REQUEST).partition(".")
    at += len(_REQUEST)
    if kind.startswith("body"):
        return Expression(text, "body", _pointer_of_body(text, at + len("body")))
    if kind not in ("query", "header", "path") or not dot:
        problem = f"is not a part of a request; use {_KINDS}"
        raise BadExpression(f"{kind[:40]!r} at character {at} {problem}")
    at += len(kind) + 1
    if not name:
        raise BadExpression(f"a name is missing at character {at}")
    control = _CONTROL.search(name)
    if control is not None:
        raise BadExpression(f"there is a control character at character {at + control.start()}")
    if kind == "header" and not is_token(name):
        raise BadExpression(f"{name[:40]!r} at character {at} is not a valid header name")
    return Expression(text, kind, name)


def _pointer_of_body(text: str, at: int) -> str:
    # The pointer follows "$request.body". It is empty for the whole body.
    rest = text.removeprefix("$request.body")
    pointer = rest[1:]
    if rest and not rest.startswith("#") or pointer and not pointer.startswith("/"):
        wanted = "use # and a JSON pointer, as in $request.body#/callbackUrl"
        raise BadExpression(f"{rest[:40]!r} at character {at} is invalid; {wanted}")
    escape = _BAD_ESCAPE.search(pointer)
    if escape is not None:
        position = at + 1 + escape.start()
        raise BadExpression(f"the ~ at character {position} must be ~0 (for ~) or ~1 (for /)")
    return pointer


def is_token(text: str) -> bool:
    """Check whether a text is a token as defined by RFC 9110, such as a method or a header name."""
    return _TOKEN.fullmatch(text) is not None
