"""The state of one app, kept in ``app.extensions``: its configuration, routes and runner."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, cast

from flask import Flask, current_app, request_started
from werkzeug.routing import Rule

from . import app_loader
from . import config as configuration
from .config import Config
from .early_store import EarlyStore, left_behind
from .encoding import json_default
from .errors import ConfigurationError, StoreUnavailable
from .executors.registry import IMMEDIATE, kind_of
from .request.identity import IdentityLoader
from .routes import Declaration, Route, resolve_routes
from .stores import registry as stores
from .stores.base import SharedTaskStore, TaskStore
from .stores.registry import MEMORY
from .workers import app_identity, shutdown
from .workers.role import Role
from .workers.runner import Runner

logger = logging.getLogger("flask_asyncroute")

EXTENSION = "asyncroute"

_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()
_is_child_process = False


class Runtime:
    """Freezes the configuration and routes at first use: a request, `start()`, or access to tasks.
    Thread-safe.
    """

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
        self.is_child = _is_child_process
        """Whether this process runs a single task for its parent; see `child_main`."""
        self.name_prefix = ""  # of this process's name as a worker
        self.role: Role | None = None  # which tasks this process takes; None: as configured
        self.is_inline = False
        """Whether all routes run inside the request, on ``memory://``; see `testing`."""
        self.initial = self.config = configuration.read(app)
        """``initial`` is the configuration at ``init_app``, ``config`` the one frozen at first
        use.
        """
        self.is_prepared = False  # whether the configuration is frozen
        self.routes: dict[str, Route] = {}  # the async routes by endpoint; empty before first use
        self._lock = threading.RLock()
        self._runner: Runner | None = None
        self._takes_tasks = False
        """Whether the last runner of this process took tasks from the store, so that the next one
        must too.
        """
        self.on_first_request: Callable[..., None] | None = None
        """Connected to `request_started` until the first request, and again after a fork."""
        self._early = self._built = EarlyStore()
        """The store before first use. `testing.inline` ends by restoring ``_built``."""
        _runtimes.add(self)

    @property
    def runner(self) -> Runner:
        """This process's runner (the app's threads and connections), with an open store; created at
        first use.

        :raises AsyncRouteError: if the app is misconfigured, or the store cannot be opened.
        """
        runner = self._runner
        if runner is None and self._takes_tasks:
            self.become_runner()
        runner = runner or self._make_runner()
        if self.is_child and not runner.store.is_shared:
            raise ConfigurationError(
                'With memory://, a child process of executor="process" cannot access tasks or '
                "async_routes.state, which are in its parent. It can only use current_task. Use "
                "another ASYNCROUTE_STORE, or return the data to the parent."
            )
        runner.open()
        return runner

    @property
    def store(self) -> TaskStore:
        """The open store of this process.

        Before first use, it is opened with the current, unfrozen configuration. The runner takes it
        over.

        :raises AsyncRouteError: like :attr:`runner`.
        """
        if not self.is_prepared:
            with self._lock:
                if not self.is_prepared:
                    return self._early.open(self._get_app(), self._read_config())
        return self.runner.store

    @property
    def has_runner(self) -> bool:
        """Whether this process has a runner at the moment."""
        return self._runner is not None

    def become_runner(self) -> None:
        """Run waiting tasks and maintenance in this process as soon as the store can be opened."""
        if self.is_child:
            return
        runner = self._runner or self._make_runner()
        runner.dispatcher.is_runner = not runner.is_celery_worker
        try:
            runner.open()
        except StoreUnavailable:
            logger.warning(
                "The store of namespace %s could not be opened. This process tries again in the "
                "background.",
                runner.config.namespace,
            )
        if runner.store.is_shared:
            runner.start_maintenance()

    def become_worker(self, role: Role) -> Runner:
        """Take and run waiting tasks as ``role`` says, whatever ``ASYNCROUTE_RUN_TASKS`` is."""
        if self._runner is not None:
            self.close()  # the app has called `start` while it was loaded
        self.role = role
        self.become_runner()
        runner = self._runner or self._make_runner()
        runner.take_over_soon()
        return runner

    def become_child(self) -> Runner:
        """Prepare this process to run a single task for its parent, without opening the store."""
        self.is_child = True
        # Loading the app can have opened another store than the parent's.
        self._early.close()
        self._early = self._built = EarlyStore()
        return self._make_runner()

    @property
    def celery(self) -> Any:
        """The Celery app that runs tasks of the app; None if no route needs one.

        :raises ConfigurationError: if the app is misconfigured.
        """
        config = self.prepare()
        if not any(kind_of(r.options.executor).runs_elsewhere for r in self.routes.values()):
            return None
        from .executors.celery_app import find_celery

        return find_celery(self._get_app(), config.celery)

    def become_celery_worker(self, name_prefix: str) -> None:
        """Only run the tasks that Celery delivers, unless this process already serves requests."""
        with self._lock:
            if self._runner is None:
                self.name_prefix = name_prefix

    def _make_runner(self) -> Runner:
        with self._lock:
            if self._runner is None:
                app, config = self._get_app(), self.prepare()
                self._runner = Runner(
                    app, config, self._early.take(app, config), self.routes, self._before_task,
                    self._identity_loader, shutdown.is_server_ending, self.is_inline,
                    self.name_prefix, self.role,
                )  # fmt: skip
                shutdown.runners.add(self._runner)
            return self._runner

    @property
    def json_default(self) -> Callable[[Any], Any]:
        """The function of the app's JSON provider that converts values without a JSON type."""
        return json_default(self._get_app().json)

    def prepare(self) -> Config:
        """Freeze the configuration and check the routes, or raise ConfigurationError."""
        with self._lock:
            if self.is_prepared:
                return self.config
            refuse_eventlet()
            app = self._get_app()
            config = self._read_config()
            self._early.check(config)
            if config.routing != self.initial.routing:
                raise ConfigurationError(
                    "ASYNCROUTE_PAGES, _OPERATIONS, _URL_PREFIX, _TASK_PATH, _TASKS_PATH or "
                    "_TASK_ID_IN was changed after init_app() created the URL rules. Set it before "
                    "init_app()."
                )
            executor = IMMEDIATE.name if self.is_inline else None
            self.routes = resolve_routes(app, self._declared, config.defaults, executor)
            refuse_conflicts(app, self.routes)
            kinds = [kind_of(route.options.executor) for route in self.routes.values()]
            if not self.is_child and any(kind.needs_app for kind in kinds):
                app_loader.found(app, config.app)
            if any(kind.runs_elsewhere for kind in kinds):
                refuse_unreachable(app, config)
            self.config, self.is_prepared = config, True
            return config

    def close(self) -> None:
        """End the threads and close the store. The next use creates a new runner."""
        with self._lock:
            runner, self._runner = self._runner, None
            self._early.close()
        if runner is not None:
            self._takes_tasks = runner.dispatcher.is_runner
            shutdown.runners.discard(runner)
            runner.close()

    def reset(self, is_inline: bool) -> None:
        self.close()
        with self._lock:
            self.is_inline, self.is_prepared = is_inline, False
            self.config, self.routes = self.initial, {}
            self._early = self._built.in_memory() if is_inline else self._built

    def forget_process(self) -> None:
        """Drop the parent's runner without closing it. Call this in the child after a fork."""
        self._lock = threading.RLock()
        if self._runner is not None:
            if isinstance(self._runner.store, SharedTaskStore):
                self._runner.store.forget()
            app_identity.leave(self._runner)
            left_behind.append(self._runner)
            self._runner = None
        self._takes_tasks = False
        self._built.forget_process()
        app = self._app()
        if app is not None and self.on_first_request is not None:
            request_started.connect(self.on_first_request, sender=app, weak=False)

    def _read_config(self) -> Config:
        config = configuration.read(self._get_app())
        return replace(config, store=MEMORY) if self.is_inline else config

    def _get_app(self) -> Flask:
        app = self._app()
        assert app is not None, "the app references its runtime, so it is alive"
        return app


