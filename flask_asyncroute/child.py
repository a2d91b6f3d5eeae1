"""What a child process does: loads the app, runs one task, and tells its parent how that ended.

The fork server calls :func:`main`, by the name of this module. A child writes no State, keeps no house and takes no tasks.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from . import app_path, snapshot
from .config import take_values
from .execution import Execution
from .executors import frames
from .outcome import Outcome, failed
from .runner import Runner
from .runtime import runtime_of
from .worker import execute

logger = logging.getLogger("flask_asyncroute")

REPORT_SECONDS = 0.1
"""Progress is sent at most this often."""
LIMITS = {frames.SETTINGS: 16 * 1024 * 1024, frames.JOB: 16 * 1024 * 1024, frames.BODY: frames.PIECE}


def main(channel: socket.socket) -> None:
    """Run one task for whoever is at the other end; return where there is none, too."""
    incoming = frames.receive(channel, LIMITS)
    reporter = _Reporter(channel)
    try:
        _, encoded = next(incoming)
        settings = msgspec.json.decode(encoded, type=frames.Settings)
    except (StopIteration, OSError):
        return
    try:
        runner = _load(settings)
    except BaseException as error:
        logger.exception("A child could not load the app.")
        reporter.end(failed(error, settings.values.get("ASYNCROUTE_EXPOSE_ERRORS", True)))
        return
    reporter.send(frames.READY, str(os.getpid()).encode())
    try:
        _, encoded = next(incoming)
    except (StopIteration, OSError):
        return
    job = msgspec.json.decode(encoded, type=frames.Job)
    execution = Execution(job.task_id, wake=reporter.wake)
    execution.begin(job.user, job.epoch, None if job.deadline is None else job.deadline - time.monotonic())
    reporter.execution = execution
    body = snapshot.Body(_pieces(incoming, job.body_size)) if job.body_size else None
    pid = os.getpid()
    outcome = execute(runner, job.endpoint, bytes(job.request), body, execution)
    if os.getpid() != pid:
        # A copy that the view has forked and let return; what it says is not the task's outcome.
        os._exit(1)
    reporter.end(outcome)


def _load(settings: frames.Settings) -> Runner:
    app = app_path.load(settings.app)
    runtime = runtime_of(app)
    take_values(app, settings.values, settings.own)
    return runtime.become_child()


def _pieces(incoming: Iterator[tuple[bytes, bytes]], size: int) -> Iterator[bytes]:
    while size > 0:
        _, piece = next(incoming)
        size -= len(piece)
        yield piece


class _Reporter:
    """Sends to the parent: progress from a thread of its own, which begins with the first, and the outcome."""

    def __init__(self, channel: socket.socket) -> None:
        self.execution: Execution | None = None
        self._channel = channel
        self._lock = threading.Lock()
        self._has_news = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_over = False

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame, unless the outcome was sent or nobody is there."""
        with self._lock, suppress(OSError):
            if not self._is_over:
                frames.send(self._channel, kind, payload)

    def wake(self) -> None:
        """Take note that there is progress to send."""
        self._has_news.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="asyncroute-reporter", daemon=True)
                    self._thread.start()

    def end(self, outcome: Outcome) -> None:
        """Send the outcome. What cannot be sent the parent learns from the exit status."""
        progress, message = None, None
        if self.execution is not None:
            self._send_events(self.execution)
            progress, message = self.execution.final_report()
        values = outcome.values
        ending = frames.Ending(
            outcome.state,
            frames.Report(progress, message),
            msgspec.Raw(values.get("result_json", b"null")),
            values.get("error"),
            values.get("error_status"),
        )
        self.send(frames.OUTCOME, msgspec.json.encode(ending))
        self._is_over = True

    def _work(self) -> None:
        due: float | None = None
        report_at = 0.0
        while not self._is_over:
            self._has_news.wait(None if due is None else max(due - time.monotonic(), 0.0))
            self._has_news.clear()
            execution = self.execution
            if execution is None:
                continue
            self._send_events(execution)
            now = time.monotonic()
            due = execution.climb(now)
            if execution.has_report and now < report_at:
                due = report_at if due is None else min(due, report_at)
            elif (report := execution.take_report()) is not None:
                report_at = now + REPORT_SECONDS
                self.send(frames.PROGRESS, msgspec.json.encode(frames.Report(*report)))

    def _send_events(self, execution: Execution) -> None:
        with execution.writing:
            for event in execution.take_events():
                self.send(frames.EVENT, msgspec.json.encode(frames.Sent(event.name, msgspec.Raw(event.data))))
