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
from typing import Any, cast

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

logger = logging.getLogger("flask_asyncroute")

LOOK_SECONDS = 0.5
MAINTAIN_SECONDS = 1.0
SEND_SECONDS = 0.5
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
            app, self.store, self.lifecycle.owner, self.dispatcher.on_change, is_ending
        )
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
                Job(LOOK_SECONDS, recovery.recover_tasks),
                Job(MAINTAIN_SECONDS, self.store.maintain),
                Job(interval, recovery.abort_unroutable),
            ]
            if self.has_celery:
                jobs.append(self._celery_job(self.store, recovery))
        return jobs

    def _celery_job(self, store: SharedTaskStore, recovery: Recovery) -> Job:
        from .lost_messages import LostMessages  # imports Celery

        routes = {
            name: route
            for name, route in self.routes.items()
            if kind_of(route.options.executor).runs_elsewhere
        }
        messages = LostMessages(
            store, routes, cast(Any, self.executor_of), recovery.is_first,
            lambda time_us: self._hasten(job, time_us), int(LOOK_SECONDS * 1_000_000),
        )  # fmt: skip
        job = Job(LOOK_SECONDS, messages.send_again)
        return job

    @property
    def has_celery(self) -> bool:
        """Whether Celery workers run the tasks of any route."""
        return any(kind_of(r.options.executor).runs_elsewhere for r in self.routes.values())

    @cached_property
    def celery(self) -> Any:
        """The Celery app that sends and runs the tasks.

        :raises ConfigurationError: if there is none.
        """
        from ..executors.celery import find_celery

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
        self.maintenance.start()

    def _start_maintenance(self) -> None:
        with suppress(RuntimeError):  # the system has no more threads; the next start tries again
            self.maintenance.start()

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
            and not kind_of(route.options.executor).runs_elsewhere
        }
        capacity = {
            pool: self._takeover_capacity(pool) for pool in {r.pool for r in waiting.values()}
        }
        limits = {name: capacity[route.pool] for name, route in waiting.items()}
        limits = {name: limit for name, limit in limits.items() if limit}
        if not limits:
            return
        now = now_us()
        soon = now + int(LOOK_SECONDS * 1_000_000)
        found = self.store.waiting(limits, now - TAKEOVER_AFTER_US, soon, self.lifecycle.owner)
        for task_id, endpoint, due_us in found:
            if now < due_us < soon:
                self._take_over_at(due_us)
                continue
            route = waiting[endpoint]
            executor = self.executor_of(route)
            if capacity[route.pool] and not executor.holds(task_id):
                try:
                    executor.reserve()
                except QueueFull:
                    continue
                capacity[route.pool] -= 1
                executor.submit(task_id)

    def _send_restarted(self, task: AsyncRouteTask) -> None:
        route = self.routes.get(task.endpoint)
        if route is not None and kind_of(route.options.executor).runs_elsewhere:
            with suppress(BrokerUnavailable):  # lost messages are sent again
                self.executor_of(route).submit(task.id)

    def _take_over_at(self, time_us: int) -> None:
        """Call :meth:`_take_over` at this time, or earlier."""
        self._hasten(self._take_over_job, time_us)

    def _hasten(self, job: Job, time_us: int) -> None:
        job.hasten(time.monotonic() + (time_us - now_us()) / 1_000_000)
        self.maintenance.wake()

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


def _runs(reference: weakref.ref[Runner]) -> Run:
    """Return the function that executors call to run a task. The function does not keep the runner
    alive.
    """

    def run(executor: TaskExecutor, task_id: str) -> None:
        runner = reference()
        if runner is not None:
            run_task.run(runner, executor, task_id)

    return run
