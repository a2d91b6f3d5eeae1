"""Real servers in separate processes on a free loopback port. They are killed with all their
workers at the end.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

from tests.support.client import send
from tests.support.processes import children
from tests.support.waiting import eventually_true

ROOT = Path(__file__).parents[2]
LISTENING = re.compile(r"(?:Listening at|Running on|Serving on)\S* http://127\.0\.0\.1:(\d+)")
PATIENCE = 30.0
"""Seconds for a server to start."""
GRACE = 15.0
"""Seconds for a server to exit."""

START = """
def post_worker_init(worker):
    app = worker.app.wsgi()
    app.extensions["async_routes"].start(app)
"""
"""gunicorn configuration that calls ``start()`` in each worker of an app of `tests.support.apps`.
"""


class Server:
    """Runs ``python -m command…`` in the project folder while the context lasts.

    :param log: the file for its output.
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
        """The process id of the server; for gunicorn that of the arbiter."""
        assert self._process is not None, "used outside its context"
        return self._process.pid

    def __enter__(self) -> Server:
        with self.log.open("wb") as output:
            # A new session, so that all its processes can be killed together.
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environ, start_new_session=True,
            )  # fmt: skip
        try:
            self.port = self._wait_for_port()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text("utf-8", "replace")

    def workers(self) -> list[int]:
        """Return the pids of its child processes (Linux)."""
        return children(self.pid)

    def a_worker(self) -> int:
        """Return the process id of a worker that responds. A worker that is still starting could
        miss a signal.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline, "no worker answers"
            try:
                pid = send(self.port, "GET", "/pid").pid
            except (OSError, HTTPException):
                continue
            if pid in self.workers():
                return pid

    def reload(self) -> float:
        """Send HUP to gunicorn; return the time when it began to replace its workers.

        The arbiter may sleep for a second before it handles the signal.
        """
        message = "Handling signal: hup"
        before = self.output().count(message)
        os.kill(self.pid, signal.SIGHUP)
        eventually_true(
            lambda: self.output().count(message) > before, 60, otherwise="HUP was not handled"
        )
        return time.monotonic()

    def assert_no_traceback(self) -> None:
        """Fail if the server has logged a traceback."""
        log = self.output()
        assert "Traceback" not in log, f"the server logged an error:\n{log[-3000:]}"

    def stop(self) -> None:
        """Terminate the server, and kill remaining processes of its session after the grace period."""
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
        process = self._process
        assert process is not None
        eventually_true(
            lambda: LISTENING.search(self.output()) or process.poll() is not None, PATIENCE, 0.02
        )
        found = LISTENING.search(self.output())
        assert found is not None, f"The server did not start:\n{self.output()}"
        return int(found[1])


def gunicorn(
    log: Path, app: str, *options: str, environ: dict[str, str] | None = None, conf: str = ""
) -> Server:
    """Return a gunicorn server for ``app`` on a free port.

    :param conf: Python code for its configuration file, such as `START`.
    """
    if conf:
        path = log.with_name("gunicorn.conf.py")
        path.write_text(conf)
        options = (*options, "--config", str(path))
    return Server(
        log, "gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--graceful-timeout", "5",
        *options, app, environ=environ,
    )  # fmt: skip
