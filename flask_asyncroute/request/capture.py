"""Capture the current request as a `Snapshot`."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from flask import Request, current_app, session
from flask.json.tag import TaggedJSONSerializer
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.wsgi import LimitedStream

from .. import snapshot
from ..errors import (
    BodyTooLarge,
    CannotStart,
    InvalidRequest,
    LengthRequired,
    RequestRefused,
    StoreUnavailable,
)
from ..snapshot import Body, Snapshot

logger = logging.getLogger("flask_asyncroute")

_KEPT = frozenset({str, int, bool})
_DROPPED = frozenset({"HTTP_TRANSFER_ENCODING", "wsgi.input_terminated", "CONTENT_LENGTH"})
_VARIABLES = "flask_asyncroute.view_args"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_UNENCODABLE = (TypeError, ValueError, RecursionError)
_tagged = TaggedJSONSerializer()


def note_request(current: Request) -> None:
    """Save the URL variables before the app's hooks can change them.

    Also remove ``wsgi.input_terminated``, because it makes Werkzeug accept a body shorter than its
    Content-Length.
    """
    if current.content_length is not None:
        current.environ.pop("wsgi.input_terminated", None)
    if current_app.url_value_preprocessors and current.view_args:
        current.environ[_VARIABLES] = dict(current.view_args)


def url_variables(current: Request) -> Mapping[str, Any]:
    """Return the URL variables as they were before the app's hooks."""
    return current.environ.get(_VARIABLES, current.view_args) or {}


def guard(current: Request, max_body: int) -> None:
    """Make reading the body raise an error if the body is incomplete or over ``max_body`` bytes."""
    _refuse_undelivered(current)
    announced = current.content_length
    environ = current.environ
    if announced is not None:
        snapshot.check_announced(announced, max_body)
        environ.pop("wsgi.input_terminated", None)
    elif "HTTP_TRANSFER_ENCODING" in environ:
        environ["wsgi.input"] = snapshot.LimitedInput(environ["wsgi.input"], max_body)


def _refuse_undelivered(current: Request) -> None:
    """Raise LengthRequired if the body is chunked and the server does not support this. Werkzeug
    would read an empty body, because PEP 3333 has no chunked requests.
    """
    environ = current.environ
    coding = environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    is_chunked = "chunked" in coding and current.content_length is None
    if is_chunked and not environ.get("wsgi.input_terminated"):
        raise LengthRequired(
            "This server does not support chunked request bodies. Send a Content-Length."
        )


def restore_body(current: Request, captured: Snapshot, body: Body | None) -> None:
    """Rewind a captured body, so that the app can read it again."""
    current.__dict__["stream"] = io.BytesIO(captured.body or b"") if body is None else body.open()


