"""Send the callbacks that are due, each on its own thread.

A failed callback does not change the State of its task.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from flask import Flask
from standardwebhooks import Webhook

from .. import signals
from ..callbacks.model import COMPLETED, FAILED, NOT_STARTED, RUNNING, Callback, Delivery
from ..callbacks.url import parse_url
from ..callbacks.validation import DEPTH_HEADER
from ..config import Config
from ..encoding import CONTENT_TYPES, encode_json, encode_xml, encode_yaml
from ..engine.lifecycle import Lifecycle
from ..errors import CallbackRefused, CommitUnknown, TaskUnfinished
from ..stores.outbox import AT_ONCE, Due, Outbox
from ..task import AsyncRouteTask, State, now_us
from .client import Outcome, post

logger = logging.getLogger("flask_asyncroute")

MOST_THREADS = 32  # simultaneous attempts; at most two per host
DELAYS = (0.0, 5.0, 30.0, 120.0)  # seconds before each attempt; later delays double
MAX_DELAY = 3600.0
JITTER = 0.2  # random part of a delay, to spread retries


class Sender:
    """Sends the callbacks that are due, and stores the outcomes. Thread-safe.

    :param outbox: stores the callbacks and assigns each to one process.
    :param enter: registers this process as a worker. It is called before this process takes
        callbacks.
    :param schedule: makes a background thread call :meth:`look`.
    """

    def __init__(
        self,
        app: Flask,
        config: Config,
        outbox: Outbox,
        lifecycle: Lifecycle,
        enter: Callable[[], None],
        schedule: Callable[[], object],
    ) -> None:
        self._config = config
        self._outbox = outbox
        self._lifecycle = lifecycle
        self._enter = enter
        self._schedule = schedule
        self._lock = threading.Lock()
        self._active: set[str] = set()
        self._must_release = False
        self._is_closed = False
        self.is_closing = False  # whether no more attempts start
        # Signals hold weak references and do not keep this object alive.
        signals.callback_pending.connect(self.on_callback_pending, sender=app)

    def on_callback_pending(self, sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        if task.id not in self._active:
            self._schedule()

    def redeliver(self, task: AsyncRouteTask, callback: Callback | None) -> AsyncRouteTask | None:
        """Send the callback of a finished task again, in the background.

        :param callback: the callback of the task's route; None if the route no longer exists or has
            no callback.
        :return: the task; None if it was removed.
        :raises TaskUnfinished: if the task has not ended, or its callback is being sent.
        :raises CallbackRefused: if the task has no callback.
        """
        if task.callback_json is None:
            raise CallbackRefused(
                "This task has no callback, because its request had no callback URL.",
                task_id=task.id,
            )
        if not task.is_completed:
            raise TaskUnfinished(
                "The task has not ended; its callback is sent when it ends.", task_id=task.id
            )
        headers = {} if callback is None else callback.literal_headers
        renewed = self._outbox.redeliver(task.id, headers)
        if renewed is None:
            return None
        if renewed.callback_state != NOT_STARTED:
            raise TaskUnfinished(
                "The callback is being sent now; try again in a minute.", task_id=task.id
            )
        self._lifecycle.notify(None, renewed)
        return renewed

    def close(self) -> None:
        """Start no more attempts, and record no more outcomes.

        If an attempt is running, another process will send its callback again.
        """
        self.is_closing = True
        self._is_closed = True

    def look(self) -> None:
        """Start to send the callbacks that are due, at most MOST_THREADS at the same time.

        :raises StoreUnavailable: if the store cannot be used.
        """
        with self._lock:
            capacity = MOST_THREADS - len(self._active)
        now = now_us()
        if self.is_closing:
            return
        if self._must_release:
            # Otherwise, no process could send the callbacks that a failed claim left here.
            self._outbox.release(self._lifecycle.owner, keep=frozenset(self._active))
            self._must_release = False
        if capacity <= 0 or self._outbox.next_due(now) != AT_ONCE:
            return
        self._enter()
        try:
            for due in self._outbox.claim(self._lifecycle.owner, now, capacity):
                self._begin(due)
        except (CommitUnknown, RuntimeError):
            # This process can have claimed callbacks that no thread sends. The next look() releases
            # them.
            self._must_release = True
            raise

    def _begin(self, due: Due) -> None:
        with self._lock:
            self._active.add(due.task.id)
        self._lifecycle.notify(None, due.task)
        thread = threading.Thread(
            target=self._send, args=(due,), name="asyncroute-callback", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._active.discard(due.task.id)
            raise

    def _send(self, due: Due) -> None:
        task_id = due.task.id
        outcome = self._attempt(due)
        state, due_us = _next(due.attempts + 1, outcome, self._config.callback_attempts)

        def record() -> None:
            task = self._outbox.record_attempt(task_id, self._lifecycle.owner, state, due_us)
            if task is not None:
                self._report(task, outcome)

        def free() -> None:
            with self._lock:
                self._active.discard(task_id)
            self._schedule()

        if self._is_closed:
            return  # a write would reopen the closed store
        try:
            self._lifecycle.pending_writes.write(task_id, record, free)
        except Exception:
            logger.exception(
                "The outcome of a callback attempt for task %s could not be stored. The callback "
                "is sent again after this process ends.",
                task_id,
            )
            free()

    def _attempt(self, due: Due) -> Outcome:
        config, delivery = self._config, due.delivery
        try:
            body = body_of(due.task, delivery)
            headers = headers_of(delivery, body, config.callback_secret)
            address, allowed = parse_url(delivery.url), config.callback_allowed_hosts
            return post(address, delivery.method, headers, body, delivery.is_trusted, allowed)
        except Exception as error:
            logger.exception(
                "The callback of task %s could not be sent because of an internal error.",
                due.task.id,
            )
            return Outcome(False, reason=f"internal error: {type(error).__name__}")

    def _report(self, task: AsyncRouteTask, outcome: Outcome) -> None:
        signal = None
        reason = outcome.reason
        if task.callback_state == COMPLETED:
            signal = signals.callback_sent
        elif task.callback_state == FAILED:
            signal = signals.callback_failed
            logger.warning(
                "The callback of task %s failed after %d attempts: %s. It is not retried.",
                task.id, task.callback_attempts, reason,
            )  # fmt: skip
        else:
            logger.info(
                "An attempt to send the callback of task %s failed and will be retried: %s.",
                task.id, reason,
            )  # fmt: skip
        self._lifecycle.notify(signal, task, status=outcome.status, reason=reason)


def _next(attempts: int, outcome: Outcome, most: int) -> tuple[str, int | None]:
    """Return the state of a callback after an attempt, and when the next attempt is due.

    :param most: maximum number of attempts.
    :return: the time is None if no attempt follows.
    """
    if outcome.is_sent:
        return COMPLETED, None
    if outcome.is_gone or attempts >= most:
        return FAILED, None
    seconds = delay(attempts) * random.uniform(1 - JITTER, 1 + JITTER)
    return RUNNING, now_us() + int(max(seconds, outcome.retry_after) * 1_000_000)


def delay(attempts: int) -> float:
    """Return the mean number of seconds to wait before the next attempt.

    :param attempts: the number of attempts so far.
    """
    if attempts < len(DELAYS):
        return DELAYS[attempts]
    return min(DELAYS[-1] * 2.0 ** (attempts - len(DELAYS) + 1), MAX_DELAY)


def body_of(task: AsyncRouteTask, delivery: Delivery) -> bytes:
    is_json = delivery.content_type == "application/json"
    document: dict[str, Any] = {
        "Id": task.id,
        "Url": task.url,
        "Method": task.method,
        "EventName": delivery.event_name,
        "State": task.state.value,
    }
    if task.state is not State.COMPLETED:
        document["Error"] = task.error or ""
    elif delivery.send_result and task.result_json is not None:
        document["Result"] = msgspec.Raw(task.result_json) if is_json else task.result
    if is_json:
        return encode_json(document)
    is_xml = delivery.content_type == "application/xml"
    return encode_xml(document, "Callback") if is_xml else encode_yaml(document)


def headers_of(delivery: Delivery, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    headers = dict(delivery.headers)
    if not any(name.lower() == "user-agent" for name in headers):
        headers["User-Agent"] = "flask-asyncroute"
    headers["Content-Type"] = CONTENT_TYPES[delivery.content_type]
    headers[DEPTH_HEADER] = str(delivery.depth)
    # Not now_us(): `testing.Clock` does not set the clock of the receiver.
    seconds = int(time.time())
    return headers | signature_headers(secrets, delivery.webhook_id, seconds, body)


def signature_headers(
    secrets: Sequence[str], webhook_id: str, at: int, body: bytes
) -> dict[str, str]:
    """Return the headers that identify and sign a message, as defined by Standard Webhooks.

    :param secrets: each secret adds a signature, so that secrets can be rotated. Without secrets,
        the message is not signed.
    :param webhook_id: the same for every attempt. It contains no ``.``.
    :param at: the time of this attempt, in seconds since the epoch.
    """
    fields = {"webhook-id": webhook_id, "webhook-timestamp": str(at)}
    if secrets:
        sent_at, text = datetime.fromtimestamp(at, UTC), body.decode()
        signatures = (Webhook(secret).sign(webhook_id, sent_at, text) for secret in secrets)
        fields["webhook-signature"] = " ".join(signatures)
    return fields
