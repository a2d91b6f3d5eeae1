"""Many tasks on several gunicorn workers, started, polled and stopped through any of them.

The responses to clients are compared with what the views wrote into a file.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.support.apps.crowd import read_journal
from tests.support.client import Connection, Reply, send
from tests.support.server import gunicorn

TASKS = 400
CLIENTS = 8
PATIENCE = 120.0
ASKED_SECONDS = 0.5
POLL_SECONDS = 0.1
ORDER = ("NotStarted", "Running", "Completed", "Failed", "Aborted")
TERMINAL = ("Completed", "Failed", "Aborted")


@dataclass
class Followed:
    """A task as its client sees it.

    :param stop_after: seconds of running after which it is stopped; None: never.
    :param is_hasty: whether it is stopped right after its start.
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
        """Whether the client has seen its end."""
        return bool(self.states) and self.states[-1] in TERMINAL

    def record(self, reply: Reply) -> None:
        """Record a response about the task; states may only advance."""
        task = reply.json()
        assert task["Id"] == self.id, f"{self.id}: the answer is about {task['Id']}"
        self.pids.add(reply.pid)
        state = task["State"]
        if not self.states or state != self.states[-1]:
            last = self.states[-1] if self.states else "NotStarted"
            assert last not in TERMINAL, f"{self.id} left its terminal state {last} for {state}"
            assert ORDER.index(state) >= ORDER.index(last), f"{self.id} went from {last} to {state}"
            self.states.append(state)


class Journal:
    """What the views wrote, read again as it grows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._read_at = 0.0
        self.by_id: dict[str, list[dict[str, Any]]] = {}

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """Return the lines about one task, at most 50 ms old."""
        with self._lock:
            if time.monotonic() - self._read_at > 0.05:
                self.read()
        return self.by_id.get(task_id, [])

    def read(self) -> None:
        """Read the file again."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in read_journal(self._folder):
            found[line["id"]].append(line)
        self.by_id = dict(found)
        self._read_at = time.monotonic()


