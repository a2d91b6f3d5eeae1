"""The runner: store, executors and background threads of one app in one process."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flask import Flask

from .. import app_loader
from ..background import when_gone
from ..config import Config, values_for_child
from ..engine.dispatcher import Dispatcher
from ..engine.lifecycle import Lifecycle
from ..engine.notifier import Notifier
from ..errors import AsyncRouteError, BrokerUnavailable, QueueFull
from ..executors.base import ChildSettings, PoolSettings, Run, TaskExecutor
from ..executors.registry import CELERY_WORKER, kind_of, make_executor
from ..query import NEWEST_FIRST
from ..request.identity import IdentityLoader
from ..routes import Route
from ..stores.base import Readers, SharedTaskStore, TaskStore
from ..stores.registry import make_store, modules_of
from ..task import AsyncRouteTask, now_us
from ..webhooks.sender import Sender
from . import app_identity, run_task
from .heartbeat import Heartbeat
from .maintenance import Job, Maintenance, Timekeeper
from .recovery import Recovery

if TYPE_CHECKING:
    from .broker_loop import BrokerLoop

logger = logging.getLogger("flask_asyncroute")

LOOK_SECONDS = 0.5
ENDING_SECONDS = 0.05  # until the thread of an ending run has probably left its slot
MAINTAIN_SECONDS = 1.0
SEND_SECONDS = 0.5
PUBLISH_PAGE = 200  # maximum number of tasks to publish at once
TAKEOVER_AFTER_US = 1_000_000  # Any process may run a task that has waited this long.


def new_store(app: Flask, config: Config) -> TaskStore:
    """Create the configured store without opening it."""
    return make_store(config.store, app.instance_path, config.namespace, config.create_tables)


class Runner:
    """The store, executors and threads of one app in this process. It is created at first use, and
    discarded after a fork.

    Its threads start when they are needed. :meth:`close` ends them. In a Celery worker, it only
    runs the tasks that Celery delivers; the processes of the web servers do the rest.
    """

    def __init__(
        self, app: Flask, config: Config, store: TaskStore, routes: Mapping[str, Route],
        before_task: Sequence[Callable[[], Any]],
        identity_loader: Callable[[], IdentityLoader | None],
        is_ending: Callable[[], bool] = lambda: False, is_inline: bool = False,
        name_prefix: str = "",
    ) -> None:  # fmt: skip
        self.app = app
        self.config = config
        self.is_inline = is_inline  # tasks ignore delays; see `testing.inline`
        self.routes = routes
        self.before_task = before_task
        self.store = store
        self.is_celery_worker = name_prefix.startswith(CELERY_WORKER)
        self.lifecycle = Lifecycle(app, self.store, f"{name_prefix}{os.getpid()}-{uuid.uuid4()}")
        self.dispatcher = Dispatcher(
            app, config, self.store, self.lifecycle, identity_loader, self.executor_of, routes,
            self._start_maintenance,
        )  # fmt: skip
        self.notifier = Notifier(
            app, self.store, self.lifecycle.owner, self.dispatcher.on_change, is_ending,
            _publishes(weakref.ref(self)),
        )  # fmt: skip
        self.stream_slots = threading.BoundedSemaphore(config.max_streams)
        self.heartbeat: Heartbeat | None = None
        self.sender = Sender(
            app, config, self.store.outbox, self.lifecycle, self.enter, self._send_callbacks
        )
        if isinstance(self.store, SharedTaskStore):
            self.heartbeat = Heartbeat(
                self.store.workers, self.lifecycle.owner, routes, app_identity.views_of(app, routes)
            )
        self._take_over_job = Job(LOOK_SECONDS, self._take_over)
        self._publish_job = Job(math.inf, self._publish_free)
        self._broker_loop: BrokerLoop | None = None
        jobs = [] if self.is_celery_worker else self._jobs()
        self.maintenance = Maintenance(app, self.lifecycle, self.dispatcher, jobs)
        self.timekeeper = Timekeeper(self.dispatcher)
        self.lifecycle.pending_writes.wake = self.maintenance.wake
        self.lifecycle.call_at = self._take_over_at
        self.lifecycle.on_restart = self._send_restarted
        self._lock = threading.Lock()
        self._has_warned = False
        self._is_open = False
        self.superseded_by: Callable[[], app_identity.Runner | None] = lambda: None
        """Returns the runner of another app that has opened the same namespace later, or None."""
        self._executors: dict[str, TaskExecutor] = {}
        self._broken_pools: set[str] = set()  # Pools without an executor because of an error.
        self._run = _runs(weakref.ref(self))
        when_gone(self, self.store.close)

    def _jobs(self) -> list[Job]:
        """Return the background work of a process that serves requests."""
        interval = self.config.housekeeping_interval
        jobs = [
            self._take_over_job,
            Job(interval, self.lifecycle.delete_expired),
            Job(SEND_SECONDS, self.sender.look),
            Job(MAINTAIN_SECONDS, self.lifecycle.abort_expired),
        ]
        if isinstance(self.store, SharedTaskStore) and self.heartbeat is not None:
            recovery = Recovery(self.store, self.lifecycle, self.heartbeat)
            jobs += [
                Job(LOOK_SECONDS, self._publish_all),
                self._publish_job,
                Job(LOOK_SECONDS, recovery.recover_tasks),
                Job(MAINTAIN_SECONDS, self.store.maintain),
                Job(interval, recovery.abort_unroutable),
            ]
            self._broker_loop = self._new_broker_loop(self.store, recovery)
        return jobs

    def _new_broker_loop(self, store: SharedTaskStore, recovery: Recovery) -> BrokerLoop | None:
        routes = {name: route for name, route in self.routes.items() if _runs_elsewhere(route)}
        if not routes:
            return None
        from .broker_loop import BrokerLoop  # imports Celery

        return BrokerLoop(store, self.lifecycle, routes, self.executor_of, recovery)

    @cached_property
    def celery(self) -> Any:
        """The Celery app that sends and runs the tasks.

        :raises ConfigurationError: if the app has no usable Celery app.
        """
        from ..executors.celery_app import find_celery

        return find_celery(self.app, self.config.celery)

    def executor_of(self, route: Route) -> TaskExecutor:
        """Return the executor of a route's pool; the first call creates it."""
        with self._lock:
            executor = self._executors.get(route.pool)
            if executor is None:
                executor = self._executors[route.pool] = self._make_executor(route)
            return executor

    @property
    def executors(self) -> list[TaskExecutor]:
        """The executors created so far."""
        return list(self._executors.values())

    def open(self) -> None:
        """Open the store.

        :raises ConfigurationError: if the store cannot work with this configuration, or another app
            of this process has opened the namespace since the last call.
        :raises StoreUnavailable: if the store cannot be opened now.
        """
        self.store.open()
        if not self._is_open:
            app_identity.supersede_others(self)
            self._is_open = True
        app_identity.refuse_superseded(self)

    def enter(self) -> None:
        """Register this process as a worker, and start its threads. Raises the errors of
        :meth:`open`.
        """
        self.open()
        if self.heartbeat is not None:
            self.heartbeat.enter()
        self.timekeeper.start()
        self.start_maintenance()

    def start_maintenance(self) -> None:
        """Start the threads that do background work.

        :raises RuntimeError: if the system has no more threads. Call this again to retry.
        """
        self.maintenance.start()
        if self._broker_loop is not None:
            self._broker_loop.start()

    def _start_maintenance(self) -> None:
        with suppress(RuntimeError):  # the next start tries again
            self.start_maintenance()

    def _send_callbacks(self) -> None:
        if self.is_celery_worker:
            return  # other processes send it
        # If the store is shared and maintenance is not running, other processes send the callbacks.
        if not self.store.is_shared:
            self.maintenance.start()
        if self.maintenance.is_running:
            self.maintenance.call(self.sender.look)

    def wake(self) -> None:
        """Wake the background threads to handle a change of a run of this process."""
        self.timekeeper.wake()
        self.maintenance.wake()

    def close(self) -> None:
        """End the threads and close the store. Running tasks are not stopped."""
        app_identity.leave(self)
        for executor in self.executors:  # close these first, so that no queued task starts
            executor.close()
        self.sender.close()
        self.timekeeper.close()
        self.maintenance.close()
        if self._broker_loop is not None:
            self._broker_loop.close()
        self.lifecycle.pending_writes.retry(math.inf)
        self.notifier.close()
        if self.heartbeat is not None and self.dispatcher.running:
            self.heartbeat.close()  # stay registered while tasks are running
        elif self.heartbeat is not None:
            try:
                self.heartbeat.leave()
            except AsyncRouteError as error:
                logger.warning(
                    "Could not unregister this worker; other workers will detect its exit. (%s)",
                    error,
                )
        self.store.close()

    def warn_about_unlisted(self) -> None:
        """If lists omit tasks of unknown users, log once how to list them."""
        anonymous = Readers(anonymous=True)
        if not self._has_warned and self.store.query((), NEWEST_FIRST, 1, None, anonymous):
            self._has_warned = True
            logger.warning(
                "Lists omit tasks of anonymous callers, because anyone who knows the id of such a "
                "task may read and stop it. Set ASYNCROUTE_LIST_ANONYMOUS to True to list them, or "
                "register an identity_loader."
            )

    def child_settings(self) -> ChildSettings:
        """Return the settings that child processes need to run tasks of this app."""
        return ChildSettings(
            app_loader.found(self.app, self.config.app),
            *values_for_child(self.app, self.config),
            self.config.max_result,
            modules_of(self.config.store),
        )

    def _make_executor(self, route: Route) -> TaskExecutor:
        options = route.options
        settings = PoolSettings(
            route.pool, self._run, options.max_workers, options.queue_size, options.min_workers,
            options.interrupt_after, options.executor, options.is_bound, options.celery, self,
        )  # fmt: skip
        return make_executor(settings)

    def _take_over(self) -> None:
        """Submit tasks that have waited for over a second, and tasks whose start time has come, up
        to the capacity of each executor.
        """
        if self.dispatcher.is_closing or self.superseded_by() is not None:
            return
        waiting = {
            name: route
            for name, route in self.routes.items()
            if not kind_of(route.options.executor).runs_inline
            and not _runs_elsewhere(route)
            # A process that is no runner takes only tasks that no other process can run.
            and (route.options.is_bound or self.dispatcher.is_runner or not self.store.is_shared)
        }
        capacity = {
            pool: self._takeover_capacity(pool) for pool in {r.pool for r in waiting.values()}
        }
        limits = {name: capacity[route.pool] for name, route in waiting.items()}
        limits = {name: limit for name, limit in limits.items() if limit}
        if not limits:
            return
        before = now_us() - TAKEOVER_AFTER_US
        now = self.store.now_us()
        soon = now + int(LOOK_SECONDS * 1_000_000)
        found = self.store.waiting(limits, before, soon, self.lifecycle.owner)
        for task_id, endpoint, due_us in found:
            if now < due_us < soon:
                self._take_over_at(due_us)
                continue
            route = waiting[endpoint]
            executor = self.executor_of(route)
            if capacity[route.pool] and not executor.holds(task_id):
                capacity[route.pool] -= 1
                if not self._submit(route, task_id):
                    capacity[route.pool] = 0
        if any(not capacity[waiting[endpoint].pool] for endpoint in limits):
            # More tasks may wait than one look takes over. Their slots are perhaps free soon.
            self._take_over_job.hasten(time.monotonic() + ENDING_SECONDS)

    def _submit(self, route: Route, task_id: str) -> bool:
        """Pass a waiting task to its executor. Return False if that failed."""
        executor = self.executor_of(route)
        try:
            executor.reserve()
            executor.submit(task_id)
        except QueueFull:
            return False
        except Exception:
            if route.pool not in self._broken_pools:
                self._broken_pools.add(route.pool)
                logger.exception(
                    "The executor of %s accepts no tasks, so its tasks wait.", route.pool
                )
            return False
        return True

    def publish_soon(self) -> None:
        """Publish tasks that transactions of the app have added. Returns immediately."""
        self._publish_job.hasten(time.monotonic())
        self.maintenance.wake()

    def _publish_all(self) -> None:
        self.notifier.listen()
        self._publish(is_for_free_slots=False)

    def _publish_free(self) -> None:
        self._publish(is_for_free_slots=True)

    def _publish(self, is_for_free_slots: bool) -> None:
        """Publish tasks that transactions of the app have added, and start those for which a slot
        is free.

        :param is_for_free_slots: leave the other tasks to runners that have free slots, or send
            Celery messages.
        """
        store = self.store
        if not isinstance(store, SharedTaskStore) or not store.has_unpublished:
            return
        if self.dispatcher.is_closing or self.superseded_by() is not None:
            return
        if not self.dispatcher.is_runner:
            return
        capacity: dict[str, int] = {}
        for task in store.unpublished(PUBLISH_PAGE):
            route = self.routes.get(task.endpoint)
            pool = "" if route is None else route.pool
            if route is not None and pool not in capacity:
                capacity[pool] = self._takeover_capacity(pool)
            has_room = capacity.get(pool, 0) > 0
            is_sender = (
                self._broker_loop is not None and route is not None and _runs_elsewhere(route)
                and self._broker_loop.is_first()
            )  # fmt: skip
            if is_for_free_slots and not (has_room or is_sender):
                continue
            published = self.lifecycle.publish(task)
            is_due = task.start_at_us is None or task.start_at_us <= self.store.now_us()
            if published is None or route is None or not (has_room and is_due):
                continue
            capacity[pool] -= 1
            self._submit(route, task.id)  # if this fails, a runner takes the task over later

    def _send_restarted(self, task: AsyncRouteTask) -> None:
        route = self.routes.get(task.endpoint)
        if self._broker_loop is not None:
            self._broker_loop.send_restarted(task)
        elif route is not None and _runs_elsewhere(route):
            with suppress(BrokerUnavailable):  # lost messages are sent again
                self.executor_of(route).submit(task.id)

    def _take_over_at(self, time_us: int) -> None:
        """Call :meth:`_take_over` soon after this time, or earlier; send Celery messages then."""
        # A failed attempt still occupies its slot until its thread has ended.
        seconds = max((time_us - self.store.now_us()) / 1_000_000, ENDING_SECONDS)
        self._take_over_job.hasten(time.monotonic() + seconds)
        self.maintenance.wake()
        if self._broker_loop is not None:
            self._broker_loop.send_at(time_us)

    def _takeover_capacity(self, pool: str) -> int:
        route = next(route for route in self.routes.values() if route.pool == pool)
        try:
            return self.executor_of(route).takeover_capacity()
        except Exception:
            if pool not in self._broken_pools:
                self._broken_pools.add(pool)
                logger.exception(
                    "The executor of %s could not be created, so its tasks wait.", pool
                )
            return 0


def _runs_elsewhere(route: Route) -> bool:
    return kind_of(route.options.executor).runs_elsewhere


def _publishes(reference: weakref.ref[Runner]) -> Callable[[], None]:
    """Return the function that a listener calls when the app's transactions have added tasks. The
    function does not keep the runner alive.
    """

    def publish() -> None:
        runner = reference()
        if runner is not None:
            runner.publish_soon()

    return publish


def _runs(reference: weakref.ref[Runner]) -> Run:
    """Return the function that executors call to run a task. The function does not keep the runner
    alive.
    """

    def run(executor: TaskExecutor, task_id: str) -> None:
        runner = reference()
        if runner is not None:
            run_task.run(runner, executor, task_id)

    return run
