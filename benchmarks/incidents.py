"""Stops and killed workers under gunicorn: the times until clients and views notice."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from .hotpath import wait_until
from .served import POLL, Connection, Event, Journal, Server, running

PAUSE = 0.05, 0.25
"""Seconds before each measured request. A random time, because some stops wait for a poll of the
store.
"""
WARM_UP = 3
"""Rounds before the measurement."""
SAME, OTHER = "same worker", "other worker"
WAITING = 20
"""Tasks that wait when a worker is killed."""
MAINTENANCE = 1.0
"""Seconds between two checks for dead workers. The kills are spread over this time."""


@dataclass
class Stops:
    """Stops of tasks in one worker, sent to the same or to another worker. Times are in seconds.

    :param answered: from the request until its response.
    :param noticed: from the request until the view has noticed the stop.
    :param plain: from a request of the plain view until its response.
    """

    store: str
    where: str
    answered: list[float] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The ratio of the response's median to that of the plain view."""
        return median(self.answered) / median(self.plain)


@dataclass
class Recoveries:
    """Kills of a worker with running tasks. Times are in seconds since the kill.

    :param again: until the view of each of these tasks ran in another process.
    :param ended: until all tasks of a round had ended, one value for each kill.
    """

    store: str
    again: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)


def measure_stops(store: str, rounds: int) -> list[Stops]:
    """Measure stops by the worker that runs the task, and by another worker."""
    same, other = Stops(store, SAME), Stops(store, OTHER)
    chance = random.Random(1)
    with running(store) as server, server.connections() as workers:
        for number in range(WARM_UP + rounds):
            for stops in chance.sample((same, other), 2):
                _stop(server, workers, stops, chance)
            if number < WARM_UP:
                same, other = Stops(store, SAME), Stops(store, OTHER)
    return [same, other]


def _stop(server: Server, workers: list[Connection], stops: Stops, chance: random.Random) -> None:
    """Start a task, call the plain view while it runs, then stop it."""
    task_id = chance.choice(workers).send("PUT", "/endless", 202).body["Id"]
    begun = _wait_for(server.journal, "begin", {task_id})[task_id]
    is_same = stops.where == SAME
    worker = next(one for one in workers if (one.pid == begun.pid) == is_same)
    time.sleep(chance.uniform(*PAUSE))
    plain = worker.send("DELETE", "/plain")
    time.sleep(chance.uniform(*PAUSE))
    stop = worker.send("DELETE", f"/task/{task_id}")
    if stop.body["State"] != "Aborted":
        raise RuntimeError(f"The task was not stopped: {stop.body}")
    noticed = _wait_for(server.journal, "stopped", {task_id})[task_id]
    stops.plain.append(plain.seconds)
    stops.answered.append(stop.seconds)
    stops.noticed.append(noticed.at - stop.sent_at)
    server.journal.clear()


def measure_recoveries(store: str, tasks: int, kills: int) -> Recoveries:
    """Kill a worker that runs ``tasks`` tasks, while 20 more wait.

    The other worker is also full. Its tasks end after the kill, so it has capacity for the others.
    """
    found, chance = Recoveries(store), random.Random(1)
    with running(store, tasks) as server:
        for _ in range(kills):
            with server.connections() as workers:
                _kill(server, workers, tasks, found, chance.uniform(0, MAINTENANCE))
    return found


def _kill(
    server: Server, workers: list[Connection], tasks: int, found: Recoveries, pause: float
) -> None:
    """Fill both workers, start tasks that wait, kill a worker and wait until all tasks have ended.

    :param pause: seconds before the kill.
    """
    victim, survivor = workers
    lost = _start(server.journal, victim, tasks)
    others = _start(server.journal, survivor, tasks)
    others |= {victim.send("PUT", "/restartable", 202).body["Id"] for _ in range(WAITING)}
    time.sleep(pause)
    killed_at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    server.gate.touch()
    _wait_for(server.journal, "end", lost | others)
    for task_id in lost | others:
        wait_until(partial(_has_ended, survivor, task_id), "The end of a task", POLL)
    found.ended.append(time.monotonic() - killed_at)
    begun = _wait_for(server.journal, "begin", lost)
    for task_id in lost:
        if begun[task_id].pid == victim.pid:
            raise RuntimeError(f"The task {task_id} did not run again.")
        found.again.append(begun[task_id].at - killed_at)
    server.gate.unlink()
    server.journal.clear()


def _has_ended(worker: Connection, task_id: str) -> bool:
    return worker.send("GET", f"/task/{task_id}").body["IsCompleted"] is True


def _start(journal: Journal, worker: Connection, tasks: int) -> set[str]:
    """Start tasks in one worker and wait until they run there; return their ids."""
    started = {worker.send("PUT", "/restartable", 202).body["Id"] for _ in range(tasks)}
    begun = _wait_for(journal, "begin", started)
    if any(event.pid != worker.pid for event in begun.values()):
        raise RuntimeError(f"Another worker than {worker.pid} runs some tasks.")
    return started


def _wait_for(journal: Journal, what: str, ids: set[str]) -> dict[str, Event]:
    """Wait until each of these tasks has an event of this kind; return its last one."""
    found: dict[str, Event] = {}

    def have_all() -> bool:
        events = journal.read(what)
        found.update({event.task_id: event for event in events if event.task_id in ids})
        return len(found) == len(ids)

    wait_until(have_all, f'The event "{what}" of {len(ids)} tasks', POLL)
    return found
