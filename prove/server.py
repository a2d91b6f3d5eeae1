"""A real server in a process of its own, on a free port of loopback, ended with all its workers whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parent.parent
LISTENING = re.compile(r"(?:Listening at|Running on|Serving on)\S* http://127\.0\.0\.1:(\d+)")
PATIENCE = 30.0
"""Seconds for a server to come up."""
GRACE = 15.0
"""Seconds for it to go."""


class Server:
    """Runs ``python -m command…`` from the project's folder while it is used as a context manager.

    :param log: where its output goes.
    :param environ: added to the environment.
    """

    def __init__(self, log: Path, *command: str, environ: dict[str, str] | None = None) -> None:
        self.log = log
        self.port = 0
        self._command = [sys.executable, "-m", *command]
        self._environ = {**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process that was started; of gunicorn the arbiter."""
        assert self._process is not None, "it is used as a context manager"
        return self._process.pid

    def __enter__(self) -> Server:
        with self.log.open("wb") as output:
            # A session of its own, so that whatever it forks can be ended with it.
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=self._environ, start_new_session=True,
            )  # fmt: skip
        try:
            self.port = self._wait_for_port()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def output(self) -> str:
        """Return what it has written so far."""
        return self.log.read_text("utf-8", "replace")

    def workers(self) -> list[int]:
        """Return the pids of its child processes (Linux)."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("ascii")
        return [int(pid) for pid in listed.split()]

    def stop(self) -> None:
        """End it: first asked, then killed with all in its session."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def _wait_for_port(self) -> int:
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = LISTENING.search(self.output())
            if found is not None:
                return int(found[1])
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"The server did not come up:\n{self.output()}")


def gunicorn(log: Path, app: str, *options: str, environ: dict[str, str] | None = None) -> Server:
    """Return a gunicorn that serves ``app`` on a free port."""
    return Server(
        log, "gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--graceful-timeout", "5", *options, app,
        environ=environ,
    )  # fmt: skip
