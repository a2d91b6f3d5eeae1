"""Many tasks over several gunicorn workers: started, polled and stopped over whichever answers.

Checked from outside: what clients saw, against what the runs wrote into a file.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import check, scaled
from .apps.crowd import read_journal
from .client import Connection, Reply, send
from .server import gunicorn

TASKS = 400
CLIENTS = 8
PATIENCE = 120.0
TOLD_SECONDS = 0.5
POLL_SECONDS = 0.1
ORDER = ("NotStarted", "Running", "Completed", "Failed", "Aborted")
TERMINAL = ("Completed", "Failed", "Aborted")


@dataclass
class Followed:
    """One task as its client knows it.

    :param stop_after: seconds of running after which it is stopped; None: not.
    :param is_hasty: it is stopped right after its start, whatever it is doing.
    """

    id: str
    milliseconds: int
    stop_after: float | None
    is_hasty: bool
    states: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    polls: int = 0
    stop: Reply | None = None
    stopped_running: bool = False

    @property
    def is_over(self) -> bool:
        """Whether its end was seen."""
        return bool(self.states) and self.states[-1] in TERMINAL

    def saw(self, reply: Reply) -> None:
        """Take note of an answer about the task; no state may follow one that comes later."""
        task = reply.json()
        check(task["Id"] == self.id, f"{self.id}: the answer is about {task['Id']}")
        self.pids.add(reply.pid)
        state = task["State"]
        if not self.states or state != self.states[-1]:
            last = self.states[-1] if self.states else "NotStarted"
            check(last not in TERMINAL, f"{self.id} left its terminal state {last} for {state}")
            check(ORDER.index(state) >= ORDER.index(last), f"{self.id} went from {last} to {state}")
            self.states.append(state)


class Journal:
    """What the runs wrote down, read again as it grows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._read_at = 0.0
        self.by_id: dict[str, list[dict[str, Any]]] = {}

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """Return the lines about one task, as they were at most 50 ms ago."""
        with self._lock:
            if time.monotonic() - self._read_at > 0.05:
                self.read()
        return self.by_id.get(task_id, [])

    def read(self) -> None:
        """Read the file anew."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in read_journal(self._folder):
            found[line["id"]].append(line)
        self.by_id = dict(found)
        self._read_at = time.monotonic()


def prove(share: float) -> str:
    """Run the trial without and with ``--preload``."""
    return "; ".join(run(scaled(TASKS, share, 40), preload) for preload in (False, True))


def run(count: int, preload: bool) -> str:
    """Follow ``count`` tasks to their ends; return the figures."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        options = ["--workers", "4", "--threads", "4", *(["--preload"] if preload else [])]
        with gunicorn(folder / "log", f"prove.apps.crowd:create_app({name!r})", *options) as server:
            journal = Journal(folder)
            tasks = follow(server.port, journal, count)
            settle(server.port, tasks)
            figures = judge(tasks, journal, count)
        log = server.output()
        check("Traceback" not in log and "ERROR" not in log, f"the server wrote of an error:\n{log[-3000:]}")
    return f"{'preload' if preload else 'no preload'}: {figures}"


def follow(port: int, journal: Journal, count: int) -> list[Followed]:
    """Start all tasks, then poll and stop them until all have ended."""
    chance = random.Random(count)
    plans = []
    for number in range(count):
        milliseconds = chance.randrange(200, 2000)
        stop_after = chance.uniform(0, milliseconds / 1000) if number % 2 else None
        plans.append((milliseconds, stop_after, number % 10 == 9))

    def begin(plan: tuple[int, float | None, bool]) -> Followed:
        reply = send(port, "PUT", f"/work/{plan[0]}")
        check(reply.status == 202, f"a start was answered {reply.status}: {reply.body[:300]!r}")
        task = Followed(reply.json()["Id"], *plan)
        task.saw(reply)
        if task.is_hasty:
            stop(port, task, journal)
        return task

    with ThreadPoolExecutor(CLIENTS) as pool:
        tasks = list(pool.map(begin, plans))
        deadline = time.monotonic() + PATIENCE
        while open_tasks := [task for task in tasks if not task.is_over]:
            check(time.monotonic() < deadline, f"{len(open_tasks)} tasks have not ended after {PATIENCE} s")
            began = time.monotonic()
            list(pool.map(lambda task: attend(port, task, journal), open_tasks))
            time.sleep(max(POLL_SECONDS - (time.monotonic() - began), 0.0))
    return tasks


def attend(port: int, task: Followed, journal: Journal) -> None:
    """Poll a task, and stop it if it is time."""
    if task.stop_after is not None and task.stop is None:
        begin = next((line for line in journal.of(task.id) if line["what"] == "begin"), None)
        if begin is not None and time.monotonic() - begin["at"] >= task.stop_after:
            stop(port, task, journal)
            return
    poll(port, task)