def check_app(app: Any) -> None:
    if not isinstance(app, Flask):
        raise ConfigurationError(
            f"A {type(app).__name__} is not a Flask app. Pass the Flask app itself; if a WSGI "
            "middleware wraps it, assign the middleware to app.wsgi_app."
        )


def runtime_of(app: Flask) -> Runtime:
    """Return the runtime of ``app``.

    :raises ConfigurationError: if ``app`` is not a Flask app, or ``init_app`` was not called.
    """
    check_app(app)
    runtime = app.extensions.get(EXTENSION)
    if runtime is None:
        raise ConfigurationError(
            f"AsyncRoute is not set up for the app {app.name!r}; call init_app(app)."
        )
    return cast(Runtime, runtime)


def current_runtime() -> Runtime:
    """Return the current app's runtime, or raise RuntimeError outside an app context."""
    return runtime_of(current_app._get_current_object())  # type: ignore[attr-defined]


def be_child_process() -> None:
    """Keep this process's apps from running waiting tasks, even if a module calls ``start()``. Call
    this before the app is imported.
    """
    global _is_child_process
    _is_child_process = True


def close_early_stores() -> None:
    """Close the stores that ``async_routes.state`` has opened; the next access reopens them."""
    for runtime in list(_runtimes):
        runtime._early.close()


