"""Sends tasks to Celery again: those whose start time has come, and those with a lost message."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import BrokerUnavailable
from ..executors.celery import CeleryTaskExecutor
from ..routes import Route
from ..stores.base import SharedTaskStore, Waiting
from ..task import now_us

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
    """Finds the waiting tasks of all Celery routes. Not thread-safe.

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
    _next_check: float = 0.0

    def send_again(self) -> None:
        if not self.is_first():
            return
        now = time.monotonic()
        self._sent = {task: at for task, at in self._sent.items() if now - at < OVERDUE_SECONDS}
        limits = dict.fromkeys(self.routes, PAGE)
        now_us = self.store.now_us()
        try:
            for task in self.store.waiting(limits, None, now_us + self.look_ahead_us):
                if task.due_us > now_us:
                    self.call_at(task.due_us)
                elif task not in self._sent and now_us - task.due_us < LOST_SECONDS * 1_000_000:
                    self._send(task)  # `_send_lost` sends older ones again
            if now >= self._next_check:
                self._next_check = now + LOST_SECONDS
                self._send_lost()
        except BrokerUnavailable:
            pass  # the executor has logged the error

    def _send_lost(self) -> None:
        before = now_us() - int(LOST_SECONDS * 1_000_000)
        queues: dict[str | None, list[Waiting]] = {}
        for task in self.store.waiting(dict.fromkeys(self.routes, PAGE), before):
            queues.setdefault(self._executor(task).queue_name(), []).append(task)
        for waiting in queues.values():
            count = self._executor(waiting[0]).waiting_messages()
            # A worker can also hold messages before it runs them. They are sent again once, and are
            # then in the queue.
            lost = 0 if count is None else len(waiting) - count
            overdue = MOST_OVERDUE
            for task in waiting:  # the oldest first, because their messages were sent first
                now = time.monotonic()
                sent_at = self._sent.get(task, now - (now_us() - task.due_us) / 1_000_000)
                if now - sent_at < LOST_SECONDS:
                    continue
                if lost > 0:
                    lost -= 1
                elif overdue > 0 and now - sent_at >= OVERDUE_SECONDS:
                    overdue -= 1
                else:
                    continue
                self._send(task)

    def _executor(self, task: Waiting) -> CeleryTaskExecutor:
        return self.executor_of(self.routes[task.endpoint])

    def _send(self, task: Waiting) -> None:
        self._executor(task).submit(task.id)
        if len(self._sent) < LONGEST_MEMORY:
            self._sent[task] = time.monotonic()
