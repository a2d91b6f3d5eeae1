"""The typed state of one app: its configuration, routes and, per process, its runner. Found in ``app.extensions``."""

from __future__ import annotations

import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from flask import current_app
from flask.json.provider import DefaultJSONProvider

from . import app_path
from . import config as configuration
from .config import Config
from .errors import ConfigurationError, StoreUnavailable
from .registry import Declaration, Route, resolve_routes
from .runner import Runner
from .store_url import MEMORY
from .typing import IdentityLoader

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.routing import Rule

logger = logging.getLogger("flask_asyncroute")

EXTENSION = "asyncroute"

_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()
_left_behind: list[Runner] = []
"""Runners of a parent process. Closing their connections here would break the parent's, so they are only kept."""


class Runtime:
    """What the extension knows of one app. Thread-safe."""

    def __init__(
        self,
        app: Flask,
        declared: Sequence[Declaration],
        before_task: Sequence[Callable[[], Any]],
        identity_loader: Callable[[], IdentityLoader | None],
    ) -> None:
        self._app = weakref.ref(app)
        self._declared = declared
        self._before_task = before_task
        self._identity_loader = identity_loader
        self.is_child = False
        """Whether this process runs one task and nothing else; see `child`."""
        self.is_inline = False
        """Whether all routes run inside the request, on ``memory://``; see `testing`."""
        self.initial = configuration.read(app)
        self._lock = threading.RLock()
        self._config: Config | None = None
        self._routes: dict[str, Route] = {}
        self._runner: Runner | None = None
        _runtimes.add(self)

    @property
    def config(self) -> Config:
        """The configuration: frozen from first use on, as it was at ``init_app`` before."""
        return self._config or self.initial

    @property
    def routes(self) -> dict[str, Route]:
        """The async routes by endpoint; none before first use."""
        return self._routes

    @property
    def is_prepared(self) -> bool:
        """Whether first use is behind."""
        return self._config is not None

    @property
    def runner(self) -> Runner:
        """What this process has of the app, its store open; first use, where it was not before.

        :raises ConfigurationError: at each use, where the app is set up in a way that cannot work.
        :raises StoreUnavailable: where the store cannot be opened now.
        """
        runner = self._runner or self._make_runner()
        if self.is_child and runner.config.store == MEMORY:
            raise ConfigurationError(
                'In a child process of executor="process" there are no tasks and no state to ask for: with memory:// they are '
                "in its parent. Only current_task is here. Use another ASYNCROUTE_STORE, or return what the parent needs."
            )
        runner.store.open()
        return runner

    def become_runner(self) -> None:
        """Have this process keep house for the app and take waiting tasks, from when its store can be opened.

        :raises ConfigurationError: see :attr:`runner`.
        """
        if self.is_child:
            return
        runner = self._runner or self._make_runner()
        try:
            runner.store.open()
        except StoreUnavailable:
            logger.warning(
                "The store of %s cannot be opened yet; it is tried again in the background.", runner.config.namespace
            )
        if runner.store.is_shared:
            runner.housekeeper.start()

    def become_child(self) -> Runner:
        """Have this process run a single task for its parent: it takes no others and keeps no house.

        :return: the runner, its store not opened: with ``memory://`` there is none, see :attr:`runner`.
        :raises ConfigurationError: where the app is set up in a way that cannot work.
        """
        self.is_child = True
        return self._make_runner()

    def _make_runner(self) -> Runner:
        with self._lock:
            if self._runner is None:
                config = self.prepare()
                self._runner = Runner(self._get_app(), config, self._routes, self._before_task, self._identity_loader)
            return self._runner

    @property
    def json_default(self) -> Callable[[Any], Any]:
        """What the app's JSON provider makes of values that JSON does not have."""
        return json_default(self._get_app())

    def prepare(self) -> Config:
        """Read and freeze the configuration, and check the app's routes against it.

        :raises ConfigurationError: see :attr:`runner`.
        """
        with self._lock:
            if self._config is None:
                app = self._get_app()
                config = configuration.read(app)
                if self.is_inline:
                    config = replace(config, store=MEMORY)
                if config.routing != self.initial.routing:
                    raise ConfigurationError(
                        "ASYNCROUTE_OPERATIONS, _URL_PREFIX, _TASK_PATH, _TASKS_PATH and _TASK_ID_IN made the URL rules at "
                        "init_app() and were changed since; set them before it."
                    )
                self._routes = resolve_routes(
                    app, self._declared, config.defaults, "immediate" if self.is_inline else None
                )
                refuse_conflicts(app, self._routes)
                if any(route.options.executor == "process" for route in self._routes.values()):
                    app_path.found(app, config.app)
                self._config = config
            return self._config

    def close(self) -> None:
        """End this process's threads for the app and close its store; the next use begins anew."""
        with self._lock:
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def reset(self, is_inline: bool) -> None:
        """Go back to before first use."""
        self.close()
        with self._lock:
            self.is_inline = is_inline
            self._config = None
            self._routes = {}

    def forget_process(self) -> None:
        """Leave what belongs to the parent process alone; called in a child after a fork."""
        self._lock = threading.RLock()
        if self._runner is not None:
            self._runner.store.forget()
            _left_behind.append(self._runner)
            self._runner = None

    def _get_app(self) -> Flask:
        app = self._app()
        assert app is not None, "the app holds its runtime, so it is there"
        return app


