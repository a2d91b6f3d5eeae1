"""The present request taken as a `Snapshot`: its environ, body and session, and what the view was called with.

`dispatcher` calls it in the request; `context` makes a request of the snapshot again, wherever the task runs.
"""

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

from .errors import BodyTooLarge, CannotStart, InvalidRequest, RequestRefused, StoreUnavailable
from .snapshot import (
    SMALL,
    Body,
    LimitedInput,
    Snapshot,
    check_announced,
    check_complete,
    form_body,
    read_body,
)

logger = logging.getLogger("flask_asyncroute")

_KEPT = frozenset({str, int, bool})
_DROPPED = frozenset({"HTTP_TRANSFER_ENCODING", "wsgi.input_terminated", "CONTENT_LENGTH"})
_VARIABLES = "flask_asyncroute.view_args"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_tagged = TaggedJSONSerializer()


def note_request(current: Request) -> None:
    """Note of a request to an async route, before any hook of the app runs, what hooks may change.

    A server that ends the input by itself says so, and Werkzeug then takes any end for the end of the body. Without that
    it notices a form that is cut short, whoever parses it.
    """
    if current.content_length is not None:
        current.environ.pop("wsgi.input_terminated", None)
    if current_app.url_value_preprocessors and current.view_args:
        current.environ[_VARIABLES] = dict(current.view_args)


def guard(current: Request, max_body: int) -> None:
    """Have whatever reads the body from here on, such as an identity loader, get no more than ``max_body`` and all of it.

    :raises BodyTooLarge: where more is announced.
    """
    announced = current.content_length
    environ = current.environ
    if announced is not None:
        check_announced(announced, max_body)
        environ.pop("wsgi.input_terminated", None)
    elif "HTTP_TRANSFER_ENCODING" in environ:
        environ["wsgi.input"] = LimitedInput(environ["wsgi.input"], max_body)


def give_back(current: Request, captured: Snapshot, body: Body | None) -> None:
    """Let functions of the app read the body of a request that was captured, as if nobody had."""
    current.__dict__["stream"] = io.BytesIO(captured.body or b"") if body is None else body.open()


