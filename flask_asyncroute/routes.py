"""The async routes of an app. Decorators declare them, and the first request resolves them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias

from flask import Flask
from werkzeug.sansio.response import Response as SansIOResponse

from .errors import ConfigurationError
from .executors.registry import check_usable
from .options import RouteOptions, resolve

View: TypeAlias = Callable[..., Any]
Start: TypeAlias = Callable[..., Any]
"""The function that replaces a view. It starts a task; inside a task, it calls the view."""

MARK = "__asyncroute__"
_OF_POOL = (
    "executor", "min_workers", "max_workers", "queue_size", "interrupt_after", "celery"
)  # fmt: skip
AUTHENTICATION = {"flask_login", "flask_httpauth", "flask_jwt_extended", "flask_security"}


@dataclass(frozen=True, slots=True)
class Declaration:
    """A decorated view, its decorator's options, and the function that starts its tasks."""

    view: View
    given: Mapping[str, Any]
    start: Start

    @property
    def label(self) -> str:
        return f"The async route {self.view.__module__}.{self.view.__qualname__}()"


@dataclass(frozen=True, slots=True)
class Route:
    """An endpoint of an app that starts tasks.

    :param pool: the key of the pool (workers and queue) of its tasks. Routes can share a named
        pool.
    """

    endpoint: str
    view: View
    options: RouteOptions
    pool: str


def declaration_of(function: Callable[..., Any] | None) -> Declaration | None:
    """Return the declaration of an async route, even inside other decorators; else None."""
    while function is not None:
        found = function.__dict__.get(MARK) if hasattr(function, "__dict__") else None
        if isinstance(found, Declaration):
            return found
        function = getattr(function, "__wrapped__", None)
    return None


def check_variables(label: str, variables: Iterable[str], arguments: Mapping[str, Any]) -> None:
    for name in variables:
        if name in arguments:
            raise ConfigurationError(
                f"{label}: {name!r} is both a URL variable and in arguments={{…}}; rename one."
            )


def check_view(declaration: Declaration) -> None:
    """Check that a view can be an async route.

    :raises ConfigurationError: if the view is a method, is annotated ``-> Response``, has an
        authentication decorator, or has no parameter for an item of ``arguments``.
    """
    view, label = declaration.view, declaration.label
    owner = view.__qualname__.rpartition(".")[0]
    if owner and not owner.endswith("<locals>"):
        raise ConfigurationError(
            f"{label} is a method. Use a flask.views.View class with "
            "decorators = [async_routes.task()] instead."
        )
    _refuse_authentication_below(view, label)
    annotation = getattr(inspect.unwrap(view), "__annotations__", {}).get("return")
    if isinstance(annotation, str):
        is_response = annotation.strip("\"'").rpartition(".")[2] == "Response"
    else:
        is_response = isinstance(annotation, type) and issubclass(annotation, SansIOResponse)
    if is_response:
        raise ConfigurationError(
            f"{label} is annotated to return a Response. Return data instead; the library creates "
            "the response."
        )
    parameters = inspect.signature(view).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        for name in declaration.given.get("arguments", ()):
            if name not in names:
                raise ConfigurationError(
                    f"{label}: arguments={{…}} has {name!r}, but the view has no such parameter."
                )


def _refuse_authentication_below(view: View, label: str) -> None:
    """Raise if a known authentication decorator is below ``@task()``.

    Such a decorator would run in the task, so unauthenticated clients could start tasks.
    """
    function: Any = view
    while function is not None:
        module = str(getattr(function, "__globals__", {}).get("__name__", ""))
        if module.partition(".")[0] in AUTHENTICATION:
            name = function.__code__.co_qualname.partition(".<locals>")[0].rpartition(".")[2]
            raise ConfigurationError(
                f"{label}: {name} is below the async route, so it would run in the task. Put it "
                f"above @task(), or pass decorators=[{name}] to task() or route()."
            )
        function = getattr(function, "__wrapped__", None)


def resolve_routes(
    app: Flask,
    declared: Iterable[Declaration],
    defaults: Mapping[str, Any],
    executor: str | None = None,
) -> dict[str, Route]:
    """Find every async route of ``app`` and complete its options.

    :param declared: all declarations, to find misplaced decorators.
    :param executor: overrides the executor of all routes.
    :raises ConfigurationError: if a route is misconfigured; the message names it.
    """
    routes: dict[str, Route] = {}
    for endpoint, function in app.view_functions.items():
        declaration = declaration_of(function)
        if declaration is None:
            continue
        label = declaration.label
        given = {**declaration.given, **({} if executor is None else {"executor": executor})}
        _refuse_async_methods(app, label, function)
        options = resolve(given, defaults, label)
        check_usable(label, options.executor)
        for rule in app.url_map.iter_rules(endpoint):
            check_variables(label, rule.arguments, options.arguments)
        pool = f"pool {options.pool}" if options.pool else f"endpoint {endpoint}"
        routes[endpoint] = Route(endpoint, declaration.view, options, pool)
    _refuse_misplaced(app, declared)
    _refuse_different_pools(routes)
    return routes


def _refuse_async_methods(app: Flask, label: str, function: Callable[..., Any]) -> None:
    view_class = getattr(function, "view_class", None)
    can_call = type(app).async_to_sync is not Flask.async_to_sync or find_spec("asgiref")
    if view_class is None or can_call:
        return
    for name in ("dispatch_request", *map(str.lower, getattr(view_class, "methods", None) or ())):
        if inspect.iscoroutinefunction(getattr(view_class, name, None)):
            raise ConfigurationError(
                f"{label}: {view_class.__name__}.{name}() is async, and Flask needs asgiref to run "
                "such methods. Install flask[async], or use a plain method or an async view "
                "function."
            )


def _refuse_misplaced(app: Flask, declared: Iterable[Declaration]) -> None:
    plain = {id(function): endpoint for endpoint, function in app.view_functions.items()}
    placed = {id(declaration_of(function)) for function in app.view_functions.values()}
    for declaration in declared:
        if id(declaration) in placed:
            continue
        # Other decorators can be between task() and the route decorator.
        view: Callable[..., Any] | None = declaration.view
        while view is not None and id(view) not in plain:
            view = getattr(view, "__wrapped__", None)
        if view is not None:
            endpoint = plain[id(view)]
            raise ConfigurationError(
                f"{declaration.label}: task() is above the route decorator of endpoint "
                f"{endpoint!r}, which registered the plain view. Put the route decorator above "
                "@task()."
            )


def _refuse_different_pools(routes: Mapping[str, Route]) -> None:
    first: dict[str, Route] = {}
    for route in routes.values():
        if route.options.pool is None:
            continue
        other = first.setdefault(route.pool, route)
        for name in _OF_POOL:
            mine, others = getattr(route.options, name), getattr(other.options, name)
            if mine != others:
                raise ConfigurationError(
                    f"The endpoints {other.endpoint!r} and {route.endpoint!r} share the pool "
                    f"{route.options.pool!r} but differ in "
                    f"{name}: {others!r} and {mine!r}. Use the same value, or two pools."
                )
