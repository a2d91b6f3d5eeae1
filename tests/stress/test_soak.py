"""A server under load for 15 minutes: its memory, files, threads and store do not grow.

It runs short tasks, uploads, failures, stops and child processes. Clients poll and list them.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.client import Connection
from tests.support.crew import Crew
from tests.support.processes import children
from tests.support.server import START, Server, gunicorn

SECONDS = 900
TASKS = 25_000
CLIENTS = 4
WORKERS = 2
RETENTION = 5
WARM_UP = 0.2
"""The share of the time before the first sample, in which caches fill."""
MOST_GROWTH = 0.05
BODY = b"x" * 300_000
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Sample:
    """The sum over all workers and their fork servers.

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
                except Exception as error:  # It is reported at the end.
                    self.errors.append(f"{type(error).__name__}: {error}")
                self._end.wait(max(due - time.monotonic(), 0.0))

    def _follow(self, connection: Connection, chance: random.Random) -> None:
        kind = chance.random()
        path = (
            "/work/60000"
            if kind < 0.1
            else "/fail"
            if kind < 0.2
            else f"/work/{chance.randrange(1, 30)}"
        )
        path = "/child/1" if 0.25 <= kind < 0.3 else path
        body = BODY if 0.2 <= kind < 0.25 else b"{}"
        reply = connection.send("PUT", path, body, {"Content-Type": "application/octet-stream"})
        assert reply.status == 202, f"a start was answered {reply.status}: {reply.body[:200]!r}"
        where = reply.headers["location"]
        if kind < 0.1:
            assert connection.send("DELETE", where).status == 200, "a stop was refused"
        if kind > 0.9:
            assert connection.send("GET", "/tasks?State=Completed&limit=5").status == 200, (
                "a query was refused"
            )
        deadline = time.monotonic() + 30
        while not (task := connection.send("GET", where).json())["IsCompleted"]:
            assert time.monotonic() < deadline, f"{where} has not ended after 30 s"
            time.sleep(0.02)
        self.ends[task["State"]] += 1


def test_a_server_does_not_grow(
    tmp_path: Path, share: float, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    seconds = max(SECONDS * share, 30.0)
    wanted = scaled(TASKS, 500)
    config = f"retention={RETENTION}, housekeeping_interval=1.0"
    app = f"tests.support.apps.crowd:create_app({str(tmp_path)!r}, {config})"
    options = ("--workers", str(WORKERS), "--threads", "8")
    with gunicorn(tmp_path / "log", app, *options, conf=START) as server:
        with Clients(server.port, wanted / seconds * 1.1) as clients:
            samples = watch(server, tmp_path, seconds)
        log = server.output()
    assert not clients.errors, (
        f"{len(clients.errors)} requests or tasks failed: {clients.errors[:3]}"
    )
    tasks = sum(clients.ends.values())
    assert tasks >= wanted, f"only {tasks} of {wanted} tasks ran; the machine is too slow"
    # Some views fail on purpose, so tracebacks are expected; failures of the package say "could not".
    assert "could not" not in log, f"the server logged an error:\n{log[-3000:]}"
    found = check_results(samples, wanted / seconds)
    figures(f"{tasks} tasks in {seconds:.0f} s ({dict(clients.ends)}), {found}")


def watch(server: Server, folder: Path, seconds: float) -> list[Sample]:
    """Take samples after the warm-up, until the time is over."""
    began = time.monotonic()
    samples = []
    while (now := time.monotonic()) < began + seconds:
        if now >= began + seconds * WARM_UP:
            samples.append(sample(server, folder))
        time.sleep(max(seconds / 100, 0.25))
    return samples


def sample(server: Server, folder: Path) -> Sample:
    """Measure all workers and the fork server of each."""
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


def check_results(samples: list[Sample], rate: float) -> str:
    """Compare the first samples with the last; return the figures."""
    tenth = max(len(samples) // 10, 3)
    first, last = samples[:tenth], samples[-tenth:]
    before, after = (sum(one.memory for one in part) / tenth for part in (first, last))
    growth = after / before - 1
    assert growth < MOST_GROWTH, (
        f"memory grew by {growth:.1%}, from {before / 1e6:.1f} to {after / 1e6:.1f} MB"
    )
    for what in ("files", "threads"):
        # Compares minima, because child processes use some for a moment.
        earlier, later = (min(getattr(one, what) for one in part) for part in (first, last))
        assert later <= earlier + 2 * WORKERS, f"{what} grew from {earlier} to {later}"
    most = max(one.rows for one in samples)
    bound = rate * 1.2 * (RETENTION + 5) + 50
    assert most <= bound, f"the store held {most} tasks; its retention allows {bound:.0f}"
    return (
        f"memory {before / 1e6:.1f} → {after / 1e6:.1f} MB ({growth:+.1%}), files "
        f"{last[-1].files}, "
        f"threads {last[-1].threads}, at most {most} tasks stored"
    )
