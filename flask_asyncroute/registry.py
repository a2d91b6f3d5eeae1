"""Which endpoints of an app are async routes, and with what options: recorded by the decorators, resolved at first use."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import flask
from flask import Flask
from werkzeug.sansio.response import Response

from .errors import ConfigurationError
from .options import RouteOptions, resolve
from .typing import View

MARK = "__asyncroute__"


@dataclass(frozen=True, slots=True)
class Declaration:
    """One decorated view: the plain function below the decorator and the options as they were given."""

    view: View
    given: Mapping[str, Any]

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"The async route {self.view.__module__}.{self.view.__qualname__}()"


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint of one app that starts tasks."""

    endpoint: str
    view: View
    options: RouteOptions
    pool: str


def declaration_of(function: Callable[..., Any] | None) -> Declaration | None:
    """Return the declaration of a view function, through whatever decorators are above it."""
    while function is not None:
        found = function.__dict__.get(MARK) if hasattr(function, "__dict__") else None
        if isinstance(found, Declaration):
            return found
        function = getattr(function, "__wrapped__", None)
    return None


def check_variables(label: str, variables: Iterable[str], arguments: Mapping[str, Any]) -> None:
    """Refuse an argument that the URL gives too."""
    for name in variables:
        if name in arguments:
            raise ConfigurationError(
                f"{label}: {name!r} is both a variable of its URL and in arguments={{…}}; rename one."
            )


def check_view(view: View, given: Mapping[str, Any]) -> None:
    """Refuse what can be seen at decoration not to work.

    :raises ConfigurationError: for a method of a class, an annotation ``-> Response``, or arguments without a parameter.
    """
    label = Declaration(view, given).label
    owner = view.__qualname__.rpartition(".")[0]
    if owner and not owner.endswith("<locals>"):
        raise ConfigurationError(
            f"{label} is a method of a class. Put decorators = [async_routes.task()] into the class, a flask.views.View, instead."
        )
    annotation = (
        inspect.unwrap(view).__annotations__.get("return") if hasattr(inspect.unwrap(view), "__annotations__") else None
    )
    is_response = isinstance(annotation, type) and issubclass(annotation, Response)
    if is_response or (isinstance(annotation, str) and annotation.strip("\"'").rpartition(".")[2] == "Response"):
        raise ConfigurationError(
            f"{label} is annotated to return a Response. An async route returns data; the response is written for it."
        )
    parameters = inspect.signature(view).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        for name in given.get("arguments", ()):
            if name not in names:
                raise ConfigurationError(f"{label}: arguments={{…}} has {name!r}, but the view has no such parameter.")


def resolve_routes(
    app: Flask, declared: Iterable[Declaration], defaults: Mapping[str, Any], executor: str | None = None
) -> dict[str, Route]:
    """Find every async route of ``app`` and complete its options.

    :param declared: all that :meth:`AsyncRoute.task` made; only to find those that are out of place.
    :param executor: used by all routes, whatever their options say.
    :raises ConfigurationError: naming the route and what is wrong.
    """
    routes: dict[str, Route] = {}
    for endpoint, function in app.view_functions.items():
        declaration = declaration_of(function)
        if declaration is None:
            continue
        given = declaration.given if executor is None else {**declaration.given, "executor": executor}
        _refuse_async_methods(app, declaration.label, function)
        options = resolve(given, defaults, declaration.label)
        _refuse_unserved(declaration.label, options)
        for rule in app.url_map.iter_rules(endpoint):
            check_variables(declaration.label, rule.arguments, options.arguments)
        routes[endpoint] = Route(
            endpoint, declaration.view, options, f"pool {options.pool}" if options.pool else f"endpoint {endpoint}"
        )
    _refuse_misplaced(app, declared)
    _refuse_different_pools(routes)
    return routes


def _refuse_async_methods(app: Flask, label: str, function: Callable[..., Any]) -> None:
    """Refuse a class-based view with async methods where Flask, which calls these itself, cannot."""
    view_class = getattr(function, "view_class", None)
    if view_class is None or type(app).async_to_sync is not flask.Flask.async_to_sync or find_spec("asgiref"):
        return
    for name in ("dispatch_request", *map(str.lower, getattr(view_class, "methods", None) or ())):
        if inspect.iscoroutinefunction(getattr(view_class, name, None)):
            raise ConfigurationError(
                f"{label}: {view_class.__name__}.{name}() is async, and Flask runs such methods with asgiref alone. Install "
                "flask[async], or make it a plain method, or a view function of its own: those need nothing."
            )


def _refuse_unserved(label: str, options: RouteOptions) -> None:
    if options.executor == "process" and platform.system() != "Linux":
        raise ConfigurationError(f'{label}: executor="process" works on Linux alone; use "thread" here.')
    if options.executor == "celery":
        raise ConfigurationError(
            f'{label}: executor="celery" is not served by this version; use "thread" or "process".'
        )


def _refuse_misplaced(app: Flask, declared: Iterable[Declaration]) -> None:
    plain = {id(function): endpoint for endpoint, function in app.view_functions.items()}
    placed = {id(declaration_of(function)) for function in app.view_functions.values()}
    for declaration in declared:
        if id(declaration) in placed:
            continue
        # Also through decorators between the two.
        view: Callable[..., Any] | None = declaration.view
        while view is not None and id(view) not in plain:
            view = getattr(view, "__wrapped__", None)
        if view is not None:
            endpoint = plain[id(view)]
            raise ConfigurationError(
                f"{declaration.label}: task() stands above the route decorator of endpoint {endpoint!r}, which registered the "
                "plain view. Put the route decorator above @task()."
            )


def _refuse_different_pools(routes: Mapping[str, Route]) -> None:
    first: dict[str, Route] = {}
    for route in routes.values():
        if route.options.pool is None:
            continue
        other = first.setdefault(route.pool, route)
        for name in ("executor", "min_workers", "max_workers", "queue_size", "interrupt_after"):
            mine, others = getattr(route.options, name), getattr(other.options, name)
            if mine != others:
                raise ConfigurationError(
                    f"The endpoints {other.endpoint!r} and {route.endpoint!r} share the pool {route.options.pool!r} but differ in "
                    f"{name}: {others!r} and {mine!r}. Give both the same, or two pools."
                )
