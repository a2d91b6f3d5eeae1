"""The one room that touches Flask's contexts: a request captured and rebuilt, an app context, `current_task`.

`dispatcher` captures in the request, `worker` rebuilds wherever the task runs. Whatever pushes a context pops it here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import msgspec
from flask import Request, current_app, has_app_context, session
from flask.ctx import RequestContext
from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SecureCookieSession
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.local import LocalProxy
from werkzeug.wsgi import LimitedStream

from .current import CurrentTask
from .errors import (
    BodyTooLarge,
    CannotStart,
    InvalidRequest,
    NoCurrentTask,
    RequestRefused,
    SessionIsReadOnly,
    StoreUnavailable,
)
from .execution import Execution
from .snapshot import (
    SMALL,
    Body,
    LimitedInput,
    Snapshot,
    check_announced,
    check_complete,
    empty,
    form_body,
    read_body,
)

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")

_KEPT = frozenset({str, int, bool})
_DROPPED = frozenset({"HTTP_TRANSFER_ENCODING", "wsgi.input_terminated", "CONTENT_LENGTH"})
_VARIABLES = "flask_asyncroute.view_args"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_tagged = TaggedJSONSerializer()
_running: ContextVar[CurrentTask] = ContextVar("flask_asyncroute.current_task")


def _current() -> CurrentTask:
    try:
        return _running.get()
    except LookupError:
        raise NoCurrentTask(
            "current_task was used where no task runs. It is there inside a view under task() or route() while its task runs; "
            "in tests use flask_asyncroute.testing.fake_task()."
        ) from None


current_task = cast(CurrentTask, LocalProxy(_current))
"""The task that runs here (a :class:`~flask_asyncroute.current.CurrentTask`); elsewhere any use raises `NoCurrentTask`."""


@contextmanager
def running(execution: Execution) -> Iterator[CurrentTask]:
    """Make ``execution`` the current task of this context."""
    task = CurrentTask(execution)
    token = _running.set(task)
    try:
        yield task
    finally:
        _running.reset(token)


def apart(function: Callable[[], T]) -> T:
    """Call ``function`` in an empty context: no request, no `g`, no current task of whoever calls."""
    return Context().run(function)


@contextmanager
def in_app(app: Flask) -> Iterator[None]:
    """Push an app context, where the app's own is not there already."""
    if has_app_context() and current_app._get_current_object() is app:  # type: ignore[attr-defined]
        yield
        return
    with app.app_context():
        yield


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


def capture(
    current: Request, arguments: Mapping[str, Any], max_body: int, drop: frozenset[str]
) -> tuple[Snapshot, Body | None]:
    """Take from the present request what its task will need.

    :param arguments: what the view was called with; URL variables are matched again later, the rest must be JSON.
    :param max_body: bytes.
    :param drop: lower-case names of headers and cookies that must not be stored.
    :raises RequestRefused: for a body that is too large or incomplete, or a session or argument that cannot be stored.
    """
    environ = {key: value for key, value in current.environ.items() if type(value) in _KEPT and key not in _DROPPED}
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


def _is_used_up(stream: IO[bytes], announced: int | None) -> bool:
    if isinstance(stream, LimitedInput):
        return stream.arrived > 0
    return isinstance(stream, LimitedStream) and bool(announced) and stream.is_exhausted


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


class TaskSession(SecureCookieSession):
    """The session as it was at the start; a write raises."""

    def __init__(self, initial: Mapping[str, Any]) -> None:
        super().__init__()
        dict.update(self, initial)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise SessionIsReadOnly(
            "A task cannot write to session: its response was sent when the task started. Return the value, or keep it in "
            "async_routes.state."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@contextmanager
def rebuilt(app: Flask, snapshot: Snapshot, body: Body | None) -> Iterator[dict[str, Any]]:
    """Push the request of ``snapshot`` as if it were here; yield the arguments of the view's call.

    Teardown functions run at the end, `before_request` and `after_request` functions do not.

    :raises HTTPException: where the app no longer has the URL.
    """
    environ: dict[str, Any] = {
        **snapshot.environ,
        "wsgi.version": (1, 0),
        "wsgi.input": empty() if body is None else body.open(),
        "wsgi.errors": sys.stderr,
    }
    if body is not None:
        environ["CONTENT_LENGTH"] = str(body.size)
    held = TaskSession({} if snapshot.session is None else _tagged.loads(snapshot.session))
    with RequestContext(app, environ, session=held) as context:
        if context.request.routing_exception is not None:
            raise context.request.routing_exception
        matched = context.request.view_args or {}
        variables = {name: matched[name] for name in snapshot.url_names}
        context.request.view_args = variables
        yield {**variables, **snapshot.injected}
