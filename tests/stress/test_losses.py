"""Workers of gunicorn are killed at random under a steady load: no accepted task is lost or stuck.

The responses to clients are compared with what the views wrote into a file.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.support.apps.crowd import read_journal
from tests.support.client import get_patiently, send
from tests.support.crew import Crew
from tests.support.processes import descendants, wait_until_gone
from tests.support.server import START, gunicorn
from tests.support.waiting import eventually_true
from tests.support.worker_processes import WorkerProcesses

CYCLES = 200
WORKERS = 3
RATE_SECONDS = 0.03
"""Seconds between two starts of the steady load."""
FOUND_SECONDS = 2.0
SETTLED_SECONDS = 60.0
CHILDREN_SECONDS = 1.0
"""Seconds within which the children of a killed worker must be gone."""
ROUTES = ("work", "work", "again", "child")
"""Routes to start; a repeated route is started more often."""

NOTE_READY = """    app.extensions["crowd.note"]("ready", "")
"""


class Load(Crew):
    """Starts tasks while the context lasts; keeps the ids of the accepted ones."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(1)
        self.acknowledged: dict[str, str] = {}
        self.refused = 0
        self.unanswered = 0
        self._port = port
        self._chance = random.Random(seed)

    def _run(self, number: int) -> None:
        while not self._end.wait(RATE_SECONDS):
            route = self._chance.choice(ROUTES)
            try:
                reply = send(self._port, "PUT", f"/{route}/{self._chance.randrange(20, 800)}")
            except (OSError, HTTPException):
                self.unanswered += 1  # Its worker was killed before it sent a response.
                continue
            if reply.status == 202:
                self.acknowledged[reply.json()["Id"]] = route
            else:
                assert reply.status == 503, (
                    f"a start was answered {reply.status}: {reply.body[:300]!r}"
                )
                self.refused += 1


