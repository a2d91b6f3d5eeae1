"""What a callback's URL, method, content type and header fields may be, wherever they come from.

`options` checks what a developer writes, `callbacks.resolving` what the expressions in it make of a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from . import expressions, web_address
from .encoding import MEDIA_TYPES
from .errors import ConfigurationError
from .expressions import BadExpression, Template, is_token

_NO_METHODS = frozenset({"CONNECT", "GET", "HEAD", "OPTIONS", "TRACE"})
_OURS = frozenset(
    {"asyncroute-depth", "connection", "content-length", "content-type", "expect", "host", "keep-alive", "te", "trailer",
     "transfer-encoding", "upgrade", "webhook-id", "webhook-signature", "webhook-timestamp"}
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_BEGINNING = re.compile(r"https?://", re.IGNORECASE)
_AUTHORITY = re.compile(r"https?://[^/?#]+/", re.IGNORECASE)
MAX_METHOD = 32
MAX_VALUE = 8192


def method_of(text: str) -> str:
    """Return a request method in capital letters.

    :raises ValueError: for what is none, or one that carries no message.
    """
    method = text.upper()
    if not is_token(text) or len(text) > MAX_METHOD:
        raise ValueError(f"{text[:40]!r} is no request method")
    if method in _NO_METHODS:
        raise ValueError(f"{method} carries no message; use POST, PUT or PATCH")
    return method


def content_type_of(text: str) -> str:
    """Return one of the three content types. Parameters are left out: what is sent is UTF-8, and says so where it must.

    :raises ValueError: for another one.
    """
    kind = text.partition(";")[0].strip().lower()
    if kind not in MEDIA_TYPES:
        raise ValueError(f"{text[:60]!r} is none of {', '.join(MEDIA_TYPES)}")
    return kind


def header_value(text: str) -> str:
    """Return the value of a header field.

    :raises ValueError: for control characters, which could begin another field, and over 8,192 characters.
    """
    if _CONTROL.search(text):
        raise ValueError("it holds a line break or another control character")
    if len(text) > MAX_VALUE:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_VALUE} are sent")
    return text.strip(" \t")


def header_name(label: str, text: str) -> str:
    """Return the name of a header field that an app may set.

    :raises ConfigurationError: for what is none, or one that the sender sets.
    """
    if not is_token(text):
        raise ConfigurationError(f"{label} must be the name of a header field, not {text[:60]!r}.")
    if text.lower() in _OURS:
        raise ConfigurationError(f"{label}: {text} is set by the sender of the callback; leave it out.")
    return text


def url(label: str, text: str) -> None:
    """Check the URL of a callback as it was written.

    :raises ConfigurationError: for a bad expression, or an address that cannot be called whatever they yield.
    """
    template = _parsed(label, text)
    if template.is_alone:
        return
    fixed = template.beginning
    if not template.is_literal:
        if not _BEGINNING.match(fixed):
            raise ConfigurationError(
                f"{label}: before its first {{ a URL must begin with https:// or http://. An expression that yields a whole URL "
                "stands alone, without braces."
            )
        if not has_authority(template):
            return
    try:
        web_address.parse(fixed)
    except web_address.BadAddress as error:
        raise ConfigurationError(f"{label} is no URL that can be called: {error}.") from None


def has_authority(template: Template) -> bool:
    """Return whether the text before the first expression holds the whole authority and the ``/`` after it."""
    return _AUTHORITY.match(template.beginning) is not None


def checked(label: str, text: str, check: Callable[[str], str]) -> None:
    """Check a term as it was written: its expressions, and its literal text where that is all there is.

    :raises ConfigurationError: naming it.
    """
    template = _parsed(label, text)
    try:
        if template.is_literal:
            check(text)
        else:
            for part in template.parts:
                if isinstance(part, str):
                    header_value(part)
    except ValueError as error:
        raise ConfigurationError(f"{label}: {error}.") from None


def _parsed(label: str, text: str) -> Template:
    try:
        return expressions.parse(text)
    except BadExpression as error:
        raise ConfigurationError(f"{label}: {error}.") from None
