"""How soon those who wait, or follow a stream, are told that a view has returned: in its own process, and in another."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from . import check, scaled
from .client import Connection
from .databases import sqlite_and_postgresql
from .following import END, Stream
from .machine import slowness
from .server import gunicorn

TRIALS = 80
MILLISECONDS = (30, 90)
"""How long a view takes, by chance: long enough for the other side to be waiting, and not in step with who looks for news."""
HERE_MS = 5.0
SHORT_ALLOWANCE = 2.0
ELSEWHERE_MS = {"SQLite": 60.0, "PostgreSQL": 20.0}
Tell = Callable[[int, bool], tuple[float, bool]]


def prove(share: float) -> str:
    """Time both ways on each store; return the medians."""
    trials = scaled(TRIALS, share, 4)
    # The median of a handful varies by much.
    allowance = slowness() * (1.0 if share == 1.0 else SHORT_ALLOWANCE)
    told = [
        f"{trials} trials each, bounds of {allowance:.2f} times, median ms from the return of the view to the client"
    ]
    told.append(figures("memory, one worker", "memory://", 1, trials, False, HERE_MS * allowance))
    for name, opened in sqlite_and_postgresql():
        with opened as url:
            told.append(figures(f"{name}, one worker", url, 1, trials, False, HERE_MS * allowance))
            told.append(figures(f"{name}, another worker", url, 2, trials, True, ELSEWHERE_MS[name] * allowance))
    return "; ".join(told)


def figures(name: str, store: str, workers: int, trials: int, is_elsewhere: bool, most_ms: float) -> str:
    """Serve on a store, time, and compare with what is allowed."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
        app = f"prove.apps.news:create_app({folder!r}, store={store!r}, drain=0.5)"
        options = ("--workers", str(workers), "--worker-class", "gthread", "--threads", "4")
        with gunicorn(Path(folder) / "log", app, *options) as server:
            waits = measure(by_wait, server.port, trials, is_elsewhere)
            streams = measure(by_stream, server.port, trials, is_elsewhere)
    for how, found in (("wait", waits), ("stream", streams)):
        check(median(found) <= most_ms, f"{name}: a {how} was told after {median(found):.1f} ms at the median")
    return (
        f"{name}: wait {median(waits):.1f} (at most {max(waits):.1f}), stream {median(streams):.1f} "
        f"(at most {max(streams):.1f})"
    )


def measure(tell: Tell, port: int, trials: int, is_elsewhere: bool) -> list[float]:
    """Return the milliseconds of so many trials in which the task ran where it was to run; the first is not counted."""
    found: list[float] = []
    deadline = time.monotonic() + 60 + trials * 2
    while len(found) <= trials:
        check(time.monotonic() < deadline, "the workers of a server do not share the work")
        milliseconds, was_elsewhere = tell(port, is_elsewhere)
        if was_elsewhere == is_elsewhere:
            found.append(milliseconds)
    return found[1:]


def by_wait(port: int, is_elsewhere: bool) -> tuple[float, bool]:
    """Hold a GET on a worker until a task has ended; return the milliseconds, and whether it was another's task."""
    with a_connection(port) as (waiting, pid), a_connection(port, pid if is_elsewhere else None) as (starting, _):
        task = starting.send("PUT", f"/told/{random.randint(*MILLISECONDS)}").json()
        reply = waiting.send("GET", f"/task/{task['Id']}?wait=20")
        arrived = time.time_ns()
    return since(reply.json(), arrived), reply.json()["Result"]["Pid"] != reply.pid


def by_stream(port: int, is_elsewhere: bool) -> tuple[float, bool]:
    """Follow a task to its end; return the milliseconds, and whether it ran in another process than the stream's."""
    with a_connection(port) as (starting, _):
        task = starting.send("PUT", f"/told/{random.randint(*MILLISECONDS)}").json()
    with Stream(port, f"/task/{task['Id']}/events") as stream:
        check(stream.status == 200, f"a stream was answered {stream.status}")
        for message in stream.messages():
            arrived = time.time_ns()
            if message.name == END:
                return since(message.data, arrived), message.data["Result"]["Pid"] != stream.pid
    raise AssertionError("a stream ended before its task")


class a_connection:
    """A kept connection and the worker that it leads to; not to the worker ``other_than``."""

    def __init__(self, port: int, other_than: int | None = None) -> None:
        deadline = time.monotonic() + 20
        while True:
            self._connection = Connection(port)
            self.pid = self._connection.send("GET", "/pid").pid
            if self.pid != other_than:
                break
            self._connection.__exit__(None, None, None)
            check(time.monotonic() < deadline, "all connections lead to one worker")

    def __enter__(self) -> tuple[Connection, int]:
        return self._connection, self.pid

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(None, None, None)


def since(task: dict[str, Any], arrived: int) -> float:
    """Return the milliseconds from the return of a view."""
    check(task["State"] == "Completed", f"a task ended {task['State']}: {task.get('Error')}")
    return (arrived - int(task["Result"]["At"])) / 1e6
