"""The decorator that replaces a view with a function that starts a task."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from flask import Request, Response, current_app, has_request_context, request
from werkzeug.sansio.response import Response as SansIOResponse

from .config import task_path
from .current_task import is_in_task
from .errors import (
    CannotStart,
    ConfigurationError,
    MethodNotAllowed,
    NotAcceptable,
    RequestRefused,
    StoreUnavailable,
)
from .executors import interruption
from .executors.registry import IMMEDIATE, kind_of
from .http import pages
from .http.params import preferred_wait
from .http.responses import NO_STORE, negotiate, render, task_answer
from .http.waits import held, longest
from .options import checked
from .routes import MARK, Declaration, Route, Start, View, check_view, declaration_of
from .runtime import current_runtime
from .task import AsyncRouteTask, now_us
from .workers.runner import Runner

logger = logging.getLogger("flask_asyncroute")

_NEVER = {"HEAD", "TRACE"}
"""Methods that get 405. OPTIONS also starts no task, but gets Flask's response."""
_START = "_asyncroute_start"
"""Attribute that marks a request that has called an async route; a second call fails."""


def declare(view: View, options: dict[str, Any]) -> Declaration:
    """Return the declaration of ``view`` as an async route.

    :func:`inspect.unwrap` of the declaration's ``start`` returns ``view``.

    :raises ConfigurationError: if the options or the view are invalid.
    """
    if not callable(view) or not hasattr(view, "__qualname__") or isinstance(view, type):
        raise ConfigurationError(f"task() decorates a view function, not {view!r}.")
    if declaration_of(view) is not None:
        raise ConfigurationError(
            f"{view.__qualname__}() is already an async route. For several URLs, put several route "
            "decorators above one @task()."
        )
    given = checked(options)
    register_task(given.get("executor", IMMEDIATE.name))

    @functools.wraps(view)
    def start(*passed: Any, **arguments: Any) -> Any:
        current = _request_of_call(view)
        if current is None:
            return view(*passed, **arguments)
        try:
            return _start(view, current, passed, arguments)
        except RequestRefused as refusal:
            response = pages.refuse(refusal, current)
            if isinstance(refusal, MethodNotAllowed):
                response.headers["Allow"] = _allowed(current)
            return response

    declaration = Declaration(view, given, start)
    check_view(declaration)
    start.__dict__[MARK] = declaration
    interruption.allow_within(start)
    return declaration


def register_task(executor: str | Executor) -> None:
    """Make Celery workers that import the app know the task of this package, if they need it."""
    if kind_of(executor).runs_elsewhere:
        from . import celery_task  # noqa: F401 - imports Celery


def view_function_of(declaration: Declaration) -> Start:
    """Apply the route's ``decorators`` to the function that starts tasks; the last is outermost.

    :raises ConfigurationError: if a decorator does not use :func:`functools.wraps`.
    """
    function = declaration.start
    for decorator in declaration.given.get("decorators", ()):
        function = decorator(function)
        if not callable(function) or declaration_of(function) is not declaration:
            raise ConfigurationError(
                f"{declaration.label}: {decorator!r} in decorators=[…] returned {function!r}. "
                "Decorators must use functools.wraps, which sets __wrapped__."
            )
    if function is declaration.start:
        return function
    view = declaration.view

    @functools.wraps(function)
    def call(*passed: Any, **arguments: Any) -> Any:
        # Decorators do not run in a task, because they can need the client's request.
        if _request_of_call(view) is None:
            return view(*passed, **arguments)
        return current_app.ensure_sync(function)(*passed, **arguments)

    interruption.allow_within(call)
    return call


def is_bare(view_function: Callable[..., Any]) -> bool:
    """Return whether ``@task()`` is directly below the route decorator of a registered view."""
    declaration = declaration_of(view_function)
    return declaration is not None and declaration.start is view_function


def _request_of_call(view: View) -> Request | None:
    """Return the request that calls an async route; None in a task, where calls run ``view``."""
    current: Request | None = None
    if has_request_context():
        current = request._get_current_object()  # type: ignore[attr-defined]
    if is_in_task(current):
        return None
    if current is None:
        raise _call_error(view, "was called outside a request and outside a task")
    return current


def _call_error(view: View, reason: str, remedy: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"{view.__qualname__}() is an async route and {reason}. To call the plain function, use "
        f"inspect.unwrap({view.__name__})(…).{remedy}"
    )


