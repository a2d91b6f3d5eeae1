"""Processes of ``flask asyncroute worker``, which are replaced when they have been killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tests.support.server import GRACE, PATIENCE, ROOT
from tests.support.waiting import eventually_true

STARTED = " runs tasks from "
"""In the line that a worker logs when it takes tasks."""


class WorkerProcess:
    """Runs ``flask asyncroute worker`` in the project folder while the context lasts.

    :param log: the file for its output.
    :param app: the import string of the app.
    """

    def __init__(self, log: Path, app: str, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "flask", "--app", app, "asyncroute", "worker", *options]
        with log.open("wb") as output:
            # A new session, so that all its processes can be killed together.
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def __enter__(self) -> WorkerProcess:
        try:
            self.wait_until_started()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text("utf-8", "replace")

    def wait_until_started(self) -> None:
        eventually_true(lambda: STARTED in self.output() or self.has_ended, PATIENCE, 0.02)
        assert not self.has_ended, f"The worker did not start:\n{self.output()}"

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = GRACE) -> int:
        """Wait for its end; return the exit code, which is negative after a signal."""
        return self._process.wait(seconds)

    def end(self) -> None:
        """Terminate the process, and kill what remains of its session after the grace period."""
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


class WorkerProcesses:
    """Runs several workers of an app while the context lasts.

    :param folder: for their logs.
    """

    def __init__(self, folder: Path, app: str, count: int, *options: str) -> None:
        self._folder = folder
        self._app = app
        self._count = count
        self._options = options
        self._started: list[WorkerProcess] = []

    def __enter__(self) -> WorkerProcesses:
        try:
            self.pids()
            for worker in self.running:
                worker.wait_until_started()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def running(self) -> list[WorkerProcess]:
        return [worker for worker in self._started if not worker.has_ended]

    def pids(self) -> list[int]:
        """Replace the workers that have ended; return the pids of those that take tasks."""
        for _ in range(self._count - len(self.running)):
            log = self._folder / f"worker-{len(self._started)}.log"
            self._started.append(WorkerProcess(log, self._app, *self._options))
        return [worker.pid for worker in self.running if STARTED in worker.output()]

    def assert_no_traceback(self) -> None:
        """Fail if any worker has logged a traceback."""
        for worker in self._started:
            log = worker.output()
            assert "Traceback" not in log, f"a worker logged an error:\n{log[-3000:]}"

    def _end(self) -> None:
        for worker in self._started:
            worker.end()
