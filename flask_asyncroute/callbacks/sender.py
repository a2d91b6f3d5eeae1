"""Sends the callbacks that are due: takes them from the outbox, tries, and writes what became of it.

`runner` has its housekeeper look for them; each attempt is made on a thread of its own, since a receiver may take its time.
Nothing that a receiver does changes the State of a task.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal

from .. import context, signals
from ..config import Config
from ..delivery import COMPLETED, FAILED, PENDING, RUNNING
from ..errors import CommitUnknown
from ..lifecycle import Lifecycle
from ..stores.outbox import AT_ONCE, Due, Outbox
from ..task import AsyncRouteTask, now_us

if TYPE_CHECKING:
    from flask import Flask

    from .attempt import Outcome

logger = logging.getLogger("flask_asyncroute")

MOST_THREADS = 8
"""Attempts that one process makes at once."""
DELAYS = (0.0, 5.0, 30.0, 120.0)
"""Seconds before each attempt; after these each waits twice as long as the one before."""
LONGEST_DELAY = 3600.0
SPREAD = 0.2
"""By which part a delay is longer or shorter, so that not all come at once."""

_CONTENT_TYPES = {name: f"{name}; charset=utf-8" for name in ("application/xml", "application/yaml")}
"""Of those that do not say by themselves that they are UTF-8."""


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
        self._app = app
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
        signals.task_changed.connect(self.on_task_changed, sender=app)

    def on_task_changed(self, sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        """Look for what is due when a task has ended that has a callback. The receiver of `task_changed`."""
        if task.callback_state in PENDING and task.state.is_terminal and task.id not in self._active:
            self._look_soon()

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
        signals.send_fact(signals.task_changed, self._app, logger, task=due.task)
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
                "Content-Type": _CONTENT_TYPES.get(delivery.content_type, delivery.content_type),
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
        signals.send_fact(signals.task_changed, self._app, logger, task=task)
        if task.callback_state == COMPLETED:
            self._send_fact(signals.callback_sent, task, outcome)
        elif task.callback_state == FAILED:
            logger.warning(
                "The callback of task %s has failed after %d attempts: %s.",
                task.id,
                task.callback_attempts,
                outcome.reason,
            )
            self._send_fact(signals.callback_failed, task, outcome)
        else:
            logger.info("An attempt at the callback of task %s failed: %s.", task.id, outcome.reason)

    def _send_fact(self, fact: NamedSignal, task: AsyncRouteTask, outcome: Outcome) -> None:
        if fact.receivers:
            tell = partial(signals.send_fact, fact, self._app, logger, task=task)
            with context.in_app(self._app):
                tell(status=outcome.status, reason=outcome.reason)


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
