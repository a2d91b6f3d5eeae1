"""Creates tasks from requests, stops them and times them out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flask import Flask, Request
from werkzeug.exceptions import HTTPException

from .. import errors
from ..config import Config
from ..executors.base import TaskExecutor
from ..executors.execution import Execution
from ..executors.registry import kind_of
from ..permissions import Caller, Permission, is_anonymous, may_read
from ..request import idempotency
from ..request.capture import body_refusal, capture, guard, restore_body
from ..request.identity import IdentityLoader, identify
from ..request.submission import StartRequest, permission_of, take_unique_key, validate
from ..routes import Route
from ..snapshot import encode
from ..stores.base import Joined, SharedTaskStore, StartKey, TaskStore
from ..task import AsyncRouteTask, State, now_us
from .lifecycle import Lifecycle, seconds_since_end
from .retry_after import RunTimes

logger = logging.getLogger("flask_asyncroute")

ID_TRIES = 4  # attempts to generate an unused id
UNIQUE_TRIES = 10  # attempts to find or start the task with a unique key
STOPPED = "Aborted by the user"
TIMED_OUT = "Timeout"


class Started(NamedTuple):
    """The task of a start request."""

    task: AsyncRouteTask
    is_replay: bool
    """Whether an earlier request with the same ``Idempotency-Key`` started the task."""


@dataclass(eq=False)
class Dispatcher:
    """Starts, stops and times out tasks of one app in this process. Thread-safe."""

    app: Flask
    config: Config
    store: TaskStore
    lifecycle: Lifecycle
    identity_loader: Callable[[], IdentityLoader | None]
    executor_of: Callable[[Route], TaskExecutor]
    routes: Mapping[str, Route]
    start_maintenance: Callable[[], None]
    run_times: RunTimes = field(default_factory=RunTimes)
    is_closing: bool = False  # whether this process starts no more tasks
    is_runner: bool = False
    """Whether this process takes tasks from a shared store: it has served a request, called
    ``start()`` or run a task.
    """
    running: dict[str, tuple[Execution, TaskExecutor]] = field(default_factory=dict)
    """Runs whose outcome is not stored yet, by task id."""
    _ended: threading.Condition = field(default_factory=threading.Condition)

    def caller(self) -> Caller | None:
        return identify(self.app, self.identity_loader(), self.config.user_id_field)

    def start(self, route: Route, current: Request, arguments: Mapping[str, Any]) -> Started:
        """Create a task from the request ``current`` and submit it to the executor of ``route``.

        If the caller has used the ``Idempotency-Key`` before, return the earlier task.

        :param arguments: the view's keyword arguments, except those of the route option
            ``arguments``.
        :raises RequestRefused: if the task cannot be started; nothing is stored.
        """
        if self.is_closing:
            raise _shutting_down()
        executor = self.executor_of(route)
        config, route_permission = self.config, route.options.permission
        caller = permission = key_name = None
        loader = self.identity_loader()
        has_identity = loader is not None or hasattr(self.app, "login_manager")
        has_key = idempotency.HEADER in current.environ
        # Skipped for speed if the request needs no identity, key or permission.
        if has_identity or has_key or route_permission is not None:
            if has_identity or callable(route_permission):
                guard(current, config.max_body)  # because the app's functions can read the body
            try:
                caller = identify(self.app, loader, config.user_id_field, is_start=True)
                if has_key:
                    key_name = idempotency.key_name(current, caller, self.store.secret())
                else:
                    permission = permission_of(route, caller)
            except HTTPException as error:
                raise body_refusal(current, error) from error
        captured, body = capture(current, arguments, config.max_body, config.snapshot_drop)
        incoming = StartRequest(route, current, caller, captured, body, permission, arguments)
        try:
            if key_name is not None:
                return self._submit_once(executor, incoming, key_name)
            return Started(self._submit_unique(executor, incoming), is_replay=False)
        except BaseException:
            if body is not None:
                body.close()
            raise

    def submit(
        self, route: Route, current: Request, arguments: Mapping[str, Any], caller: Caller | None,
        start_at_us: int | None, connection: Any,
    ) -> AsyncRouteTask:  # fmt: skip
        """Create a task from the request ``current``, which the app's own code has built, without
        checking permissions. See `AsyncRoute.submit` for the other parameters.

        Only the process of a runner passes the task to its executor. If the store is shared, other
        processes, and a runner that shuts down, store the task for the runners.
        """
        if start_at_us is not None and kind_of(route.options.executor).runs_inline:
            raise errors.ConfigurationError(
                f"submit({route.endpoint!r}, start_at=…): tasks of this route run inside submit(), "
                'so they cannot start later. Use executor="thread" or "process".'
            )
        joined = None if connection is None else self._joined(route, connection)
        kind = kind_of(route.options.executor)
        is_here = self.is_runner or kind.is_bound or kind.runs_elsewhere
        is_for_runners = self.store.is_shared and not is_here
        executor = None
        if joined is not None or is_for_runners:
            # Without a start time, runners would first leave the task to the executor of another
            # process.
            start_at_us = self.store.now_us() if start_at_us is None else start_at_us
        elif start_at_us is None:
            executor = self.executor_of(route)
        elif self.is_closing:
            if not self._can_run_elsewhere(route):
                raise _shutting_down()
        elif self.is_runner or kind.is_bound or not self.store.is_shared:
            self.start_maintenance()
        config, option = self.config, route.options.permission
        captured, body = capture(current, arguments, config.max_body, config.snapshot_drop)
        permission = option if isinstance(option, Permission) else None
        incoming = StartRequest(
            route, current, caller, captured, body, permission, arguments, start_at_us=start_at_us,
            joined=joined, is_from_code=True,
        )  # fmt: skip
        try:
            task = self._submit_unique(executor, incoming)
        except BaseException:
            if body is not None:
                body.close()
            raise
        if executor is not None and executor.runs_inline:
            return self.store.get(task.id) or task  # it has ended
        return task

    def _can_run_elsewhere(self, route: Route) -> bool:
        return self.store.is_shared and not kind_of(route.options.executor).is_bound

    def _joined(self, route: Route, connection: Any) -> Joined:
        if route.options.is_bound:
            raise errors.ConfigurationError(
                f"submit({route.endpoint!r}, connection=…): tasks of this route run only in the "
                'process that starts them, before the commit. Use executor="thread" or "process", '
                "or call submit() without a connection after the commit."
            )
        if not isinstance(self.store, SharedTaskStore):
            raise errors.ConfigurationError(
                f"submit(connection=…) needs a PostgreSQL store, but ASYNCROUTE_STORE is "
                f"{self.store.label}. Call submit() without a connection after your commit."
            )
        return self.store.joined(connection)

    def stop(self, task: AsyncRouteTask) -> AsyncRouteTask:
        """Stop a task; return the new record. An Aborted task is returned unchanged.

        :raises TaskFinished: if the task is Completed or Failed.
        :raises NotCancellable: if its route does not allow stops.
        :raises TaskNotFound: if it was deleted.
        """
        current: AsyncRouteTask | None = task
        while current is not None:
            if current.state is State.ABORTED:
                return current
            if current.state.is_terminal:
                raise errors.TaskFinished(
                    f"The task has ended with State {current.state}, so it cannot be stopped.",
                    task_id=current.id,
                )
            if not current.cancellable:
                raise errors.NotCancellable(
                    "This task cannot be stopped: its route does not allow it.", task_id=current.id
                )
            run = self.running.get(task.id)
            if run is not None:
                # Store the view's events first, because the store rejects events of an aborted
                # task.
                self.lifecycle.write_events(run[0])
            aborted = self.lifecycle.abort(current, STOPPED)
            if aborted is not None:
                route = self.routes.get(task.endpoint)
                if route is not None and kind_of(route.options.executor).runs_elsewhere:
                    self.executor_of(route).cancel(aborted)
                return aborted
            current = self.store.get(task.id)
        raise unknown(task.id)

    def expire(self, execution: Execution) -> None:
        """Ask a view to stop because its timeout has expired. Return at once; the store is written
        later.
        """
        execution.is_expired = True
        execution.ask_to_stop()
        self.lifecycle.pending_writes.keep(
            execution.task_id, lambda: self.lifecycle.expire(execution, TIMED_OUT)
        )

    def on_change(self, task: AsyncRouteTask) -> None:
        """Stop or dequeue a task that was aborted; stop a run that another process has taken
        over.
        """
        if task.completed_us is not None and task.owner != self.lifecycle.owner:
            # Only tasks of other processes: `run_task` notes the durations of this process's runs.
            self.run_times.note(task, task.completed_us)
        run = self.running.get(task.id)
        if task.state is not State.ABORTED:
            is_ending = run is not None and (run[0].is_over or run[0].is_shutting_down)
            if run is not None and not is_ending and self._is_lost(run[0], task):
                logger.warning(
                    "Another worker has taken over task %s, because this process appeared to be "
                    "dead. Stopping the run in this process.",
                    task.id,
                )
                run[0].ask_to_stop()
        elif run is not None:
            execution, executor = run
            execution.ask_to_stop(ago=seconds_since_end(task))
            if task.stopping:
                executor.abandon(task.id)
        elif (route := self.routes.get(task.endpoint)) is not None:
            self.executor_of(route).discard(task.id)

    def begin(self, execution: Execution, executor: TaskExecutor) -> bool:
        """Register a run; return False if this process already runs the task."""
        with self._ended:
            run = execution, executor
            return self.running.setdefault(execution.task_id, run) is run

    def end(self, execution: Execution) -> None:
        with self._ended:
            if self.running.get(execution.task_id, (None,))[0] is execution:
                del self.running[execution.task_id]
            self._ended.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until this process runs no task; return False after ``seconds``."""
        with self._ended:
            return self._ended.wait_for(lambda: not self.running, seconds)

    def _is_lost(self, execution: Execution, task: AsyncRouteTask) -> bool:
        """Return whether another process has taken over the run. ``task`` can be an old record."""
        if task.state is State.NOT_STARTED:
            return 0 < execution.epoch <= task.epoch
        return task.owner != self.lifecycle.owner and task.epoch > execution.epoch

    def _submit_once(self, executor: TaskExecutor, incoming: StartRequest, name: str) -> Started:
        """Start a task; if an earlier request with this idempotency key did so, return its task."""
        key = incoming.take_key(name, self.store.secret())
        task = self._started_with(key)
        if task is None:
            restore_body(incoming.current, incoming.captured, incoming.body)
            try:
                incoming.permission = permission_of(incoming.route, incoming.caller)
            except HTTPException as error:
                raise body_refusal(incoming.current, error) from error
            try:
                return Started(self._submit_unique(executor, incoming), is_replay=False)
            except (errors.KeyTaken, errors.QueueFull, errors.TooManyTasks) as error:
                # A concurrent request with this key started its task first, perhaps in the
                # last slot of the queue.
                task = self._started_with(key)
                if task is None and not isinstance(error, errors.KeyTaken):
                    raise
                if task is None:
                    raise errors.QueueFull(
                        "The task of this Idempotency-Key was removed. Try again.", retry_after=1
                    ) from error
        if incoming.body is not None:
            incoming.body.close()
        return Started(task, is_replay=True)

    def _started_with(self, key: StartKey) -> AsyncRouteTask | None:
        found = self.store.started_with(key.name)
        if found is None:
            return None
        task, fingerprint = found
        if fingerprint != key.fingerprint:
            raise errors.KeyReused(
                "This Idempotency-Key was used with a different method, URL or body. Use another "
                "key."
            )
        return task

    def _submit_unique(
        self, executor: TaskExecutor | None, incoming: StartRequest
    ) -> AsyncRouteTask:
        """Start a task; if an unfinished task has the same ``unique`` key, return that task."""
        validate(incoming)
        if incoming.route.options.unique is not False:
            take_unique_key(incoming, self.store.secret())
        if incoming.unique_key is None:
            return self._submit(executor, incoming)
        store = self.store if incoming.joined is None else incoming.joined
        for _ in range(UNIQUE_TRIES):
            found = store.started_with(incoming.unique_key)
            if found is not None:
                if incoming.key is not None and self._started_with(incoming.key) is not None:
                    raise errors.KeyTaken("Another task has this Idempotency-Key.")
                self._check_unique(incoming, found[0])
                if incoming.body is not None:
                    incoming.body.close()
                return found[0]
            try:
                return self._submit(executor, incoming)
            except errors.UniqueTaken:
                continue  # the other task has just been created, and perhaps has already ended
        raise errors.QueueFull(
            "Tasks with the unique key of this one start and end at the moment. Try again.",
            retry_after=1,
        )

    def _check_unique(self, incoming: StartRequest, task: AsyncRouteTask) -> None:
        """Raise TaskExists unless the caller may learn the id of the task with its unique key."""
        caller = incoming.caller
        if incoming.is_from_code:
            return
        if caller is None:
            # The key contains the credentials of unknown callers, if they have any.
            is_allowed = idempotency.has_credentials(incoming.current)
        else:
            # Everyone who knows the id may read an anonymous task, so do not send the id.
            admins, is_known = self.config.admins, not is_anonymous(task.user, task.granted)
            is_allowed = caller.is_in(admins) or (
                is_known and may_read(caller, task.user, task.granted, admins)
            )
        if not is_allowed:
            raise errors.TaskExists(
                "An unfinished task has the same unique key. Try again when it has ended.",
                retry_after=self.run_times.rest(task, now_us()),
            )

    def _submit(self, executor: TaskExecutor | None, incoming: StartRequest) -> AsyncRouteTask:
        """Store a task and pass it to the executor. Without an executor, only store it."""
        if executor is None:
            return self._create(incoming)
        route = incoming.route
        if self.is_closing:  # check again, because reading the request can take long
            if not (incoming.is_from_code and self._can_run_elsewhere(route)):
                raise _shutting_down()
            incoming.start_at_us = self.store.now_us()
            return self._create(incoming)
        if route.options.start_timeout is not None:
            # Otherwise, maintenance starts with the first run. But a busy Executor of the app may
            # start no task at all.
            self.start_maintenance()
        try:
            self._reserve(executor, incoming)
            if executor.is_queue:
                # Without a start time, workers would first leave the task to this process.
                incoming.start_at_us = self.store.now_us()
            try:
                task = self._create(incoming)
            except BaseException:
                executor.release()
                raise
        except (errors.QueueFull, errors.TooManyTasks) as refusal:
            refusal.retry_after = self.run_times.until_free(
                route.endpoint, route.options.max_workers
            )
            raise
        try:
            executor.submit(task.id)
        except Exception as error:
            is_logged = isinstance(error, errors.BrokerUnavailable)
            if not is_logged:
                logger.exception("The executor of endpoint %s rejected a task.", route.endpoint)
            deleted: list[bool] = []
            self.lifecycle.pending_writes.write(
                task.id, lambda: deleted.append(self.lifecycle.withdraw(task))
            )
            if deleted == [False]:
                return task  # another process has claimed the task
            if is_logged:
                raise
            raise errors.QueueFull(
                "The server's executor rejected the task. Try again.", retry_after=5
            ) from error
        return task

    def _reserve(self, executor: TaskExecutor, incoming: StartRequest) -> None:
        """Reserve a slot of the executor. If the queue is full, check the quota first: waiting for
        the queue does not help a user who is over it.
        """
        try:
            executor.reserve()
        except errors.QueueFull:
            caller, quota = incoming.caller, self.config.max_tasks_per_user
            if caller is None or quota is None:
                raise
            if self.store.count_unfinished(caller.id, quota) < quota:
                raise
            raise errors.TooManyTasks.of(quota) from None

    def _create(self, incoming: StartRequest) -> AsyncRouteTask:
        data = encode(incoming.captured)
        callback = incoming.route.options.callback
        if callback is not None:
            from ..request.callback import resolve  # needed only by apps with callbacks

            hosts = self.config.callback_allowed_hosts
            incoming.delivery = resolve(callback, incoming, incoming.name, hosts)
        grants = incoming.grants()
        quota = None if incoming.caller is None else self.config.max_tasks_per_user
        for _ in range(ID_TRIES):
            task = incoming.record(self.lifecycle.owner, self.config)
            try:
                if incoming.joined is not None:
                    incoming.joined.add(task, data, incoming.body, grants, incoming.delivery)
                else:
                    self.lifecycle.create(
                        task, data, incoming.body, grants, incoming.key, quota, incoming.delivery
                    )
            except errors.IdTaken:
                continue
            return task
        raise errors.CannotStart(
            f"The route's id generator returned {ID_TRIES} existing ids in a row; it must return "
            "unique ids."
        )


def unknown(task_id: str) -> errors.TaskNotFound:
    """Return the error for an id that is unknown, or whose task the caller may not read."""
    return errors.TaskNotFound(
        "There is no task with this id, or you may not read it.", task_id=task_id
    )


def _shutting_down() -> errors.ShuttingDown:
    return errors.ShuttingDown(
        "This server process is shutting down, so no task was started. Try again.", retry_after=1
    )
