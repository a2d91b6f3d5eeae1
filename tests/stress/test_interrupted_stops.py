"""Ctrl-C right after a stop: each worker of gunicorn exits in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import pytest

from tests.support.client import send
from tests.support.crew import Crew
from tests.support.processes import is_running
from tests.support.server import START, gunicorn
from tests.support.waiting import eventually_true

ROUNDS = 500
PARALLEL = 4
DRAIN = 1.0
MOST_SECONDS = DRAIN + 2.0
KINDS = [
    ("gthread", "/work/60000"),
    ("sync", "/work/60000"),
    ("gthread", "/deaf/60000"),
    ("gthread", "/loop"),
    ("sync", "/loop"),
    ("gthread", "/child/60000"),
]
"""Worker classes and views. One view checks for stops, one is in C, one is interrupted, one is
killed.
"""

DUMPING = """
import faulthandler, signal
stacks = open({path!r}, "w")
def post_fork(server, worker):
    faulthandler.register(signal.SIGRTMIN, file=stacks, all_threads=True)
"""


@pytest.mark.covers("F04")
def test_workers_exit_in_time_on_ctrl_c_right_after_a_stop(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    rounds = scaled(ROUNDS, len(KINDS))
    with Interrupters(tmp_path, rounds) as interrupters:
        interrupters.wait()
    took = interrupters.took
    figures(
        f"{rounds} workers, {PARALLEL} at a time: out after {median(took):.2f} s, at most "
        f"{max(took):.2f} s"
    )
    assert len(took) == rounds


class Interrupters(Crew):
    """Repeatedly start a server and a task in it, stop the task and interrupt the server."""

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__(PARALLEL)
        self.took: list[float] = []
        self._folder = folder
        self._rounds = rounds
        self._numbers = count()
        self._ended = [threading.Event() for _ in range(PARALLEL)]

    def wait(self) -> None:
        """Wait until all rounds are done or have failed."""
        for event in self._ended:
            event.wait()

    def _run(self, number: int) -> None:
        try:
            while (this := next(self._numbers)) < self._rounds:
                folder = self._folder / str(this)
                folder.mkdir()
                self.took.append(interrupt(folder, *KINDS[this % len(KINDS)]))
        finally:
            self._ended[number].set()


def interrupt(folder: Path, kind: str, view: str) -> float:
    """Interrupt a new server after a stop; return the seconds until its worker has exited.

    :raises AssertionError: if that took too long, with the stacks of its threads.
    """
    app = f"tests.support.apps.crowd:create_app({str(folder)!r}, drain={DRAIN})"
    options = ["--workers", "1", "--worker-class", kind, "--threads", "4"]
    stacks = folder / "stacks"
    conf = START + DUMPING.format(path=str(stacks))
    with gunicorn(folder / "log", app, *options, conf=conf) as server:
        worker = server.a_worker()
        task_id = send(server.port, "PUT", view).json()["Id"]
        eventually_true(lambda: task_id in journal(folder), 30)
        assert send(server.port, "DELETE", f"/task/{task_id}").status == 200
        began = time.monotonic()
        # Send it to all processes of the foreground group, as a terminal does.
        os.killpg(server.pid, signal.SIGINT)
        while is_running(worker):
            if time.monotonic() - began > MOST_SECONDS:
                os.kill(worker, signal.SIGRTMIN)
                eventually_true(lambda: not is_running(worker) or stacks.read_text(), 5)
                pytest.fail(
                    f"{kind} {view}: the worker has not exited after {MOST_SECONDS} s:\n"
                    f"{stacks.read_text()}\n{server.output()}"
                )
            time.sleep(0.002)
        took = time.monotonic() - began
        server.assert_no_traceback()
    return took


def journal(folder: Path) -> str:
    """Return what the views have written so far."""
    path = folder / "journal"
    return path.read_text() if path.exists() else ""
