"""The decorator: what stands in a view's place, and answers each request with a new task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flask import Request, Response, request

from .errors import CannotStart, ConfigurationError, MethodNotAllowed, RequestRefused, StoreUnavailable
from .http.answers import task_answer
from .http.negotiation import negotiate
from .http.problems import problem_response
from .http.waiting import hold, preferred_wait
from .locations import task_path
from .options import checked
from .registry import MARK, Declaration, check_view, declaration_of
from .runtime import current_runtime
from .typing import Start, View


def declare(view: View, options: dict[str, Any]) -> tuple[Start, Declaration]:
    """Return the function that starts ``view`` as a task, and what it declares.

    The view stays reachable as ``__wrapped__``, so that :func:`inspect.unwrap` gives it to a unit test.

    :raises ConfigurationError: for options or a view that cannot work.
    """
    if not callable(view) or not hasattr(view, "__qualname__") or isinstance(view, type):
        raise ConfigurationError(f"task() decorates a view function, not {view!r}.")
    if declaration_of(view) is not None:
        raise ConfigurationError(
            f"{view.__qualname__}() is an async route already. Put several route decorators above one @task()."
        )
    declaration = Declaration(view, checked(options))
    check_view(view, declaration.given)

    @functools.wraps(view)
    def start(*passed: Any, **arguments: Any) -> Response:
        try:
            if passed:
                raise CannotStart(
                    "A decorator above the async route passed a value by position; let it pass it by keyword."
                )
            return _start(arguments)
        except RequestRefused as refusal:
            response = problem_response(refusal, request.headers.get("Accept"), request.path)
            if isinstance(refusal, MethodNotAllowed):
                response.headers["Allow"] = _allowed()
            return response

    start.__dict__[MARK] = declaration
    return start, declaration


def is_bare(view_function: Callable[..., Any]) -> bool:
    """Return whether a view function is what :func:`declare` made, with no decorator above it."""
    return getattr(view_function, "__code__", None) is _START_CODE


_START_CODE = next(constant for constant in declare.__code__.co_consts if getattr(constant, "co_name", None) == "start")


def _start(arguments: dict[str, Any]) -> Response:
    current: Request = request._get_current_object()  # type: ignore[attr-defined]
    runtime = current_runtime()
    runner = runtime.runner
    route = runtime.routes.get(current.endpoint or "")
    if route is None:
        raise ConfigurationError(
            f"The endpoint {current.endpoint!r} became an async route after the app's first use (register it before), or "
            "a decorator above it hides it: decorators need functools.wraps, which sets __wrapped__."
        )
    if runtime.is_child:
        raise CannotStart(
            "A child process starts no tasks: it ends with its own, and these with it. Send a request to the server."
        )
    if current.method == "HEAD":
        raise MethodNotAllowed(f"HEAD never starts a task; use {_allowed()}.")
    media_type = negotiate(current.environ.get("HTTP_ACCEPT"), route.options.response_types)
    task = runner.dispatcher.start(route, current, arguments)
    config = runner.config
    # A new task is given as it was stored: one that has ended is that of an earlier request with the same key.
    status = 200 if task.state.is_terminal else config.accepted_status
    if route.options.executor == "immediate":
        task = runner.store.get(task.id) or task
    headers = [("Location", task_path(config, current.root_path, task.id))] if "get" in config.operations else []
    if "HTTP_PREFER" in current.environ:
        seconds = preferred_wait(current, config.max_wait)
        if seconds is not None:
            try:
                held, is_applied = hold(runner, task, seconds, lambda found: found.state.is_terminal)
            except StoreUnavailable:
                held, is_applied = None, False  # it has started, and its client is to know of it
            task = held or task
            status = 200 if task.state.is_terminal else status
            if is_applied:
                headers.append(("Preference-Applied", f"wait={seconds:.0f}"))
    return task_answer(task, runner.dispatcher.pace, media_type, status, headers)


def _allowed() -> str:
    rule = request.url_rule
    methods = (rule.methods or set()) - {"HEAD"} if rule is not None else set()
    return ", ".join(sorted(methods))
