"""Children under gunicorn: how soon they start, and how soon they are gone, with all that they have started."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from . import check, scaled
from .apps.children import MARK, TIMEOUT
from .client import Connection, Reply
from .server import gunicorn

COUNT = 100
PATIENCE = 30.0
KINDS = ("sleep", "loop", "family")
START_SECONDS, SPARE_SECONDS = 0.060, 0.010
SHORT_ALLOWANCE = 2.0
OWN_STOP_SECONDS, ANY_STOP_SECONDS = 0.050, 0.5
OVERSHOOT_SECONDS = 0.2
PAUSE = 0.15
"""Between two starts: a spare needs that to become ready."""


def prove(share: float) -> str:
    """Time starts, stops and timeouts; return the figures."""
    count = scaled(COUNT, share, 6)
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        app = f"prove.apps.children:create_app({name!r})"
        with gunicorn(folder / "log", app, "--workers", "2", "--threads", "4", "--keep-alive", "60") as server:
            workers = _connections(server.port)
            try:
                trial = _Trial(folder, workers)
                starts = trial.starts("/began", count)
                spares = trial.starts("/began/spare", count)
                own, others = trial.stops(count, 0), trial.stops(count, 1)
                overshoots = trial.timeouts(max(count // 4, 2))
            finally:
                for connection in workers:
                    connection.__exit__(None, None, None)
            check("Traceback" not in server.output(), server.output())
    # What depends on who else computes is judged by its fastest quarter, the rest by the slowest.
    # Of a handful of starts not even a quarter need have had the processor to themselves.
    allowance = 1.0 if share == 1.0 else SHORT_ALLOWANCE
    check(_usual(starts) <= START_SECONDS * allowance, f"starts took {_ms(starts)}")
    check(_usual(spares) <= SPARE_SECONDS * allowance, f"starts from a spare took {_ms(spares)}")
    check(_usual(own) <= OWN_STOP_SECONDS, f"stops by the own worker took {_ms(own)}")
    check(max(own + others) <= ANY_STOP_SECONDS, f"stops took {_ms(own)} and {_ms(others)}")
    check(max(overshoots) <= OVERSHOOT_SECONDS, f"timeouts were overshot by {_ms(overshoots)}")
    return (
        f"{count} each, quarter/median/slowest: start {_ms(starts)}, from a spare {_ms(spares)}, gone after a stop by the own "
        f"worker {_ms(own)}, by another {_ms(others)} ({', '.join(KINDS)}), past the timeout {_ms(overshoots)}"
    )


class _Trial:
    """:param workers: a connection to each of two workers."""

    def __init__(self, folder: Path, workers: tuple[Connection, Connection]) -> None:
        self._folder = folder
        self._workers = workers

    def starts(self, path: str, count: int) -> list[float]:
        """Return the seconds from a request to the first line of its view, the first one left out."""
        took = []
        for _ in range(count + 1):
            reply = self._start(path)
            took.append(self._ended(reply)["Result"]["At"] - reply.sent_at)
            time.sleep(PAUSE)
        return took[1:]

    def stops(self, count: int, worker: int) -> list[float]:
        """Return the seconds from a stop, sent to one worker, until everybody of the task is gone."""
        took = []
        for number in range(count):
            task = self._start(f"/endless/{KINDS[number % len(KINDS)]}").json()
            pids = self._pids(task)
            check(all(map(_is_alive, pids)), "a task did not run")
            began = time.monotonic()
            reply = self._workers[worker].send("DELETE", f"/task/{task['Id']}")
            check(reply.status == 200 and reply.json()["State"] == "Aborted", f"a stop was answered {reply.body!r}")
            while any(map(_is_alive, pids)):
                check(time.monotonic() - began < PATIENCE, "a process is not gone")
                time.sleep(0.0005)
            took.append(time.monotonic() - began)
            time.sleep(PAUSE)
        return took

    def timeouts(self, count: int) -> list[float]:
        """Return by how many seconds views went on after their time."""
        took = []
        for _ in range(count):
            reply = self._start("/overdue")
            task = self._ended(reply)
            check((task["State"], task["Error"]) == ("Aborted", "Timeout"), f"a task that was overdue is {task}")
            (lasted,) = MARK.unpack((self._folder / f"marks-{task['Id']}").read_bytes())
            took.append(max(lasted - TIMEOUT, 0.0))
        return took

    def _start(self, path: str) -> Reply:
        reply = self._workers[0].send("PUT", path)
        check(reply.status == 202, f"{path} was answered {reply.body!r}")
        return reply

    def _ended(self, reply: Reply) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            task = self._workers[0].send("GET", f"/task/{reply.json()['Id']}").json()
            if task["IsCompleted"] and "Stopping" not in task:
                return task
            check(time.monotonic() < deadline, f"a task does not end: {task}")
            time.sleep(0.005)

    def _pids(self, task: Any) -> list[int]:
        path = self._folder / f"pids-{task['Id']}"
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            check(time.monotonic() < deadline, "a task does not begin")
            time.sleep(0.002)
        return [int(pid) for pid in path.read_text().split()]


def _connections(port: int) -> tuple[Connection, Connection]:
    """Return a kept connection to each of two workers."""
    held: dict[int, Connection] = {}
    for _ in range(1000):
        connection = Connection(port)
        pid = connection.send("GET", "/pid").pid
        if held.setdefault(pid, connection) is not connection:
            connection.__exit__(None, None, None)
        if len(held) == 2:
            first, second = held.values()
            return first, second
    raise AssertionError("one worker answers all")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _usual(seconds: list[float]) -> float:
    """Return what a quarter of them stay below: the time it takes where nobody else wants the processor."""
    return sorted(seconds)[len(seconds) // 4]


def _ms(seconds: list[float]) -> str:
    return f"{_usual(seconds) * 1000:.1f}/{median(seconds) * 1000:.1f}/{max(seconds) * 1000:.0f} ms"
