"""Workers of gunicorn that are killed at random moments under a steady load: what was acknowledged is neither lost nor stuck.

Checked from outside: what clients were told, against what the runs wrote into a file.
"""

from __future__ import annotations

import math
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from statistics import median
from typing import Any

from . import check, scaled
from .apps.crowd import read_journal
from .client import Reply, send
from .databases import sqlite_and_postgresql
from .server import Server, gunicorn

CYCLES = 200
WORKERS = 3
RATE_SECONDS = 0.03
"""Between two starts of the steady load."""
FOUND_SECONDS = 2.0
SETTLED_SECONDS = 60.0
CHILDREN_SECONDS = 1.0
"""Within which the children of a killed worker are gone."""
ROUTES = ("work", "work", "again", "child")
"""What is started; one that is named twice twice as often."""

START = """
def post_worker_init(worker):
    app = worker.app.wsgi()
    app.extensions["crowd"].start(app)
"""
TELL = """    app.extensions["crowd.note"]("ready", "")
"""


class Load:
    """Starts tasks until it is told to end; keeps the ids of those that were acknowledged."""

    def __init__(self, port: int, seed: int) -> None:
        self.acknowledged: dict[str, str] = {}
        self.refused = 0
        self.unanswered = 0
        self._port = port
        self._chance = random.Random(seed)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(RATE_SECONDS):
            route = self._chance.choice(ROUTES)
            try:
                reply = send(self._port, "PUT", f"/{route}/{self._chance.randrange(20, 800)}")
            except (OSError, HTTPException):
                self.unanswered += 1  # its worker was killed; nobody was promised anything
                continue
            if reply.status == 202:
                self.acknowledged[reply.json()["Id"]] = route
            else:
                check(reply.status == 503, f"a start was answered {reply.status}: {reply.body[:300]!r}")
                self.refused += 1


def prove(share: float) -> str:
    """Run the trial on SQLite and on PostgreSQL."""
    told = []
    for name, url in sqlite_and_postgresql():
        with url as store:
            told.append(f"{name}: {run(store, scaled(CYCLES, share, 5))}")
    return "; ".join(told)


