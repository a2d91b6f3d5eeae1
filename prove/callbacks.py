"""Workers that are ended and killed at random moments while they send callbacks: each callback arrives, and none changes a task.

Among the receivers are some that hang, drip, flood, redirect or refuse. What they got is compared with what clients were told.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from . import check, scaled
from .apps.calling import ATTEMPTS
from .apps.crowd import read_journal
from .client import send
from .crew import Crew
from .databases import sqlite_and_postgresql
from .exits import a_worker
from .losses import START, patiently
from .receivers import DELIVERED, FLOOD, ONCE, REFUSED, Message, Receivers
from .server import Server, gunicorn

EVENTS = 500
"""Shutdowns and kills, on all stores together."""
WORKERS = 2
CALM_SECONDS = 0.8
"""Of load before the first of them."""
RATE_SECONDS = 0.06
CLIENTS = 2
SETTLED_SECONDS = 90.0
KINDS = ("good",) * 26 + ("late", "busy", "gone", "moved", "hang", "drip", "head", "flood")
"""Of receivers; what is named more often is called more often."""
ENDS = ("TERM", "HUP", "KILL", "KILL")


class Load(Crew):
    """Starts tasks that call back until it is told to end; keeps those that were acknowledged."""

    def __init__(self, port: int, receivers: Receivers) -> None:
        super().__init__(CLIENTS)
        self.kinds: dict[str, str] = {}
        """Of the receiver, by the id of the task."""
        self.unanswered = 0
        self.refused = 0
        self._port = port
        self._receivers = receivers
        self._chance = random.Random(7)

    def _run(self, number: int) -> None:
        deck: list[str] = []
        while not self._end.wait(RATE_SECONDS):
            # All of them come soon, also in a short trial.
            deck = deck or self._chance.sample(KINDS, len(KINDS))
            kind = deck.pop()
            route = self._chance.choice(("call", "call", "call", "break"))
            path = f"/{route}/{self._chance.randrange(150)}"
            try:
                reply = send(self._port, "PUT", path, {"callbackUrl": self._receivers.url(kind)})
            except (OSError, HTTPException):
                self.unanswered += 1  # its worker was killed; nobody was promised anything
                continue
            if reply.status == 202:
                self.kinds[reply.json()["Id"]] = kind
            else:
                check(reply.status == 503, f"a start was answered {reply.status}: {reply.body[:300]!r}")
                self.refused += 1


def prove(share: float) -> str:
    """Run the trial on SQLite and on PostgreSQL."""
    told = []
    stores = list(sqlite_and_postgresql())
    for name, opened in stores:
        with opened as url:
            told.append(f"{name}: {run(url, scaled(EVENTS, share, 8) // len(stores))}")
    return "; ".join(told)


def run(store: str, events: int) -> str:
    """End workers so often; return the figures."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name, Receivers() as receivers:
        folder = Path(name)
        (folder / "gunicorn.conf.py").write_text(START)
        options = ["--workers", str(WORKERS), "--threads", "4", "--config", str(folder / "gunicorn.conf.py")]
        app = f"prove.apps.calling:create_app({name!r}, store={store!r}, drain=0.3)"
        with gunicorn(folder / "log", app, *options) as server:
            with Load(server.port, receivers) as load:
                time.sleep(CALM_SECONDS)
                check(receivers.most_at_once <= 2, f"a host was called {receivers.most_at_once} times at once")
                calm_until = time.monotonic()
                ended = end_workers(server, events)
            tasks = settle(server.port, load)
            log = server.output()
        errors = log.count("Traceback") - log.count("raised.\nTraceback")
        check(not errors, f"the server wrote of {errors} errors that are no view's:\n{log[-9000:]}")
        figures = judge(load, tasks, receivers, folder, calm_until)
    return f"{', '.join(f'{count} {how}' for how, count in sorted(ended.items()))}; {figures}"


def end_workers(server: Server, events: int) -> Counter[str]:
    """End one worker or all of them, again and again, each time when all are there; return how often by each signal."""
    chance = random.Random(events)
    done: Counter[str] = Counter()
    for _ in range(events):
        deadline = time.monotonic() + 30
        while len(server.workers()) < WORKERS:
            check(time.monotonic() < deadline, "the arbiter has not replaced its workers within 30 s")
            time.sleep(0.01)
        victim = a_worker(server)
        time.sleep(chance.uniform(0.05, 0.5))
        how = chance.choice(ENDS)
        done[how] += 1
        try:
            os.kill(server.pid if how == "HUP" else victim, getattr(signal, f"SIG{how}"))
        except ProcessLookupError:
            pass  # one that was leaving has gone by itself
    return done


