"""Builds the request of a task that the app's own code starts without a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import Flask, Request, has_request_context, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RequestRedirect, Rule

from ..callbacks.validation import DEPTH_HEADER
from ..current_task import is_in_task
from ..errors import ConfigurationError
from ..routes import Route
from ..task import EPOCH
from ..validators import seconds
from . import context

T = TypeVar("T")

_NEVER = {"HEAD", "OPTIONS", "TRACE"}  # methods that start no task


def route_of(routes: Mapping[str, Route], endpoint: str) -> Route:
    """Return the async route of an endpoint.

    :raises ConfigurationError: if the endpoint is not an async route.
    """
    route = routes.get(endpoint)
    if route is None:
        raise ConfigurationError(
            f"submit({endpoint!r}): the app has no async route with this endpoint. The endpoints "
            f"of its async routes are: {', '.join(map(repr, routes)) or 'none'}."
        )
    return route


def start_time(value: Any, now_us: int) -> int | None:
    """Return the ``start_at`` of `submit` in microseconds; None if the task may start now.

    :param now_us: the present time of the store's clock.
    :raises ValueError: for a naive datetime, or for negative seconds.
    :raises TypeError: for another type.
    """
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(
                f"start_at={value!r} has no time zone. Pass an aware datetime, such as "
                "datetime.now(UTC) + timedelta(hours=1), or the seconds from now."
            )
        start = (value - EPOCH) // timedelta(microseconds=1)
    elif isinstance(value, (int, float, timedelta)) and not isinstance(value, bool):
        try:
            start = now_us + round(seconds("start_at", value) * 1_000_000)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
    else:
        raise TypeError(
            "start_at must be an aware datetime, or seconds or a timedelta from now, not a "
            f"{type(value).__name__}."
        )
    return start if start > now_us else None


def environ_of(
    app: Flask, endpoint: str, values: Mapping[str, Any] | None, method: str | None, query: Any,
    json: Any, data: Any, headers: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the WSGI environ of a request to ``endpoint``; see `AsyncRoute.submit`.

    :raises ValueError: if the values or the method do not match a rule of the endpoint.
    :raises TypeError: if ``json`` cannot be encoded, or ``data`` is given too.
    """
    from werkzeug.test import EnvironBuilder  # needed only by apps that start tasks from code

    # As for `url_for`, None means no value.
    values = {name: value for name, value in (values or {}).items() if value is not None}
    method = _method(app, endpoint, values, method)
    host = app.config["SERVER_NAME"] or "localhost"
    scheme = app.config["PREFERRED_URL_SCHEME"]
    try:
        url = urlsplit(
            app.url_map.bind(host, url_scheme=scheme).build(
                endpoint, values, method, force_external=True
            )
        )
    except Exception as error:
        # A URL converter can raise any exception for a value that it does not accept.
        raise ValueError(
            f"submit({endpoint!r}): a URL cannot be built for {method} from values={values!r}: "
            f"{error}"
        ) from error
    if json is not None:
        if data is not None:
            raise TypeError(f"submit({endpoint!r}): pass either json or data, not both.")
        data = _json_body(app, endpoint, json)
    elif hasattr(data, "read"):
        data = data.read()
    builder = EnvironBuilder(
        path="/",
        base_url=f"{scheme}://{url.netloc}{app.config['APPLICATION_ROOT']}",
        query_string=query,
        method=method,
        data=data,
        headers=headers,
    )
    builder.path = builder.request_uri = url.path
    if json is not None and "Content-Type" not in builder.headers:
        builder.headers["Content-Type"] = "application/json"
    if has_request_context() and is_in_task(request._get_current_object()):  # type: ignore[attr-defined]
        depth = request.headers.get(DEPTH_HEADER)
        if depth is not None:
            builder.headers.setdefault(DEPTH_HEADER, depth)
    try:
        return builder.get_environ()
    finally:
        builder.close()


def call(
    app: Flask, endpoint: str, environ: dict[str, Any],
    function: Callable[[Request, dict[str, Any]], T],
) -> T:  # fmt: skip
    """Call ``function`` in the request of ``environ``, with the request and the arguments of the
    view.

    :raises ConfigurationError: if the app routes the URL to another endpoint, or to none.
    """
    begun = False

    def checked(current: Request, arguments: dict[str, Any]) -> T:
        nonlocal begun
        if current.endpoint != endpoint:
            raise _not_routed(endpoint, current.url, f"it routes it to {current.endpoint!r}")
        begun = True
        return function(current, arguments)

    try:
        return context.call_in_request(app, environ, checked)
    except HTTPException as error:
        if begun:
            raise
        reason = error.description or type(error).__name__
        if isinstance(error, RequestRedirect):
            reason = f"it redirects to {error.new_url}"
        path = environ["SCRIPT_NAME"] + environ["PATH_INFO"]
        url = f"{environ['wsgi.url_scheme']}://{environ['HTTP_HOST']}{path}"
        raise _not_routed(endpoint, url, reason) from error


def _not_routed(endpoint: str, url: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"submit({endpoint!r}): the app does not route {url} to this endpoint: {reason}. Check the "
        "URL values, and that SERVER_NAME, TRUSTED_HOSTS and the rule fit together."
    )


def _method(app: Flask, endpoint: str, values: Mapping[str, Any], method: str | None) -> str:
    """Check the method and the names of the URL variables; return the method."""
    rules = list(app.url_map.iter_rules(endpoint))
    names = set().union(*(rule.arguments for rule in rules))
    unknown = sorted(map(str, values.keys() - names))
    if unknown:
        raise ValueError(
            f"submit({endpoint!r}): the URL has no variable {unknown[0]!r}; its variables are: "
            f"{', '.join(sorted(names)) or 'none'}. Other values belong in query, json or data."
        )
    fitting = [rule for rule in rules if _fits(rule, values)] or rules
    allowed = sorted(set().union(*(rule.methods or () for rule in fitting)) - _NEVER)
    if method is None:
        if len(allowed) != 1:
            raise ValueError(
                f"submit({endpoint!r}): the route has several methods; pass one of them as the "
                f"method: {', '.join(allowed)}."
            )
        return allowed[0]
    wanted = str(method).upper()
    if wanted not in allowed:
        raise ValueError(
            f"submit({endpoint!r}): the route has no method {wanted}; its methods are: "
            f"{', '.join(allowed)}."
        )
    return wanted


def _fits(rule: Rule, values: Mapping[str, Any]) -> bool:
    """Return whether the values are those of all variables of a rule."""
    defaults = rule.defaults or {}
    same = all(values[name] == value for name, value in defaults.items() if name in values)
    return same and rule.arguments - defaults.keys() <= values.keys() <= rule.arguments


def _json_body(app: Flask, endpoint: str, value: Any) -> bytes:
    try:
        return app.json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"submit({endpoint!r}): json cannot be encoded: {error}") from error