def poll(port: int, task: Followed) -> None:
    """Ask for a task over a new connection."""
    reply = send(port, "GET", f"/task/{task.id}")
    check(reply.status == 200, f"{task.id} was started, and now a get is answered {reply.status}")
    task.polls += 1
    task.saw(reply)


def stop(port: int, task: Followed, journal: Journal) -> None:
    """Stop a task over a connection to another process than the one that runs it."""
    deadline = time.monotonic() + 10
    while True:
        check(time.monotonic() < deadline, "no other worker answered within 10 s")
        with Connection(port) as connection:
            pid = connection.send("GET", "/pid").pid
            runs_on = next((line["pid"] for line in journal.of(task.id) if line["what"] == "begin"), None)
            if pid == runs_on:
                continue
            reply = connection.send("DELETE", f"/task/{task.id}")
            check(reply.pid == pid, f"the connection went from worker {pid} to {reply.pid}")
            break
    task.stop = reply
    check(reply.status in (200, 410), f"stopping {task.id} was answered {reply.status}: {reply.body[:300]!r}")
    if reply.status == 200:
        document = reply.json()
        check(document["State"] == "Aborted", f"a stop of {task.id} was answered with State {document['State']}")
        task.stopped_running = "StartingTime" in document
        task.saw(reply)


def settle(port: int, tasks: list[Followed]) -> None:
    """Wait until no code is stopping; every worker must tell the same of every task."""
    deadline = time.monotonic() + 10
    for task in tasks:
        seen: dict[bytes, set[int]] = defaultdict(set)
        while True:
            reply = send(port, "GET", f"/task/{task.id}")
            check(reply.status == 200, f"{task.id} has ended, and now a get is answered {reply.status}")
            task.saw(reply)
            if "Stopping" in reply.json():
                check(time.monotonic() < deadline, f"{task.id} is still stopping 10 s after its end")
                time.sleep(0.02)
                continue
            seen[reply.body].add(reply.pid)
            if sum(map(len, seen.values())) >= 2 or len(task.pids) > 2:
                break
        check(len(seen) == 1, f"{task.id}: workers tell different things: {seen}")


def judge(tasks: list[Followed], journal: Journal, count: int) -> str:
    """Compare what clients saw with what runs wrote; return the figures."""
    journal.read()
    known = {task.id for task in tasks}
    check(len(known) == count, "two starts were given the same id")
    strangers = journal.by_id.keys() - known
    check(not strangers, f"something ran that nobody started: {strangers}")
    told, others = [], 0
    for task in tasks:
        lines = journal.by_id.get(task.id, [])
        noted = Counter(line["what"] for line in lines)
        ends = [line["state"] for line in lines if line["what"] == "finished"]
        check(ends == [task.states[-1]], f"{task.id} is {task.states[-1]}; its signals of an end: {ends}")
        check(noted["begin"] <= 1, f"{task.id} ran {noted['begin']} times")
        if task.states[-1] == "Completed":
            check(noted["end"] == 1 and not noted["told"], f"{task.id} is Completed, its run wrote {dict(noted)}")
            continue
        check(task.states[-1] == "Aborted", f"{task.id} is {task.states[-1]}")
        check(task.stop is not None and task.stop.status == 200, f"{task.id} is Aborted; nobody stopped it")
        assert task.stop is not None
        if not task.stopped_running:
            check(not noted["begin"], f"{task.id} was stopped before it began, and began")
            continue
        runs_on = next(line["pid"] for line in lines if line["what"] == "begin")
        check(task.stop.pid != runs_on or task.is_hasty, f"{task.id} was stopped by the process that runs it")
        others += task.stop.pid != runs_on
        heard = next((line["at"] for line in lines if line["what"] == "told"), None)
        if heard is None:
            end = next((line["at"] for line in lines if line["what"] == "end"), None)
            check(end is not None and end < task.stop.answered_at + TOLD_SECONDS, f"{task.id} was not told of its stop")
        else:
            told.append(heard - task.stop.sent_at)
    check(told, "no view was told of a stop")
    check(max(told) <= TOLD_SECONDS, f"a view was told {max(told):.3f} s after the stop was sent")
    ran_on = {line["pid"] for lines in journal.by_id.values() for line in lines if line["what"] == "begin"}
    check(len(ran_on) >= 3, f"only {len(ran_on)} processes ran tasks")
    states = Counter(task.states[-1] for task in tasks)
    late = sum(task.stop is not None and task.stop.status == 410 for task in tasks)
    unbegun = sum(task.states[-1] == "Aborted" and not task.stopped_running for task in tasks)
    return (
        f"{count} tasks on {len(ran_on)} pids, {sum(task.polls for task in tasks)} polls, {states['Completed']} Completed, "
        f"{states['Aborted']} Aborted ({others} running ones stopped from another pid, {unbegun} before they began, "
        f"{late} stops too late), view told after {median(told) * 1000:.0f} ms, at most {max(told) * 1000:.0f} ms"
    )