def plain_environ(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is to keep of a request's environ: its plain values, without those that tell of its body."""
    return {key: value for key, value in environ.items() if type(value) in _KEPT and key not in _DROPPED}


def capture(
    current: Request, arguments: Mapping[str, Any], max_body: int, drop: frozenset[str]
) -> tuple[Snapshot, Body | None]:
    """Take from the present request what its task will need.

    :param arguments: what the view was called with; URL variables are matched again later, the rest must be JSON.
    :param max_body: bytes.
    :param drop: lower-case names of headers and cookies that must not be stored.
    :raises RequestRefused: for a body that is too large or incomplete, or a session or argument that cannot be stored.
    """
    environ = plain_environ(current.environ)
    if drop:
        _drop_names(environ, drop)
    body = None
    if current.content_length or "HTTP_TRANSFER_ENCODING" in current.environ:
        body = _capture_body(current, environ, max_body)
    try:
        matched = _matched_again(current, arguments)
        names = tuple(name for name in arguments if name in matched)
        injected = {name: _json_argument(name, arguments[name]) for name in arguments if name not in names}
        small = None
        held = _capture_session()
        if body is not None and body.size <= SMALL:
            small = body.open().read()
            body.close()
            body = None
        return Snapshot(environ=environ, body=small, session=held, url_names=names, injected=injected), body
    except BaseException:
        if body is not None:
            body.close()
        raise


def _capture_body(current: Request, environ: dict[str, Any], limit: int) -> Body:
    announced = current.content_length
    check_announced(announced, limit)
    try:
        cached = getattr(current, "_cached_data", None)
        # Once a form was parsed, get_data() caches nothing at all.
        was_parsed = "form" in current.__dict__ and not cached
        if was_parsed and current.mimetype in _FORMS:
            content_type, body = form_body(current.mimetype, current.form, current.files)
            if current.mimetype == "multipart/form-data":
                environ["CONTENT_TYPE"] = content_type
            if announced is None:
                # Written anew it may be a little longer than it was; what was announced is in bounds.
                check_announced(body.size, limit)
            return body
        if cached is not None:
            check_announced(len(cached), limit)
            check_complete(len(cached), announced)
            return Body([cached])
        stream = current.stream
        if _is_used_up(stream, announced):
            raise CannotStart(
                "The app read the body of this request and kept nothing of it. Let it read request.form, json or get_data(), "
                "not request.stream or get_data(cache=False)."
            )
        return read_body(stream, announced, limit)
    except HTTPException as error:
        raise body_refusal(current, error) from None
    except OSError as error:
        logger.error("A request body could not be set aside: %s: %s", type(error).__name__, error)
        raise StoreUnavailable("The body cannot be kept at the moment. Try again.", retry_after=5) from error


def _is_used_up(stream: Any, announced: int | None) -> bool:
    # By type: their bases are abstract, which makes isinstance() many times slower.
    if type(stream) is LimitedInput:
        return bool(stream.arrived)
    return type(stream) is LimitedStream and bool(announced) and bool(stream.is_exhausted)


def body_refusal(current: Request, error: HTTPException) -> RequestRefused | HTTPException:
    """Return the refusal for what Werkzeug raised while the body was read; ``error`` itself where that was not about it."""
    if isinstance(error, RequestEntityTooLarge):
        most = current.max_content_length
        told = "MAX_FORM_MEMORY_SIZE or MAX_FORM_PARTS" if most is None else f"{most} bytes, MAX_CONTENT_LENGTH"
        return BodyTooLarge(f"The body is larger than this app takes ({told}).")
    if isinstance(error, ClientDisconnected):
        return InvalidRequest("The body was cut short: the client went away. Send it again.")
    return error


def _matched_again(current: Request, arguments: Mapping[str, Any]) -> set[str]:
    """Return which arguments are variables of the URL, just as they will come out of it when it is matched again."""
    # A preprocessor may have changed the variables since, or added some.
    variables = current.environ.get(_VARIABLES, current.view_args) or {}
    return {name for name, value in arguments.items() if name in variables and value is variables[name]}


def _capture_session() -> str | None:
    held = dict(session)
    if not held:
        return None
    try:
        return _tagged.dumps(held)
    except (TypeError, ValueError, RecursionError):
        for key, value in held.items():
            try:
                _tagged.dumps({key: value})
            except (TypeError, ValueError, RecursionError):
                raise CannotStart(
                    f"The session's {key!r} holds a {type(value).__name__}, which cannot be stored with a task. Keep JSON there."
                ) from None
        raise


def _json_argument(name: str, value: Any) -> Any:
    try:
        encoded = msgspec.json.encode(value, enc_hook=_no_json)
        if msgspec.json.decode(encoded) != (list(value) if isinstance(value, tuple) else value):
            raise TypeError
    except (TypeError, ValueError, RecursionError):
        raise CannotStart(
            f"A decorator above the async route passed {name!r} a {type(value).__name__}, which cannot be stored with a task. "
            "Let it pass JSON, or load the object in a before_task function."
        ) from None
    return value


def _no_json(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is no JSON")


def _drop_names(environ: dict[str, Any], names: frozenset[str]) -> None:
    for name in names:
        environ.pop("HTTP_" + name.upper().replace("-", "_"), None)
    cookies = environ.get("HTTP_COOKIE")
    if cookies is not None:
        # As it came, so that what is kept reads as it did: Werkzeug too splits at each semicolon, quoted or not.
        kept = [cookie for cookie in cookies.split(";") if cookie.partition("=")[0].strip().lower() not in names]
        if kept:
            environ["HTTP_COOKIE"] = ";".join(kept)
        else:
            del environ["HTTP_COOKIE"]