def plain_environ(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return a WSGI environ's strings, integers and booleans, except those about the body."""
    return {
        key: value for key, value in environ.items() if type(value) in _KEPT and key not in _DROPPED
    }


def capture(
    current: Request, arguments: Mapping[str, Any], max_body: int, drop: frozenset[str]
) -> tuple[Snapshot, Body | None]:
    """Capture the current request; return a large body as the second value.

    :param arguments: the view's arguments. Of URL variables, only the names are stored, because the
        URL is matched again later. Other arguments must be JSON.
    :param drop: lower-case names of headers and cookies that must not be stored.
    :raises RequestRefused: if the body, the session or an argument cannot be stored.
    """
    environ = plain_environ(current.environ)
    if drop:
        _drop_names(environ, drop)
    body = small = None
    _refuse_undelivered(current)
    if current.content_length or "HTTP_TRANSFER_ENCODING" in current.environ:
        body = _capture_body(current, environ, max_body)
    try:
        # Store the values that a url_value_preprocessor has put into URL variables: the URL has the
        # old values.
        variables = url_variables(current)
        names, injected = [], {}
        for name, value in arguments.items():
            if name in variables and value is variables[name]:
                names.append(name)
            else:
                injected[name] = _json_argument(name, value)
        values = dict(session)
        encoded = _encoded_session(values) if values else None
        if body is not None and body.size <= snapshot.SMALL:
            small = body.open().read()
            body.close()
            body = None
    except BaseException:
        if body is not None:
            body.close()
        raise
    captured = Snapshot(
        environ=environ, body=small, session=encoded, url_names=tuple(names), injected=injected
    )
    return captured, body


def _capture_body(current: Request, environ: dict[str, Any], limit: int) -> Body:
    announced = current.content_length
    snapshot.check_announced(announced, limit)
    try:
        cached = getattr(current, "_cached_data", None)
        # After a form was parsed, get_data() finds no cached body.
        was_parsed = "form" in current.__dict__ and not cached
        if was_parsed and current.mimetype in _FORMS:
            content_type, body = snapshot.form_body(current.mimetype, current.form, current.files)
            if current.mimetype == "multipart/form-data":
                environ["CONTENT_TYPE"] = content_type
            if announced is None:
                # A chunked body was not checked above, and encoding the form again can lengthen it.
                snapshot.check_announced(body.size, limit)
            return body
        if cached is not None:
            snapshot.check_announced(len(cached), limit)
            snapshot.check_complete(len(cached), announced)
            return Body([cached])
        stream = current.stream
        if _is_used_up(stream, announced):
            raise CannotStart(
                "The app read the body of this request without caching it. Use request.form, "
                "request.json or request.get_data(), not request.stream or get_data(cache=False)."
            )
        return snapshot.read_body(stream, announced, limit)
    except HTTPException as error:
        raise body_refusal(current, error) from None
    except OSError as error:
        logger.error(
            "A request body could not be written to a temporary file, so no task was started: "
            "%s: %s",
            type(error).__name__,
            error,
        )
        raise StoreUnavailable(
            "The body cannot be stored at the moment. Try again.", retry_after=5
        ) from error


def _is_used_up(stream: Any, announced: int | None) -> bool:
    if isinstance(stream, snapshot.LimitedInput):
        return bool(stream.arrived)
    return isinstance(stream, LimitedStream) and bool(announced) and bool(stream.is_exhausted)


def body_refusal(current: Request, error: HTTPException) -> RequestRefused | HTTPException:
    """Convert Werkzeug's errors about the body to RequestRefused; return others unchanged."""
    if isinstance(error, RequestEntityTooLarge):
        limit = f"{current.max_content_length} bytes, MAX_CONTENT_LENGTH"
        if current.max_content_length is None:
            limit = "MAX_FORM_MEMORY_SIZE or MAX_FORM_PARTS"
        return BodyTooLarge(f"The body exceeds the limit of this app ({limit}).")
    if isinstance(error, ClientDisconnected):
        return InvalidRequest("The body is incomplete: the client disconnected. Send it again.")
    return error


def _encoded_session(values: dict[str, Any]) -> str:
    try:
        return _tagged.dumps(values)
    except _UNENCODABLE:
        for key, value in values.items():
            try:
                _tagged.dumps({key: value})
            except _UNENCODABLE:
                raise CannotStart(
                    f"The session's {key!r} is a {type(value).__name__}, which cannot be stored "
                    "with a task. Keep JSON values in the session."
                ) from None
        raise


def _json_argument(name: str, value: Any) -> Any:
    try:
        encoded = msgspec.json.encode(value)
        if msgspec.json.decode(encoded) != (list(value) if isinstance(value, tuple) else value):
            raise TypeError
    except _UNENCODABLE:
        raise CannotStart(
            f"A decorator above the async route passed a {type(value).__name__} as {name!r}, which "
            "cannot be stored with a task. Pass JSON, or load the object in a before_task function."
        ) from None
    return value


def _drop_names(environ: dict[str, Any], names: frozenset[str]) -> None:
    for name in names:
        environ.pop("HTTP_" + name.upper().replace("-", "_"), None)
    cookies = environ.pop("HTTP_COOKIE", None)
    if cookies is None:
        return
    # Split the cookies at each semicolon, quoted or not, as Werkzeug does.
    kept = [
        cookie
        for cookie in cookies.split(";")
        if cookie.partition("=")[0].strip().lower() not in names
    ]
    if kept:
        environ["HTTP_COOKIE"] = ";".join(kept)
