"""A clock that tests can set ahead."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from flask import Flask

from .. import validators
from ..runtime import runtime_of
from ..task import skip
from ..workers.runner import Runner

PATIENCE = 10.0
"""Seconds for the work that is due after a skip."""


class Clock:
    """Sets the clock of an app's tasks ahead. Use it as a context manager.

    Between two calls of `advance`, time passes as usual. The clock is that of the whole process;
    other processes keep theirs. At the end of the block, it is set back.
    """

    def __init__(self, app: Flask) -> None:
        self._runtime = runtime_of(app)
        self._skipped_us = 0

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        skip(-self._skipped_us)
        self._skipped_us = 0

    def advance(self, time: float | timedelta) -> None:
        """Set the clock ahead, and do what is due then.

        When it returns, tasks that were due have been passed to their executors, running tasks past
        their ``timeout`` have been timed out, callbacks that were due are being sent, and tasks
        past their ``start_timeout`` or ``retention`` have been aborted or removed.

        :param time: seconds or a timedelta.
        """
        seconds = validators.seconds("time", time)
        runner = self._runtime.runner
        _wait_for_claims(runner)
        skipped_us = round(seconds * 1_000_000)
        skip(skipped_us)
        self._skipped_us += skipped_us
        for execution, _ in list(runner.dispatcher.running.values()):
            execution.skip(seconds)
        runner.timekeeper.wake()
        if not runner.maintenance.do_all().wait(PATIENCE):
            raise TimeoutError(f"The background work of the app took longer than {PATIENCE:g} s.")


def _wait_for_claims(runner: Runner) -> None:
    """Wait until each run has claimed its task. Otherwise, a task could be ``Running`` already, but
    its deadline would be counted from the new time.
    """
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    for task_id, (execution, _) in list(runner.dispatcher.running.items()):
        while (
            not execution.epoch and runner.dispatcher.running.get(task_id, (None,))[0] is execution
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Task {task_id} was not claimed within {PATIENCE:g} s.")
            pause.wait(0.001)