def runtimes() -> list[Runtime]:
    """Return the runtimes of all apps in this process."""
    return list(_runtimes)


def refuse_unreachable(app: Flask, config: Config) -> None:
    """Raise ConfigurationError if Celery workers cannot use the store."""
    from .executors.celery_app import find_celery, is_local

    celery = find_celery(app, config.celery)
    kind = stores.kind_of(config.store)
    if not kind.is_shared:
        raise ConfigurationError(
            'A route has executor="celery", but ASYNCROUTE_STORE is memory://, which other '
            "processes cannot read. Use the default store or PostgreSQL."
        )
    if kind.is_file and not is_local(celery):
        raise ConfigurationError(
            'A route has executor="celery", and its broker is on another machine. Workers there '
            "could not read the SQLite file in ASYNCROUTE_STORE. Use PostgreSQL."
        )


def refuse_eventlet() -> None:
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("thread"):
        raise ConfigurationError(
            "eventlet has replaced Python's threads in this process, which flask_asyncroute does "
            "not support. Use gevent or threads instead, such as gunicorn --threads 4."
        )


def refuse_conflicts(app: Flask, routes: Collection[str]) -> None:
    """Raise ConfigurationError if a URL rule of the app has the same method and path as an
    operation.
    """
    operations: dict[tuple[str, str], str] = {}
    hosts: set[str] = set()
    others = []
    for rule in app.url_map.iter_rules():
        is_operation = rule.endpoint.startswith(f"{EXTENSION}.")
        if is_operation or rule.endpoint in routes:
            hosts.add(_host(rule))
        if not is_operation:
            others.append(rule)
            continue
        for method in _methods(rule):
            other = operations.setdefault((_shape(rule.rule), method), rule.endpoint)
            if other != rule.endpoint:
                raise ConfigurationError(
                    f"ASYNCROUTE_TASK_PATH and ASYNCROUTE_TASKS_PATH map {method} {rule.rule} to "
                    f"both {other!r} and {rule.endpoint!r}. Change one of them."
                )
    for rule in others:
        for method in _methods(rule):
            operation = operations.get((_shape(rule.rule), method))
            if operation is not None and _host(rule) in hosts:
                raise ConfigurationError(
                    f"The app's rule {method} {rule.rule} (endpoint {rule.endpoint!r}) conflicts "
                    f"with {operation!r}. Set ASYNCROUTE_URL_PREFIX (or ASYNCROUTE_TASK_PATH, "
                    "ASYNCROUTE_TASKS_PATH) to move the operations."
                )


def _methods(rule: Rule) -> list[str]:
    return sorted((rule.methods or set()) - {"OPTIONS", "HEAD"})


def _shape(rule: str) -> str:
    """Return a rule without variable names, converters or trailing slash."""
    parts = rule.split("/")
    shape = ["<>" if part.startswith("<") and part.endswith(">") else part for part in parts]
    return "/".join(shape).rstrip("/")


def _host(rule: Rule) -> str:
    return _shape(rule.host or rule.subdomain or "")


def _after_fork() -> None:
    for runtime in list(_runtimes):
        runtime.forget_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
