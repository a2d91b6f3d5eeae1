"""Sends tasks to Celery again: those whose start time has come, and those with a lost message."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import BrokerUnavailable
from ..executors.celery import CeleryTaskExecutor
from ..routes import Route
from ..stores.base import SharedTaskStore, Waiting
from ..task import AsyncRouteTask, now_us

logger = logging.getLogger("flask_asyncroute")

LOST_SECONDS = 5.0
"""Seconds after which a message is lost if fewer messages are in the queue than tasks wait."""
OVERDUE_SECONDS = 60.0
"""Seconds after which a message is taken for lost in any case: the queue can contain messages of
other tasks.
"""
PAGE = 1000
MOST_OVERDUE = 20
"""Maximum overdue messages per queue and check, so that the queue of busy workers does not grow."""
LONGEST_MEMORY = 50_000


@dataclass(eq=False)
class LostMessages:
    """Finds the waiting tasks of all Celery routes.

    A doubled message does no harm, because only one claim succeeds. So only one process does this:
    the one for which ``is_first`` is true.
    """

    store: SharedTaskStore
    routes: Mapping[str, Route]
    executor_of: Callable[[Route], CeleryTaskExecutor]
    is_first: Callable[[], bool]
    call_at: Callable[[int], None]
    look_ahead_us: int
    _sent: dict[Waiting, float] = field(default_factory=dict)
    """When this process has sent a message again."""
    _restarted: deque[Waiting] = field(default_factory=deque)
    _next_check: float = 0.0

    def add(self, task: AsyncRouteTask) -> None:
        """Send this task with the next call of :meth:`send_again`, because its worker has ended.
        Thread-safe.
        """
        self._restarted.append(Waiting(task.id, task.endpoint, task.created_us))

    def send_again(self) -> None:
        now = time.monotonic()
        self._sent = {task: at for task, at in self._sent.items() if now - at < OVERDUE_SECONDS}
        try:
            while self._restarted:
                self._send(self._restarted[0])  # keep it if the broker refuses it
                self._restarted.popleft()
            if self.is_first():
                self._send_due()
                if now >= self._next_check:
                    self._next_check = now + LOST_SECONDS
                    self._send_lost()
        except BrokerUnavailable:
            pass  # the executor has logged the error

    def _send_due(self) -> None:
        """Send the tasks whose start time has come. `_send_lost` sends the older ones again."""
        now_us = self.store.now_us()
        limits = dict.fromkeys(self.routes, PAGE)
        for task in self.store.waiting(limits, None, now_us + self.look_ahead_us):
            if task.due_us > now_us:
                self.call_at(task.due_us)
            elif task not in self._sent and now_us - task.due_us < LOST_SECONDS * 1_000_000:
                self._send(task)

    def _send_lost(self) -> None:
        queues: dict[str | None, list[Waiting]] = {}
        for task in self.store.waiting(dict.fromkeys(self.routes, PAGE), now_us()):
            queues.setdefault(self._executor(task).queue_name(), []).append(task)
        for waiting in queues.values():
            if max(map(self._seconds_since_sent, waiting)) < LOST_SECONDS:
                continue
            count = self._executor(waiting[0]).waiting_messages()
            # A worker can also hold messages before it runs them. They are sent again once, and are
            # then in the queue.
            lost = 0 if count is None else len(waiting) - count
            overdue = MOST_OVERDUE
            for task in waiting:  # the oldest first, because their messages were sent first
                seconds = self._seconds_since_sent(task)
                if seconds < LOST_SECONDS:
                    continue
                if lost > 0:
                    lost -= 1
                elif overdue > 0 and seconds >= OVERDUE_SECONDS:
                    overdue -= 1
                else:
                    continue
                self._send(task)

    def _seconds_since_sent(self, task: Waiting) -> float:
        sent_at = self._sent.get(task)
        if sent_at is None:
            return (now_us() - task.due_us) / 1_000_000
        return time.monotonic() - sent_at

    def _executor(self, task: Waiting) -> CeleryTaskExecutor:
        return self.executor_of(self.routes[task.endpoint])

    def _send(self, task: Waiting) -> None:
        self._executor(task).submit(task.id)
        if len(self._sent) < LONGEST_MEMORY:
            self._sent[task] = time.monotonic()
