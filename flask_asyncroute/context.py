"""The one room that pushes Flask's contexts: a rebuilt request, an app context, `current_task`.

`worker` has a request rebuilt wherever its task runs. Whatever pushes a context pops it here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flask import current_app, has_app_context, request
from flask.ctx import RequestContext
from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SecureCookieSession
from werkzeug.local import LocalProxy

from .current import CurrentTask
from .errors import NoCurrentTask, SessionIsReadOnly
from .execution import Execution
from .snapshot import Body, Snapshot, empty

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

T = TypeVar("T")

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
def running(execution: Execution, json_default: Callable[[Any], Any]) -> Iterator[CurrentTask]:
    """Make ``execution`` the current task of this context.

    :param json_default: makes plain values of what JSON does not have; see `runtime.json_default`.
    """
    task = CurrentTask(execution, json_default)
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


@contextmanager
def again(app: Flask, environ: dict[str, Any]) -> Iterator[None]:
    """Push a request as it was once more, without its body, to ask who makes it.

    :param environ: see `capture.plain_environ`.
    """
    with app.request_context({**environ, "wsgi.input": empty(), "wsgi.errors": sys.stderr}):
        yield


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
    context = RequestContext(app, environ, session=held)
    context.push()
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
        _leave(context, ended)


def process_url(arguments: Mapping[str, Any]) -> None:
    """Call the app's `url_value_preprocessor` functions on the rebuilt request, as Flask does before a view.

    They take variables out of the URL and leave them where `url_defaults` functions look for them; without that
    :func:`flask.url_for` would not work. ``view_args`` are then as they were there.

    :param arguments: of the view's call, as :func:`rebuilt` gave them.
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


def _leave(context: RequestContext, ended: BaseException | None) -> None:
    """Pop a rebuilt request. What its teardown functions raise is logged: how the task ended is decided by then."""
    try:
        context.pop(ended)
    except (Exception, SystemExit):
        task_id = _current().id
        logger.exception(
            "A teardown function raised after task %s. Its outcome stands.", task_id, extra={"task_id": task_id}
        )