def settle(port: int, load: Load) -> dict[str, Any]:
    """Wait until all that was acknowledged has ended and its callback is over; return the tasks by id."""
    deadline = time.monotonic() + SETTLED_SECONDS
    over: dict[str, Any] = {}
    while open_ids := [task_id for task_id in load.kinds if task_id not in over]:
        for task_id in open_ids:
            reply = patiently(port, f"/task/{task_id}")
            check(reply.status == 200, f"{task_id} was acknowledged, and now a get is answered {reply.status}")
            task = reply.json()
            if task["IsCompleted"] and task["CallbackInfo"]["State"] in ("Completed", "Failed"):
                over[task_id] = task
        check(
            time.monotonic() < deadline,
            f"{len(open_ids)} callbacks are stuck after {SETTLED_SECONDS} s: {[load.kinds[i] for i in open_ids[:9]]}",
        )
        time.sleep(0.1)
    return over


def judge(load: Load, tasks: dict[str, Any], receivers: Receivers, folder: Path, calm_until: float) -> str:
    """Compare what clients were told with what receivers got; return the figures."""
    check(not receivers.forged, f"{len(receivers.forged)} callbacks could not be verified: {receivers.forged[:1]}")
    check(not receivers.trapped, f"{receivers.trapped} redirects were followed")
    check(receivers.flooded and max(receivers.flooded) < FLOOD, f"of a flood {receivers.flooded} bytes were taken")
    came: dict[str, list[Message]] = defaultdict(list)
    for message in receivers.messages:
        came[message.document["Id"]].append(message)
    ids = {task_id: {message.webhook_id for message in messages} for task_id, messages in came.items()}
    check(all(len(found) == 1 for found in ids.values()), "a callback was repeated with another webhook-id")
    check(len(set[str]().union(*ids.values())) == len(ids), "two tasks have the same webhook-id")
    told = defaultdict(set)
    for line in read_journal(folder):
        if line["what"] == "finished":
            told[line["id"]].add(line["state"])
    outcomes: Counter[str] = Counter()
    doubled = 0
    for task_id, task in tasks.items():
        messages, kind = came[task_id], load.kinds[task_id]
        judge_task(task, messages, told[task_id])
        outcomes[f"{kind} {task['CallbackInfo']['State']}"] += 1
        expected, fits = EXPECTED[kind]
        attempts = task["CallbackInfo"]["Tentative"]
        check(
            task["CallbackInfo"]["State"] == expected, f"the callback of {task_id} ({kind}) is {task['CallbackInfo']}"
        )
        check(fits(attempts), f"the callback of {task_id} ({kind}) took {attempts} attempts")
        check(len(messages) >= attempts, f"{task_id} ({kind}): {attempts} attempts, {len(messages)} came")
        extra = [message for message in messages[attempts:] if message.at < calm_until]
        check(not extra, f"{task_id} ({kind}) was sent twice before any worker was ended")
        doubled += len(messages) > attempts
    check(doubled, "no attempt was cut: the load is too small")
    return (
        f"{len(tasks)} callbacks of acknowledged tasks, 0 lost, all verified, {doubled} sent again with the same id "
        f"({load.unanswered} starts unanswered, {load.refused} refused), {dict(sorted(outcomes.items()))}"
    )


EXPECTED: dict[str, tuple[str, Callable[[int], bool]]] = {
    **{kind: ("Completed", lambda attempts: 1 <= attempts <= ATTEMPTS) for kind in DELIVERED},
    **{kind: ("Failed", lambda attempts: attempts == 1) for kind in ONCE},
    **{kind: ("Failed", lambda attempts: attempts == ATTEMPTS) for kind in REFUSED},
}
"""What becomes of a callback, and after how many attempts that were not cut."""


def judge_task(task: dict[str, Any], messages: list[Message], told: set[str]) -> None:
    """Check that a task has the outcome of its view, or of the end of its worker, and that all were told just that."""
    state, error = task["State"], task.get("Error")
    fails = task["Url"].split("/")[-2] == "break"
    if state == "Aborted":
        check(error in ("Worker lost", "Server shutdown"), f"{task['Id']} is Aborted: {error}")
    else:
        check(state == ("Failed" if fails else "Completed"), f"{task['Id']} is {state}: {error}")
    check(told <= {state}, f"{task['Id']} is {state}, and was told to be {told}")
    for message in messages:
        document = message.document
        check(
            (document["State"], document.get("Error"), document.get("Result")) == (state, error, task.get("Result")),
            f"{task['Id']} is {state}, {error}, {task.get('Result')}, and its callback says {document}",
        )
