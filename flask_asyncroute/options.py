"""The options of an async route. The decorator checks them; the first request adds the app's
defaults.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import retries, validators
from .callbacks.model import Callback
from .encoding import MEDIA_TYPES
from .errors import ConfigurationError
from .executors import registry
from .permissions import Permission
from .retries import Retry
from .validators import Check, boolean, instance_of, optional, refuse, setting, short_name, text


@dataclass(frozen=True, slots=True)
class Sse:
    """The options of a task's event stream.

    :param group: the name of a group of tasks that share a stream; None: the route's URL rule.
    :param send_result: whether a task's last event contains the Result.
    """

    group: str | None = None
    send_result: bool = False

    def __post_init__(self) -> None:
        optional(text)("Sse(group=…)", self.group)
        boolean("Sse(send_result=…)", self.send_result)


def _permission(label: str, value: Any) -> Permission | Callable[[], Any]:
    if isinstance(value, Permission):
        return value
    if not callable(value):
        raise refuse(label, "a Permission or a function that returns one", value)
    return validators.function(label, value)


def _sse(label: str, value: Any) -> Sse | None:
    if value is True:
        return Sse()
    if value is False:
        return None
    if not isinstance(value, Sse):
        raise refuse(label, "True, False or an Sse", value)
    return value


def _unique(label: str, value: Any) -> bool | Callable[[], Any]:
    if value is None or isinstance(value, bool):
        return bool(value)
    if not callable(value):
        raise refuse(label, "True, or a function that returns a key or None", value)
    return validators.function(label, value)


def _celery(label: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise refuse(label, "a mapping", value)
    checks = {"queue": short_name, "routing_key": short_name, "priority": validators.whole(0)}
    for name, given in value.items():
        if name not in checks:
            raise refuse(f"a key of {label}", "one of " + ", ".join(map(repr, checks)), name)
        checks[name](f"{name!r} of {label}", given)
    return dict(value)


def _new_id() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class DefaultedOptions:
    """The options that have an app-wide default in ``ASYNCROUTE_<NAME>``."""

    timeout: int | None = setting(validators.time_limit, 36_000_000_000)
    start_timeout: int | None = setting(validators.wait_limit, None)
    retry: Retry | None = setting(retries.checked, None)
    unique: bool | Callable[[], Any] = setting(_unique, False)
    cancellable: bool = setting(boolean, True)
    executor: str | Executor = setting(registry.checked, "thread")
    min_workers: int = setting(optional(validators.whole(0)), None)
    max_workers: int = setting(validators.whole(1), 2)
    queue_size: int = setting(validators.whole(0), 1000)
    interrupt_after: float | None = setting(optional(validators.seconds), 1.0)
    id_generator: Callable[[], Any] = setting(validators.function, _new_id)
    permission: Permission | Callable[[], Any] | None = setting(optional(_permission), None)
    validate: Callable[..., Any] | None = setting(optional(validators.function), None)
    respond: Callable[[Any], Any] | None = setting(optional(validators.function), None)
    callback: Callback | None = setting(optional(instance_of(Callback, "a Callback")), None)
    sse: Sse | None = setting(_sse, Sse())
    response_types: tuple[str, ...] = setting(
        validators.some_of(*MEDIA_TYPES), ("application/json",)
    )
    retention: int = setting(validators.retention_time, 86_400_000_000)
    on_loss: str = setting(validators.matching("abort|restart", "'abort' or 'restart'"), "abort")


@dataclass(frozen=True, slots=True)
class RouteOptions(DefaultedOptions):
    """All options of one route in one app. `interrupt_after` is in seconds, other times in
    microseconds.
    """

    pool: str | None = setting(optional(short_name), None)
    arguments: Mapping[str, Any] = field(
        default_factory=dict, metadata={"check": validators.arguments}
    )
    celery: Mapping[str, Any] = field(default_factory=dict, metadata={"check": _celery})
    name: str | None = setting(optional(short_name), None)
    decorators: tuple[Callable[..., Any], ...] = setting(validators.decorators, ())

    @property
    def is_bound(self) -> bool:
        """Whether only the process that received a task's request can run the task."""
        return registry.kind_of(self.executor).is_bound


_CHECKS: dict[str, Check] = {
    option.name: option.metadata["check"] for option in fields(RouteOptions)
}
DEFAULTED = tuple(option.name for option in fields(DefaultedOptions))
OWN = tuple(name for name in _CHECKS if name not in DEFAULTED)
"""The options without an app-wide default."""


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check a decorator's options.

    :raises ConfigurationError: if an option is unknown or its value is invalid.
    """
    for name in given:
        if name not in _CHECKS:
            raise ConfigurationError(
                f"{name!r} is not an option of an async route. "
                f"The options are: {', '.join(_CHECKS)}."
            )
    return {name: _CHECKS[name](f"{name}=…", value) for name, value in given.items()}


def resolve(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> RouteOptions:
    """Add the app's defaults to a decorator's options.

    :param given: from :func:`checked`.
    :param defaults: a checked value for each name in :data:`DEFAULTED`.
    :param where: the route's name for error messages.
    :raises ConfigurationError: if two options contradict each other.
    """
    values = {**defaults, **given}
    most = values["max_workers"]
    if values["min_workers"] is None:
        values["min_workers"] = min(registry.kind_of(values["executor"]).default_min_workers, most)
    if values["min_workers"] > most:
        raise ConfigurationError(
            f"{where}: min_workers={values['min_workers']} is more than max_workers={most}; "
            "raise max_workers."
        )
    if registry.kind_of(values["executor"]).runs_inline:
        values["start_timeout"] = None  # no task waits
    found = RouteOptions(**values)
    # No other process could restart the task, so on_loss="restart" has no effect.
    return replace(found, on_loss="abort") if found.is_bound else found