def run(store: str, cycles: int) -> str:
    """Kill a worker ``cycles`` times; return the figures."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        (folder / "gunicorn.conf.py").write_text(START + TELL)
        options = ["--workers", str(WORKERS), "--threads", "4", "--config", str(folder / "gunicorn.conf.py")]
        app = f"prove.apps.crowd:create_app({name!r}, store={store!r})"
        with gunicorn(folder / "log", app, *options) as server:
            with Load(server.port, cycles) as load:
                kills = kill_workers(server, cycles)
            states = settle(server.port, load, folder)
            figures = judge(load, states, kills, folder)
        log = server.output()
        check("Traceback" not in log, f"the server wrote of an error:\n{log[-3000:]}")
    return figures


@dataclass
class Kills:
    """What was killed.

    :param at: when (monotonic), by the pid of the worker.
    :param children: seconds until all that a worker had started was gone, of those that had.
    """

    at: dict[int, float] = field(default_factory=dict)
    children: list[float] = field(default_factory=list)

    def could_find(self, killed_at: float, ready: dict[int, float]) -> list[float]:
        """Return since when each of the other workers could have found what one of them left: there may be none that has
        begun at first, since those that follow each other are killed as fast as they come. Who is killed in the time that it
        has is not to be blamed.

        :param ready: when each worker had begun.
        """
        since = {pid: max(killed_at, at) for pid, at in ready.items()}
        return [at for pid, at in since.items() if self.at.get(pid, math.inf) > at + FOUND_SECONDS]

    def worker_of(self, begin: dict[str, Any]) -> int:
        """Return the worker that ran what wrote a line, itself or in a child."""
        return int(begin.get("worker", begin["pid"]))

    def is_killed(self, begin: dict[str, Any]) -> bool:
        """Return whether that worker was killed. A child that writes in the moment that it has left has none, or init."""
        return self.worker_of(begin) in self.at or self.worker_of(begin) <= 1


def kill_workers(server: Server, cycles: int) -> Kills:
    """Kill one worker after the other, each when all are there."""
    chance = random.Random(cycles)
    kills = Kills()
    for _ in range(cycles):
        deadline = time.monotonic() + 30
        while len(living := [pid for pid in server.workers() if pid not in kills.at]) < WORKERS:
            check(time.monotonic() < deadline, "the arbiter has not replaced a killed worker within 30 s")
            time.sleep(0.01)
        time.sleep(chance.uniform(0.2, 1.5))
        victim = chance.choice(living)
        started = descendants(victim)
        kills.at[victim] = killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while any(is_alive(pid) for pid in started):
            check(time.monotonic() < killed_at + 10, "children of a killed worker live on")
            time.sleep(0.002)
        if started:
            kills.children.append(time.monotonic() - killed_at)
    return kills


def children(pid: int) -> list[int]:
    """Return the children of a process (Linux)."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for one in listed for child in one.read_text("ascii").split()]


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    return [other for child in children(pid) for other in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Return whether a process is there and no zombie (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def settle(port: int, load: Load, folder: Path) -> dict[str, Any]:
    """Wait until all that was acknowledged has ended; return the tasks by id."""
    deadline = time.monotonic() + SETTLED_SECONDS
    ended: dict[str, Any] = {}
    while True:
        open_ids = [task_id for task_id in load.acknowledged if task_id not in ended]
        if not open_ids:
            return ended
        for task_id in open_ids:
            reply = patiently(port, f"/task/{task_id}")
            check(reply.status == 200, f"{task_id} was acknowledged, and now a get is answered {reply.status}")
            task = reply.json()
            if task["IsCompleted"] and "Stopping" not in task:
                ended[task_id] = task
        left = [task_id for task_id in open_ids if task_id not in ended]
        check(time.monotonic() < deadline, f"{len(left)} tasks are stuck after {SETTLED_SECONDS} s: {left[:5]}")
        time.sleep(0.1)


def patiently(port: int, path: str) -> Reply:
    """Get, once more where the connection went to a worker that was just killed."""
    for _ in range(5):
        try:
            return send(port, "GET", path)
        except (OSError, HTTPException):
            time.sleep(0.2)
    return send(port, "GET", path)


def judge(load: Load, tasks: dict[str, Any], kills: Kills, folder: Path) -> str:
    """Compare what clients were told with what runs wrote; return the figures."""
    written: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for line in read_journal(folder):
        written[line["id"]][line["what"]].append(line)
    ready = {line["pid"]: line["at"] for line in written[""]["ready"]}
    found_after, after_kill, ends = [], [], Counter[str]()
    for task_id, task in tasks.items():
        begun, done = written[task_id]["begin"], written[task_id]["end"]
        ends[task.get("Error", task["State"])] += 1
        most = 1 if load.acknowledged[task_id] != "again" else 3
        check(len(begun) <= most, f"{task_id} ({load.acknowledged[task_id]}) ran {len(begun)} times")
        check(
            all(map(kills.is_killed, begun[:-1])),
            f"{task_id} ran again though its worker lives",
        )
        if task["State"] == "Completed":
            # One that is to be restarted may be killed between the end of its view and that of its task.
            check(done, f"{task_id} is Completed and has not come to its end")
            check(len(done) == 1 or most > 1, f"{task_id} came to its end twice")
            continue
        check(task.get("Error") == "Worker lost", f"{task_id} is {task['State']}: {task.get('Error')}")
        check(
            not begun or kills.is_killed(begun[-1]),
            f"{task_id} is said to be lost, and its worker lives: {written[task_id]}",
        )
        if begun and kills.worker_of(begun[-1]) in kills.at:
            told = [line["at"] for line in written[task_id]["finished"]]
            check(len(told) <= 1, f"{task_id} had {len(told)} ends")
            # Who found it may itself be killed before it tells of it.
            for at in told:
                killed_at = kills.at[kills.worker_of(begun[-1])]
                after_kill.append(at - killed_at)
                found_after.append(at - min(at, *kills.could_find(killed_at, ready)))
    check(kills.children, "no worker had children: the load is too small")
    check(max(kills.children) <= CHILDREN_SECONDS, f"children were gone only after {max(kills.children):.2f} s")
    check(found_after, "no running task was lost: the load is too small")
    check(
        max(after_kill) <= FOUND_SECONDS,
        f"a lost task was found after {max(after_kill):.2f} s; {max(found_after):.2f} s after there was a worker that could",
    )
    return (
        f"{len(kills.at)} kills, {len(tasks)} tasks acknowledged, 0 lost, 0 stuck ({load.unanswered} starts unanswered, "
        f"{load.refused} refused), {dict(ends)}, lost ones found after {median(after_kill):.2f} s, at most "
        f"{max(after_kill):.2f} s and {max(found_after):.2f} s after there was a worker that could, children gone after "
        f"{median(kills.children) * 1000:.0f} ms, at most {max(kills.children) * 1000:.0f} ms"
    )
