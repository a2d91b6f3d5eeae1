"""Streams are cut at random and resumed on any worker: no event is lost, repeated or out of order.

Several clients follow the same tasks, one task or a group. They are cut within an event, by a
reset, or because their worker is killed. At the end, the events of each client are compared with
those of the others, of a late client and of the views.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

from tests.support.client import send
from tests.support.event_streams import END, STATES, Message, Stream
from tests.support.server import START, Server, gunicorn

CUTS = 500
"""The number of cuts, on each store."""
KILL_EVERY = 3
"""A worker is killed once in this number of rounds."""
WORKERS = 3
COUNT = 60
"""Events of each view."""
ROUTES = ("thread", "process", "again")
GROUP_FOLLOWERS = 2
BYTES = 700
"""The average number of bytes between two cuts."""
SECONDS = 0.3
"""Seconds until a silent connection is cut."""
PATIENCE = 90.0


class StreamClient:
    """A client of one stream that is cut and resumed until it has received all ends. Used in one
    thread.

    :param path: of the stream.
    :param ends: the number of ends to receive.
    """

    def __init__(self, port: int, path: str, ends: int, seed: int) -> None:
        self.got: list[Message] = []
        """All events that have an id."""
        self.present: str | None = None
        """The state that was received before the first of them."""
        self.pids: list[int] = []
        self.cuts = 0
        self.has_begun = threading.Event()
        self.has_id = threading.Event()
        self._port = port
        self._path = path
        self._ends = ends
        self._chance = random.Random(seed)
        self._last_id: str | None = None

    def run(self) -> None:
        """Follow the stream to the end."""
        deadline = time.monotonic() + PATIENCE
        while not self.is_done:
            assert time.monotonic() < deadline, (
                f"{self._path}: {len(self.got)} events, and not the end"
            )
            try:
                self._connect()
            except (OSError, HTTPException):
                pass  # Its worker was killed, or nothing arrived within SECONDS.

    @property
    def is_done(self) -> bool:
        """Whether all ends were received."""
        return sum(message.name == END for message in self.got) >= self._ends

    def _connect(self) -> None:
        """Read a stream until it ends or is cut."""
        budget = int(self._chance.expovariate(1 / BYTES))
        with Stream(
            self._port, self._path, self._last_id, timeout=10 if self._last_id is None else SECONDS
        ) as stream:
            if stream.status == 204:
                assert self.is_done, f"{self._path} was answered 204 before all ends were received"
                return
            assert stream.status == 200, f"{self._path} was answered {stream.status}"
            self.pids.append(stream.pid)
            while not self.is_done:
                data = stream.read(self._chance.randint(1, 300))
                if not data:
                    return
                self._take(stream.parser.feed(data))
                # A client of a group cannot resume before it has an id.
                self._last_id = stream.parser.last_id or self._last_id
                if stream.parser.has_begun:
                    self.has_begun.set()
                budget -= len(data)
                if self._last_id is not None:
                    self.has_id.set()
                    if budget < 0 and not self.is_done:
                        self.cuts += 1
                        if self._chance.random() < 0.5:
                            stream.reset()
                        return

    def _take(self, messages: list[Message]) -> None:
        for message in messages:
            if message.id is not None:
                self.got.append(message)
            elif message.name in STATES and not self.got:
                self.present = message.short


def test_resumed_streams_have_every_event_once(
    tmp_path: Path, store_url: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    cuts = scaled(CUTS, 10)
    config = f"store={store_url!r}, max_streams=16, drain=0.5"
    app = f"tests.support.apps.news:create_app({str(tmp_path)!r}, {config})"
    options = ("--workers", str(WORKERS), "--threads", "24")
    with gunicorn(tmp_path / "log", app, *options, conf=START) as server:
        done: list[StreamClient] = []
        rounds = kills = events = 0
        while sum(client.cuts for client in done) < cuts or not kills:
            rounds += 1
            with_kill = rounds % KILL_EVERY == 1
            kills += with_kill
            clients, seen = one_round(server, rounds, with_kill)
            done += clients
            events += seen
    moved = sum(a != b for each in done for a, b in zip(each.pids, each.pids[1:], strict=False))
    figures(
        f"{sum(each.cuts for each in done)} cuts and {kills} kills of a worker in {rounds} rounds, "
        f"{moved} times resumed on another worker, {events} events, 0 lost, 0 doubled, in order"
    )
    assert moved, "no stream was resumed on another worker"


def one_round(server: Server, number: int, with_kill: bool) -> tuple[list[StreamClient], int]:
    """Start a task of each kind, follow and cut streams; return the clients and the number of
    events.
    """
    port = server.port
    seed = number * 100
    groups = [
        StreamClient(port, "/tasks/events?group=burst", len(ROUTES), seed + n)
        for n in range(GROUP_FOLLOWERS)
    ]
    with ThreadPoolExecutor(len(groups) + len(ROUTES)) as pool:
        running = [pool.submit(each.run) for each in groups]
        for each in groups:
            assert each.has_begun.wait(PATIENCE), "the stream of a group does not begin"
        tasks = {route: start(port, f"/burst/{route}/{COUNT}") for route in ROUTES}
        alone = {
            task_id: StreamClient(port, f"/task/{task_id}/events", 1, seed + 50 + n)
            for n, task_id in enumerate(tasks.values())
        }
        running += [pool.submit(each.run) for each in alone.values()]
        if with_kill:
            for each in groups:
                assert each.has_id.wait(PATIENCE), "the stream of a group sends nothing"
            time.sleep(random.Random(seed).uniform(0, 0.2))
            os.kill(random.Random(seed).choice(server.workers()), signal.SIGKILL)
        for future in running:
            future.result()
    compare(port, groups, alone, tasks, with_kill)
    return [*groups, *alone.values()], len(groups[0].got)


def compare(
    port: int,
    groups: list[StreamClient],
    alone: dict[str, StreamClient],
    tasks: dict[str, str],
    with_kill: bool,
) -> None:
    """Check that all clients have the same events, and that these match what happened."""
    first = groups[0].got
    ids = [message.id for message in first]
    assert len(set(ids)) == len(ids), "an event of a group was received twice"
    for other in groups[1:]:
        assert [message.id for message in other.got] == ids, (
            "two clients of a group have different events"
        )
    of_task = {message.id: task_id for task_id, each in alone.items() for message in each.got}
    of_task |= {message.id: message.data["Id"] for message in first if message.name in STATES}
    for route, task_id in tasks.items():
        whole = [message for message in first if of_task.get(message.id) == task_id]
        last = check_history(route, whole, with_kill)
        check_alone(alone[task_id], whole)
        late = [message for message in read_late(port, task_id) if message.id is not None]
        sent = [message for message in whole if message.name not in STATES]
        assert late == [*sent, last], f"{task_id}: a late client gets other events"
        resumed = {"Last-Event-ID": str(last.id)}
        reply = send(port, "GET", f"/task/{task_id}/events", headers=resumed)
        assert reply.status == 204, f"{task_id}: a client that has all events gets more"
    assert set(of_task) == set(ids), "the events of a group are not exactly those of its tasks"


def check_history(route: str, whole: list[Message], with_kill: bool) -> Message:
    """Check the events that a client of the group got for one task; return the last."""
    runs: list[list[int]] = []
    states = [message.short for message in whole if message.name in STATES]
    for message in whole:
        if message.name not in STATES:
            runs[-1].append(message.short)
        elif message.short == "Running":
            runs.append([])
    expected = ["NotStarted", "Running"] * max(len(runs), 1)
    assert len(runs) == 1 or (route == "again" and with_kill), (
        f"a task ran {len(runs)} times: {states}"
    )
    assert states[:-1] == expected or (not runs and states[:-1] == expected[:1]), (
        f"the states were {states}"
    )
    for run in runs:
        assert run == list(range(len(run))), f"the events of a view came as {run}"
    if route == "again" or not with_kill:
        assert states[-1] == "Completed", f"a task ended {states[-1]}"
    if states[-1] == "Completed":
        assert len(runs[-1]) == COUNT, f"{len(runs[-1])} events of a view were received"
    assert whole[-1].name == END, f"the last event was {whole[-1].name}"
    return whole[-1]


def check_alone(client: StreamClient, whole: list[Message]) -> None:
    """Check that a client of one task got all events except states before the first it received."""
    # Compares ids, because the task object of an event may show later progress.
    ids = [message.id for message in client.got]
    known: set[str | None] = set()
    fits = False
    for message in whole:
        if message.name in STATES:
            if message.name != END:
                known.add(message.id)
            if message.short == client.present:
                fits = fits or ids == [each.id for each in whole if each.id not in known]
    assert fits, (
        f"a client of one task that first received {client.present} has other events than "
        "its group's"
    )


def read_late(port: int, task_id: str) -> list[Message]:
    """Return the events that a client gets if it connects after the end."""
    with Stream(port, f"/task/{task_id}/events") as stream:
        return list(stream.messages())


def start(port: int, path: str) -> str:
    """Start a task; return its id."""
    reply = send(port, "PUT", path)
    assert reply.status == 202, f"a start was answered {reply.status}: {reply.body[:300]!r}"
    return str(reply.json()["Id"])
