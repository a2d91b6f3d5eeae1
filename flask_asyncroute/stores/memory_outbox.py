"""The outbox in the memory of this process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from ..delivery import NOT_STARTED, PENDING, RUNNING, Delivery
from ..task import AsyncRouteTask
from .outbox import AT_ONCE, LONGEST_US, PER_HOST, Due, Outbox


@dataclass(slots=True)
class _Kept:
    """One callback."""

    delivery: Delivery
    due_us: int | None = None
    attempts: int = 0
    holder: str | None = None

    def is_due(self, now_us: int) -> bool:
        if self.due_us is None or self.holder is not None:
            return False
        return not now_us < self.due_us <= now_us + LONGEST_US


class MemoryOutbox(Outbox):
    """Keeps the callbacks in a dict.

    :param lock: of the store, held by whoever calls :meth:`put`, :meth:`make_due` and :meth:`drop`.
    :param change: writes fields of a task; called with the lock held.
    """

    def __init__(
        self,
        lock: threading.Lock,
        tasks: Mapping[str, AsyncRouteTask],
        change: Callable[[AsyncRouteTask, dict[str, Any]], AsyncRouteTask],
    ) -> None:
        self._lock = lock
        self._tasks = tasks
        self._change = change
        self._kept: dict[str, _Kept] = {}

    def put(self, task_id: str, delivery: Delivery) -> None:
        """Store a callback with its task."""
        self._kept[task_id] = _Kept(delivery)

    def make_due(self, task_id: str) -> None:
        """Have the callback of a task sent: it has ended."""
        if task_id in self._kept:
            self._kept[task_id].due_us = AT_ONCE

    def drop(self, task_id: str) -> None:
        """Remove the callback of a task."""
        self._kept.pop(task_id, None)

    def next_due(self, now_us: int) -> int | None:
        with self._lock:
            waits = [kept for kept in self._kept.values() if kept.due_us is not None and kept.holder is None]
            if any(kept.is_due(now_us) for kept in waits):
                return AT_ONCE
            return min((kept.due_us for kept in waits if kept.due_us is not None), default=None)

    def claim(self, holder: str, now_us: int, limit: int) -> list[Due]:
        with self._lock:
            held = Counter(kept.delivery.host for kept in self._kept.values() if kept.holder is not None)
            due = [(kept.due_us or 0, task_id) for task_id, kept in self._kept.items() if kept.is_due(now_us)]
            taken: list[Due] = []
            for _, task_id in sorted(due):
                kept = self._kept[task_id]
                if len(taken) < limit and held[kept.delivery.host] < PER_HOST:
                    held[kept.delivery.host] += 1
                    kept.holder = holder
                    task = self._tasks[task_id]
                    if task.callback_state == NOT_STARTED:
                        task = self._change(task, {"callback_state": RUNNING})
                    taken.append(Due(task, kept.delivery, kept.attempts))
            return taken

    def settle(self, task_id: str, holder: str, state: str, due_us: int | None) -> AsyncRouteTask | None:
        with self._lock:
            kept = self._kept.get(task_id)
            if kept is None or kept.holder != holder:
                return None
            kept.holder = None
            kept.attempts += 1
            kept.due_us = due_us
            if state not in PENDING:
                kept.delivery = replace(kept.delivery, headers={})
            task = self._tasks[task_id]
            return self._change(task, {"callback_state": state, "callback_attempts": task.callback_attempts + 1})

    def release(self, holder: str, keep: Collection[str] = ()) -> None:
        with self._lock:
            for task_id, kept in self._kept.items():
                if kept.holder == holder and task_id not in keep:
                    kept.holder = None

    def redeliver(self, task_id: str, headers: Mapping[str, str]) -> AsyncRouteTask | None:
        with self._lock:
            kept, task = self._kept.get(task_id), self._tasks.get(task_id)
            if kept is None or task is None or not task.state.is_terminal:
                return None
            if kept.holder is not None:
                return task
            if task.callback_state not in PENDING:
                kept.delivery = replace(kept.delivery, headers=dict(headers))
            kept.due_us = AT_ONCE
            kept.attempts = 0
            return self._change(task, {"callback_state": NOT_STARTED, "callback_attempts": 0})
