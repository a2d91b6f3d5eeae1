"""`AsyncRoute`: the decorators, `init_app`, and access to tasks from code."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar, overload

from flask import Blueprint, Flask, Request, has_request_context, request, request_started
from werkzeug.routing import Rule

from . import options, validators
from .cli import group
from .cli.base import is_loading
from .decorator import declare, is_bare, register_task, view_function_of
from .engine.dispatcher import unknown
from .engine.lifecycle import purge
from .errors import ConfigurationError
from .http.blueprint import make_blueprint
from .http.waits import BLOCKING_SECONDS, is_asgiref
from .permissions import may_read, may_write
from .query import NEWEST_FIRST, parse_python, position_of
from .request import from_code
from .request.capture import note_request
from .request.identity import IdentityLoader, caller_of
from .request.submission import ID_PATTERN
from .routes import Declaration, Start, View, check_variables
from .runtime import EXTENSION, Runtime, check_app, current_runtime, runtime_of
from .shared_state import SharedState
from .stores.registry import kind_of
from .task import AsyncRouteTask
from .workers import shutdown

logger = logging.getLogger("flask_asyncroute")

F = TypeVar("F", bound=Callable[..., Any])
PAGE = 200
_ROUTE_SETTINGS = {*inspect.signature(Rule).parameters, "provide_automatic_options"} - {"string"}
_VARIABLE = re.compile(r"<(?:[^<>]*:)?([A-Za-z_]\w*)>")


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    rule: str
    view: Start
    settings: Mapping[str, Any]


class AsyncRoute:
    """Turns views of Flask apps into async routes, and serves the HTTP operations on their tasks.

    One instance can serve several apps. Each app's state is in ``app.extensions``.

    :param app: if set, passed to :meth:`init_app`.
    :param decorators: decorators (``login_required``, …) for every HTTP operation.
    """

    def __init__(
        self, app: Flask | None = None, *, decorators: Sequence[Callable[..., Any]] = ()
    ) -> None:
        self._rules: list[_Rule] = []
        self._declared: list[Declaration] = []
        self._before_task: list[Callable[[], Any]] = []
        self._identity_loader: IdentityLoader | None = None
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        self._added: weakref.WeakKeyDictionary[Flask, set[_Rule]] = weakref.WeakKeyDictionary()
        self.blueprint: Blueprint = make_blueprint(decorators)
        """The HTTP operations, with endpoints such as ``asyncroute.get`` and the URL variable
        ``task_id``.
        """
        self.state = SharedState(
            lambda: current_runtime().store, lambda: current_runtime().json_default
        )
        """JSON values that requests and tasks of all processes share. Access needs an app
        context.
        """
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Check the configuration of ``app``; add the declared routes and the HTTP operations.

        The call starts no thread and opens no store. After an error, the call can be repeated.

        :raises ConfigurationError: if the app is misconfigured; the message names the key or route.
        """
        check_app(app)
        if EXTENSION in app.extensions:
            raise ConfigurationError(
                f"AsyncRoute is already set up for the app {app.name!r}; call init_app(app) once."
            )
        runtime = Runtime(app, self._declared, self._before_task, lambda: self._identity_loader)
        register_task(runtime.initial.defaults["executor"])
        for rule in self._rules:
            self._add(app, rule)
        app.extensions[EXTENSION] = runtime
        try:
            if app.blueprints.get(EXTENSION) is not self.blueprint:
                prefix = runtime.initial.url_prefix or None
                app.register_blueprint(self.blueprint, url_prefix=prefix)
            app.cli.add_command(group)
            if isinstance(runtime.initial.celery, Mapping):
                from .executors.celery_app import create_celery  # imports Celery

                create_celery(app, runtime.initial.celery)
        except BaseException:
            del app.extensions[EXTENSION]
            raise
        self._apps.add(app)
        runtime.on_first_request = _on_request
        request_started.connect(_on_request, sender=app, weak=False)

    @overload
    def task(self, view: View, /) -> Start: ...

    @overload
    def task(self, /, **options: Any) -> Callable[[View], Start]: ...

    def task(self, view: Any = None, /, **given: Any) -> Any:
        """Turn the decorated view into an async route.

        Put the route decorator of the app or blueprint above this one; pass options in parentheses.

        :raises ConfigurationError: if the options or the view are invalid.
        """

        def decorate(function: View) -> Start:
            declaration = declare(function, given)
            self._declared.append(declaration)
            return view_function_of(declaration)

        return decorate if view is None else decorate(view)

    def route(self, rule: str, **settings: Any) -> Callable[[View], Start]:
        """Turn the decorated view into an async route with the URL rule ``rule``.

        The route is added to all apps of this instance, including apps initialised later, except
        apps already in use. The options are those of :meth:`task` and of :meth:`flask.Flask.route`
        (``methods``, ``endpoint``, ``defaults``, …).

        :raises ConfigurationError: like :meth:`task`, and if all apps are already in use.
        """
        names = (*options.DEFAULTED, *options.OWN)
        given = {name: settings.pop(name) for name in names if name in settings}
        for name in settings:
            if name not in _ROUTE_SETTINGS:
                raise ConfigurationError(
                    f"route({rule!r}): {name!r} is an option neither of an async route nor of "
                    f"Flask's route(). The options are: {', '.join(names)}."
                )

        def decorate(function: View) -> Start:
            declaration = declare(function, given)
            arguments = declaration.given.get("arguments", {})
            check_variables(declaration.label, _VARIABLE.findall(rule), arguments)
            endpoint = settings.get("endpoint") or function.__name__
            function = view_function_of(declaration)
            declared = _Rule(rule, function, {**settings, "endpoint": endpoint})
            apps = list(self._apps)
            open_apps = [app for app in apps if not runtime_of(app).is_prepared]
            if apps and not open_apps:
                raise ConfigurationError(
                    f"{declaration.label} was declared too late: every app is already in use. "
                    "Declare routes before the first request."
                )
            self._declared.append(declaration)
            self._rules.append(declared)
            for app in open_apps:
                self._add(app, declared)
            return function

        return decorate

    def before_task(self, function: F) -> F:
        """Register a function that runs in each task, in the rebuilt request, before the view.

        The function takes no parameters. It can do what ``before_request`` does, such as set
        ``g.user``. If it raises, the task fails.

        :raises ConfigurationError: if ``function`` is async or not a function.
        """
        validators.function("before_task(…)", function)
        self._before_task.append(function)
        return function

    def identity_loader(self, function: F) -> F:
        """Register the function that identifies the caller of the current request.

        The function takes no parameters and returns None, or a mapping or object with ``id`` (see
        ``ASYNCROUTE_USER_ID_FIELD``), ``groups``, ``roles`` and ``scopes``. Without an identity
        loader, the caller is the user of Flask-Login, if the app uses it.

        :raises ConfigurationError: if ``function`` is async or not a function.
        """
        validators.function("identity_loader(…)", function)
        self._identity_loader = function
        return function

    def start(self, app: Flask) -> None:
        """Make this process run waiting tasks and background maintenance of ``app``.

        The first request does the same. Call this method in a process that possibly gets no
        request, and in gunicorn's ``post_worker_init``: then streams and waits end as soon as the
        worker receives the signal to exit. Further calls do nothing, nor do calls in
        children of ``executor="process"``, or while ``flask`` loads the app for one of the app's
        own commands. If ``ASYNCROUTE_RUN_TASKS`` is False, the process leaves the tasks to workers
        and does only the maintenance.

        If the store cannot be opened, a warning is logged and maintenance retries, so the server
        can start without its database.

        :raises ConfigurationError: if the app is misconfigured.
        """
        runtime = runtime_of(app)
        if runtime.is_child or is_loading():
            return
        runtime.become_runner()
        shutdown.notice(shutdown.end_waits)

    def get(self, task_id: str) -> AsyncRouteTask | None:
        """Return a task, or None if the id is unknown. Permissions are not checked."""
        store = current_runtime().runner.store
        return store.get(task_id) if ID_PATTERN.match(task_id) else None

    def exists(self, task_id: str) -> bool:
        """Return whether a task has this id."""
        return self.get(task_id) is not None

    def query(
        self, conditions: Mapping[str, Any] | None = None, **fields: Any
    ) -> Iterator[AsyncRouteTask]:
        """Yield all matching tasks, newest first. Permissions are not checked.

        ``query(State="Running", User="anna")`` yields the tasks that meet both conditions. Reads
        pages of 200 tasks.

        :param conditions: as in the body of a JSON query, such as ``{"State": {"op": "NE", "value":
            "Failed"}}``. A value alone is compared with EQ: ``{"State": "Failed"}``. Values may be
            `State` members and datetimes; a datetime without a time zone is UTC.
        :param fields: more conditions of the same form. A field in ``conditions`` cannot be
            repeated here.
        :raises InvalidQuery: raised immediately, not during iteration; the message names the
            invalid part.
        """
        parsed = parse_python({} if conditions is None else conditions, fields)
        store = current_runtime().runner.store

        def pages() -> Iterator[AsyncRouteTask]:
            position = None
            while True:
                page = store.query(parsed, NEWEST_FIRST, PAGE, position, None)
                yield from page
                if len(page) < PAGE:
                    return
                position = position_of(page[-1], NEWEST_FIRST)

        return pages()

    def submit(
        self,
        endpoint: str,
        values: Mapping[str, Any] | None = None,
        *,
        method: str | None = None,
        query: Mapping[str, Any] | str | None = None,
        json: Any = None,
        data: Any = None,
        headers: Any = None,
        user: Any = None,
        start_at: datetime | float | timedelta | None = None,
        connection: Any = None,
    ) -> AsyncRouteTask:
        """Start a task of an async route without a client; return its record.

        The view gets a request that is built from the route's rule and the parameters. Its host is
        ``SERVER_NAME``, else ``localhost``. ``before_request`` functions and the identity loader
        are not called, and permissions are not checked. A ``permission`` of the route that is a
        value is stored; a permission function is not called. Needs an app context. See
        :doc:`/howto/start-from-code`.

        In a process that has neither served a request nor called :meth:`start`, the task waits
        for a process that has. Tasks on ``memory://``, of ``executor="immediate"`` and of the app's
        own Executors run in this process.

        :param values: the variables of the URL.
        :param method: needed only if the route has several besides ``HEAD`` and ``OPTIONS``.
        :param query: the query, as a mapping or a string.
        :param json: the body as a JSON value.
        :param data: the body as bytes or a string, or a form as a mapping. A value of a form can be
            an open binary file, or a tuple of file, filename and media type.
        :param headers: the headers, as a mapping or a list of pairs.
        :param user: the owner of the task: a user id, or an identity as the identity loader returns
            it.
        :param start_at: an aware datetime, or seconds or a timedelta from now. The task does not
            start before.
        :param connection: an SQLAlchemy Connection or Session on the PostgreSQL database of the
            store. The task is stored in its transaction, and starts after the commit. The quota of
            the user is not checked.
        :raises ConfigurationError: if the endpoint is not an async route, or the app or the
            connection does not allow the task.
        :raises ValueError: if the values, the method or the start time are invalid.
        :raises TypeError: if a parameter has a wrong type, or ``json`` is not JSON.
        :raises RequestRefused: if the task cannot be started, as for a request: `QueueFull`,
            `TooManyTasks`, `BodyTooLarge`, `CallbackRefused`, `StoreUnavailable` and others.
        """
        runtime = current_runtime()
        runner = runtime.runner
        route = from_code.route_of(runner.routes, endpoint)
        if runtime.is_child and route.options.is_bound:
            raise ConfigurationError(
                f"submit({endpoint!r}): tasks of this route run in the process that starts them, "
                'which a child process of executor="process" cannot do. Use executor="thread" or '
                '"process" for the route.'
            )
        config, dispatcher = runner.config, runner.dispatcher
        caller = None
        if user is not None:
            caller = caller_of(user, self._identity_loader, config.user_id_field)
        start_at_us = None
        if start_at is not None and not runner.is_inline:
            start_at_us = from_code.start_time(start_at, runner.store.now_us())
        app = runner.app
        environ = from_code.environ_of(app, endpoint, values, method, query, json, data, headers)

        def submit(current: Request, arguments: Mapping[str, Any]) -> AsyncRouteTask:
            return dispatcher.submit(route, current, arguments, caller, start_at_us, connection)

        return from_code.call(app, endpoint, environ, submit)

    def stop(self, task_id: str) -> AsyncRouteTask:
        """Stop a task of any process; return its new record. Permissions are not checked.

        The errors are also HTTPExceptions, so a plain view may let them through. In a task they are
        ordinary exceptions.

        :raises TaskNotFound: (404) if no task has this id.
        :raises NotCancellable: (423) if its route has ``cancellable=False``.
        :raises TaskFinished: (410) if the task is Completed or Failed.
        """
        return current_runtime().runner.dispatcher.stop(self._existing(task_id))

    def purge(self, task_id: str) -> None:
        """Remove a finished task with its result, events and callback. Permissions are not checked.

        Waits until 0.3 seconds after the task's end, so that subscribers can read the end. The
        errors are also HTTPExceptions, as those of :meth:`stop`.

        :raises TaskNotFound: (404) if no task has this id.
        :raises TaskUnfinished: (409) if the task has not ended, or its code is still running.
        """
        task = self._existing(task_id)
        runner = current_runtime().runner
        if not purge(runner.store, runner.lifecycle, task):
            raise unknown(task_id)

    def may_read(self, task: AsyncRouteTask | None) -> bool:
        """Return whether the caller of the current request may read a task.

        Applies the same rules as the HTTP operations, and calls the identity loader. Without a
        request, the caller is anonymous. In a task, the current request is the one that started the
        task.

        :param task: a record, such as :meth:`get` and :meth:`query` return. For None, the caller is
            identified too, and the result is False.
        :raises TypeError: if ``task`` is neither.
        :raises CannotStart: if the identity's groups, roles or scopes are invalid.
        """
        return self._may(may_read, "may_read", task)

    def may_write(self, task: AsyncRouteTask | None) -> bool:
        """Return whether the caller of the current request may stop and purge a task; see
        :meth:`may_read` for the parameter, the caller and the errors.
        """
        return self._may(may_write, "may_write", task)

    def wait(self, task_id: str, timeout: float | timedelta | None = None) -> AsyncRouteTask:
        """Wait until a task of any process has ended; return its record.

        :param timeout: seconds or timedelta; None: no limit.
        :raises TimeoutError: if the task has not ended after ``timeout``.
        :raises TaskNotFound: if no task has this id, or if it is deleted during the wait.
        """
        seconds = validators.seconds("timeout", timeout) if timeout is not None else None
        if not ID_PATTERN.match(task_id):
            raise unknown(task_id)
        notifier = current_runtime().runner.notifier
        task = notifier.wait(task_id, lambda found: found.is_completed, seconds)
        if task is None:
            raise unknown(task_id)
        if not task.is_completed:
            raise TimeoutError(
                f"Task {task_id} has not ended within {seconds} s: its State is {task.state}."
            )
        return task

    def redeliver(self, task_id: str) -> AsyncRouteTask:
        """Send the callback of a finished task again, with the same ``webhook-id``.

        The attempt count restarts at 0. Header values written in the route's ``Callback`` are sent
        again. Values from the request are not: they were deleted after the last attempt.

        :raises TaskNotFound: if no task has this id.
        :raises TaskUnfinished: if the task has not ended, or its callback is being sent.
        :raises CallbackRefused: if the task has no callback.
        """
        task = self._existing(task_id)
        runner = current_runtime().runner
        route = runner.routes.get(task.endpoint)
        renewed = runner.sender.redeliver(task, None if route is None else route.options.callback)
        if renewed is None:
            raise unknown(task_id)
        return renewed

    def _may(self, rule: Callable[..., bool], name: str, task: Any) -> bool:
        if task is not None and not isinstance(task, AsyncRouteTask):
            raise TypeError(
                f"{name}() takes the record of a task, not a {type(task).__name__}. Pass what "
                "async_routes.get(id) returns."
            )
        runner = current_runtime().runner
        # Identify the caller even for an unknown id, so that the time does not reveal which ids
        # exist.
        caller = runner.dispatcher.caller() if has_request_context() else None
        return task is not None and rule(caller, task.user, task.granted, runner.config.admins)

    def _existing(self, task_id: str) -> AsyncRouteTask:
        task = self.get(task_id)
        if task is None:
            raise unknown(task_id)
        return task

    def _add(self, app: Flask, rule: _Rule) -> None:
        # Skip rules that an earlier, failed call of init_app() added.
        added = self._added.setdefault(app, set())
        if rule not in added:
            app.add_url_rule(rule.rule, view_func=rule.view, **rule.settings)
            added.add(rule)


