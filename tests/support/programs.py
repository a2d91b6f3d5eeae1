"""Programs in separate processes, which are killed with all their children at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.support.processes import children
from tests.support.waiting import eventually_true

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0
"""Seconds for a program to start."""
GRACE = 15.0
"""Seconds for a program to exit."""


class Program:
    """Runs a command in the project folder while the context lasts. It can be started again.

    :param log: the file for its output. The first start empties it.
    :param environ: added to the environment.
    """

    patience, grace = PATIENCE, GRACE

    def __init__(
        self, log: Path, command: Sequence[str], environ: dict[str, str] | None = None
    ) -> None:
        self.log = log
        self._command = command
        self._environ = {**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._printed = 0  # characters of the output before the last start

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The id of the process that was started; for gunicorn that of the arbiter."""
        assert self._process is not None, "used outside its context"
        return self._process.pid

    def start(self) -> None:
        """Start the program, perhaps again, and wait until it is ready."""
        if self._process is None:
            self.log.write_bytes(b"")
        self._printed = len(self.output())
        with self.log.open("ab") as output:
            # A new session, so that all its processes can be killed together.
            self._process = process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environ, start_new_session=True,
            )  # fmt: skip
        try:
            eventually_true(
                lambda: self._is_ready() or process.poll() is not None, self.patience, 0.02
            )
            assert self._is_ready(), f"{self._command} did not start:\n{self.output()}"
        except BaseException:
            self.stop()
            raise

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text("utf-8", "replace")

    def children(self) -> list[int]:
        """Return the ids of its child processes (Linux)."""
        return children(self.pid)

    def send(self, number: int) -> None:
        """Send a signal to the process that was started."""
        os.kill(self.pid, number)

    def wait(self, seconds: float | None = None) -> int:
        """Wait until the program has exited, at most for the grace period; return its exit code."""
        assert self._process is not None
        return self._process.wait(self.grace if seconds is None else seconds)

    def kill(self) -> None:
        """Kill all its processes."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def stop(self) -> None:
        """Terminate the program, and kill what remains after the grace period."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(self.grace)
            except subprocess.TimeoutExpired:
                pass
        self.kill()


def module(*command: str) -> list[str]:
    """Return the command that runs a module with this Python."""
    return [sys.executable, "-m", *command]
