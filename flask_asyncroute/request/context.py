"""Push Flask's app contexts and request contexts. No other module pushes them."""

from __future__ import annotations

import io
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Any, TypeVar, cast

from flask import Flask, Request, ctx, current_app, has_app_context, request
from flask.ctx import AppContext
from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SecureCookieSession

from ..current_task import REBUILT, current_task
from ..snapshot import Body, Snapshot

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")

_tagged = TaggedJSONSerializer()
_warned: weakref.WeakKeyDictionary[Flask, set[tuple[str | None, str]]] = weakref.WeakKeyDictionary()
"""For each app, the endpoint and the subject of each warning that was already logged."""
MOST_WARNINGS = 1000


@contextmanager
def in_app(app: Flask) -> Iterator[None]:
    """Within the block, an app context of ``app`` is active. A new one is pushed only if needed."""
    if has_app_context() and current_app._get_current_object() is app:  # type: ignore[attr-defined]
        yield
        return
    with app.app_context():
        yield


@contextmanager
def again(app: Flask, environ: dict[str, Any]) -> Iterator[None]:
    """Within the block, the context of an earlier request is active. The request has no body."""
    # It serves to identify the caller again.
    with app.request_context({**environ, "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr}):
        yield


def call_in_request(
    app: Flask, environ: dict[str, Any], function: Callable[[Request, dict[str, Any]], T]
) -> T:
    """Call ``function`` in the context of a request that no client has sent: the app starts a task
    from its own code. Pass it the request and the arguments of the view. Of the app's hooks, only
    the `url_value_preprocessor` functions run.

    The context is not popped, because the app's teardown functions could end the caller's database
    transaction. It is dropped with the copied `contextvars.Context`.

    :raises HTTPException: if the URL does not match a rule of the app.
    """

    def call() -> T:
        current, arguments = _push(app, dict(environ))
        if app.url_value_preprocessors:
            # In an own app context, because the functions store values in `g`.
            matched, left = Context().run(_processed_arguments, app, environ)
            arguments = {
                name: arguments.get(name) if value is matched.get(name) else value
                for name, value in left.items()
            }
        return function(current, arguments)

    return copy_context().run(call)


def _push(app: Flask, environ: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
    # An empty session: opening one could access the app's session database.
    context = _with_session(app, environ, SecureCookieSession())
    context.push()
    current: Request = context.request
    if current.routing_exception is not None:
        raise current.routing_exception
    return current, dict(current.view_args or {})


def _processed_arguments(
    app: Flask, environ: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the URL variables before and after the app's `url_value_preprocessor` functions, which
    can remove and replace some.
    """
    _, matched = _push(app, {**environ, "wsgi.input": io.BytesIO()})
    process_url({})
    return matched, dict(request.view_args or {})


@contextmanager
def rebuilt(app: Flask, snapshot: Snapshot, body: Body | None) -> Iterator[dict[str, Any]]:
    """Within the block, the request context of a stored request is active.

    The block receives the arguments of the view. Teardown functions run at its end.
    `before_request` and `after_request` functions do not run.

    :raises HTTPException: if the app no longer has the URL.
    """
    environ: dict[str, Any] = {
        **snapshot.environ,
        "wsgi.version": (1, 0),
        "wsgi.input": io.BytesIO() if body is None else body.open(),
        "wsgi.errors": sys.stderr,
    }
    if body is not None:
        environ["CONTENT_LENGTH"] = str(body.size)
    # Do not use the app's session interface: it could open the user's live session.
    session = SecureCookieSession(_load_session(snapshot.session))
    context = _with_session(app, environ, session)
    context.push()
    setattr(context.request, REBUILT, True)
    ended: BaseException | None = None
    try:
        if context.request.routing_exception is not None:
            raise context.request.routing_exception
        matched = dict(context.request.view_args or {})
        yield {**{name: matched[name] for name in snapshot.url_names}, **snapshot.injected}
    except BaseException as error:
        ended = error
        raise
    finally:
        try:
            _warn_of_writes(session, _load_session(snapshot.session))
            # Flask has no public way to detect functions of after_this_request().
            if getattr(context, "_after_request_functions", None):
                _warn_once(
                    "after_this_request",
                    "A task of endpoint %s called after_this_request(), which has no effect in a "
                    "task, because it sends no response.",
                    request.endpoint,
                )
        finally:
            _pop(context, ended)


def _with_session(app: Flask, environ: dict[str, Any], session: SecureCookieSession) -> Any:
    # Without a given session, Flask would open another session.
    # Flask.request_context() takes no session. Creating a second context from its request would
    # bind the URL map twice.
    rebuilt_request = app.request_class(environ)
    rebuilt_request.json_module = app.json
    # Flask 3.2 merged RequestContext into AppContext, which takes no environ.
    build: Any = vars(ctx).get("RequestContext", AppContext)
    leading = (app,) if build is AppContext else (app, environ)
    return build(*leading, request=rebuilt_request, session=session)


def _load_session(data: str | None) -> dict[str, Any]:
    return {} if data is None else _tagged.loads(data)


def _warn_of_writes(session: Mapping[Any, Any], saved: Mapping[Any, Any]) -> None:
    # Each combination of route and keys is logged once per process.
    names = [
        name
        for name in {**saved, **session}
        if _stored_form(session, name) != _stored_form(saved, name)
    ]
    if not names:
        return
    keys = ", ".join(sorted(map(repr, names)))
    _warn_once(
        keys,
        "A task of endpoint %s wrote the session keys %s. The changes are lost when the task ends. "
        "Return the values, or store them in async_routes.state.",
        request.endpoint, keys,
    )  # fmt: skip


def _warn_once(subject: str, message: str, *arguments: Any) -> None:
    app = cast(Flask, current_app._get_current_object())  # type: ignore[attr-defined]
    warned = _warned.setdefault(app, set())
    if (request.endpoint, subject) not in warned and len(warned) < MOST_WARNINGS:
        warned.add((request.endpoint, subject))
        logger.warning(message, *arguments)


def _stored_form(values: Mapping[Any, Any], name: Any) -> str | None:
    # Stored forms are compared, because comparing the values themselves fails for arrays.
    if name not in values:
        return None
    try:
        return _tagged.dumps(values[name])
    except Exception:  # dumps() calls methods of the value, which can fail
        return f"a {type(values[name])} that cannot be stored"


def process_url(arguments: Mapping[str, Any]) -> None:
    """Call the app's `url_value_preprocessor` functions, as Flask does before a view.

    The functions can store values for `url_for`. If they change `request.view_args`, the values in
    ``arguments`` are restored.
    """
    processors = current_app.url_value_preprocessors
    if not processors:
        return
    for name in (None, *reversed(request.blueprints)):
        for process in processors.get(name, ()):
            process(request.endpoint, request.view_args)
    values = request.view_args
    if values is not None:
        values.update((name, value) for name, value in arguments.items() if name in values)


def _pop(context: Any, ended: BaseException | None) -> None:
    try:
        context.pop(ended)
    except (Exception, SystemExit, BaseExceptionGroup):
        # The app's teardown function raised an exception, in Flask 3.2 as a group.
        task_id = current_task.id
        logger.exception(
            "A teardown function raised an exception after task %s, whose outcome is unchanged.",
            task_id,
            extra={"task_id": task_id},
        )