def _on_request(app: Flask, **extra: Any) -> None:
    """At the app's first request, make this process run waiting tasks and maintenance.

    If the configuration is invalid, raise an error; the next request calls this again.
    """
    runtime = runtime_of(app)
    runtime.become_runner()
    if not kind_of(runtime.config.store).is_shared and request.environ.get("wsgi.multiprocess"):
        logger.warning(
            "ASYNCROUTE_STORE is memory://, but this server has several processes. Each process "
            "sees only its own tasks, and clients get 404 for the others. Use the default store or "
            "a single process."
        )
    if is_asgiref(request.environ):
        logger.warning(
            "asgiref's WsgiToAsgi runs all requests of a process on one thread, so a wait or "
            "stream blocks all other requests. Waits and streams therefore end after %d seconds. "
            "Use a2wsgi as the adapter, or a WSGI server with threads.",
            BLOCKING_SECONDS,
        )
    # Connect this receiver only if hooks or decorators could read the body before the task is
    # created: without it, starting or getting a task is 5 % faster.
    has_hooks = any(app.before_request_funcs.values()) or any(app.url_value_preprocessors.values())
    if has_hooks or not all(is_bare(app.view_functions[endpoint]) for endpoint in runtime.routes):
        request_started.connect(_before_hooks, sender=app, weak=False)
        _before_hooks(app)
    # Disconnect last, so that concurrent requests on other threads also call a receiver.
    request_started.disconnect(_on_request, sender=app)


def _before_hooks(app: Flask, **extra: Any) -> None:
    if request.endpoint in runtime_of(app).routes:
        note_request(request._get_current_object())  # type: ignore[attr-defined]
