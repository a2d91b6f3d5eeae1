"""The ``ASYNCROUTE_*`` keys of an app: one table, checked at ``init_app``, read again and frozen at first use."""

from __future__ import annotations

import base64
import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import NoneType
from typing import TYPE_CHECKING, Any

from . import allowed_hosts, app_path, checks, options, store_url
from .allowed_hosts import AllowedHosts
from .checks import Check, refuse
from .errors import ConfigurationError
from .names import MAX_NAME
from .permissions import Access
from .store_url import StoreSetting

if TYPE_CHECKING:
    from flask import Flask

PREFIX = "ASYNCROUTE_"
MIN_SECRET = 24
"""Bytes of a secret for callbacks, as Standard Webhooks ask for."""
ROUTING = ("OPERATIONS", "URL_PREFIX", "TASK_PATH", "TASKS_PATH", "TASK_ID_IN")
"""The keys that make the URL rules at ``init_app``."""


def _new_id() -> str:
    """Return a version 4 UUID (RFC 9562), as `uuid.uuid4` does in five times the time."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def _path(label: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value):
        raise refuse(label, "a path such as '/task'", value)
    return value


def _prefix(label: str, value: Any) -> str:
    return "" if value == "" else _path(label, value)


def _header_name(label: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        raise refuse(label, "a name of letters, digits and '-', at most 64", value)
    return value


def _accepted_status(label: str, value: Any) -> int:
    if value not in (200, 202) or isinstance(value, (bool, float)):
        raise refuse(label, "202 or 200", value)
    return int(value)


def _interval(label: str, value: Any) -> float:
    interval = checks.seconds(label, value)
    if interval < 0.1:
        raise refuse(label, "0.1 seconds or more", value)
    return interval


def _admins(label: str, value: Any) -> Access:
    if not isinstance(value, Access):
        raise refuse(label, "an Access", value)
    return value


def _not_served(label: str, value: Any) -> None:
    if value is not None:
        raise ConfigurationError(f"{label} is not served by this version; remove it from the configuration.")


def _secrets(label: str, value: Any) -> tuple[str, ...]:
    """Accept one secret or several, as Standard Webhooks have them. The message does not show what was given."""
    if value is None:
        return ()
    secrets = value if isinstance(value, (list, tuple)) else (value,)
    for secret in secrets:
        if not isinstance(secret, str) or not _is_secret(secret):
            raise ConfigurationError(
                f"{label} must be at least {MIN_SECRET} random bytes in base64, with or without whsec_ before it, or a list. "
                "Make them with: python -c 'import base64, os; print(base64.b64encode(os.urandom(32)).decode())'"
            )
    return tuple(secrets)


def _is_secret(text: str) -> bool:
    try:
        # The library takes it without its padding too.
        encoded = text.removeprefix("whsec_").rstrip("=")
        return len(base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)) >= MIN_SECRET
    except ValueError:
        return False


def _origins(label: str, value: Any) -> tuple[str, ...]:
    for origin in checks.names(label, value):
        if not re.fullmatch(r"https?://[^/\s?#]+", origin, re.IGNORECASE):
            raise refuse(f"a member of {label}", "an origin such as 'https://app.example'", origin)
    return tuple(origin.lower() for origin in value)


def _stream_age(label: str, value: Any) -> float:
    age = checks.seconds(label, value)
    if age < 1:
        raise refuse(label, "1 second or more", value)
    return age


@dataclass(frozen=True, slots=True)
class Key:
    """One configuration key: how its value is checked and what it is where the app says nothing."""

    check: Check
    default: Any


KEYS: dict[str, Key] = {
    "STORE": Key(store_url.checked, "sqlite:///asyncroute.db"),
    "APP": Key(checks.optional(app_path.checked), None),
    "NAMESPACE": Key(checks.optional(checks.short_name), None),
    "CREATE_TABLES": Key(checks.boolean, True),
    "OPERATIONS": Key(checks.some_of("get", "stop", "query", "events"), ("get", "stop", "query", "events")),
    "URL_PREFIX": Key(_prefix, ""),
    "TASK_PATH": Key(_path, "/task"),
    "TASKS_PATH": Key(_path, "/tasks"),
    "TASK_ID_IN": Key(checks.some_of("path", "query", "header", "cookie"), ("path", "query")),
    "TASK_ID_NAME": Key(_header_name, "Id"),
    "ACCEPTED_STATUS": Key(_accepted_status, 202),
    "MAX_BODY": Key(checks.whole(1), 64 * 1024 * 1024),
    "MAX_RESULT": Key(checks.whole(1), 1024 * 1024),
    "EXPOSE_ERRORS": Key(checks.boolean, True),
    "SNAPSHOT_DROP": Key(checks.names, ()),
    "USER_ID_FIELD": Key(checks.short_name, "id"),
    "ADMINS": Key(checks.optional(_admins), None),
    "LIST_ANONYMOUS": Key(checks.optional(checks.boolean), None),
    "TRUSTED_ORIGINS": Key(_origins, ()),
    "MAX_TASKS_PER_USER": Key(checks.optional(checks.whole(1)), None),
    "HOUSEKEEPING_INTERVAL": Key(_interval, 30.0),
    "TIMEOUT": Key(options.DEFAULTED["timeout"], 36_000_000_000),
    "CANCELLABLE": Key(options.DEFAULTED["cancellable"], True),
    "EXECUTOR": Key(options.DEFAULTED["executor"], "thread"),
    "MIN_WORKERS": Key(options.DEFAULTED["min_workers"], None),
    "MAX_WORKERS": Key(options.DEFAULTED["max_workers"], 2),
    "QUEUE_SIZE": Key(options.DEFAULTED["queue_size"], 1000),
    "INTERRUPT_AFTER": Key(options.DEFAULTED["interrupt_after"], 1.0),
    "ID_GENERATOR": Key(options.DEFAULTED["id_generator"], _new_id),
    "PERMISSION": Key(options.DEFAULTED["permission"], None),
    "CALLBACK": Key(options.DEFAULTED["callback"], None),
    "SSE": Key(options.DEFAULTED["sse"], options.Sse()),
    "RESPONSE_TYPES": Key(options.DEFAULTED["response_types"], ("application/json",)),
    "RETENTION": Key(options.DEFAULTED["retention"], 86_400_000_000),
    "ON_LOSS": Key(options.DEFAULTED["on_loss"], "abort"),
    "CELERY": Key(_not_served, None),
    "DRAIN": Key(checks.optional(checks.seconds), None),
    "MAX_WAIT": Key(checks.seconds, 20.0),
    "MAX_STREAMS": Key(checks.whole(0), 2),
    "STREAM_AGE": Key(_stream_age, 300.0),
    "CALLBACK_ATTEMPTS": Key(checks.whole(1), 4),
    "CALLBACK_SECRET": Key(_secrets, ()),
    "CALLBACK_ALLOWED_HOSTS": Key(allowed_hosts.checked, AllowedHosts()),
    "OPENAPI_PATH": Key(_not_served, None),
    "DOCS_PATH": Key(_not_served, None),
    "DASHBOARD_PATH": Key(_not_served, None),
}
"""Every key without its prefix. A key that is not here is an error too, so that a misspelt one is not silently ignored."""


@dataclass(frozen=True, slots=True)
class Config:
    """The checked configuration of one app. Sizes in bytes, times in seconds; ``defaults`` as `options.resolve` takes them."""

    store: StoreSetting
    app: str | None
    namespace: str
    create_tables: bool
    operations: tuple[str, ...]
    url_prefix: str
    task_path: str
    tasks_path: str
    task_id_in: tuple[str, ...]
    task_id_name: str
    accepted_status: int
    max_body: int
    max_result: int
    expose_errors: bool
    snapshot_drop: frozenset[str]
    user_id_field: str
    admins: Access
    list_anonymous: bool
    trusted_origins: tuple[str, ...]
    max_tasks_per_user: int | None
    housekeeping_interval: float
    drain: float
    callback_attempts: int
    callback_secrets: tuple[str, ...]
    callback_allowed_hosts: AllowedHosts
    max_wait: float
    max_streams: int
    stream_age: float
    defaults: Mapping[str, Any]

    @property
    def routing(self) -> tuple[Any, ...]:
        """What decided the URL rules at ``init_app`` and cannot change after it."""
        return tuple(getattr(self, name.lower()) for name in ROUTING)


def values_for_child(app: Flask, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return the values that a child process must have too, as JSON, and the keys whose values must be its own.

    Functions and objects cannot be sent; and what made the URL rules has made them there.
    """
    values: dict[str, Any] = {"ASYNCROUTE_NAMESPACE": config.namespace}
    if isinstance(config.store, str):
        values["ASYNCROUTE_STORE"] = store_url.absolute(config.store, app.instance_path)
    own: list[str] = []
    for name, value in app.config.items():
        if name.startswith(PREFIX):
            if isinstance(value, timedelta):
                value = value.total_seconds()
            members = value if isinstance(value, (list, tuple)) else (value,)
            # A child sends no callbacks, so it need not know what they are signed with.
            is_own = name[len(PREFIX) :] in (*ROUTING, "CALLBACK_SECRET")
            if is_own or not all(type(m) in (str, int, float, bool, NoneType) for m in members):
                own.append(name)
            else:
                values.setdefault(name, value)
    return values, own


