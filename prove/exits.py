"""Workers of gunicorn that end under load: out in time, and no request fails for it that would not fail without tasks.

The same server is recycled in the same ways with the extension and with plain views, and the failed requests are compared.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from statistics import median

from . import check, scaled
from .client import send
from .crew import Crew
from .losses import START
from .server import Server, gunicorn

ROUNDS = 20
DRAIN = 1.0
MOST_SECONDS = DRAIN + 2.0
CLIENTS = 4
MAX_REQUESTS = 200


def prove(share: float) -> str:
    """Recycle workers by TERM, HUP and max_requests; return the figures."""
    rounds = scaled(ROUNDS, share, 2)
    told = []
    for how in (by_term, by_hup, by_max_requests):
        failed: dict[bool, int] = {}
        sent: dict[bool, int] = {}
        took: list[float] = []
        for is_async in (False, True):
            failed[is_async], sent[is_async], seconds = recycle(how, is_async, rounds)
            took = seconds if is_async else took
        check(max(took) <= MOST_SECONDS, f"{how.__name__}: a worker was out only after {max(took):.2f} s")
        # One request each way is the chance of the moment.
        most = failed[False] / sent[False] * sent[True] + 1
        check(failed[True] <= most, f"{how.__name__}: {failed[True]} requests failed, {failed[False]} without tasks")
        told.append(
            f"{how.__name__[3:]} out after {median(took):.2f} s, at most {max(took):.2f} s; failed {failed[True]} of "
            f"{sent[True]}, without tasks {failed[False]} of {sent[False]}"
        )
    return "; ".join(told)


def recycle(how: Callable[[Server, int], float], is_async: bool, rounds: int) -> tuple[int, int, list[float]]:
    """Serve, load and recycle; return how many requests failed, how many were sent, and the seconds of each exit."""
    took: list[float] = []
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        (folder / "gunicorn.conf.py").write_text(START)
        options = ["--workers", "2", "--threads", "4", "--config", str(folder / "gunicorn.conf.py")]
        if how is by_max_requests:
            options += ["--max-requests", str(MAX_REQUESTS), "--max-requests-jitter", "0"]
        app = f"prove.apps.crowd:create_app({name!r}, drain={DRAIN})"
        with gunicorn(folder / "log", app, *options) as server:
            path, method = ("/work/30", "PUT") if is_async else ("/pid", "GET")
            with Clients(server.port, method, path) as clients:
                for _ in range(rounds):
                    if is_async:
                        patiently(server.port, "/work/60000")
                        patiently(server.port, "/deaf/60000")
                    victim = a_worker(server)
                    began = how(server, victim)
                    while is_there(server, victim):
                        check(time.monotonic() - began < 60, f"worker {victim} does not end")
                        time.sleep(0.005)
                    took.append(time.monotonic() - began)
                    while len(server.workers()) < 2:
                        time.sleep(0.005)
            log = server.output()
        check("Traceback" not in log, f"the server wrote of an error:\n{log[-3000:]}")
    return clients.failed, clients.sent, took


def by_term(server: Server, pid: int) -> float:
    """End one worker as its arbiter does; return when it was told."""
    os.kill(pid, signal.SIGTERM)
    return time.monotonic()


def by_hup(server: Server, pid: int) -> float:
    """Have the arbiter replace all its workers; return when it did. It may sleep for a second before it looks."""
    said = "Handling signal: hup"
    before = server.output().count(said)
    os.kill(server.pid, signal.SIGHUP)
    deadline = time.monotonic() + 60
    while server.output().count(said) == before:
        check(time.monotonic() < deadline, "the arbiter does not do what it was told")
        time.sleep(0.005)
    return time.monotonic()


def by_max_requests(server: Server, pid: int) -> float:
    """Wait until the worker has had as many requests as it may."""
    deadline = time.monotonic() + 60
    while f"[{pid}] [INFO] Autorestarting worker" not in server.output():
        check(time.monotonic() < deadline, f"worker {pid} did not come to its last request")
        time.sleep(0.005)
    return time.monotonic()


def a_worker(server: Server) -> int:
    """Return a worker that serves: to one that is only beginning a signal may be lost."""
    deadline = time.monotonic() + 30
    while True:
        check(time.monotonic() < deadline, "no worker answers")
        try:
            pid = send(server.port, "GET", "/pid").pid
        except (OSError, HTTPException):
            continue
        if is_there(server, pid):
            return pid


def is_there(server: Server, pid: int) -> bool:
    """Return whether a worker lives."""
    return pid in server.workers()


def patiently(port: int, path: str) -> None:
    """Start a task on whichever worker answers."""
    for _ in range(50):
        try:
            if send(port, "PUT", path).status == 202:
                return
        except (OSError, HTTPException):
            pass
        time.sleep(0.02)


class Clients(Crew):
    """Send one request after the other, each on a connection of its own, and count those that fail."""

    def __init__(self, port: int, method: str, path: str) -> None:
        super().__init__(CLIENTS)
        self.sent = 0
        self.failed = 0
        self._port = port
        self._method = method
        self._path = path
        self._lock = threading.Lock()

    def _run(self, number: int) -> None:
        while not self._end.wait(0.01):
            try:
                is_well = send(self._port, self._method, self._path).status < 400
            except (OSError, HTTPException):
                is_well = False
            with self._lock:
                self.sent += 1
                self.failed += not is_well
