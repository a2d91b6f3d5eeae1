"""The entry point of a child process: load the app, run one task, and report to the parent.

The fork server imports this module by name and calls :func:`be_child_process`,
:func:`close_early_stores` and, in each child, :func:`main`. The child does not claim tasks,
change their State or run maintenance.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import msgspec

from . import app_loader, snapshot
from .background import Loop
from .config import take_values
from .executors.base import ChildSettings
from .executors.execution import Execution
from .executors.outcome import Outcome, failed
from .executors.process import protocol
from .runtime import be_child_process, close_early_stores, runtime_of
from .workers.run_task import execute

logger = logging.getLogger("flask_asyncroute")

REPORT_SECONDS = 0.1
"""Minimum interval between progress reports to the parent."""
LONGEST_SLEEP = 30.0

__all__ = ["be_child_process", "close_early_stores", "main"]


def main(channel: socket.socket) -> None:
    """Run one task for the parent at the other end of ``channel``; return early if the parent
    exits.
    """
    pieces = iter(lambda: protocol.receive(channel), b"")
    incoming = protocol.frames(pieces, protocol.TO_CHILD)
    reporter = _Reporter(channel)
    first = next(incoming, None)
    if first is None:
        return
    settings = msgspec.json.decode(first[1], type=ChildSettings)
    try:
        app = app_loader.load(settings.app)
        runtime = runtime_of(app)
        take_values(app, settings.values, settings.own)
        runner = runtime.become_child()
    except BaseException as error:
        logger.exception("A child process could not load the app.")
        outcome = failed(error, settings.values.get("ASYNCROUTE_EXPOSE_ERRORS", True))
        reporter.end(replace(outcome, can_retry=True))
        return
    reporter.send(protocol.READY, str(os.getpid()).encode())
    second = next(incoming, None)
    if second is None:
        return
    job = msgspec.json.decode(second[1], type=protocol.Job)
    execution = reporter.execution = Execution(job.task_id, wake=reporter.wake)
    seconds = None if job.deadline is None else job.deadline - time.monotonic()
    execution.begin(
        job.user, job.epoch, seconds, attempt=job.attempt, retries_left=job.retries_left
    )
    body = snapshot.Body(_pieces(incoming, job.body_size)) if job.body_size else None
    pid = os.getpid()
    outcome = execute(runner, job.endpoint, bytes(job.request), body, execution)
    if os.getpid() != pid:
        # The view has forked this process and returned in the copy, too. Only the original reports
        # the outcome.
        os._exit(1)
    reporter.end(outcome)


def _pieces(incoming: Iterator[tuple[bytes, bytes]], size: int) -> Iterator[bytes]:
    while size > 0:
        _, piece = next(incoming)
        size -= len(piece)
        yield piece


class _Reporter(Loop):
    """Sends progress and events to the parent on a thread; :meth:`end` sends the outcome on the
    calling thread.
    """

    def __init__(self, channel: socket.socket) -> None:
        super().__init__("asyncroute-reporter")
        self.execution: Execution | None = None
        self._channel = channel
        self._sending = threading.Lock()
        self._report_at = 0.0

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame, unless the outcome was sent or the parent has exited."""
        with self._sending, suppress(OSError):
            if not self._is_closed:
                protocol.send(self._channel, kind, payload)

    def wake(self) -> None:
        self.start()
        super().wake()

    def end(self, outcome: Outcome) -> None:
        """Send the outcome. If this fails, the parent reports this process's exit status
        instead.
        """
        report: protocol.Report = None, None
        if self.execution is not None:
            self._send_events(self.execution)
            report = self.execution.final_report()
        values = outcome.values
        result = msgspec.Raw(values.get("result_json", b"null"))
        ending = protocol.Ending(
            outcome.state, report, result, values.get("error"), values.get("error_status"),
            outcome.can_retry, outcome.retry_after,
        )  # fmt: skip
        self.send(protocol.OUTCOME, msgspec.json.encode(ending))
        self._is_closed = True

    def _step(self) -> float:
        execution = self.execution
        assert execution is not None, "only an execution wakes this thread"
        self._send_events(execution)
        now = time.monotonic()
        due = execution.advance_by_time(now) or now + LONGEST_SLEEP
        if execution.has_report and now < self._report_at:
            due = min(due, self._report_at)
        elif (report := execution.take_report()) is not None:
            self._report_at = now + REPORT_SECONDS
            self.send(protocol.PROGRESS, msgspec.json.encode(report))
        return max(due - now, 0.0)

    def _send_events(self, execution: Execution) -> None:
        with execution.writing:
            for event in execution.take_events():
                payload = msgspec.json.encode((event.name, msgspec.Raw(event.data)))
                self.send(protocol.EVENT, payload)
