"""A server at work for a quarter of an hour: its memory, files and threads stay as they are, and its store does not grow.

Tasks of all kinds pass through it: short ones, uploads, failures, stops, some in processes of their own; clients poll and query.
"""

from __future__ import annotations

import os
import random
import sqlite3
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import check, scaled
from .client import Connection
from .crew import Crew
from .losses import START, children
from .server import Server, gunicorn

SECONDS = 900
TASKS = 25_000
CLIENTS = 4
WORKERS = 2
RETENTION = 5
WARM_UP = 0.2
"""The part of the time after which memory is compared: caches have filled by then."""
MOST_GROWTH = 0.05
BODY = b"x" * 300_000
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Sample:
    """What all workers and their fork servers use together.

    :param memory: resident bytes.
    :param rows: tasks in the store.
    """

    memory: int
    files: int
    threads: int
    rows: int


class Clients(Crew):
    """Start tasks at a steady rate and follow each to its end."""

    def __init__(self, port: int, rate: float) -> None:
        super().__init__(CLIENTS)
        self.ends: Counter[str] = Counter()
        self.errors: list[str] = []
        self._port = port
        self._pause = CLIENTS / rate

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        due = time.monotonic()
        with Connection(self._port) as connection:
            while not self._end.is_set():
                due = max(due + self._pause, time.monotonic() - 1.0)
                try:
                    self._follow(connection, chance)
                except Exception as error:  # whatever it is, it is the trial's result
                    self.errors.append(f"{type(error).__name__}: {error}")
                self._end.wait(max(due - time.monotonic(), 0.0))

    def _follow(self, connection: Connection, chance: random.Random) -> None:
        kind = chance.random()
        path = "/work/60000" if kind < 0.1 else "/fail" if kind < 0.2 else f"/work/{chance.randrange(1, 30)}"
        path = "/child/1" if 0.25 <= kind < 0.3 else path
        body = BODY if 0.2 <= kind < 0.25 else b"{}"
        reply = connection.send("PUT", path, body, {"Content-Type": "application/octet-stream"})
        check(reply.status == 202, f"a start was answered {reply.status}: {reply.body[:200]!r}")
        where = reply.headers["location"]
        if kind < 0.1:
            check(connection.send("DELETE", where).status == 200, "a stop was refused")
        if kind > 0.9:
            check(connection.send("GET", "/tasks?State=Completed&limit=5").status == 200, "a query was refused")
        deadline = time.monotonic() + 30
        while not (task := connection.send("GET", where).json())["IsCompleted"]:
            check(time.monotonic() < deadline, f"{where} has not ended after 30 s")
            time.sleep(0.02)
        self.ends[task["State"]] += 1


def prove(share: float) -> str:
    """Run the trial for its share of a quarter of an hour; return the figures."""
    seconds = max(SECONDS * share, 30.0)
    wanted = scaled(TASKS, share, 500)
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        (folder / "gunicorn.conf.py").write_text(START)
        options = ["--workers", str(WORKERS), "--threads", "8", "--config", str(folder / "gunicorn.conf.py")]
        app = f"prove.apps.crowd:create_app({name!r}, retention={RETENTION}, housekeeping_interval=1.0)"
        with gunicorn(folder / "log", app, *options) as server:
            with Clients(server.port, wanted / seconds * 1.1) as clients:
                samples = watch(server, folder, seconds)
            log = server.output()
    check(not clients.errors, f"{len(clients.errors)} requests or tasks went wrong: {clients.errors[:3]}")
    tasks = sum(clients.ends.values())
    check(tasks >= wanted, f"only {tasks} of {wanted} tasks were run; the machine is too slow for the trial")
    # The views that fail do so on purpose; their tracebacks are meant.
    check("could not" not in log, f"the server wrote of an error:\n{log[-3000:]}")
    return f"{tasks} tasks in {seconds:.0f} s ({dict(clients.ends)}), {judge(samples, wanted / seconds)}"


def watch(server: Server, folder: Path, seconds: float) -> list[Sample]:
    """Take samples until the time is over, from when the caches have filled."""
    began = time.monotonic()
    samples = []
    while (now := time.monotonic()) < began + seconds:
        if now >= began + seconds * WARM_UP:
            samples.append(sample(server, folder))
        time.sleep(max(seconds / 100, 0.25))
    return samples


def sample(server: Server, folder: Path) -> Sample:
    """Look at all workers, and at the fork server of each."""
    memory = files = threads = 0
    for pid in [other for worker in server.workers() for other in (worker, *children(worker))]:
        process = Path(f"/proc/{pid}")
        memory += int((process / "statm").read_text().split()[1]) * PAGE
        files += len(list((process / "fd").iterdir()))
        threads += len(list((process / "task").iterdir()))
    store = sqlite3.connect(f"file:{folder / 'asyncroute.db'}?mode=ro", uri=True)
    try:
        (rows,) = store.execute("SELECT count(*) FROM asyncroute_tasks").fetchone()
    finally:
        store.close()
    return Sample(memory, files, threads, rows)


def judge(samples: list[Sample], rate: float) -> str:
    """Compare the first samples with the last; return the figures."""
    tenth = max(len(samples) // 10, 3)
    first, last = samples[:tenth], samples[-tenth:]
    before, after = (sum(one.memory for one in part) / tenth for part in (first, last))
    growth = after / before - 1
    check(growth < MOST_GROWTH, f"memory grew by {growth:.1%}, from {before / 1e6:.1f} to {after / 1e6:.1f} MB")
    for what in ("files", "threads"):
        # The least of each: a task in a process of its own has some for a moment.
        earlier, later = (min(getattr(one, what) for one in part) for part in (first, last))
        check(later <= earlier + 2 * WORKERS, f"{what} grew from {earlier} to {later}")
    most = max(one.rows for one in samples)
    bound = rate * 1.2 * (RETENTION + 5) + 50
    check(most <= bound, f"the store held {most} tasks; {bound:.0f} is what comes within its retention")
    return (
        f"memory {before / 1e6:.1f} → {after / 1e6:.1f} MB ({growth:+.1%}), files {last[-1].files}, "
        f"threads {last[-1].threads}, at most {most} tasks stored"
    )
