"""Celery workers in separate processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from tests.support.apps.celery_crowd import MODULE
from tests.support.processes import children
from tests.support.server import ROOT
from tests.support.waiting import eventually_true

PATIENCE = 40.0
"""Seconds for a worker to start."""
GRACE = 10.0


class CeleryWorker:
    """Runs ``celery worker`` in the project folder while the context lasts.

    :param log: the file for its output.
    :param module: the module with the Celery app ``celery``.
    """

    def __init__(
        self, log: Path, environ: dict[str, str], *options: str, pool: str = "prefork",
        concurrency: int = 2, module: str = MODULE,
    ) -> None:  # fmt: skip
        self.log = log
        self._environ = {**os.environ, "PYTHONUNBUFFERED": "1", **environ}
        self._command = [
            sys.executable, "-m", "celery", "-A", module, "worker", "--pool", pool, "--concurrency", str(concurrency),
            "--hostname", f"{uuid4().hex}@%h", "--loglevel", "INFO", "--without-gossip", "--without-mingle", *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the worker's main process."""
        assert self._process is not None, "used outside its context"
        return self._process.pid

    def __enter__(self) -> CeleryWorker:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, is_awaited: bool = True) -> None:
        """Start the worker, perhaps again."""
        with self.log.open("ab") as output:
            before = self.output().count(" ready.")
            self._process = process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environ, start_new_session=True,
            )  # fmt: skip
        if is_awaited:
            eventually_true(
                lambda: self.output().count(" ready.") > before or process.poll() is not None,
                PATIENCE, 0.02,
            )  # fmt: skip
            assert process.poll() is None, f"The worker did not start:\n{self.output()}"

    def children(self) -> list[int]:
        """Return the process ids of the pool."""
        return children(self.pid)

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Send a signal to the main process."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = GRACE) -> int:
        """Wait until the worker has exited; return its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def kill(self) -> None:
        """Kill all processes of the worker."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def stop(self) -> None:
        """Terminate the worker, and kill what remains after the grace period."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
