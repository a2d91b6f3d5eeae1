"""The signals of the package (blinker).

*Facts*, in the past tense, are sent by `lifecycle` after the store has the fact, in the process that wrote it, at most
once, with an app context pushed. The sender is the Flask app; receivers take ``task`` (the record) and ``**extra``.
A receiver that raises is logged and the next one still runs. *Requests* have one receiver of our own, which decides.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from blinker import Namespace

if TYPE_CHECKING:
    from blinker import NamedSignal
    from flask import Flask

_namespace = Namespace()

task_created = _namespace.signal("task-created", "The task is in the store, and not started.")
task_started = _namespace.signal("task-started", "A worker has claimed the task and is about to run it.")
task_progressed = _namespace.signal("task-progressed", "New progress is in the store; several steps may come as one.")
task_completed = _namespace.signal("task-completed", "The view has returned and its result is in the store.")
task_failed = _namespace.signal("task-failed", "The view, or what prepares it, has raised.")
task_aborted = _namespace.signal("task-aborted", "The task was stopped, or ran out of time.")
task_finished = _namespace.signal("task-finished", "The task has reached one of its three terminal states.")

callback_sent = _namespace.signal("callback-sent", "The receiver has taken the callback of a task: it answered 2xx.")
callback_failed = _namespace.signal("callback-failed", "The callback of a task was given up: the last attempt failed.")

task_changed = _namespace.signal(
    "task-changed", "Any of the facts above, for our own notifier: id, revision and state."
)
callback_pending = _namespace.signal(
    "callback-pending", "A task has changed that has ended and whose callback is yet to be sent; for our own sender."
)
events_written = _namespace.signal("events-written", "Events of a view are in the store; for our own notifier.")
progress_reported = _namespace.signal(
    "progress-reported", "A request: write this progress down. Answered by the lifecycle."
)

FACTS = (
    task_created, task_started, task_progressed, task_completed, task_failed, task_aborted, task_finished, callback_sent,
    callback_failed,
)  # fmt: skip


def send_fact(signal: NamedSignal, app: Flask, logger: logging.Logger, **values: Any) -> None:
    """Tell every receiver of ``signal``; one that raises is logged with its traceback and keeps nobody from hearing."""
    for receiver in signal.receivers_for(app):
        try:
            receiver(app, **values)
        except (Exception, SystemExit):
            logger.exception("A receiver of %s raised: %r. The fact stands.", signal.name, receiver)