@pytest.mark.covers("F01", "F02", "I1", "I3")
def test_no_task_is_lost_when_workers_are_killed(
    tmp_path: Path, store_url: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    cycles = scaled(CYCLES, 5)
    app = f"tests.support.apps.crowd:create_app({str(tmp_path)!r}, store={store_url!r})"
    options = ("--workers", str(WORKERS), "--threads", "4")
    with gunicorn(tmp_path / "log", app, *options, conf=START + NOTE_READY) as server:
        with Load(server.port, cycles) as load:
            kills = kill_workers(server.workers, WORKERS, cycles)
        tasks = wait_for_ends(server.port, load)
        figures(check_results(load, tasks, kills, tmp_path))
        server.assert_no_traceback()


@pytest.mark.covers("F01", "F02", "I1", "I3")
def test_no_task_is_lost_when_web_servers_and_workers_are_killed(
    tmp_path: Path, store_url: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """The web servers run no tasks. All processes are killed, and replaced."""
    cycles = scaled(CYCLES, 5)
    arguments = f"{str(tmp_path)!r}, store={store_url!r}, run_tasks=False"
    app = f"tests.support.apps.crowd:create_app({arguments})"
    options = ("--workers", "2", "--threads", "4")
    with (
        gunicorn(tmp_path / "log", app, *options, conf=START + NOTE_READY) as server,
        WorkerProcesses(tmp_path, app, 2) as workers,
    ):
        with Load(server.port, cycles) as load:
            kills = kill_workers(lambda: server.workers() + workers.pids(), 4, cycles)
        tasks = wait_for_ends(server.port, load, workers.pids)
        figures(check_results(load, tasks, kills, tmp_path))
        server.assert_no_traceback()
        workers.assert_no_traceback()
    ran = {
        line.get("worker", line["pid"])
        for line in read_journal(tmp_path)
        if line["what"] == "begin"
    }
    assert not ran & set(server.workers()), "a web server ran tasks"


@dataclass
class Kills:
    """The workers that were killed.

    :param at: the monotonic time of each kill, by the pid of the worker.
    :param children: the seconds until all descendants of a worker were gone, if it had some.
    """

    at: dict[int, float] = field(default_factory=dict)
    children: list[float] = field(default_factory=list)

    def could_find(self, killed_at: float, ready: dict[int, float]) -> list[float]:
        """Return when each other worker could first detect the tasks of a killed worker.

        Workers that were killed within `FOUND_SECONDS` do not count.

        :param ready: the time at which each worker had started.
        """
        since = {pid: max(killed_at, at) for pid, at in ready.items()}
        return [at for pid, at in since.items() if self.at.get(pid, math.inf) > at + FOUND_SECONDS]

    def worker_of(self, begin: dict[str, Any]) -> int:
        """Return the worker of the process that wrote a line: the process itself, or a child's
        parent.
        """
        return int(begin.get("worker", begin["pid"]))

    def is_killed(self, begin: dict[str, Any]) -> bool:
        """Return whether that worker was killed. The parent of an orphaned child has pid 1 or 0."""
        return self.worker_of(begin) in self.at or self.worker_of(begin) <= 1


def kill_workers(running: Callable[[], list[int]], count: int, cycles: int) -> Kills:
    """Kill one worker after the other, each time when all are running.

    :param running: returns the pids of the workers, and replaces those that were killed.
    :param count: the number of workers.
    """
    chance = random.Random(cycles)
    kills = Kills()
    for _ in range(cycles):
        eventually_true(
            lambda: len(living(running(), kills)) >= count,
            30,
            otherwise="a killed worker was not replaced within 30 s",
        )
        time.sleep(chance.uniform(0.2, 1.5))
        victim = chance.choice(living(running(), kills))
        started = descendants(victim)
        kills.at[victim] = killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_until_gone(started, 10)
        if started:
            kills.children.append(time.monotonic() - killed_at)
    return kills


def living(pids: list[int], kills: Kills) -> list[int]:
    """Return the workers that were not killed."""
    return [pid for pid in pids if pid not in kills.at]


def wait_for_ends(
    port: int, load: Load, replace: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Wait until all accepted tasks have ended; return them by id.

    :param replace: replaces killed workers.
    """
    deadline = time.monotonic() + SETTLED_SECONDS
    ended: dict[str, Any] = {}
    while True:
        replace()
        open_ids = [task_id for task_id in load.acknowledged if task_id not in ended]
        if not open_ids:
            return ended
        for task_id in open_ids:
            reply = get_patiently(port, f"/task/{task_id}")
            assert reply.status == 200, (
                f"{task_id} was acknowledged, and now a get is answered {reply.status}"
            )
            task = reply.json()
            if task["IsCompleted"] and "Stopping" not in task:
                ended[task_id] = task
        left = [task_id for task_id in open_ids if task_id not in ended]
        assert time.monotonic() < deadline, (
            f"{len(left)} tasks are stuck after {SETTLED_SECONDS} s: {left[:5]}"
        )
        time.sleep(0.1)


def check_results(load: Load, tasks: dict[str, Any], kills: Kills, folder: Path) -> str:
    """Compare the responses to clients with what the views wrote; return the figures."""
    written: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for line in read_journal(folder):
        written[line["id"]][line["what"]].append(line)
    ready = {line["pid"]: line["at"] for line in written[""]["ready"]}
    found_after, after_kill, ends = [], [], Counter[str]()
    for task_id, task in tasks.items():
        begun, done = written[task_id]["begin"], written[task_id]["end"]
        ends[task.get("Error", task["State"])] += 1
        most = 1 if load.acknowledged[task_id] != "again" else 3
        assert len(begun) <= most, (
            f"{task_id} ({load.acknowledged[task_id]}) ran {len(begun)} times"
        )
        assert all(map(kills.is_killed, begun[:-1])), f"{task_id} ran again though its worker lives"
        if task["State"] == "Completed":
            # A worker may be killed between the end of a view and the end of its task. With
            # on_loss="restart", the view then runs again.
            assert done, f"{task_id} is Completed, but its view has not ended"
            assert len(done) == 1 or most > 1, f"{task_id} ended twice"
            continue
        assert task.get("Error") == "Worker lost", (
            f"{task_id} is {task['State']}: {task.get('Error')}"
        )
        assert not begun or kills.is_killed(begun[-1]), (
            f"{task_id} has the error Worker lost, but its worker lives: {written[task_id]}"
        )
        if begun and kills.worker_of(begun[-1]) in kills.at:
            ended_at = [line["at"] for line in written[task_id]["finished"]]
            assert len(ended_at) <= 1, f"{task_id} had {len(ended_at)} ends"
            # The worker that recovers it may be killed before it sends the signal.
            for at in ended_at:
                killed_at = kills.at[kills.worker_of(begun[-1])]
                after_kill.append(at - killed_at)
                found_after.append(at - min(at, *kills.could_find(killed_at, ready)))
    assert kills.children, "no worker had children: the load is too small"
    assert max(kills.children) <= CHILDREN_SECONDS, (
        f"children were gone only after {max(kills.children):.2f} s"
    )
    assert found_after, "no running task was lost: the load is too small"
    assert max(after_kill) <= FOUND_SECONDS, (
        f"a lost task was found after {max(after_kill):.2f} s; {max(found_after):.2f} s after "
        "a worker could detect it"
    )
    return (
        f"{len(kills.at)} kills, {len(tasks)} tasks acknowledged, 0 lost, 0 stuck "
        f"({load.unanswered} starts unanswered, "
        f"{load.refused} refused), {dict(ends)}, lost ones found after {median(after_kill):.2f} s, "
        "at most "
        f"{max(after_kill):.2f} s and {max(found_after):.2f} s after there was a worker that "
        "could, children gone after "
        f"{median(kills.children) * 1000:.0f} ms, at most {max(kills.children) * 1000:.0f} ms"
    )
