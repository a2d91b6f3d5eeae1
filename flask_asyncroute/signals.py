"""The signals (blinker) of the package.

The public signals (`PUBLIC_SIGNALS`) report a stored change, at most once, with an app context, in
the process that stored it. The sender is the Flask app; receivers take ``task`` (the record) and
``**extra``; those of `task_removed` take ``task_id`` and ``endpoint``. A receiver's error is
logged, and the other receivers run. Other signals are internal.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace
from flask import Flask

logger = logging.getLogger("flask_asyncroute")

_namespace = Namespace()

task_created = _namespace.signal("task-created", "The task has been stored and has not started.")
task_started = _namespace.signal(
    "task-started", "A worker has claimed the task and is about to run it."
)
task_progressed = _namespace.signal(
    "task-progressed", "New progress has been stored; one signal may cover several steps."
)
task_retried = _namespace.signal(
    "task-retried", "An attempt has failed; the task waits for its next attempt."
)
task_completed = _namespace.signal(
    "task-completed", "The view has returned and its result has been stored."
)
task_failed = _namespace.signal("task-failed", "The task has failed; its error says why.")
task_aborted = _namespace.signal(
    "task-aborted", "The task was stopped, timed out, or lost its worker process."
)
task_finished = _namespace.signal(
    "task-finished", "The task has reached one of its three terminal states."
)
task_removed = _namespace.signal(
    "task-removed", "The task was deleted by a purge or after its retention; it has no record."
)
callback_sent = _namespace.signal(
    "callback-sent", "The receiver has answered the callback of a task with a 2xx status."
)
callback_failed = _namespace.signal(
    "callback-failed", "The last attempt to send the callback of a task has failed."
)

# Internal signals.
task_changed = _namespace.signal("task-changed", "Any change of a task has been stored.")
callback_pending = _namespace.signal(
    "callback-pending", "A finished task with a pending callback has changed."
)
progress_reported = _namespace.signal("progress-reported", "A running task has progress to store.")
events_written = _namespace.signal("events-written", "Events of a view have been stored.")

PUBLIC_SIGNALS = (
    task_created, task_started, task_progressed, task_retried, task_completed, task_failed,
    task_aborted, task_finished, task_removed, callback_sent, callback_failed,
)  # fmt: skip


def send_to_receivers(signal: NamedSignal, app: Flask, **values: Any) -> None:
    for receiver in signal.receivers_for(app):
        try:
            receiver(app, **values)
        except (Exception, SystemExit):
            logger.exception(
                "A receiver of the signal %s raised an exception; the task is not affected: %r",
                signal.name,
                receiver,
            )
