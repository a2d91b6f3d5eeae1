"""Check a callback's settings, before and after their expressions are resolved."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .. import validators
from ..encoding import MEDIA_TYPES
from ..errors import ConfigurationError
from . import expressions
from .expressions import BadExpression, Template, is_token
from .url import BadAddress, parse_url

DEPTH_HEADER = "Asyncroute-Depth"  # the number of callbacks that led to a request
MAX_METHOD = 32
MAX_VALUE = 8192
_NO_METHODS = frozenset({"CONNECT", "GET", "HEAD", "OPTIONS", "TRACE"})
_OURS = frozenset(
    {DEPTH_HEADER.lower(), "connection", "content-length", "content-type", "expect", "host",
     "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "webhook-id",
     "webhook-signature", "webhook-timestamp"}
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_BEGINNING = re.compile(r"https?://", re.IGNORECASE)
_AUTHORITY = re.compile(r"https?://[^/?#]+/", re.IGNORECASE)


def method_of(text: str) -> str:
    """Convert a request method to upper case.

    :raises ValueError: if the method is invalid, or its requests have no body.
    """
    method = text.upper()
    if not is_token(text) or len(text) > MAX_METHOD:
        raise ValueError(f"{text[:40]!r} is not a request method")
    if method in _NO_METHODS:
        raise ValueError(f"{method} has no request body; use POST, PUT or PATCH")
    return method


def content_type_of(text: str) -> str:
    """Return the media type of a content type, in lower case and without parameters.

    :raises ValueError: if the media type is not supported.
    """
    # A charset parameter is not needed: bodies are always UTF-8.
    kind = text.partition(";")[0].strip().lower()
    if kind not in MEDIA_TYPES:
        raise ValueError(f"{text[:60]!r} is not one of {', '.join(MEDIA_TYPES)}")
    return kind


def header_value(text: str) -> str:
    """Return a header value without surrounding spaces and tabs.

    :raises ValueError: if the value is too long or contains control characters.
    """
    refuse_control_characters(text)
    if len(text) > MAX_VALUE:
        raise ValueError(f"it has {len(text)} characters; the limit is {MAX_VALUE}")
    return text.strip(" \t")


def refuse_control_characters(text: str) -> None:
    """Raise ValueError if a header value contains control characters other than TAB.

    A line break, for example, could inject another header.
    """
    if _CONTROL.search(text):
        raise ValueError("it contains a line break or another control character")


def check_header_name(label: str, value: Any) -> None:
    """Check the name of a header that a developer adds to a callback.

    :raises ConfigurationError: if the name is invalid, or the package sets this header itself.
    """
    name = validators.text(label, value)
    if not is_token(name):
        raise ConfigurationError(f"{label} must be a valid header name, not {name[:60]!r}.")
    if name.lower() in _OURS:
        problem = f"the library sets {name} itself; remove it"
        raise ConfigurationError(f"{label}: {problem}.")


def check_url(label: str, value: Any) -> None:
    """Raise ConfigurationError if the declared URL of a callback can never be valid."""
    template = _parsed(label, value)
    if template.is_alone:
        return
    fixed = template.beginning
    if not template.is_literal:
        if not _BEGINNING.match(fixed):
            raise ConfigurationError(
                f"{label}: the text before the first {{ must begin with https:// or http://. If "
                "one expression is the whole URL, write it without braces."
            )
        if not has_authority(template):
            return
    try:
        parse_url(fixed)
    except BadAddress as error:
        raise ConfigurationError(f"{label} is not a URL that can be called: {error}.") from None


def has_authority(template: Template) -> bool:
    """Check that the host in a URL is literal text, so that no expression can change it."""
    # If the "/" after the authority were missing, an expression could extend the host.
    # If the "/" were missing, an expression could extend the host.
    return _AUTHORITY.match(template.beginning) is not None


def check_term(label: str, value: Any, check: Callable[[str], str]) -> None:
    """Check the declared method, content type or header value of a callback.

    :param check: raises ValueError for an invalid value. It is not called for a value with
        expressions.
    :raises ConfigurationError: if the value is invalid.
    """
    template = _parsed(label, value)
    try:
        if template.is_literal:
            check(value)
            return
        for part in template.parts:
            if isinstance(part, str):
                header_value(part)
    except ValueError as error:
        raise ConfigurationError(f"{label}: {error}.") from None


def _parsed(label: str, value: Any) -> Template:
    try:
        return expressions.parse(validators.text(label, value))
    except BadExpression as error:
        raise ConfigurationError(f"{label}: {error}.") from None
