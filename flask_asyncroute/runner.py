"""What one process has of one app: store, executors, threads. Made at first use, dropped after a fork."""

from __future__ import annotations

import logging
import math
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from werkzeug.utils import import_string

from . import app_path, drain
from .callbacks.sender import Sender
from .census import Census
from .config import Config, values_for_child
from .dispatcher import Dispatcher
from .errors import AsyncRouteError, QueueFull
from .executors.base import RUN, Run, TaskExecutor
from .finalizers import when_gone
from .housekeeping import Housekeeper, Job
from .lifecycle import Lifecycle
from .notifier import Notifier
from .places import Places
from .presence import Presence
from .query import NEWEST_FIRST
from .registry import Route
from .store_url import modules_of
from .stores.base import Readers
from .stores.opening import make_store
from .task import now_us
from .timekeeping import Timekeeper
from .typing import IdentityLoader

if TYPE_CHECKING:
    from flask import Flask

    from .executors.children import ForkServer

logger = logging.getLogger("flask_asyncroute")

LOOK_SECONDS = 0.5
TEND_SECONDS = 1.0
SEND_SECONDS = 0.5
TAKEOVER_AFTER_US = 1_000_000
"""A task that has waited this long may be taken by any process."""


class Runner:
    """Wires the parts that belong to one process. Its threads start when they are needed, and end with :meth:`close`."""

    def __init__(
        self,
        app: Flask,
        config: Config,
        routes: Mapping[str, Route],
        before_task: Sequence[Callable[[], Any]],
        identity_loader: Callable[[], IdentityLoader | None],
    ) -> None:
        self.app = app
        self.config = config
        self.routes = routes
        self.before_task = before_task
        self.store = make_store(config.store, app.instance_path, config.namespace, config.create_tables)
        self.lifecycle = Lifecycle(app, self.store, f"{os.getpid()}-{uuid.uuid4()}")
        self.dispatcher = Dispatcher(app, config, self.store, self.lifecycle, identity_loader, self.executor_of, routes)
        self.notifier = Notifier(app, self.store, self.dispatcher.heard, drain.is_near)
        self.places = Places(config.max_streams)
        self.presence: Presence | None = None
        self.sender = Sender(app, config, self.store.outbox, self.lifecycle, self.enter, self._look_for_callbacks)
        jobs = [Job(SEND_SECONDS, self.sender.look)]
        if self.store.workers is not None:
            self.presence = Presence(self.store.workers, self.lifecycle.owner, routes)
            census = Census(self.store, self.store.workers, self.lifecycle, self.presence)
            jobs += [
                Job(LOOK_SECONDS, census.look),
                Job(LOOK_SECONDS, self._take_over),
                Job(TEND_SECONDS, self.store.tend),
                Job(config.housekeeping_interval, census.find_forsaken),
            ]
        self.housekeeper = Housekeeper(
            app, self.store, self.lifecycle, self.dispatcher, config.housekeeping_interval, jobs
        )
        self.timekeeper = Timekeeper(self.dispatcher)
        self.lifecycle.unwritten.wake = self.housekeeper.wake
        self._lock = threading.Lock()
        self._has_told = False
        self._executors: dict[str, TaskExecutor] = {}
        self._run = _runs(weakref.ref(self))
        self._fork_server: ForkServer | None = None
        when_gone(self, self.store.close)
        drain.at_exit(self)

    def executor_of(self, route: Route) -> TaskExecutor:
        """Return the executor of a route's pool, made when it is first asked for."""
        executor = self._executors.get(route.pool)
        if executor is None:
            with self._lock:
                executor = self._executors.get(route.pool)
                if executor is None:
                    executor = self._executors[route.pool] = self._make_executor(route)
        return executor

    @property
    def executors(self) -> list[TaskExecutor]:
        """The executors that have been asked for so far."""
        return list(self._executors.values())

    def enter(self) -> None:
        """Have this process count as a worker from now on, and its house kept.

        :raises StoreUnavailable: where the store cannot be written.
        """
        if self.presence is not None:
            self.presence.enter()
        self.timekeeper.start()
        self.housekeeper.start()

    def _look_for_callbacks(self) -> None:
        # A process that keeps no house sends none either; those that do will find them, if there are any.
        if not self.store.is_shared:
            self.housekeeper.start()
        if self.housekeeper.is_running:
            self.housekeeper.call(self.sender.look)

    def wake(self) -> None:
        """Have all that is due for the runs of this process looked at."""
        self.timekeeper.wake()
        self.housekeeper.wake()

    def close(self) -> None:
        """End the threads and close the store; tasks that run go on until they end."""
        drain.forget(self)
        self.sender.close()
        self.timekeeper.close()
        self.housekeeper.close()
        self.lifecycle.unwritten.retry(math.inf)
        self.notifier.close()
        for executor in self.executors:
            executor.close()
        if self.presence is not None:
            self._close_presence(self.presence)
        if self._fork_server is not None:
            self._fork_server.close()
        self.store.close()

    def _close_presence(self, presence: Presence) -> None:
        if self.dispatcher.running:
            presence.close()
            return
        try:
            presence.leave()
        except AsyncRouteError as error:
            logger.warning("This worker could not say that it leaves; others will find it gone. (%s)", error)

    def tell_of_unlisted(self) -> None:
        """Log, once, that lists leave out tasks that nobody owns, and how to have them."""
        if not self._has_told and self.store.query((), NEWEST_FIRST, 1, None, Readers(anonymous=True)):
            self._has_told = True
            logger.warning(
                "Lists leave out tasks that were started by nobody known, since they are anybody's who has their id. "
                "Set ASYNCROUTE_LIST_ANONYMOUS to True to list them, or give an identity_loader."
            )

    def _make_executor(self, route: Route) -> TaskExecutor:
        options = route.options
        if isinstance(options.executor, Executor):
            from .executors.futures import FutureTaskExecutor

            return FutureTaskExecutor(options.executor, self._run, options.max_workers, options.queue_size)
        if options.executor == "immediate":
            from .executors.immediate import ImmediateTaskExecutor

            return ImmediateTaskExecutor(self._run, options.max_workers, options.queue_size)
        if options.executor == "process":
            from .executors.children import ForkServer
            from .executors.processes import ProcessTaskExecutor

            if self._fork_server is None:
                self._fork_server = ForkServer(
                    app_path.found(self.app, self.config.app),
                    values_for_child(self.app, self.config),
                    self.config.max_result,
                    modules_of(self.config.store),
                )
            return ProcessTaskExecutor(
                route.pool, self._run, self._fork_server, options.min_workers, options.max_workers, options.queue_size
            )
        from .executors.threads import ThreadTaskExecutor

        return ThreadTaskExecutor(
            route.pool, self._run, options.min_workers, options.max_workers, options.queue_size, options.interrupt_after
        )

    def _take_over(self) -> None:
        """Submit tasks that have waited for over a second to executors with a free place, and a few more for the next ones."""
        if self.dispatcher.is_closing:
            return
        room = {
            route.pool: self.executor_of(route).room() for route in self.routes.values() if not route.options.is_bound
        }
        most = {route.endpoint: room[route.pool] for route in self.routes.values() if room.get(route.pool)}
        if not most:
            return
        for task_id, endpoint in self.store.waiting(most, now_us() - TAKEOVER_AFTER_US):
            route = self.routes[endpoint]
            executor = self.executor_of(route)
            if room[route.pool] and not executor.holds(task_id):
                try:
                    executor.reserve()
                except QueueFull:
                    continue
                room[route.pool] -= 1
                executor.submit(task_id)


def _runs(reference: weakref.ref[Runner]) -> Run:
    """Return what executors call. Their threads must not keep a runner alive, hence the weak reference."""

    def run(executor: TaskExecutor, task_id: str) -> None:
        runner = reference()
        if runner is not None:
            import_string(RUN)(runner, executor, task_id)

    return run
