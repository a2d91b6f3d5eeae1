"""What a `Callback` comes to for one request: its expressions resolved, its target checked as far as that needs no name server.

`dispatcher` asks for it between the request's capture and its task; a refusal starts nothing.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable
from functools import cached_property
from typing import Any
from urllib.parse import quote

from flask import Request
from jsonpointer import JsonPointer
from werkzeug.exceptions import HTTPException
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from .. import expressions, web_address
from ..allowed_hosts import AllowedHosts
from ..callback_terms import content_type_of, header_value, method_of
from ..delivery import Delivery
from ..errors import CallbackRefused
from ..expressions import NotText
from ..intake import Intake, url_of
from ..options import Callback
from ..snapshot import Snapshot
from ..web_address import WebAddress
from . import guard

MAX_BODY = 1024 * 1024
"""Bytes of a body in which expressions look."""
MAX_DEPTH = 3
DEPTH = "Asyncroute-Depth"
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def resolve(callback: Callback, intake: Intake, name: str, allowed: AllowedHosts) -> Delivery | None:
    """Return what is to be sent when the task ends; None where the request has no URL for it.

    :param name: what ``EventName`` says where the callback does not.
    :raises CallbackRefused: for a URL that is empty, malformed or leads inside, a value that is no text or does not fit
        where it goes, a body over 1 MiB that an expression reads, and a request that is a callback's callback's … callback.
    """
    source = RequestSource(intake)
    url = _term("URL", callback.url, source, embedded=_in_url)
    if url is None:
        return None
    depth = _depth_of(intake.current)
    address = _address_of(url, callback.is_trusted, allowed)
    headers = {}
    for field, text in callback.headers.items():
        value = _term(f"header {field}", text, source, header_value)
        if value is not None:
            headers[field] = value
    return Delivery(
        webhook_id=f"msg_{uuid.uuid4().hex}",
        url=address.url,
        host=address.host,
        method=_term("method", callback.method, source, method_of) or "POST",
        content_type=_term("content type", callback.content_type, source, content_type_of) or "application/json",
        headers=headers,
        event_name=callback.event_name or name,
        send_result=callback.send_result,
        is_trusted=callback.is_trusted,
        depth=depth + 1,
    )


def literal_headers(callback: Callback) -> dict[str, str]:
    """Return the header fields of a callback that need no request: what is left of them after the last attempt."""
    parsed = {field: expressions.parse(text) for field, text in callback.headers.items()}
    return {field: callback.headers[field] for field, template in parsed.items() if template.is_literal}


class RequestSource:
    """The captured request, for `expressions`. What is never stored (``ASYNCROUTE_SNAPSHOT_DROP``) is not found either."""

    def __init__(self, intake: Intake) -> None:
        self._current = intake.current
        self._captured: Snapshot = intake.captured
        self._intake = intake
        self.method = intake.current.method

    @cached_property
    def url(self) -> str:
        """The absolute URL with its query."""
        query = self._current.query_string.decode("latin-1")
        return url_of(self._current) + (f"?{query}" if query else "")

    def query(self, name: str) -> str | None:
        return self._current.args.get(name)

    def header(self, name: str) -> str | None:
        key = name.upper().replace("-", "_")
        found = self._captured.environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}")
        return None if found is None else _text_of(str(found))

    def path(self, name: str) -> str | None:
        found = (self._current.view_args or {}).get(name)
        return None if found is None else str(found)

    def body(self, pointer: str) -> Any:
        document = self._document
        for part in JsonPointer(pointer).parts:
            if isinstance(document, dict):
                document = document.get(part)
            elif isinstance(document, list) and part.isdecimal() and len(part) < 10 and str(int(part)) == part:
                document = document[int(part)] if int(part) < len(document) else None
            else:
                return None
        return document

    @cached_property
    def _document(self) -> Any:
        """The body as JSON, or a form as an object of texts; None where it is neither."""
        kind, parameters = parse_options_header(self._captured.environ.get("CONTENT_TYPE", ""))
        kind = kind.lower()
        is_json = kind == "application/json" or kind.endswith("+json")
        body = self._intake.body
        size = len(self._captured.body or b"") if body is None else body.size
        if size == 0 or not (is_json or kind in _FORMS):
            return None
        if size > MAX_BODY:
            raise CallbackRefused(
                f"The callback is taken from the body, which has {size} bytes; for that it may have {MAX_BODY}."
            )
        data = (self._captured.body or b"") if body is None else body.open().read()
        if is_json:
            try:
                return json.loads(data)  # what Flask takes, with oddities in fields that nothing here is about
            except (ValueError, RecursionError):
                raise CallbackRefused("The callback is taken from the body, which is not JSON as it says.") from None
        return _form_of(data, kind, parameters)


def _form_of(data: bytes, kind: str, parameters: dict[str, str]) -> dict[str, str]:
    """Return the fields of a form, the first of each name; files are none."""
    # Files in memory, which the whole body is: a temporary one would have to be closed, also where the rest cannot be read.
    parser = FormDataParser(lambda *about, **more: io.BytesIO(), max_form_memory_size=MAX_BODY, silent=False)
    try:
        _, form, _ = parser.parse(io.BytesIO(data), kind, len(data), parameters)
    except (ValueError, HTTPException):
        raise CallbackRefused("The callback is taken from the body, which is no form as it says.") from None
    return form.to_dict()


def _term(
    what: str, text: str, source: RequestSource, check: Callable[[str], str] = str, embedded: Callable[[str], str] = str
) -> str | None:
    """Return one term of the callback, checked; None where the request has nothing for it."""
    try:
        found = expressions.parse(text).resolve(source, embedded)
        return None if found is None else check(found)
    except NotText as error:
        raise CallbackRefused(f"The callback's {what}: {error}.") from None
    except ValueError as error:
        raise CallbackRefused(f"The callback's {what} cannot be used: {error}.") from None


def _in_url(value: str) -> str:
    """Return a value as a part of a URL, percent-encoded."""
    if value in ("", ".", ".."):
        raise ValueError(f"{value!r} cannot be a part of it")
    try:
        return quote(value, safe="")
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair") from None


def _address_of(url: str, is_trusted: bool, allowed: AllowedHosts) -> WebAddress:
    try:
        address = web_address.parse(url)
        if not is_trusted:
            guard.check(address, allowed)
        return address
    except (web_address.BadAddress, guard.Inside) as error:
        raise CallbackRefused(f"The callback's URL cannot be called: {error}.") from None


def _depth_of(current: Request) -> int:
    """Return how many callbacks led to this request."""
    text = current.headers.get(DEPTH)
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise CallbackRefused(f"{DEPTH} must be a whole number, not {text[:40]!r}.")
    if int(text) > MAX_DEPTH:
        raise CallbackRefused(
            f"This request came about by {text[:9]} callbacks of callbacks ({DEPTH}); over {MAX_DEPTH} start nothing that calls "
            "back."
        )
    return int(text)


def _text_of(value: str) -> str:
    """Return a header field's text: WSGI has each byte as a character, clients mostly send UTF-8."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value