def take_values(app: Flask, values: Mapping[str, Any], own: Collection[str]) -> None:
    """Make the configuration of ``app`` that of the parent process; see :func:`values_for_child`."""
    for name in [name for name in app.config if name.startswith(PREFIX) and name not in own]:
        del app.config[name]
    app.config.update(values)


def read(app: Flask) -> Config:
    """Read and check the configuration of ``app``.

    :raises ConfigurationError: naming the key and what it should hold.
    """
    given = {name: value for name, value in app.config.items() if name.startswith(PREFIX)}
    for name in given:
        if name[len(PREFIX) :] not in KEYS:
            near = difflib.get_close_matches(name[len(PREFIX) :], KEYS, 1, 0.7)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else " Remove it."
            raise ConfigurationError(f"{name} is not a configuration key of flask_asyncroute.{hint}")
    values: dict[str, Any] = {}
    for name, key in KEYS.items():
        label = PREFIX + name
        values[name] = key.check(label, given[label]) if label in given else key.default
    if values["TASK_PATH"] == values["TASKS_PATH"]:
        raise ConfigurationError("ASYNCROUTE_TASK_PATH and ASYNCROUTE_TASKS_PATH are the same; they must differ.")
    listed = values["LIST_ANONYMOUS"]
    drain = values["DRAIN"]
    return Config(
        store=values["STORE"],
        app=values["APP"],
        namespace=values["NAMESPACE"] or app.name[:MAX_NAME],
        create_tables=values["CREATE_TABLES"],
        operations=values["OPERATIONS"],
        url_prefix=values["URL_PREFIX"],
        task_path=values["TASK_PATH"],
        tasks_path=values["TASKS_PATH"],
        task_id_in=values["TASK_ID_IN"],
        task_id_name=values["TASK_ID_NAME"],
        accepted_status=values["ACCEPTED_STATUS"],
        max_body=values["MAX_BODY"],
        max_result=values["MAX_RESULT"],
        expose_errors=values["EXPOSE_ERRORS"],
        snapshot_drop=frozenset(name.lower() for name in values["SNAPSHOT_DROP"]),
        user_id_field=values["USER_ID_FIELD"],
        admins=values["ADMINS"] or Access(),
        list_anonymous=listed if listed is not None else bool(app.debug or app.testing),
        trusted_origins=values["TRUSTED_ORIGINS"],
        max_tasks_per_user=values["MAX_TASKS_PER_USER"],
        housekeeping_interval=values["HOUSEKEEPING_INTERVAL"],
        callback_attempts=values["CALLBACK_ATTEMPTS"],
        callback_secrets=values["CALLBACK_SECRET"],
        callback_allowed_hosts=values["CALLBACK_ALLOWED_HOSTS"],
        drain=drain if drain is not None else 0.5 if app.debug else 5.0,
        max_wait=values["MAX_WAIT"],
        max_streams=values["MAX_STREAMS"],
        stream_age=values["STREAM_AGE"],
        defaults={name: values[name.upper()] for name in options.DEFAULTED},
    )
