"""Finds the workers that are gone, and settles what they left: tasks that ran there, routes that nobody has any more.

`housekeeping` calls it in every runner. Each step is a compare-and-set, so it does no harm that several do the same.
"""

from __future__ import annotations

import logging
import time

from . import locks
from .lifecycle import Lifecycle
from .presence import LEASE_SECONDS, Presence
from .states import State
from .stores.base import TaskStore, Worker, Workers
from .task import now_us

logger = logging.getLogger("flask_asyncroute")

GAP_SECONDS = 15.0
"""Where nobody could look for so long, the store or this process stood still, and silence says nothing of others. Less than the
lease by more than a beat, and more than a look takes where each call of the store takes seconds."""
CONFIRM_SECONDS = 0.4
"""A lock that is free for so long is not one that was dropped by mistake: its owner would have it again, see `presence`."""
ROUTE_GONE_SECONDS = 3600.0
ROUTE_GONE = "Route gone"
PAGE = 500


class Census:
    """Takes stock of the workers of one app. Its methods are called by one thread.

    :param presence: this process among them.
    """

    def __init__(self, store: TaskStore, workers: Workers, lifecycle: Lifecycle, presence: Presence) -> None:
        self._store = store
        self._workers = workers
        self._lifecycle = lifecycle
        self._presence = presence
        self._heard: dict[str, tuple[int, float]] = {}
        """By worker, the last beat that was seen and when it was new (monotonic)."""
        self._free: dict[str, float] = {}
        """By worker, since when its lock was free at every look (monotonic)."""
        self._looked_at = time.monotonic()
        self._unlisted: dict[str, float] = {}
        """By endpoint, since when no worker has it (monotonic)."""

    def look(self) -> None:
        """Settle what workers that are gone have left."""
        self._presence.enter()
        listed = {worker.name: worker for worker in self._workers.listed()}
        if self._presence.name not in listed:
            # As in a file that was put in the place of the store's; without its row this process would be found by the lease.
            self._presence.beat_soon()
        for name in self._workers.owners():
            # One that was taken for dead, or whose row was lost, may live; it enters again with its next beat.
            listed.setdefault(name, Worker(name, "", 0, "", frozenset(), beat=-1))
        now = time.monotonic()
        if now - self._looked_at > GAP_SECONDS:
            self._heard.clear()
            self._free.clear()
        self._looked_at = now
        for seen in (self._heard, self._free):
            for name in seen.keys() - listed.keys():
                del seen[name]
        for worker in listed.values():
            if worker.name != self._presence.name and self._is_gone(worker, now):
                self._bury(worker)

    def find_forsaken(self) -> None:
        """Abort the tasks that wait for a route which no worker has had for an hour."""
        listed = frozenset[str]().union(*(worker.endpoints for worker in self._workers.listed()))
        unlisted = {endpoint for endpoint in self._workers.wanted() if endpoint not in listed}
        now = time.monotonic()
        self._unlisted = {endpoint: self._unlisted.get(endpoint, now) for endpoint in unlisted}
        gone = [endpoint for endpoint, since in self._unlisted.items() if now - since >= ROUTE_GONE_SECONDS]
        if gone:
            logger.warning("No worker has had the endpoints %s for an hour; their tasks are aborted.", ", ".join(gone))
        while gone and (waiting := self._store.waiting(dict.fromkeys(gone, PAGE), now_us())):
            for task_id, _ in waiting:
                task = self._store.get(task_id)
                if task is not None and task.state is State.NOT_STARTED:
                    self._lifecycle.abort(task, ROUTE_GONE)

    def _is_gone(self, worker: Worker, now: float) -> bool:
        """Return whether a worker is. A lock that is free may have been dropped by mistake, see `locks`."""
        lock_file = self._presence.lock_file
        if lock_file is not None and worker.place == lock_file.name:
            if lock_file.is_held(worker.number):
                self._free.pop(worker.name, None)
                return False
            is_running = locks.is_running(worker.process)
            if not is_running:
                free_for = now - self._free.setdefault(worker.name, now)
                return is_running is False or free_for >= CONFIRM_SECONDS
            # Something in that process closes the file again and again. Its beats tell whether it lives.
        beat, since = self._heard.get(worker.name, (None, now))
        if beat != worker.beat:
            self._heard[worker.name] = (worker.beat, now)
            return False
        return now - since >= LEASE_SECONDS

    def _bury(self, worker: Worker) -> None:
        held = self._workers.held(worker.name)
        for task in held:
            self._lifecycle.lose(task)
        self._workers.leave(worker.name)
        if held:
            logger.warning("The worker %s is gone; it left %d tasks behind that had begun.", worker.name, len(held))
