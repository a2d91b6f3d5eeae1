"""Starts, stops and times out tasks: what a request, an operation or the clock asks for becomes steps of the lifecycle.

One per process and app. It knows which tasks run here; everything else it asks the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flask import Request
from werkzeug.exceptions import HTTPException

from . import snapshot, start_key
from .capture import body_refusal, capture, give_back, guard
from .config import Config
from .errors import (
    CannotStart,
    IdTaken,
    KeyReused,
    KeyTaken,
    NotCancellable,
    QueueFull,
    ShuttingDown,
    TaskFinished,
    TaskNotFound,
    TooManyTasks,
)
from .execution import Execution
from .executors.base import TaskExecutor
from .identity import identify
from .intake import Intake, permission_of
from .lifecycle import Lifecycle
from .pace import Pace
from .permissions import Caller
from .registry import Route
from .removal import seconds_since_end
from .start_key import StartKey
from .states import State
from .stores.base import TaskStore
from .task import AsyncRouteTask
from .typing import IdentityLoader

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger("flask_asyncroute")

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
        self.pace = Pace()
        """How long tasks take, as far as this process hears of them."""
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

        Nothing is stored where this raises, or where an earlier request of the caller with the same ``Idempotency-Key``
        is answered again: with its task as it is now.

        :param arguments: what the view was called with, the route's own ``arguments`` not among them.
        :raises RequestRefused: with the status of the answer.
        """
        self._refuse_late()
        executor = self._executor_of(route)
        if self._asks_the_app(route):
            guard(current, self._config.max_body)
        name = None
        permission = None
        try:
            caller = self.caller()
            if start_key.HEADER in current.environ:
                name = start_key.key_name(current, caller, self._store.secret())
            else:
                permission = permission_of(route, caller)
        except HTTPException as error:
            raise body_refusal(current, error) from error
        captured, body = capture(current, arguments, self._config.max_body, self._config.snapshot_drop)
        intake = Intake(route, current, caller, captured, body, permission)
        try:
            return self._start(executor, intake) if name is None else self._start_once(executor, intake, name)
        except BaseException:
            if body is not None:
                body.close()
            raise

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
            run = self.running.get(task.id)
            if run is not None:
                # What its view has sent before is to be there; from then on nothing is taken.
                self._lifecycle.write_events(run[0])
            aborted = self._lifecycle.abort(current, STOPPED)
            if aborted is not None:
                return aborted
            current = self._store.get(task.id)
        raise unknown(task.id)

    def expire(self, execution: Execution) -> None:
        """Abort a task of this process whose time is up; its view is asked to stop whether or not the store can be told."""
        execution.is_expired = True
        execution.ask_to_stop()
        # Whoever looks at the clock must not wait for the store.
        self._lifecycle.unwritten.keep(execution.task_id, lambda: self._lifecycle.expire(execution, TIMED_OUT))

    def heard(self, task: AsyncRouteTask) -> None:
        """Take note that a task has changed, here or elsewhere; one that runs or waits here is stopped where it was aborted,
        or where this process was taken for dead and lost it.
        """
        self.pace.note(task)
        run = self.running.get(task.id)
        if task.state is not State.ABORTED:
            if run is not None and not run[0].is_shutting_down and self._is_lost(run[0], task):
                logger.warning("Task %s is another worker's by now: this process was taken for dead.", task.id)
                run[0].ask_to_stop()
            return
        if run is not None:
            execution, executor = run
            execution.ask_to_stop(ago=seconds_since_end(task))
            if task.stopping:
                executor.abandon(task.id)
            return
        route = self._routes.get(task.endpoint)
        if route is not None:
            self._executor_of(route).discard(task.id)

    def begin(self, execution: Execution, executor: TaskExecutor) -> bool:
        """Count a run as one of this process; return whether it may go on: not where the task has one that is not over."""
        with self._ended:
            run = execution, executor
            return self.running.setdefault(execution.task_id, run) is run

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

    def _refuse_late(self) -> None:
        if self.is_closing:
            raise ShuttingDown("This server process is shutting down; nothing was started. Try again.", retry_after=1)

    def _asks_the_app(self, route: Route) -> bool:
        """Return whether functions of the app are asked before the body is kept. They may read it."""
        return (
            self._identity_loader() is not None
            or hasattr(self._app, "login_manager")
            or callable(route.options.permission)
        )

    def _start_once(self, executor: TaskExecutor, intake: Intake, name: str) -> AsyncRouteTask:
        """Start a task, unless its caller has started one with the same key: then return that.

        What it takes to start one, a permission, a place and the quota, is asked for only where there is none yet.
        """
        key = intake.take_key(name, self._store.secret())
        task = self._started_with(key)
        if task is None:
            give_back(intake.current, intake.captured, intake.body)
            try:
                intake.permission = permission_of(intake.route, intake.caller)
            except HTTPException as error:
                raise body_refusal(intake.current, error) from error
            try:
                return self._start(executor, intake)
            except (KeyTaken, QueueFull) as error:
                # Another request with the key was first, and may have taken the last place.
                task = self._started_with(key)
                if task is None and isinstance(error, QueueFull):
                    raise
                if task is None:
                    raise QueueFull(
                        "The task of this Idempotency-Key was withdrawn. Try again.", retry_after=1
                    ) from error
        if intake.body is not None:
            intake.body.close()
        return task

    def _started_with(self, key: StartKey) -> AsyncRouteTask | None:
        found = self._store.started_with(key.name)
        if found is None:
            return None
        task, fingerprint = found
        if fingerprint != key.fingerprint:
            raise KeyReused(
                "This Idempotency-Key came with another request before: the same key means the same method, URL and body. "
                "Send another key."
            )
        return task

    def _start(self, executor: TaskExecutor, intake: Intake) -> AsyncRouteTask:
        """Store a task and hand it to the executor.

        :raises KeyTaken: where another request with the same key was first.
        """
        route = intake.route
        self._refuse_late()  # taking in the request may have lasted
        try:
            executor.reserve()
            try:
                task = self._create(intake)
            except BaseException:
                executor.unreserve()
                raise
        except (QueueFull, TooManyTasks) as refusal:
            refusal.retry_after = self.pace.place(route.endpoint, route.options.max_workers)
            raise
        try:
            executor.submit(task.id)
        except Exception as error:
            logger.exception("The executor of endpoint %s did not take a task.", route.endpoint)
            self._lifecycle.unwritten.write(task.id, lambda: self._lifecycle.withdraw(task))
            raise QueueFull("This server's executor does not take the task. Try again.", retry_after=5) from error
        return task

    def _create(self, intake: Intake) -> AsyncRouteTask:
        data = snapshot.encode(intake.captured)
        grants = intake.grants()
        callback = intake.route.options.callback
        if callback is not None:
            from .callbacks.resolving import resolve  # and what it needs, where there is a callback

            intake.delivery = resolve(callback, intake, intake.name(), self._config.callback_allowed_hosts)
        quota = None if intake.caller is None else self._config.max_tasks_per_user
        for _ in range(ID_TRIES):
            task = intake.record(self._lifecycle.owner, self._config)
            try:
                self._lifecycle.create(task, data, intake.body, grants, intake.key, quota, intake.delivery)
            except IdTaken:
                continue
            return task
        raise CannotStart(f"The id generator of this route gave {ID_TRIES} ids in a row that exist already.")


def unknown(task_id: str) -> TaskNotFound:
    """Return the error for an id that is unknown or that the caller may not read: one and the same."""
    return TaskNotFound("There is no task with this id, or it is not yours to read.", task_id=task_id)