def _start(
    view: View, current: Request, passed: tuple[Any, ...], arguments: dict[str, Any]
) -> Response:
    runtime = current_runtime()
    if not runtime.is_prepared:
        runtime.prepare()
    route = runtime.routes.get(current.endpoint or "")
    if route is None or route.view is not view:
        raise _call_error(
            view,
            f"was called in a request to the endpoint {current.endpoint!r}, but was not this "
            "endpoint's view at the app's first request",
            " To start a task, register the route before that request, and use functools.wraps, "
            "which sets __wrapped__, in each decorator above it.",
        )
    if current.method == "OPTIONS":
        return _default_options_response(current)
    if runtime.is_child:
        raise CannotStart(
            "A child process cannot start tasks, because it exits after its own task. Send a "
            "request to the server instead."
        )
    if current.method in _NEVER:
        raise MethodNotAllowed(f"{current.method} never starts a task; use {_allowed(current)}.")
    if passed:
        raise CannotStart(
            "A decorator above the async route passed a positional argument. Pass it by keyword."
        )
    runner = runtime.runner
    is_page = pages.redirects_form(current, runner.config)
    try:
        media_type = negotiate(current.environ.get("HTTP_ACCEPT"), route.options.response_types)
    except NotAcceptable:
        if route.options.respond is None:
            raise
        media_type = route.options.response_types[0]  # respond can return other media types
    this = object()
    # While the task is started, the app can call the view again, even on other threads.
    if vars(current).setdefault(_START, this) is not this:
        raise _call_error(view, "was called twice in one request; a request starts only one task")
    try:
        task, is_replay = runner.dispatcher.start(route, current, arguments)
    except Exception:
        delattr(current, _START)  # nothing was stored, so a decorator may call again
        raise
    config = runner.config
    if kind_of(route.options.executor).runs_inline:
        task = runner.store.get(task.id) or task
    if route.options.respond is not None:
        response = _own_answer(route, runner, current, task)
        if response is not None:
            return _marked(response, is_replay)
    if is_page:
        return _marked(pages.redirect_to_task(runner, current, task), is_replay)
    status = 200 if is_replay and task.is_completed else config.accepted_status
    headers = []
    if "get" in config.operations:
        headers.append(("Location", task_path(config, current.root_path, task.id)))
    if is_replay:
        headers.append(("Idempotency-Replayed", "true"))
    seconds = preferred_wait(current, config.max_wait)
    if seconds is None:
        return task_answer(task, runner.dispatcher.run_times, media_type, status, headers)
    seconds = longest(current.environ, seconds)
    return _answer_later(runner, task, seconds, media_type, status, headers)


def _marked(response: Response, is_replay: bool) -> Response:
    if is_replay:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _own_answer(
    route: Route, runner: Runner, current: Request, task: AsyncRouteTask
) -> Response | None:
    """Return the response of the route's ``respond`` function; None if it raises an exception."""
    assert route.options.respond is not None
    try:
        value = route.options.respond(task)
        response = current_app.make_response(value)
    except Exception:
        logger.exception(
            "The respond function of endpoint %s raised an exception, so the client got the task "
            "object of task %s.",
            route.endpoint, task.id,
        )  # fmt: skip
        return None
    body, *rest = value if isinstance(value, tuple) else (value,)
    has_status = isinstance(body, SansIOResponse) or (rest and isinstance(rest[0], (int, str)))
    if not has_status:
        response.status_code = 202
    if "get" in runner.config.operations:
        path = task_path(runner.config, current.root_path, task.id)
        response.headers.setdefault("Location", path)
        # The route may have a Location of its own, but a client must find the task (RFC 8631).
        response.headers.add("Link", f'<{path}>; rel="status"')
    if not task.is_completed:
        seconds = runner.dispatcher.run_times.rest(task, now_us())
        response.headers.setdefault("Retry-After", str(seconds))
    response.headers.setdefault("Cache-Control", NO_STORE)
    return response


def _answer_later(
    runner: Runner,
    task: AsyncRouteTask,
    seconds: float,
    media_type: str,
    status: int,
    headers: list[tuple[str, str]],
) -> Response:
    """Return a response that is sent when the task ends, or after ``seconds``."""

    def answer(found: AsyncRouteTask | None, is_applied: bool) -> Response:
        now = found or task
        applied = [("Preference-Applied", f"wait={seconds:.0f}")] if is_applied else []
        return task_answer(
            now, runner.dispatcher.run_times, media_type, 200 if now.is_completed else status,
            [*headers, *applied],
        )  # fmt: skip

    def failed(error: Exception) -> Response:
        # The task was created, so the client must get its id.
        if not isinstance(error, StoreUnavailable):
            logger.error(
                "The request that started task %s could not wait for its end. The task continues.",
                task.id,
                exc_info=error,
            )
        return answer(task, False)

    announced = render(b"", media_type, "", status, headers)
    return held(runner, task, seconds, lambda found: found.is_completed, announced, answer, failed)


def _default_options_response(current: Request) -> Response:
    """Return Flask's default response to OPTIONS. Do not call Flask's own method: its parameters
    changed in Flask 3.2.
    """
    adapter = current_app.create_url_adapter(current)
    assert adapter is not None, "a request always has a URL adapter"
    response = current_app.response_class()
    response.allow.update(adapter.allowed_methods())
    return response


def _allowed(current: Request) -> str:
    rule = current.url_rule
    methods = (rule.methods or set()) - _NEVER if rule is not None else set()
    return ", ".join(sorted(methods))
