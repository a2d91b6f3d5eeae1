"""Sends the callbacks that are due: takes them from the outbox, tries, and writes what became of it.

`runner` has its housekeeper look for them; each attempt is made on a thread of its own, since a receiver may take its time.
Nothing that a receiver does changes the State of a task.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import signals
from ..config import Config
from ..delivery import COMPLETED, FAILED, NOT_STARTED, RUNNING
from ..encoding import CONTENT_TYPES
from ..errors import CallbackRefused, CommitUnknown, TaskUnfinished
from ..lifecycle import Lifecycle
from ..options import Callback
from ..stores.outbox import AT_ONCE, Due, Outbox
from ..task import AsyncRouteTask, now_us

if TYPE_CHECKING:
    from flask import Flask

    from .attempt import Outcome

logger = logging.getLogger("flask_asyncroute")

MOST_THREADS = 32
"""Attempts that one process makes at once; each host that hangs keeps two of them busy."""
DELAYS = (0.0, 5.0, 30.0, 120.0)
"""Seconds before each attempt; after these each waits twice as long as the one before."""
LONGEST_DELAY = 3600.0
SPREAD = 0.2
"""By which part a delay is longer or shorter, so that not all come at once."""


class Sender:
    """Makes the attempts of one process. Thread-safe.

    :param enter: makes this process a worker that others see to, where it is none yet.
    :param look_soon: has :meth:`look` called once more, in the background.
    """

    def __init__(
        self,
        app: Flask,
        config: Config,
        outbox: Outbox,
        lifecycle: Lifecycle,
        enter: Callable[[], None],
        look_soon: Callable[[], object],
    ) -> None:
        self._config = config
        self._outbox = outbox
        self._lifecycle = lifecycle
        self._enter = enter
        self._look_soon = look_soon
        self._lock = threading.Lock()
        self._active: set[str] = set()
        self._is_unsure = False
        self._is_closed = False
        self.is_closing = False
        """Whether this process begins no more attempts."""
        # Weak, unlike other receivers: the signal must not keep this object, and with it the app, alive.
        signals.callback_pending.connect(self.on_callback_pending, sender=app)

    def on_callback_pending(self, sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        """Look for what is due. The receiver of `callback_pending`."""
        if task.id not in self._active:
            self._look_soon()

    def redeliver(self, task: AsyncRouteTask, callback: Callback | None) -> AsyncRouteTask | None:
        """Have the callback of a finished task sent once more; return the task as it is then, None where it was removed.

        :param callback: of its route, where that is still there.
        :raises TaskUnfinished: while it has not ended, or its callback is being sent.
        :raises CallbackRefused: where it has no callback.
        """
        from .resolving import literal_headers

        if task.callback_json is None:
            raise CallbackRefused("This task has no callback: its request had no URL for one.", task_id=task.id)
        if not task.is_completed:
            raise TaskUnfinished(
                "The callback is sent when the task has ended; it still runs or waits.", task_id=task.id
            )
        renewed = self._outbox.redeliver(task.id, {} if callback is None else literal_headers(callback))
        if renewed is None:
            return None
        if renewed.callback_state != NOT_STARTED:
            raise TaskUnfinished("The callback is being sent at this moment; try again in a minute.", task_id=task.id)
        self._lifecycle.tell(None, renewed)
        return renewed

    def close(self) -> None:
        """Begin no more attempts, and write nothing of those that are being made: others will make them again."""
        self.is_closing = True
        self._is_closed = True

    def look(self) -> None:
        """Begin the attempts that are due, as many as there are threads for.

        :raises StoreUnavailable: where the store cannot be used.
        """
        with self._lock:
            room = MOST_THREADS - len(self._active)
        now = now_us()
        if self.is_closing:
            return
        if self._is_unsure:
            # First: what this process holds is due for nobody.
            self._outbox.release(self._lifecycle.owner, keep=frozenset(self._active))
            self._is_unsure = False
        if room <= 0 or self._outbox.next_due(now) != AT_ONCE:
            return
        self._enter()
        try:
            for due in self._outbox.claim(self._lifecycle.owner, now, room):
                self._begin(due)
        except (CommitUnknown, RuntimeError):
            # They may be ours, or are and there is no room for their threads; the next look lets go of them.
            self._is_unsure = True
            raise

    def _begin(self, due: Due) -> None:
        with self._lock:
            self._active.add(due.task.id)
        self._lifecycle.tell(None, due.task)
        try:
            threading.Thread(target=self._send, args=(due,), name="asyncroute-callback", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._active.discard(due.task.id)
            raise

    def _send(self, due: Due) -> None:
        task_id = due.task.id
        outcome = self._attempt(due)
        state, due_us = _next(due.attempts + 1, outcome, self._config.callback_attempts)

        def settle() -> None:
            task = self._outbox.settle(task_id, self._lifecycle.owner, state, due_us)
            if task is not None:
                self._tell(task, outcome)

        def free() -> None:
            with self._lock:
                self._active.discard(task_id)
            self._look_soon()

        if self._is_closed:
            return  # the store is closed too, and a write would open it again
        try:
            self._lifecycle.unwritten.write(task_id, settle, free)
        except Exception:
            logger.exception("What became of the callback of task %s could not be written.", task_id)
            free()

    def _attempt(self, due: Due) -> Outcome:
        # What only callbacks need is not imported before there is one.
        from .. import web_address
        from .attempt import Outcome, post
        from .message import body_of
        from .resolving import DEPTH
        from .signing import signature_headers

        delivery = due.delivery
        try:
            body = body_of(due.task, delivery)
            has_name = any(name.lower() == "user-agent" for name in delivery.headers)
            headers = {
                **({} if has_name else {"User-Agent": "flask-asyncroute"}),
                **delivery.headers,
                "Content-Type": CONTENT_TYPES[delivery.content_type],
                DEPTH: str(delivery.depth),
                **signature_headers(self._config.callback_secrets, delivery.webhook_id, now_us() // 1_000_000, body),
            }
            return post(
                web_address.parse(delivery.url), delivery.method, headers, body, delivery.is_trusted,
                self._config.callback_allowed_hosts,
            )  # fmt: skip
        except Exception as error:
            logger.exception("The callback of task %s could not be made.", due.task.id)
            return Outcome(False, reason=f"it could not be made: {type(error).__name__}")

    def _tell(self, task: AsyncRouteTask, outcome: Outcome) -> None:
        fact = {COMPLETED: signals.callback_sent, FAILED: signals.callback_failed}.get(task.callback_state or "")
        if fact is signals.callback_failed:
            logger.warning(
                "The callback of task %s has failed after %d attempts: %s.",
                task.id, task.callback_attempts, outcome.reason,
            )  # fmt: skip
        elif fact is None:
            logger.info("An attempt at the callback of task %s failed: %s.", task.id, outcome.reason)
        self._lifecycle.tell(fact, task, status=outcome.status, reason=outcome.reason)


def _next(attempts: int, outcome: Outcome, most: int) -> tuple[str, int | None]:
    """Return the state of a callback after so many attempts, and when the next one is due."""
    if outcome.is_sent:
        return COMPLETED, None
    if outcome.is_gone or attempts >= most:
        return FAILED, None
    seconds = delay(attempts) * random.uniform(1 - SPREAD, 1 + SPREAD)
    return RUNNING, now_us() + int(max(seconds, outcome.retry_after) * 1_000_000)


def delay(attempts: int) -> float:
    """Return how many seconds after so many attempts the next is made, on average."""
    if attempts < len(DELAYS):
        return DELAYS[attempts]
    return min(DELAYS[-1] * 2.0 ** (attempts - len(DELAYS) + 1), LONGEST_DELAY)
