"""Resolve a route's `Callback` for one request, and check its URL without DNS."""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias
from urllib.parse import quote

from flask import Request
from werkzeug.exceptions import HTTPException
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from ..callbacks import expressions, ssrf
from ..callbacks.expressions import NotText
from ..callbacks.model import Callback, Delivery
from ..callbacks.ssrf import AllowedHosts
from ..callbacks.url import BadAddress, parse_url
from ..callbacks.validation import (
    DEPTH_HEADER,
    content_type_of,
    header_value,
    method_of,
    refuse_control_characters,
)
from ..encoding.json import is_deep
from ..errors import CallbackRefused
from .submission import StartRequest, url_of

MAX_BODY = 1024 * 1024  # maximum bytes of a body that expressions can read
MAX_DEPTH_OF_BODY = 200
MAX_DEPTH = 3
Convert: TypeAlias = Callable[[str], str]

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def resolve(
    callback: Callback, incoming: StartRequest, name: str, allowed: AllowedHosts
) -> Delivery | None:
    """Replace the expressions in a callback by values of the request that starts the task.

    :param name: the default ``EventName``.
    :param allowed: hosts that are accepted although they are not public.
    :return: None if the request has no callback URL.
    :raises CallbackRefused: for an invalid value, a URL host that is not public, an expression that
        reads a body over 1 MiB, or a chain of too many callbacks.
    """
    source = _Source(incoming)
    url = _term("URL", callback.url, source, embedded=_in_url)
    if url is None:
        return None
    depth = _depth_of(incoming.current)
    try:
        address = parse_url(url)
        if not callback.is_trusted:
            ssrf.check_host(address, allowed)
    except BadAddress as error:
        raise CallbackRefused(f"The callback's URL cannot be used: {error}.") from None
    except ssrf.Inside as error:
        raise CallbackRefused(
            f"The callback's URL cannot be used: {error}. The app can allow the host in "
            "ASYNCROUTE_CALLBACK_ALLOWED_HOSTS."
        ) from None
    headers = {
        field: _term(f"header {field}", text, source, header_value)
        for field, text in callback.headers.items()
    }
    method = _term("method", callback.method, source, method_of)
    content_type = _term("content type", callback.content_type, source, content_type_of)
    return Delivery(
        webhook_id=f"msg_{uuid.uuid4().hex}",
        url=address.url,
        host=address.host,
        method=method or "POST",
        content_type=content_type or "application/json",
        headers={field: value for field, value in headers.items() if value is not None},
        event_name=callback.event_name or name,
        send_result=callback.send_result,
        is_trusted=callback.is_trusted,
        depth=depth + 1,
    )


class _Source:
    """Reads the values of expressions from the request.

    Headers and cookies in ``ASYNCROUTE_SNAPSHOT_DROP`` cannot be read.
    """

    def __init__(self, incoming: StartRequest) -> None:
        self._current = incoming.current
        self._environ = incoming.captured.environ
        self._intake = incoming

    def __call__(self, kind: str, name: str) -> Any:
        value = self._value(kind, name)
        if isinstance(value, str):
            refuse_control_characters(value)
        return value

    def _value(self, kind: str, name: str) -> Any:
        current = self._current
        match kind:
            case "url":
                query = current.query_string.decode("latin-1")
                return url_of(current) + (f"?{query}" if query else "")
            case "method":
                return current.method
            case "query":
                return current.args.get(name)
            case "header":
                return self._header(name)
            case "path":
                found = (current.view_args or {}).get(name)
                return None if found is None else str(found)
        return self._in_body(name)

    def _header(self, name: str) -> str | None:
        key = name.upper().replace("-", "_")
        is_bare = key in ("CONTENT_TYPE", "CONTENT_LENGTH")
        found = self._environ.get(key if is_bare else f"HTTP_{key}")
        if found is None:
            return None
        try:
            # WSGI decodes each byte to one character, but most clients send UTF-8, so try UTF-8
            # first.
            return str(found).encode("latin-1").decode()
        except UnicodeError:
            return str(found)

    def _in_body(self, pointer: str) -> Any:
        document = self._document
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(document, dict):
                document = document.get(part)
            elif isinstance(document, list) and _INDEX.fullmatch(part):
                document = document[int(part)] if int(part) < len(document) else None
            else:
                return None
        return document

    @cached_property
    def _document(self) -> Any:
        """The decoded JSON body, or a form body as a dict of strings. None for other bodies."""
        kind, parameters = parse_options_header(self._environ.get("CONTENT_TYPE", ""))
        kind = kind.lower()
        is_json = kind == "application/json" or kind.endswith("+json")
        body = self._intake.body
        small = self._intake.captured.body or b""
        size = len(small) if body is None else body.size
        if size == 0 or not (is_json or kind in _FORMS):
            return None
        problem = "The callback uses the body, which"
        if size > MAX_BODY:
            raise CallbackRefused(f"{problem} has {size} bytes; the limit is {MAX_BODY}.")
        data = small if body is None else body.open().read()
        if is_json and is_deep(data, MAX_DEPTH_OF_BODY):
            raise CallbackRefused(f"{problem} is JSON nested over {MAX_DEPTH_OF_BODY} levels deep.")
        try:
            if is_json:
                return json.loads(data)
            # Keep files in memory: temporary files would have to be closed, even after an error.
            parser = FormDataParser(
                lambda *about, **more: io.BytesIO(), max_form_memory_size=MAX_BODY, silent=False
            )
            _, form, _ = parser.parse(io.BytesIO(data), kind, size, parameters)
            return form.to_dict()
        except (ValueError, RecursionError, HTTPException):
            wanted = "JSON" if is_json else "a form"
            raise CallbackRefused(
                f"{problem} is not {wanted}, although its Content-Type says that it is."
            ) from None


def _term(
    what: str, text: str, source: _Source, check: Convert = str, embedded: Convert = str
) -> str | None:
    """Resolve and check one setting of a callback.

    :param what: the name of the setting in error messages.
    :param embedded: encodes each value that is inserted into other text.
    :return: None if the request lacks the value of an expression.
    """
    try:
        found = expressions.parse(text).resolve(source, embedded)
        return None if found is None else check(found)
    except NotText as error:
        raise CallbackRefused(f"The callback's {what} is invalid: {error}.") from None
    except ValueError as error:
        raise CallbackRefused(f"The callback's {what} cannot be used: {error}.") from None


def _in_url(value: str) -> str:
    if value in ("", ".", ".."):
        raise ValueError(f"{value!r} cannot be a part of a URL")
    try:
        return quote(value, safe="")
    except UnicodeEncodeError:
        raise ValueError("it contains a lone surrogate") from None


def _depth_of(current: Request) -> int:
    text = current.headers.get(DEPTH_HEADER, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise CallbackRefused(f"{DEPTH_HEADER} must be an integer, not {text[:40]!r}.")
    if int(text) > MAX_DEPTH:
        raise CallbackRefused(
            f"A chain of {text} callbacks led to this request ({DEPTH_HEADER}). The limit is "
            f"{MAX_DEPTH}; start the task without a callback."
        )
    return int(text)