def runtime_of(app: Flask) -> Runtime:
    """Return the runtime of ``app``.

    :raises ConfigurationError: where the extension was not initialised for it.
    """
    runtime = app.extensions.get(EXTENSION)
    if runtime is None:
        raise ConfigurationError(f"AsyncRoute is not set up for the app {app.name!r}; call init_app(app) on it.")
    return cast(Runtime, runtime)


def current_runtime() -> Runtime:
    """Return the runtime of the current app.

    :raises RuntimeError: outside an app context (Flask's own message).
    """
    return runtime_of(current_app)


def json_default(app: Flask) -> Callable[[Any], Any]:
    """Return what turns a value that JSON does not have into one that it has, as the app's JSON provider does."""
    provider = app.json
    if isinstance(provider, DefaultJSONProvider):
        return provider.default
    return lambda value: json.loads(provider.dumps(value))


def refuse_conflicts(app: Flask, routes: Collection[str]) -> None:
    """Refuse a rule of the app that has the method and path of an operation, where tasks are started or asked for.

    :param routes: the endpoints of the app's async routes.
    :raises ConfigurationError: naming the rule and the key that moves the operations away.
    """
    ours: dict[tuple[str, str], str] = {}
    places: set[str] = set()
    rules = list(app.url_map.iter_rules())
    for rule in rules:
        is_ours = rule.endpoint.startswith(f"{EXTENSION}.")
        if is_ours or rule.endpoint in routes:
            places.add(_place(rule))
        if is_ours:
            for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
                other = ours.setdefault((_shape(rule.rule), method), rule.endpoint)
                if other != rule.endpoint:
                    raise ConfigurationError(
                        f"ASYNCROUTE_TASK_PATH and ASYNCROUTE_TASKS_PATH give {method} {rule.rule} to {other!r} and to "
                        f"{rule.endpoint!r}. Change one of them."
                    )
    for rule in rules:
        if rule.endpoint.startswith(f"{EXTENSION}.") or _place(rule) not in places:
            continue
        for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"}):
            operation = ours.get((_shape(rule.rule), method))
            if operation is not None:
                raise ConfigurationError(
                    f"The app's rule {method} {rule.rule} (endpoint {rule.endpoint!r}) is also that of {operation!r}. "
                    "Set ASYNCROUTE_URL_PREFIX (or ASYNCROUTE_TASK_PATH, ASYNCROUTE_TASKS_PATH) to move the operations."
                )


def _shape(rule: str) -> str:
    """Return a rule with its variables' names and converters left out, and without a slash at the end."""
    parts = ["<>" if part.startswith("<") and part.endswith(">") else part for part in rule.split("/")]
    return "/".join(parts).rstrip("/")


def _place(rule: Rule) -> str:
    """Return the host or subdomain that a rule is for, as `_shape` has it."""
    return _shape(rule.host or rule.subdomain or "")


def _after_fork() -> None:
    for runtime in list(_runtimes):
        runtime.forget_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
