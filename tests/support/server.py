"""Real servers in separate processes on a free loopback port. They are killed with all their
workers at the end.
"""

from __future__ import annotations

import os
import re
import signal
import time
from http.client import HTTPException
from pathlib import Path

from tests.support.client import send
from tests.support.programs import PATIENCE, Program, module
from tests.support.waiting import eventually_true

LISTENING = re.compile(r"(?:Listening at|Running on|Serving on)\S* http://127\.0\.0\.1:(\d+)")

START = """
def post_worker_init(worker):
    app = worker.app.wsgi()
    app.extensions["async_routes"].start(app)
"""
"""gunicorn configuration that calls ``start()`` in each worker of an app of `tests.support.apps`.
"""


class Server(Program):
    """Runs ``python -m command…`` in the project folder while the context lasts.

    :param log: the file for its output.
    :param environ: added to the environment.
    """

    def __init__(self, log: Path, *command: str, environ: dict[str, str] | None = None) -> None:
        super().__init__(log, module(*command), environ)
        self.port = 0

    def _is_ready(self) -> bool:
        found = LISTENING.search(self.output(), self._printed)
        self.port = int(found[1]) if found is not None else 0
        return found is not None

    def workers(self) -> list[int]:
        """Return the pids of its child processes (Linux)."""
        return self.children()

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
