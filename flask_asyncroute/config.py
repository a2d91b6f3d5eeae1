"""Read and check the ``ASYNCROUTE_*`` keys at ``init_app``, and again at the app's first use."""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from types import NoneType
from typing import Any

from flask import Flask

from . import app_loader, options, validators
from .callbacks.ssrf import AllowedHosts, check_allowed_hosts
from .errors import ConfigurationError
from .permissions import Access
from .stores import registry
from .stores.registry import StoreSetting
from .validators import (
    MAX_NAME,
    Check,
    boolean,
    instance_of,
    matching,
    optional,
    refuse,
    setting,
    whole,
)

PREFIX = "ASYNCROUTE_"
MIN_SECRET = 24
"""Minimum bytes of a callback secret (Standard Webhooks)."""
ROUTING = ("PAGES", "OPERATIONS", "URL_PREFIX", "TASK_PATH", "TASKS_PATH", "TASK_ID_IN")
"""The keys that define the URL rules that ``init_app`` registers."""
OPERATIONS = ("get", "stop", "query", "events")

_PATH = r"(/[A-Za-z0-9._~-]+)+"
_path = matching(_PATH, "a path such as '/task'")


def _accepted_status(label: str, value: Any) -> int:
    if value not in (200, 202) or isinstance(value, (bool, float)):
        raise refuse(label, "202 or 200", value)
    return int(value)


def _lower_names(label: str, value: Any) -> frozenset[str]:
    return frozenset(name.lower() for name in validators.names(label, value))


def _secrets(label: str, value: Any) -> tuple[str, ...]:
    """Accept one secret or a list of secrets. Error messages show no secrets."""
    if value is None:
        return ()
    secrets = value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(secret, str) and _is_secret(secret) for secret in secrets):
        raise ConfigurationError(
            f"{label} must be a key or a list of keys. A key is at least {MIN_SECRET} "
            "random bytes in base64, and may begin with 'whsec_'. Create one with: python -c "
            "'import base64, os; print(base64.b64encode(os.urandom(32)).decode())'"
        )
    return tuple(secrets)


def _is_secret(text: str) -> bool:
    encoded = text.removeprefix("whsec_").rstrip("=")
    try:
        # Like the standardwebhooks library, accept a secret without base64 padding.
        secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return False
    return len(secret) >= MIN_SECRET


def _celery_app(label: str, value: Any) -> Any:
    """Accept an import path, settings or a Celery app. Celery itself is imported later."""
    kinds = {name.__name__ for name in type(value).__mro__}
    if not isinstance(value, (str, Mapping)) and "Celery" not in kinds:
        raise refuse(label, "a Celery app, its import path, or a mapping of settings", value)
    return value


def _origins(label: str, value: Any) -> tuple[str, ...]:
    origins = validators.names(label, value)
    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s?#]+", origin, re.IGNORECASE):
            raise refuse(f"a member of {label}", "an origin such as 'https://app.example'", origin)
    return tuple(origin.lower() for origin in origins)


@dataclass(frozen=True, slots=True, repr=False)  # no repr, so tracebacks show no secrets
class Config:
    """The checked configuration of one app. Sizes are in bytes, times in seconds.

    Each field except ``defaults`` defines a configuration key, its check and its default.

    :param defaults: the app-wide values of the route options, for `options.resolve`.
    """

    defaults: Mapping[str, Any]
    store: StoreSetting = setting(registry.checked, "sqlite:///asyncroute.db")
    app: str | None = setting(optional(app_loader.checked), None)
    celery: Any = setting(optional(_celery_app), None)
    namespace: str = setting(optional(validators.short_name), None)
    create_tables: bool = setting(boolean, True)
    run_tasks: bool = setting(boolean, True)
    operations: tuple[str, ...] = setting(validators.some_of(*OPERATIONS), OPERATIONS)
    url_prefix: str = setting(matching(f"({_PATH})?", "a path such as '/api'"), "")
    task_path: str = setting(_path, "/task")
    tasks_path: str = setting(_path, "/tasks")
    task_id_in: tuple[str, ...] = setting(
        validators.some_of("path", "query", "header", "cookie"), ("path", "query")
    )
    task_id_name: str = setting(
        matching("[A-Za-z0-9-]{1,64}", "a name of letters, digits and '-', at most 64"), "Id"
    )
    pages: bool = setting(boolean, True)
    accepted_status: int = setting(_accepted_status, 202)
    max_body: int = setting(whole(1), 64 * 1024 * 1024)
    max_result: int = setting(whole(1), 1024 * 1024)
    expose_errors: bool = setting(boolean, True)
    snapshot_drop: frozenset[str] = setting(_lower_names, frozenset())
    user_id_field: str = setting(validators.short_name, "id")
    admins: Access = setting(optional(instance_of(Access, "an Access")), None)
    list_anonymous: bool = setting(optional(boolean), None)
    trusted_origins: tuple[str, ...] = setting(_origins, ())
    max_tasks_per_user: int | None = setting(optional(whole(1)), None)
    housekeeping_interval: float = setting(partial(validators.seconds, least=0.1), 30.0)
    drain: float = setting(optional(validators.seconds), None)
    max_wait: float = setting(validators.seconds, 20.0)
    max_streams: int = setting(whole(0), 2)
    stream_age: float = setting(partial(validators.seconds, least=1), 300.0)
    callback_attempts: int = setting(whole(1), 4)
    callback_secret: tuple[str, ...] = setting(_secrets, ())
    callback_allowed_hosts: AllowedHosts = setting(check_allowed_hosts, AllowedHosts())

    @property
    def routing(self) -> tuple[Any, ...]:
        """The values of the `ROUTING` keys, which must not change after ``init_app``."""
        return tuple(getattr(self, name.lower()) for name in ROUTING)


