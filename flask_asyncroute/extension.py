"""`AsyncRoute`, what a user of the package holds: decorators, `init_app`, and the tasks from the app's own code."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, overload

from flask import Blueprint, Flask, request, request_started
from werkzeug.routing import Rule

from . import checks, drain, options, termination
from .capture import note_request
from .dispatcher import unknown
from .errors import ConfigurationError
from .http.operations import make_blueprint
from .intake import ID_PATTERN
from .query import NEWEST_FIRST, parse_mapping, position_of
from .registry import Declaration, check_variables
from .route import declare, is_bare
from .runtime import EXTENSION, Runtime, current_runtime, runtime_of
from .state import SharedState
from .store_url import MEMORY
from .task import AsyncRouteTask
from .typing import IdentityLoader, Start, View

logger = logging.getLogger("flask_asyncroute")

F = TypeVar("F", bound=Callable[..., Any])
PAGE = 200
_ROUTE_SETTINGS = {*inspect.signature(Rule).parameters, "provide_automatic_options"} - {"string"}
_VARIABLE = re.compile(r"<(?:[^<>]*:)?([A-Za-z_]\w*)>")


@dataclass(frozen=True, slots=True)
class _Rule:
    """One use of :meth:`AsyncRoute.route`, to be added to each app."""

    rule: str
    endpoint: str
    view: Callable[..., Any]
    settings: Mapping[str, Any]


class AsyncRoute:
    """Makes views of Flask apps async routes, and serves the operations on their tasks.

    One instance may serve several apps. It keeps nothing about an app on itself; that is in ``app.extensions``.

    :param app: initialised at once, where given.
    :param decorators: the app's own decorators (``login_required``, …), put around every operation.
    """

    def __init__(self, app: Flask | None = None, *, decorators: Sequence[Callable[..., Any]] = ()) -> None:
        self._rules: list[_Rule] = []
        self._declared: list[Declaration] = []
        self._before_task: list[Callable[[], Any]] = []
        self._identity_loader: IdentityLoader | None = None
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        self._added: weakref.WeakKeyDictionary[Flask, set[int]] = weakref.WeakKeyDictionary()
        self.blueprint: Blueprint = make_blueprint(decorators)
        """The operations: endpoints ``asyncroute.get``, ``.result``, ``.stop`` and ``.query``, variable ``task_id``."""
        self.state = SharedState(lambda: current_runtime().runner.store, lambda: current_runtime().json_default)
        """A mapping of JSON values that requests and tasks of all processes share; needs an app context."""
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Set ``app`` up: check its configuration, add the routes recorded so far and the operations.

        Nothing runs yet. Where it raises, the app can be initialised again once the cause is mended.

        :raises ConfigurationError: naming the key or route.
        """
        if EXTENSION in app.extensions:
            raise ConfigurationError(f"AsyncRoute is set up for the app {app.name!r} already; call init_app(app) once.")
        runtime = Runtime(app, self._declared, self._before_task, lambda: self._identity_loader)
        for rule in self._rules:
            self._add(app, rule)
        app.extensions[EXTENSION] = runtime
        try:
            if app.blueprints.get(EXTENSION) is not self.blueprint:
                app.register_blueprint(self.blueprint, url_prefix=runtime.initial.url_prefix or None)
        except BaseException:
            del app.extensions[EXTENSION]
            raise
        self._apps.add(app)
        request_started.connect(_on_request, sender=app, weak=False)

    @overload
    def task(self, view: View, /) -> Start: ...

    @overload
    def task(self, /, **options: Any) -> Callable[[View], Start]: ...

    def task(self, view: Any = None, /, **given: Any) -> Any:
        """Make the view below an async route; a route decorator of Flask or a blueprint goes above.

        With parentheses it takes the options of an async route, without them their defaults.

        :raises ConfigurationError: for options or a view that cannot work.
        """

        def decorate(function: View) -> Start:
            start, declaration = declare(function, given)
            self._declared.append(declaration)
            return start

        return decorate if view is None else decorate(view)

    def route(self, rule: str, **settings: Any) -> Callable[[View], Start]:
        """Make the view below an async route under ``rule``, in every app this is set up for, until its first request.

        Takes the options of :meth:`task` and those of :meth:`flask.Flask.route` (``methods``, ``endpoint``, ``defaults``, …).

        :raises ConfigurationError: as :meth:`task`, and where all apps have served requests already.
        """
        known = {
            name: settings.pop(name) for name in list(settings) if name in options.DEFAULTED or name in options.OWN
        }
        for name in settings:
            if name not in _ROUTE_SETTINGS:
                raise ConfigurationError(
                    f"route({rule!r}): {name!r} is neither an option of an async route nor one of Flask's route(). The options "
                    f"are: {', '.join((*options.DEFAULTED, *options.OWN))}."
                )

        def decorate(function: View) -> Start:
            start, declaration = declare(function, known)
            check_variables(declaration.label, _VARIABLE.findall(rule), declaration.given.get("arguments", {}))
            endpoint = settings.get("endpoint") or function.__name__
            made = _Rule(rule, endpoint, start, {key: value for key, value in settings.items() if key != "endpoint"})
            apps = list(self._apps)
            open_apps = [app for app in apps if not runtime_of(app).is_prepared]
            if apps and not open_apps:
                raise ConfigurationError(
                    f"{declaration.label} is declared after the first use of every app; declare routes before it."
                )
            self._declared.append(declaration)
            self._rules.append(made)
            for app in open_apps:
                self._add(app, made)
            return start

        return decorate

    def before_task(self, function: F) -> F:
        """Register a function that runs in the rebuilt request before each view; takes nothing.

        It is the place for what ``before_request`` does for plain views, ``g.user`` and the like. An exception in it
        fails the task.

        :raises ConfigurationError: for anything but a plain function.
        """
        checks.function("before_task(…)", function)
        self._before_task.append(function)
        return function

    def identity_loader(self, function: F) -> F:
        """Register the function that says who makes the present request; takes nothing.

        It returns None, or a mapping or object with ``id`` (see ``ASYNCROUTE_USER_ID_FIELD``), ``groups``, ``roles``
        and ``scopes``. Without one, Flask-Login's user counts where the app has it.

        :raises ConfigurationError: for anything but a plain function.
        """
        checks.function("identity_loader(…)", function)
        self._identity_loader = function
        return function

    def start(self, app: Flask) -> None:
        """Make this process a runner of ``app``: it keeps house and takes waiting tasks from now on. In a worker of gunicorn
        streams and waits then end as soon as it is told to exit, and hold it up no longer.

        A process becomes one by itself with its first request; call this where none may come, such as in gunicorn's
        ``post_worker_init``. Called again it does nothing.

        :raises ConfigurationError: where the app is set up in a way that cannot work.
        :raises StoreUnavailable: where the store cannot be opened now.
        """
        runtime = runtime_of(app)
        runtime.become_runner()
        termination.notice(drain.end_waits)
        runtime.runner.store.open()

    def get(self, task_id: str) -> AsyncRouteTask | None:
        """Return a task as it is now, or None. No permission is checked."""
        store = current_runtime().runner.store
        return store.get(task_id) if ID_PATTERN.match(task_id) else None

    def exists(self, task_id: str) -> bool:
        """Return whether there is such a task."""
        return self.get(task_id) is not None

    def query(self, conditions: Mapping[str, Any] | None = None) -> Iterator[AsyncRouteTask]:
        """Yield all tasks that fit, newest first, as they are when their page of 200 is read. No permission is checked.

        :param conditions: as the JSON style has them: ``{"State": {"op": "EQ", "value": "Failed"}}``; times may be
            aware datetimes.
        :raises InvalidQuery: naming the culprit, at the call.
        """
        parsed = parse_mapping(conditions or {})
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

    def stop(self, task_id: str) -> AsyncRouteTask:
        """Stop a task, whichever process runs it; return it as it is then. No permission is checked.

        :raises TaskNotFound: where there is none.
        :raises NotCancellable: where its route does not allow it.
        :raises TaskFinished: where it has Completed or Failed.
        """
        runner = current_runtime().runner
        task = self.get(task_id)
        if task is None:
            raise unknown(task_id)
        return runner.dispatcher.stop(task)

    def wait(self, task_id: str, timeout: float | timedelta | None = None) -> AsyncRouteTask:
        """Wait until a task has ended, whichever process runs it; return it.

        :param timeout: seconds or timedelta; None: as long as it takes.
        :raises TimeoutError: where it has not ended by then.
        :raises TaskNotFound: where there is none, or it is removed meanwhile.
        """
        seconds = checks.seconds("timeout", timeout) if timeout is not None else None
        if not ID_PATTERN.match(task_id):
            raise unknown(task_id)
        task = current_runtime().runner.notifier.wait(task_id, lambda found: found.is_completed, seconds)
        if task is None:
            raise unknown(task_id)
        if not task.is_completed:
            raise TimeoutError(f"Task {task_id} has not ended within {seconds} s: its State is {task.state}.")
        return task

    def redeliver(self, task_id: str) -> AsyncRouteTask:
        """Have the callback of a finished task sent once more, with the same ``webhook-id``; return the task.

        Its attempts are counted anew. Header values that came from the request are gone with the last attempt; those that
        the route gives literally are sent again.

        :raises TaskNotFound: for an unknown id.
        :raises TaskUnfinished: while the task has not ended, or its callback is being sent at this moment.
        :raises CallbackRefused: where the task has no callback.
        """
        task = self.get(task_id)
        if task is None:
            raise unknown(task_id)
        runner = current_runtime().runner
        route = runner.routes.get(task.endpoint)
        renewed = runner.sender.redeliver(task, None if route is None else route.options.callback)
        if renewed is None:
            raise unknown(task_id)
        return renewed

    def _add(self, app: Flask, rule: _Rule) -> None:
        added = self._added.setdefault(app, set())
        if id(rule) not in added:
            app.add_url_rule(rule.rule, rule.endpoint, rule.view, **rule.settings)
            added.add(id(rule))


def _on_request(app: Flask, **extra: Any) -> None:
    """Make this process a runner at the app's first request, and hear of no further one.

    An error in the configuration is raised again at each.
    """
    runtime = runtime_of(app)
    runtime.become_runner()
    if runtime.config.store == MEMORY and request.environ.get("wsgi.multiprocess"):
        logger.warning(
            "ASYNCROUTE_STORE is memory://, and this server has several processes: each knows its own tasks alone, so a "
            "client that reaches another one gets 404. Use the default, or one process."
        )
    request_started.disconnect(_on_request, sender=app)
    routes = runtime.routes
    has_hooks = any(app.before_request_funcs.values()) or any(app.url_value_preprocessors.values())
    if has_hooks or not all(is_bare(app.view_functions[endpoint]) for endpoint in routes):
        request_started.connect(_before_hooks, sender=app, weak=False)
        _before_hooks(app)


def _before_hooks(app: Flask, **extra: Any) -> None:
    if request.endpoint in runtime_of(app).routes:
        note_request(request._get_current_object())  # type: ignore[attr-defined]
