"""Tasks that fail at random while workers of gunicorn are killed: each attempt runs once, begins on
schedule, and each task sends one callback.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from flask_asyncroute.workers.runner import LOOK_SECONDS
from tests.support.apps.crowd import RETRY, read_journal
from tests.support.client import get_patiently, send
from tests.support.server import START, Server, gunicorn
from tests.support.waiting import eventually_true

TASKS = 1000
KILLS = 15
WORKERS = 2
RATE_SECONDS = 0.1
"""Seconds between two starts."""
MOST_FAILURES = RETRY.times + 1
LATE_SECONDS = 0.5
SHORT_ALLOWANCE = 2.0
SETTLED_SECONDS = 120.0
RESTART_SECONDS = 12.0
"""The delay of the retries that wait while the server restarts."""

NOTE_READY = """    app.extensions["crowd.note"]("ready", "")
"""


class Receiver:
    """Receives callbacks, by task."""

    def __init__(self) -> None:
        self.sent: dict[str, list[tuple[str, str]]] = defaultdict(list)
        """The ``webhook-id`` and the State of each callback."""
        self.url = ""

    def record(self, webhook_id: str, document: dict[str, Any]) -> None:
        self.sent[document["Id"]].append((webhook_id, document["State"]))


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Serve a receiver of callbacks while the context lasts."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.record(self.headers["webhook-id"], json.loads(data))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Trial:
    """The accepted tasks by id, with their route and planned failures, and the killed workers."""

    planned: dict[str, tuple[str, int]] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)


@pytest.mark.covers("F01", "F46", "I1", "I3")
def test_attempts_run_once_and_on_schedule_when_workers_are_killed(
    tmp_path: Path,
    store_url: str,
    share: float,
    scaled: Callable[..., int],
    figures: Callable[[str], None],
) -> None:
    app = (
        f"tests.support.apps.crowd:create_app({str(tmp_path)!r}, store={store_url!r}, "
        "callback_allowed_hosts=['127.0.0.1'])"
    )
    options = ("--workers", str(WORKERS), "--threads", "4")
    trial = Trial()
    with receiving() as receiver:
        with gunicorn(tmp_path / "log", app, *options, conf=START + NOTE_READY) as server:
            over = threading.Event()
            killer = threading.Thread(
                target=kill_workers, args=(server, tmp_path, trial, scaled(KILLS, 2), over)
            )
            killer.start()
            try:
                start_tasks(server.port, trial, receiver, scaled(TASKS, 20))
            finally:
                over.set()
                killer.join()
            tasks = wait_for_ends(server.port, trial)
            waiting = start_waiting_tasks(server.port, scaled(100, 5))
        stopped_at = time.monotonic()
        with gunicorn(tmp_path / "log", app, *options, conf=START + NOTE_READY) as server:
            for task_id in waiting:
                wait_for_end(server.port, task_id)
        eventually_true(lambda: receiver.sent.keys() >= tasks.keys(), 60)
    journal = read_journal(tmp_path)
    ends = check_attempts(trial, tasks, journal)
    repeated = check_callbacks(receiver, tasks)
    late = delays(journal, set(tasks), trial)
    ready_at = min(
        line["at"] for line in journal if line["what"] == "ready" and line["at"] > stopped_at
    )
    # A worker looks for waiting tasks half a second after its start.
    restarted = ready_at + LOOK_SECONDS + time.time() - time.monotonic()
    after_restart = delays(journal, set(waiting), trial, restarted)
    assert len(after_restart) == len(waiting), "a retry was lost at the restart"
    figures(
        f"{len(trial.killed)} kills, {len(tasks)} tasks, {dict(ends)}, {repeated} callbacks sent "
        f"again, {len(late)} retries late by {ms(late)}, {len(after_restart)} over a restart by "
        f"{ms(after_restart)}"
    )
    # In a short run, the start of the server and of replaced workers takes a large part of the CPU.
    allowance = 1.0 if share == 1.0 else SHORT_ALLOWANCE
    assert quantiles(late, n=100)[98] <= LATE_SECONDS * allowance
    assert max(after_restart) <= LATE_SECONDS * allowance


def start_tasks(port: int, trial: Trial, receiver: Receiver, count: int) -> None:
    """Start tasks at a steady rate; each fails a random number of times."""
    chance = random.Random(count)
    pause = threading.Event()
    while len(trial.planned) < count:
        route = chance.choice(("retried", "retried-again"))
        failures = chance.randrange(MOST_FAILURES + 1)
        pause.wait(RATE_SECONDS)
        try:
            document = {"callbackUrl": receiver.url}
            reply = send(port, "PUT", f"/{route}/{failures}", document)
        except (OSError, HTTPException):
            continue  # its worker was killed before it sent a response
        if reply.status == 202:
            trial.planned[reply.json()["Id"]] = route, failures


def start_waiting_tasks(port: int, count: int) -> list[str]:
    """Start tasks that wait for a retry; return their ids when all wait."""
    started = []
    for _ in range(count):
        reply = send(port, "PUT", f"/retried/1?after={RESTART_SECONDS}")
        assert reply.status == 202
        started.append(reply.json()["Id"])
    for task_id in started:
        path = f"/task/{task_id}"
        eventually_true(lambda: "NextAttemptTime" in get_patiently(port, path).json(), 10)  # noqa: B023
    return started


def kill_workers(
    server: Server, folder: Path, trial: Trial, kills: int, over: threading.Event
) -> None:
    """Kill one worker after the other, each time when all are ready."""
    chance = random.Random(kills)
    while len(trial.killed) < kills and not over.wait(chance.uniform(1, 4)):
        ready = {line["pid"] for line in read_journal(folder) if line["what"] == "ready"}
        living = [pid for pid in server.workers() if pid in ready - trial.killed.keys()]
        if len(living) < WORKERS:
            continue
        victim = chance.choice(living)
        trial.killed[victim] = time.time()
        os.kill(victim, signal.SIGKILL)


def wait_for_end(port: int, task_id: str) -> dict[str, Any]:
    """Return a task when it has ended."""

    def ended() -> Any:
        task = get_patiently(port, f"/task/{task_id}").json()
        return task if task["IsCompleted"] and "Stopping" not in task else None

    found: dict[str, Any] = eventually_true(ended, SETTLED_SECONDS, 0.1, f"{task_id} is stuck")
    return found


def wait_for_ends(port: int, trial: Trial) -> dict[str, dict[str, Any]]:
    return {task_id: wait_for_end(port, task_id) for task_id in trial.planned}


def check_attempts(
    trial: Trial, tasks: dict[str, dict[str, Any]], journal: list[dict[str, Any]]
) -> Counter[str]:
    """Compare the attempts of each task with its plan; return how the tasks ended."""
    begun: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in journal:
        if line["what"] == "begin":
            begun[line["id"]].append((line["attempt"], line["pid"]))
    ends: Counter[str] = Counter()
    for task_id, (route, failures) in trial.planned.items():
        task, runs = tasks[task_id], begun[task_id]
        where = f"{task_id} ({route}, {failures} failures): {task}, {runs}"
        attempts = [attempt for attempt, _ in runs]
        planned = list(range(1, min(failures, RETRY.times) + 2))
        if task.get("Error") == "Worker lost":
            ends["Worker lost"] += 1
            # The worker was killed during the last attempt, or between its claim and its view.
            assert (runs and runs[-1][1] in trial.killed) or task["Attempt"] > len(runs), where
            assert sorted(set(attempts)) == planned[: len(set(attempts))], where
        else:
            ends[task["State"]] += 1
            expected = "Failed" if failures > RETRY.times else "Completed"
            assert task["State"] == expected, where
            assert task["Attempt"] == len(planned), where
            assert sorted(set(attempts)) == planned, where
        assert attempts == sorted(attempts), where
        for (attempt, pid), (following, _) in zip(runs, runs[1:], strict=False):
            if attempt == following:  # it was lost and restarted
                assert route == "retried-again" and pid in trial.killed, where
    return ends


def check_callbacks(receiver: Receiver, tasks: dict[str, dict[str, Any]]) -> int:
    """Check that each task sent one callback; return how often one was sent again.

    A worker can be killed before it stores that a callback was sent.
    """
    for task_id, task in tasks.items():
        assert len(set(receiver.sent[task_id])) == 1, f"{task_id}: {receiver.sent[task_id]}"
        assert receiver.sent[task_id][0][1] == task["State"]
    return sum(len(sent) - 1 for sent in receiver.sent.values())


def delays(
    journal: list[dict[str, Any]], ids: set[str], trial: Trial, since: float = 0.0
) -> list[float]:
    """Return the seconds from the time of each retry to its begin, or from the start of a worker if
    none was running at this time. Omit retries during which a worker was killed, perhaps the one
    that had claimed it.

    :param since: when the workers that could run the retries had begun to look for them.
    """
    due = {
        (line["id"], line["attempt"]): line["due"] for line in journal if line["what"] == "retried"
    }
    found = []
    for line in journal:
        at = due.pop((line["id"], line.get("attempt")), None) if line["what"] == "begin" else None
        if at is None or line["id"] not in ids:
            continue
        if not any(at - 0.1 <= killed <= line["time"] for killed in trial.killed.values()):
            found.append(line["time"] - max(at, since))
    return found


def ms(seconds: list[float]) -> str:
    """Return median, 99th percentile and maximum as text."""
    percentile = quantiles(seconds, n=100)[98]
    shown = (median(seconds), percentile, max(seconds))
    return "/".join(f"{value * 1000:.0f}" for value in shown) + " ms"
