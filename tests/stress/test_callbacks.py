"""Workers are terminated and killed at random while they send callbacks: each callback arrives, and
none changes a task.

Some receivers hang, drip, flood, redirect or refuse. Their messages are compared with the responses
to clients.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.support.apps.calling import ATTEMPTS
from tests.support.apps.crowd import read_journal
from tests.support.client import get_patiently, send
from tests.support.crew import Crew
from tests.support.receivers import DELIVERED, FLOOD, ONCE, REFUSED, Message, Receivers
from tests.support.server import START, Server, gunicorn
from tests.support.waiting import eventually_true

EVENTS = 250
"""The number of signals to workers, on each store."""
WORKERS = 2
CALM_SECONDS = 0.8
"""Seconds of load before the first signal."""
RATE_SECONDS = 0.06
CLIENTS = 2
SETTLED_SECONDS = 90.0
KINDS = ("good",) * 26 + ("late", "busy", "gone", "moved", "hang", "drip", "head", "flood")
"""Kinds of receivers; a repeated kind is called more often."""
ENDS = ("TERM", "HUP", "KILL", "KILL")


class Load(Crew):
    """Starts tasks with a callback while the context lasts; keeps the accepted ones."""

    def __init__(self, port: int, receivers: Receivers) -> None:
        super().__init__(CLIENTS)
        self.kinds: dict[str, str] = {}
        """The kind of the receiver, by the id of the task."""
        self.unanswered = 0
        self.refused = 0
        self._port = port
        self._receivers = receivers
        self._chance = random.Random(7)

    def _run(self, number: int) -> None:
        deck: list[str] = []
        while not self._end.wait(RATE_SECONDS):
            # All kinds occur soon, also in a short trial.
            deck = deck or self._chance.sample(KINDS, len(KINDS))
            kind = deck.pop()
            route = self._chance.choice(("call", "call", "call", "break"))
            path = f"/{route}/{self._chance.randrange(150)}"
            try:
                reply = send(self._port, "PUT", path, {"callbackUrl": self._receivers.url(kind)})
            except (OSError, HTTPException):
                self.unanswered += 1  # Its worker was killed before it sent a response.
                continue
            if reply.status == 202:
                self.kinds[reply.json()["Id"]] = kind
            else:
                assert reply.status == 503, (
                    f"a start was answered {reply.status}: {reply.body[:300]!r}"
                )
                self.refused += 1


@pytest.mark.covers("A09", "A18", "A21", "F25", "F26", "F27", "F28", "F30", "F31")
def test_callbacks_arrive_when_workers_end(
    tmp_path: Path, store_url: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    app = (
        f"tests.support.apps.calling:create_app({str(tmp_path)!r}, store={store_url!r}, drain=0.3)"
    )
    options = ("--workers", str(WORKERS), "--threads", "4")
    with Receivers() as receivers:
        with gunicorn(tmp_path / "log", app, *options, conf=START) as server:
            with Load(server.port, receivers) as load:
                time.sleep(CALM_SECONDS)
                assert receivers.most_at_once <= 2, "a host was called too often at once"
                calm_until = time.monotonic()
                ended = end_workers(server, scaled(EVENTS, 4))
            tasks = wait_for_ends(server.port, load)
            log = server.output()
        # The views of /break raise, which is logged with a traceback.
        errors = log.count("Traceback") - log.count("raised an exception.\nTraceback")
        assert not errors, f"the server logged {errors} errors of its own:\n{log[-9000:]}"
        found = check_results(load, tasks, receivers, tmp_path, calm_until)
    figures(f"{', '.join(f'{count} {how}' for how, count in sorted(ended.items()))}; {found}")


def end_workers(server: Server, events: int) -> Counter[str]:
    """Signal one worker or all, each time when all are running; return the counts by signal."""
    chance = random.Random(events)
    sent: Counter[str] = Counter()
    for _ in range(events):
        eventually_true(
            lambda: len(server.workers()) >= WORKERS,
            30,
            otherwise="the arbiter has not replaced its workers within 30 s",
        )
        victim = server.a_worker()
        time.sleep(chance.uniform(0.05, 0.5))
        signal_name = chance.choice(ENDS)
        sent[signal_name] += 1
        try:
            os.kill(
                server.pid if signal_name == "HUP" else victim, getattr(signal, f"SIG{signal_name}")
            )
        except ProcessLookupError:
            pass  # It was already exiting.
    return sent


def wait_for_ends(port: int, load: Load) -> dict[str, Any]:
    """Wait until all accepted tasks and their callbacks have ended; return the tasks by id."""
    deadline = time.monotonic() + SETTLED_SECONDS
    ended: dict[str, Any] = {}
    while open_ids := [task_id for task_id in load.kinds if task_id not in ended]:
        for task_id in open_ids:
            reply = get_patiently(port, f"/task/{task_id}")
            assert reply.status == 200, (
                f"{task_id} was acknowledged, and now a get is answered {reply.status}"
            )
            task = reply.json()
            if task["IsCompleted"] and task["CallbackInfo"]["State"] in ("Completed", "Failed"):
                ended[task_id] = task
        assert time.monotonic() < deadline, (
            f"{len(open_ids)} callbacks are stuck after {SETTLED_SECONDS} s: "
            f"{[load.kinds[i] for i in open_ids[:9]]}"
        )
        time.sleep(0.1)
    return ended


def check_results(
    load: Load, tasks: dict[str, Any], receivers: Receivers, folder: Path, calm_until: float
) -> str:
    """Compare the responses to clients with the messages to receivers; return the figures."""
    assert not receivers.forged, (
        f"{len(receivers.forged)} callbacks could not be verified: {receivers.forged[:1]}"
    )
    assert not receivers.trapped, f"{receivers.trapped} redirects were followed"
    assert receivers.flooded and max(receivers.flooded) < FLOOD, (
        f"{receivers.flooded} bytes of a flood were read"
    )
    received: dict[str, list[Message]] = defaultdict(list)
    for message in receivers.messages:
        received[message.document["Id"]].append(message)
    ids = {
        task_id: {message.webhook_id for message in messages}
        for task_id, messages in received.items()
    }
    assert all(len(found) == 1 for found in ids.values()), (
        "a callback was repeated with another webhook-id"
    )
    assert len(set[str]().union(*ids.values())) == len(ids), "two tasks have the same webhook-id"
    states_signalled = defaultdict(set)
    for line in read_journal(folder):
        if line["what"] == "finished":
            states_signalled[line["id"]].add(line["state"])
    outcomes: Counter[str] = Counter()
    doubled = 0
    for task_id, task in tasks.items():
        messages, kind = received[task_id], load.kinds[task_id]
        check_task(task, messages, states_signalled[task_id])
        outcomes[f"{kind} {task['CallbackInfo']['State']}"] += 1
        expected, fits = EXPECTED[kind]
        attempts = task["CallbackInfo"]["Tentative"]
        assert task["CallbackInfo"]["State"] == expected, (
            f"the callback of {task_id} ({kind}) is {task['CallbackInfo']}"
        )
        assert fits(attempts), f"the callback of {task_id} ({kind}) took {attempts} attempts"
        assert len(messages) >= attempts, (
            f"{task_id} ({kind}): {attempts} attempts, {len(messages)} received"
        )
        extra = [message for message in messages[attempts:] if message.at < calm_until]
        assert not extra, f"{task_id} ({kind}) was sent twice before any worker was ended"
        doubled += len(messages) > attempts
    assert doubled, "no attempt was cut: the load is too small"
    return (
        f"{len(tasks)} callbacks of acknowledged tasks, 0 lost, all verified, {doubled} sent again "
        "with the same id "
        f"({load.unanswered} starts unanswered, {load.refused} refused), "
        f"{dict(sorted(outcomes.items()))}"
    )


EXPECTED: dict[str, tuple[str, Callable[[int], bool]]] = {
    **{kind: ("Completed", lambda attempts: 1 <= attempts <= ATTEMPTS) for kind in DELIVERED},
    **{kind: ("Failed", lambda attempts: attempts == 1) for kind in ONCE},
    **{kind: ("Failed", lambda attempts: attempts == ATTEMPTS) for kind in REFUSED},
}
"""The final state of a callback, and a check of its number of attempts."""


def check_task(task: dict[str, Any], messages: list[Message], states_signalled: set[str]) -> None:
    """Check that a task has the outcome of its view or of its worker's end, and that callbacks and
    signals report the same.
    """
    state, error = task["State"], task.get("Error")
    fails = task["Url"].split("/")[-2] == "break"
    if state == "Aborted":
        assert error in ("Worker lost", "Server shutdown"), f"{task['Id']} is Aborted: {error}"
    else:
        assert state == ("Failed" if fails else "Completed"), f"{task['Id']} is {state}: {error}"
    assert states_signalled <= {state}, (
        f"{task['Id']} is {state}, and its signals said {states_signalled}"
    )
    for message in messages:
        document = message.document
        assert (document["State"], document.get("Error"), document.get("Result")) == (
            state,
            error,
            task.get("Result"),
        ), (
            f"{task['Id']} is {state}, {error}, {task.get('Result')}, and its callback says "
            f"{document}"
        )
