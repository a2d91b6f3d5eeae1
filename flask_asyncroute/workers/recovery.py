"""Detect dead worker processes and recover their tasks.

Several processes can do this concurrently.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..engine.lifecycle import Lifecycle
from ..executors.registry import CELERY_WORKER
from ..stores.base import SharedTaskStore, Worker
from ..task import State, now_us
from . import process_lock
from .app_identity import difference
from .heartbeat import LEASE_SECONDS, Heartbeat

logger = logging.getLogger("flask_asyncroute")

# The gap is longer than a check of a slow store takes. It is shorter than the lease (LEASE_SECONDS
# of `heartbeat`) by more than a heartbeat interval.
GAP_SECONDS = 15.0
"""Maximum seconds between two checks of the heartbeats.

After a longer gap, this process or the store was stalled. Then a missing heartbeat does not mean
that a worker is dead.
"""
CONFIRM_SECONDS = 0.4  # a lock can be free by accident for a shorter time
ROUTE_GONE_SECONDS = 3600.0
ROUTE_GONE = "Route gone"
PAGE = 500
FAR_FUTURE_US = 2**62


@dataclass(eq=False)
class Recovery:
    """Detects dead worker processes of an app and recovers their tasks. Not thread-safe."""

    store: SharedTaskStore
    lifecycle: Lifecycle
    heartbeat: Heartbeat
    _beats: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The last heartbeat of each worker, and the monotonic time when this process first saw it."""
    _free: dict[str, float] = field(default_factory=dict)
    """For each worker whose lock is free: the monotonic time when a check first found it free."""
    _differences: set[str] = field(default_factory=set)
    """The differences between apps that were already logged."""
    _running: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The endpoints of each worker that serves requests and was not found dead."""
    _checked_at: float = field(default_factory=lambda: time.monotonic())
    _unlisted: dict[str, float] = field(default_factory=dict)
    """For each endpoint that no worker has: the monotonic time when this was first seen."""

    def recover_tasks(self) -> None:
        self.heartbeat.enter()
        listed = {worker.name: worker for worker in self.store.workers.listed()}
        if self.heartbeat.name not in listed:
            # Another worker has deleted this process's row. Without it, other workers would detect
            # the death of this process only after the lease.
            self.heartbeat.send_soon()
        for name in self.store.workers.owners():
            # A worker without a row can still be running. Its next heartbeat restores the row.
            listed.setdefault(name, Worker(name, "", 0, "", frozenset(), beat=-1))
        now = time.monotonic()
        if now - self._checked_at > GAP_SECONDS:
            self._beats.clear()
            self._free.clear()
        self._checked_at = now
        for seen in (self._beats, self._free):
            for name in seen.keys() - listed.keys():
                del seen[name]
        running = {
            worker.name: worker.endpoints
            for worker in listed.values()
            if not worker.name.startswith(CELERY_WORKER)
        }
        for worker in listed.values():
            is_alive = worker.name == self.heartbeat.name or self._is_alive(worker, now)
            if is_alive:
                self._warn_of_other_app(worker)
            if is_alive is not False:
                continue
            running.pop(worker.name, None)
            held = self.store.workers.held(worker.name)
            for task in held:
                self.lifecycle.recover(task)
            self.store.workers.leave(worker.name)
            if any(not task.is_completed for task in held):
                logger.warning(
                    "The worker %s died; its %d unfinished tasks were aborted or restarted.",
                    worker.name, len(held),
                )  # fmt: skip
        self._running = running

    def is_first(self, endpoints: Collection[str]) -> bool:
        """Return whether this process is the one that does what only one process should do for
        these endpoints. For a moment, several or none can be the first. Thread-safe.
        """
        # Processes of another release may not have these endpoints.
        running = (name for name, own in self._running.items() if not own.isdisjoint(endpoints))
        return min(running, default=self.heartbeat.name) == self.heartbeat.name

    def _warn_of_other_app(self, worker: Worker) -> None:
        found = difference(self.heartbeat.views, worker.views)
        if found is not None and found not in self._differences:
            self._differences.add(found)
            logger.warning(
                "This worker, %s, and the worker %s use the same namespace, but %s. Different apps "
                "would run each other's tasks: set another ASYNCROUTE_NAMESPACE for one of them. "
                "During the deployment of a new release this warning is expected.",
                self.heartbeat.name, worker.name, found,
            )  # fmt: skip

    def abort_unroutable(self) -> None:
        """Abort the waiting tasks of endpoints that no worker has had for an hour."""
        workers = self.store.workers
        listed = {endpoint for worker in workers.listed() for endpoint in worker.endpoints}
        unlisted = [endpoint for endpoint in workers.wanted() if endpoint not in listed]
        now = time.monotonic()
        self._unlisted = {name: self._unlisted.get(name, now) for name in unlisted}
        gone = [name for name, since in self._unlisted.items() if now - since >= ROUTE_GONE_SECONDS]
        if gone:
            logger.warning(
                "No running worker has had these endpoints for an hour: %s. Their "
                "waiting tasks are aborted.",
                ", ".join(gone),
            )
        limits = dict.fromkeys(gone, PAGE)
        while gone and (waiting := self.store.waiting(limits, now_us(), FAR_FUTURE_US)):
            for found in waiting:
                task = self.store.get(found.id)
                if task is not None and task.state is State.NOT_STARTED:
                    self.lifecycle.abort(task, ROUTE_GONE)

    def _is_alive(self, worker: Worker, now: float) -> bool | None:
        """Check whether another worker is alive. Returns None if it is too early to decide."""
        lock_file = self.heartbeat.lock_file
        if lock_file is not None and worker.lock_file == lock_file.name:
            if lock_file.is_held(worker.number):
                self._free.pop(worker.name, None)
                return True
            is_running = process_lock.is_running(worker.process)
            if not is_running:
                free_for = now - self._free.setdefault(worker.name, now)
                is_dead = is_running is False or free_for >= CONFIRM_SECONDS
                return False if is_dead else None
            # The process runs, but its code keeps closing the lock file, so use its heartbeats.
        beat, since = self._beats.get(worker.name, (None, now))
        if beat != worker.beat:
            self._beats[worker.name] = (worker.beat, now)
            return None if beat is None else True
        return False if now - since >= LEASE_SECONDS else None
