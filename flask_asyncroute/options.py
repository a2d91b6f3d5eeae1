"""What one route was given: every option checked where it is written, completed with the app's defaults at first use.

`route` checks what a decorator got, `config` checks the app-wide defaults with the same functions. Nothing here runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from . import callback_terms, checks, expressions
from .callback_terms import content_type_of, header_value, method_of
from .checks import Check, boolean, optional, refuse, text
from .encoding import MEDIA_TYPES
from .errors import ConfigurationError
from .permissions import Permission


@dataclass(frozen=True, slots=True)
class Callback:
    """Where the outcome of a task is sent when it ends.

    URL, method, content type and header values may be runtime expressions of OpenAPI, or hold some in braces; they are
    resolved when the task is started. See `callback_terms`.

    :param url: an absolute address, or an expression that yields one from the starting request.
    :param method: the request method.
    :param content_type: JSON, XML or YAML.
    :param headers: header fields to send.
    :param send_result: whether the body carries the Result.
    :param event_name: what ``EventName`` says; the task's route where None.
    """

    url: str = "$request.body#/callbackUrl"
    method: str = "POST"
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    send_result: bool = False
    event_name: str | None = None

    def __post_init__(self) -> None:
        callback_terms.url("Callback(url=…)", text("Callback(url=…)", self.url))
        callback_terms.checked("Callback(method=…)", text("Callback(method=…)", self.method), method_of)
        label = "Callback(content_type=…)"
        callback_terms.checked(label, text(label, self.content_type), content_type_of)
        if not isinstance(self.headers, Mapping):
            raise ConfigurationError(
                f"Callback(headers=…) takes a mapping of header names to values, not {self.headers!r}."
            )
        for name, value in self.headers.items():
            callback_terms.header_name("a name in Callback(headers=…)", text("a name in Callback(headers=…)", name))
            label = f"Callback(headers={{{name!r}: …}})"
            callback_terms.checked(label, text(label, value), header_value)
        if len({name.lower() for name in self.headers}) < len(self.headers):
            raise ConfigurationError("Callback(headers=…) has a name twice, in different letter case; give it once.")
        boolean("Callback(send_result=…)", self.send_result)
        optional(text)("Callback(event_name=…)", self.event_name)

    @property
    def url_field(self) -> str:
        """The URL as clients may see it: an address without its query, which may hold a secret."""
        return self.url if expressions.parse(self.url).is_alone else self.url.partition("?")[0]

    @property
    def is_trusted(self) -> bool:
        """Whether the developer alone says which server is called: no expression stands before the ``/`` after its name."""
        template = expressions.parse(self.url)
        return template.is_literal or callback_terms.has_authority(template)


@dataclass(frozen=True, slots=True)
class Sse:
    """How a task's events are streamed.

    :param group: tasks of one group share a stream; the route's rule where None.
    :param send_result: whether the last event carries the Result.
    """

    group: str | None = None
    send_result: bool = False

    def __post_init__(self) -> None:
        optional(text)("Sse(group=…)", self.group)
        boolean("Sse(send_result=…)", self.send_result)


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """All options of one route in one app, none left open. Times are in microseconds, but `interrupt_after` in seconds."""

    timeout: int | None
    cancellable: bool
    executor: str | Executor
    min_workers: int
    max_workers: int
    queue_size: int
    interrupt_after: float | None
    id_generator: Callable[[], Any]
    permission: Permission | Callable[[], Any] | None
    callback: Callback | None
    sse: Sse | None
    response_types: tuple[str, ...]
    retention: int
    on_loss: str
    pool: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    celery: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    summary: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    request_schema: Any = None
    result_schema: Any = None

    @property
    def is_bound(self) -> bool:
        """Whether a task belongs to the process that started it, and ends with it: nobody else can run it."""
        return self.executor == "immediate" or isinstance(self.executor, Executor)


def permission(label: str, value: Any) -> Permission | Callable[[], Any]:
    """Accept a Permission or a function that will return one."""
    if isinstance(value, Permission):
        return value
    if not callable(value):
        raise refuse(label, "a Permission or a function that returns one", value)
    return checks.function(label, value)


def callback(label: str, value: Any) -> Callback:
    """Accept a Callback."""
    if not isinstance(value, Callback):
        raise refuse(label, "a Callback", value)
    return value


def sse(label: str, value: Any) -> Sse | None:
    """Accept True (the defaults), False (no events) or an Sse."""
    if value is True:
        return Sse()
    if value is False:
        return None
    if not isinstance(value, Sse):
        raise refuse(label, "True or False, or an Sse", value)
    return value


DEFAULTED: dict[str, Check] = {
    "timeout": checks.time_limit,
    "cancellable": boolean,
    "executor": checks.executor,
    "min_workers": optional(checks.whole(0)),
    "max_workers": checks.whole(1),
    "queue_size": checks.whole(0),
    "interrupt_after": optional(checks.seconds),
    "id_generator": checks.function,
    "permission": optional(permission),
    "callback": optional(callback),
    "sse": sse,
    "response_types": checks.some_of(*MEDIA_TYPES),
    "retention": checks.retention_time,
    "on_loss": checks.one_of("abort", "restart"),
}
"""The options that have an app-wide default in ``ASYNCROUTE_<NAME>``."""

OWN: dict[str, Check] = {
    "pool": optional(checks.short_name),
    "arguments": checks.keyword_arguments,
    "celery": checks.celery_settings,
    "name": optional(checks.short_name),
    "summary": optional(text),
    "description": optional(text),
    "tags": checks.names,
    "request_schema": optional(checks.schema),
    "result_schema": optional(checks.schema),
}
"""The options that each route has for itself."""


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of one decorator.

    :raises ConfigurationError: for an unknown option or a value of the wrong kind, naming it.
    """
    known = {**DEFAULTED, **OWN}
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"{name!r} is not an option of an async route. The options are: {', '.join(known)}."
            )
    return {name: known[name](f"{name}=…", value) for name, value in given.items()}


def resolve(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> RouteOptions:
    """Complete what a decorator was given with the app's defaults.

    :param given: what :func:`checked` returned.
    :param defaults: a checked value for each name in :data:`DEFAULTED`.
    :param where: the route, for messages.
    :raises ConfigurationError: where two options contradict each other.
    """
    values = {**defaults, **given}
    if values["min_workers"] is None:
        values["min_workers"] = min(0 if values["executor"] == "process" else 1, values["max_workers"])
    if values["min_workers"] > values["max_workers"]:
        raise ConfigurationError(
            f"{where}: min_workers={values['min_workers']} is more than max_workers={values['max_workers']}; raise the latter."
        )
    found = RouteOptions(**values)
    # Nobody else could restart it.
    return replace(found, on_loss="abort") if found.is_bound else found