_FIELDS = fields(Config)[1:]
KEYS: dict[str, tuple[Check, Any]] = {
    key.name.upper(): (key.metadata["check"], key.default)
    for key in (*_FIELDS, *fields(options.DefaultedOptions))
}
"""The check and default of each configuration key, without ``ASYNCROUTE_``. Other keys with this
prefix raise an error, so that misspelled keys are noticed.
"""


def values_for_child(app: Flask, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return the values to send to a child process, and the keys that the child reads from its own
    app. These are the keys of functions and objects, because they cannot be sent, and the `ROUTING`
    keys, because loading the app uses them.
    """
    values: dict[str, Any] = {"ASYNCROUTE_NAMESPACE": config.namespace}
    if isinstance(config.store, str):
        values["ASYNCROUTE_STORE"] = registry.absolute(config.store, app.instance_path)
    own: list[str] = []
    for name, value in app.config.items():
        if name.startswith(PREFIX):
            if isinstance(value, timedelta):
                value = value.total_seconds()
            members = value if isinstance(value, (list, tuple)) else (value,)
            # A child sends no callbacks, so it needs no callback secret.
            is_own = name[len(PREFIX) :] in (*ROUTING, "CALLBACK_SECRET")
            if is_own or not all(type(m) in (str, int, float, bool, NoneType) for m in members):
                own.append(name)
            else:
                values.setdefault(name, value)
    return values, own


def take_values(app: Flask, values: Mapping[str, Any], own: Collection[str]) -> None:
    """Apply the parent's configuration to a child's ``app``; see :func:`values_for_child`."""
    for name in [name for name in app.config if name.startswith(PREFIX) and name not in own]:
        del app.config[name]
    app.config.update(values)


def read(app: Flask) -> Config:
    """Read and check the configuration.

    :raises ConfigurationError: if a key is invalid; the message names the key and its valid
        values.
    """
    given = {name: value for name, value in app.config.items() if name.startswith(PREFIX)}
    for name in given:
        if name[len(PREFIX) :] not in KEYS:
            near = difflib.get_close_matches(name[len(PREFIX) :], KEYS, 1, 0.7)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else " Remove it."
            raise ConfigurationError(
                f"{name} is not a configuration key of flask_asyncroute.{hint}"
            )
    values: dict[str, Any] = {}
    for name, (check, default) in KEYS.items():
        label = PREFIX + name
        values[name.lower()] = check(label, given[label]) if label in given else default
    if values["task_path"] == values["tasks_path"]:
        raise ConfigurationError(
            "ASYNCROUTE_TASK_PATH and ASYNCROUTE_TASKS_PATH are the same; they must differ."
        )
    if not values["run_tasks"] and not registry.kind_of(values["store"]).is_shared:
        raise ConfigurationError(
            "ASYNCROUTE_RUN_TASKS is False, but ASYNCROUTE_STORE is memory://, whose tasks only "
            "this process could run. Use the default store or PostgreSQL, or remove "
            "ASYNCROUTE_RUN_TASKS."
        )
    fallbacks = {
        "namespace": app.name[:MAX_NAME],
        "admins": Access(),
        "list_anonymous": bool(app.debug or app.testing),
        "drain": 0.5 if app.debug else 5.0,
    }
    for name, fallback in fallbacks.items():
        if values[name] is None:
            values[name] = fallback
    defaults = {name: values[name] for name in options.DEFAULTED}
    return Config(defaults, **{key.name: values[key.name] for key in _FIELDS})


def task_path(config: Config, root_path: str, task_id: str, end: str = "") -> str:
    """Return the URL path of Get or another operation on a task.

    :param root_path: the path under which the server mounts the app (SCRIPT_NAME).
    :param end: another operation's suffix, such as ``/events``.
    """
    base = f"{root_path}{config.url_prefix}{config.task_path}"
    if "path" in config.task_id_in:
        return f"{base}/{task_id}{end}"
    if "query" in config.task_id_in:
        return f"{base}{end}?{config.task_id_name}={task_id}"
    return base + end


def events_path(config: Config, root_path: str, task_id: str) -> str:
    return task_path(config, root_path, task_id, "/events")