@pytest.mark.covers("I2")
@pytest.mark.parametrize("preload", [False, True], ids=["no-preload", "preload"])
def test_tasks_over_four_workers(
    tmp_path: Path, preload: bool, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    figures(run(tmp_path, scaled(TASKS, 40), preload))


def run(folder: Path, count: int, preload: bool) -> str:
    """Follow ``count`` tasks to their ends; return the figures."""
    options = ["--workers", "4", "--threads", "4", *(["--preload"] if preload else [])]
    app = f"tests.support.apps.crowd:create_app({str(folder)!r})"
    with gunicorn(folder / "log", app, *options) as server:
        journal = Journal(folder)
        tasks = follow(server.port, journal, count)
        wait_until_stopped(server.port, tasks)
        figures = check_results(tasks, journal, count)
        server.assert_no_traceback()
        assert "ERROR" not in server.output(), server.output()[-3000:]
    return figures


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
        assert reply.status == 202, f"a start was answered {reply.status}: {reply.body[:300]!r}"
        task = Followed(reply.json()["Id"], *plan)
        task.record(reply)
        if task.is_hasty:
            stop(port, task, journal)
        return task

    with ThreadPoolExecutor(CLIENTS) as pool:
        tasks = list(pool.map(begin, plans))
        deadline = time.monotonic() + PATIENCE
        while open_tasks := [task for task in tasks if not task.is_over]:
            assert time.monotonic() < deadline, (
                f"{len(open_tasks)} tasks have not ended after {PATIENCE} s"
            )
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
    """Get a task over a new connection."""
    reply = send(port, "GET", f"/task/{task.id}")
    assert reply.status == 200, f"{task.id} was started, and now a get is answered {reply.status}"
    task.polls += 1
    task.record(reply)


def stop(port: int, task: Followed, journal: Journal) -> None:
    """Stop a task through another process than the one that runs it."""
    deadline = time.monotonic() + 10
    while True:
        assert time.monotonic() < deadline, "no other worker answered within 10 s"
        with Connection(port) as connection:
            pid = connection.send("GET", "/pid").pid
            runs_on = next(
                (line["pid"] for line in journal.of(task.id) if line["what"] == "begin"), None
            )
            if pid == runs_on:
                continue
            reply = connection.send("DELETE", f"/task/{task.id}")
            assert reply.pid == pid, f"the connection went from worker {pid} to {reply.pid}"
            break
    task.stop = reply
    assert reply.status in (200, 410), (
        f"stopping {task.id} was answered {reply.status}: {reply.body[:300]!r}"
    )
    if reply.status == 200:
        document = reply.json()
        assert document["State"] == "Aborted", (
            f"a stop of {task.id} was answered with State {document['State']}"
        )
        task.stopped_running = "StartingTime" in document
        task.record(reply)


def wait_until_stopped(port: int, tasks: list[Followed]) -> None:
    """Wait until no view is stopping. All workers must return the same task."""
    deadline = time.monotonic() + 10
    for task in tasks:
        seen: dict[bytes, set[int]] = defaultdict(set)
        while True:
            reply = send(port, "GET", f"/task/{task.id}")
            assert reply.status == 200, (
                f"{task.id} has ended, and now a get is answered {reply.status}"
            )
            task.record(reply)
            if "Stopping" in reply.json():
                assert time.monotonic() < deadline, (
                    f"{task.id} is still stopping 10 s after its end"
                )
                time.sleep(0.02)
                continue
            seen[reply.body].add(reply.pid)
            if sum(map(len, seen.values())) >= 2 or len(task.pids) > 2:
                break
        assert len(seen) == 1, f"{task.id}: workers answer differently: {seen}"


def check_results(tasks: list[Followed], journal: Journal, count: int) -> str:
    """Compare the responses to clients with what the views wrote; return the figures."""
    journal.read()
    known = {task.id for task in tasks}
    assert len(known) == count, "two starts were given the same id"
    strangers = journal.by_id.keys() - known
    assert not strangers, f"tasks ran that no client started: {strangers}"
    delays, others = [], 0
    for task in tasks:
        lines = journal.by_id.get(task.id, [])
        noted = Counter(line["what"] for line in lines)
        ends = [line["state"] for line in lines if line["what"] == "finished"]
        assert ends == [task.states[-1]], (
            f"{task.id} is {task.states[-1]}; its signals of an end: {ends}"
        )
        assert noted["begin"] <= 1, f"{task.id} ran {noted['begin']} times"
        if task.states[-1] == "Completed":
            assert noted["end"] == 1 and not noted["told"], (
                f"{task.id} is Completed, its run wrote {dict(noted)}"
            )
            continue
        assert task.states[-1] == "Aborted", f"{task.id} is {task.states[-1]}"
        assert task.stop is not None and task.stop.status == 200, (
            f"{task.id} is Aborted, but was not stopped"
        )
        assert task.stop is not None
        if not task.stopped_running:
            assert not noted["begin"], f"{task.id} was stopped before it began, and began"
            continue
        runs_on = next(line["pid"] for line in lines if line["what"] == "begin")
        assert task.stop.pid != runs_on or task.is_hasty, (
            f"{task.id} was stopped by the process that runs it"
        )
        others += task.stop.pid != runs_on
        asked_at = next((line["at"] for line in lines if line["what"] == "told"), None)
        if asked_at is None:
            end = next((line["at"] for line in lines if line["what"] == "end"), None)
            assert end is not None and end < task.stop.answered_at + ASKED_SECONDS, (
                f"{task.id} was not asked to stop"
            )
        else:
            delays.append(asked_at - task.stop.sent_at)
    assert delays, "no view was asked to stop"
    assert max(delays) <= ASKED_SECONDS, (
        f"a view was asked to stop {max(delays):.3f} s after the request"
    )
    ran_on = {
        line["pid"] for lines in journal.by_id.values() for line in lines if line["what"] == "begin"
    }
    assert len(ran_on) >= 3, f"only {len(ran_on)} processes ran tasks"
    states = Counter(task.states[-1] for task in tasks)
    late = sum(task.stop is not None and task.stop.status == 410 for task in tasks)
    unbegun = sum(task.states[-1] == "Aborted" and not task.stopped_running for task in tasks)
    return (
        f"{count} tasks on {len(ran_on)} pids, {sum(task.polls for task in tasks)} polls, "
        f"{states['Completed']} Completed, "
        f"{states['Aborted']} Aborted ({others} running ones stopped from another pid, {unbegun} "
        "before they began, "
        f"{late} stops too late), view asked after {median(delays) * 1000:.0f} ms, at most "
        f"{max(delays) * 1000:.0f} ms"
    )
