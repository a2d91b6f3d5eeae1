"""Starts, stops and times out tasks: what a request, an operation or the clock asks for becomes steps of the lifecycle.

One per process and app. It knows which tasks run here; everything else it asks the store.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
from flask import Request
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.sansio.utils import get_host

from . import snapshot
from .capture import body_refusal, capture, guard
from .config import Config
from .errors import (
    CannotStart,
    IdTaken,
    NotAuthenticated,
    NotCancellable,
    NotPermitted,
    QueueFull,
    RequestRefused,
    ShuttingDown,
    TaskFinished,
    TaskNotFound,
)
from .execution import Execution
from .executors.base import TaskExecutor
from .identity import identify
from .lifecycle import Lifecycle
from .names import MAX_NAME, plain
from .permissions import Caller, Permission
from .registry import Route
from .states import State
from .stores.base import TaskStore
from .task import AsyncRouteTask, now_us
from .typing import IdentityLoader

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

ID_PATTERN = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]{1,128}\Z")
ID_TRIES = 4
"""An id that is taken is generated anew three times."""
STOPPED = "Aborted by the user"
TIMED_OUT = "Timeout"


class Dispatcher:
    """Turns requests into tasks and ends tasks before their time. Thread-safe.

    :param executor_of: gives the executor of a route.
    """

    def __init__(
        self,
        app: Flask,
        config: Config,
        store: TaskStore,
        lifecycle: Lifecycle,
        identity_loader: Callable[[], IdentityLoader | None],
        executor_of: Callable[[Route], TaskExecutor],
        routes: Mapping[str, Route],
    ) -> None:
        self._app = app
        self._config = config
        self._store = store
        self._lifecycle = lifecycle
        self._identity_loader = identity_loader
        self._executor_of = executor_of
        self._routes = routes
        self._ended = threading.Condition(threading.Lock())
        self.is_closing = False
        """Whether this process is about to exit: it starts nothing more."""
        self.running: dict[str, tuple[Execution, TaskExecutor]] = {}
        """The runs of this process whose code has not ended, by task id."""

    def caller(self) -> Caller | None:
        """Return who makes the present request."""
        return identify(self._app, self._identity_loader(), self._config.user_id_field)

    def start(self, route: Route, current: Request, arguments: Mapping[str, Any]) -> AsyncRouteTask:
        """Make the present request, ``current``, a task of ``route`` and have it run; return it as it was stored.

        Nothing is stored where this raises.

        :param arguments: what the view was called with, the route's own ``arguments`` not among them.
        :raises RequestRefused: with the status of the answer.
        """
        if self.is_closing:
            raise ShuttingDown("This server process is shutting down; nothing was started. Try again.", retry_after=1)
        executor = self._executor_of(route)
        if self._asks_the_app(route):
            guard(current, self._config.max_body)
        try:
            caller = self.caller()
            permission = self._permission(route, caller)
        except HTTPException as error:
            raise body_refusal(current, error) from error
        captured, body = capture(current, arguments, self._config.max_body, self._config.snapshot_drop)
        try:
            executor.reserve()
            try:
                task = self._create(route, current, caller, permission, captured, body)
            except BaseException:
                executor.unreserve()
                raise
        except BaseException:
            if body is not None:
                body.close()
            raise
        try:
            executor.submit(task.id)
        except Exception as error:
            logger.exception("The executor of endpoint %s did not take a task.", route.endpoint)
            self._lifecycle.withdraw(task)
            raise QueueFull("This server's executor does not take the task. Try again.", retry_after=5) from error
        return task

    def stop(self, task: AsyncRouteTask) -> AsyncRouteTask:
        """Stop a task; return it as it is then. One that is Aborted already is returned as it is.

        :raises TaskFinished: where it has Completed or Failed.
        :raises NotCancellable: where its route does not allow it.
        :raises TaskNotFound: where it was removed meanwhile.
        """
        current: AsyncRouteTask | None = task
        while current is not None:
            if current.state is State.ABORTED:
                return current
            if current.state.is_terminal:
                raise TaskFinished(
                    f"The task has ended: its State is {current.state}. There is nothing left to stop.",
                    task_id=current.id,
                )
            if not current.cancellable:
                raise NotCancellable("This task cannot be stopped: its route does not allow it.", task_id=current.id)
            aborted = self._lifecycle.abort(current, STOPPED)
            if aborted is not None:
                return aborted
            current = self._store.get(task.id)
        raise unknown(task.id)

    def expire(self, execution: Execution) -> None:
        """Abort a task of this process whose time is up; its view is asked to stop whether or not the store can be told."""
        execution.is_expired = True
        # Before the store is told, which may take it a while.
        execution.ask_to_stop()
        self._lifecycle.unwritten.write(execution.task_id, lambda: self._lifecycle.expire(execution, TIMED_OUT))

    def heard(self, task: AsyncRouteTask) -> None:
        """Take note that a task has changed, here or elsewhere; one that runs or waits here is stopped where it was aborted,
        or where this process was taken for dead and lost it.
        """
        run = self.running.get(task.id)
        if task.state is not State.ABORTED:
            if run is not None and not run[0].is_shutting_down and self._is_lost(run[0], task):
                logger.warning("Task %s is another worker's by now: this process was taken for dead.", task.id)
                run[0].ask_to_stop()
            return
        if run is not None:
            execution, executor = run
            execution.ask_to_stop()
            if task.stopping:
                executor.abandon(task.id)
            return
        route = self._routes.get(task.endpoint)
        if route is not None:
            self._executor_of(route).discard(task.id)

    def begin(self, execution: Execution, executor: TaskExecutor) -> None:
        """Count a run as one of this process."""
        with self._ended:
            self.running[execution.task_id] = (execution, executor)

    def end(self, execution: Execution) -> None:
        """Count a run no longer."""
        with self._ended:
            if self.running.get(execution.task_id, (None,))[0] is execution:
                del self.running[execution.task_id]
            self._ended.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing runs here any more, at most so long; return whether that is so."""
        with self._ended:
            return self._ended.wait_for(lambda: not self.running, seconds)

    def _is_lost(self, execution: Execution, task: AsyncRouteTask) -> bool:
        """Return whether a task that runs here has been given to somebody else. News can be older than the claim."""
        if task.state is State.NOT_STARTED:
            return 0 < execution.epoch <= task.epoch
        return task.owner != self._lifecycle.owner and task.epoch > execution.epoch

    def _asks_the_app(self, route: Route) -> bool:
        """Return whether functions of the app are asked before the body is kept. They may read it."""
        return (
            self._identity_loader() is not None
            or hasattr(self._app, "login_manager")
            or callable(route.options.permission)
        )

    def _permission(self, route: Route, caller: Caller | None) -> Permission | None:
        asked = route.options.permission
        if asked is None:
            return None
        if caller is None:
            raise NotAuthenticated("This route starts tasks for known callers only. Sign in and try again.")
        if isinstance(asked, Permission):
            return asked
        try:
            permission = asked()
        except (RequestRefused, ClientDisconnected, RequestEntityTooLarge):
            # It read the body, and what is wrong with that is the client's.
            raise
        except Exception as error:
            logger.exception("The permission function of endpoint %s raised.", route.endpoint)
            raise NotPermitted("The permission for this task could not be determined.") from error
        if not isinstance(permission, Permission):
            logger.error(
                "The permission function of endpoint %s returned a %s; it must return a Permission.",
                route.endpoint, type(permission).__name__,
            )  # fmt: skip
            raise NotPermitted("The permission for this task could not be determined.")
        return permission

    def _create(
        self,
        route: Route,
        current: Request,
        caller: Caller | None,
        permission: Permission | None,
        captured: snapshot.Snapshot,
        body: snapshot.Body | None,
    ) -> AsyncRouteTask:
        options = route.options
        method = current.method
        rule = current.url_rule
        name = options.name or f"[{method.capitalize()}]{rule.rule if rule is not None else current.path}"
        owner = None if caller is None else caller.id
        granted = None
        grants: set[tuple[str, str]] = set()
        if owner is not None and permission is not None:
            grants = {*permission.read, *permission.write} - {("users", owner)}
            granted = msgspec.json.encode(permission)
        data = snapshot.encode(captured)
        for _ in range(ID_TRIES):
            task = AsyncRouteTask(
                id=self._new_id(route),
                async_route_id=name[:MAX_NAME],
                endpoint=route.endpoint,
                state=State.NOT_STARTED,
                cancellable=options.cancellable,
                user=owner,
                url=_url(current)[:2048],
                method=method,
                created_us=now_us(),
                permission_json=granted,
                timeout_us=options.timeout,
                retention_us=options.retention,
                on_loss=options.on_loss,
                body_size=0 if body is None else body.size,
            )
            try:
                self._lifecycle.create(task, data, body, grants)
            except IdTaken:
                continue
            return task
        raise CannotStart(f"The id generator of this route gave {ID_TRIES} ids in a row that exist already.")

    def _new_id(self, route: Route) -> str:
        try:
            task_id = route.options.id_generator()
        except Exception as error:
            logger.exception("The id generator of endpoint %s raised.", route.endpoint)
            raise CannotStart("The id generator of this route failed. Nothing was started.") from error
        if not isinstance(task_id, str) or not ID_PATTERN.match(task_id):
            logger.error("The id generator of endpoint %s returned %r.", route.endpoint, task_id)
            raise CannotStart(
                "The id generator of this route returned something else than 1 to 128 of A-Z a-z 0-9 . _ ~ -. Nothing was started."
            )
        return plain(task_id)


def _url(current: Request) -> str:
    """Return the absolute URL of a request without its query; as `Request.base_url`, percent-encoded, and faster."""
    path = quote(current.root_path + current.path, safe="/:@!$&'()*+,;=~", errors="replace")
    # Older Werkzeug lets userinfo through in the Host header, newer gives nothing for one that is none.
    host = current.host.rpartition("@")[2] or get_host(current.scheme, None, current.server)
    return f"{current.scheme}://{host}{path}"


def unknown(task_id: str) -> TaskNotFound:
    """Return the error for an id that is unknown or that the caller may not read: one and the same."""
    return TaskNotFound("There is no task with this id, or it is not yours to read.", task_id=task_id)
