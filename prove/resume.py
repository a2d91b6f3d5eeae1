"""Streams that are cut at random points and resumed on whichever worker answers: nothing is lost, doubled or out of order.

Several clients follow the same tasks, each alone or as a group, and are cut over and over, some in the middle of an event,
some by a reset, some since their worker is killed. In the end what each of them has is compared: with the others', with
what a client gets that comes only now, and with what the views have sent.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

from . import check, scaled
from .client import send
from .databases import sqlite_and_postgresql
from .following import END, STATES, Message, Stream
from .losses import START
from .server import Server, gunicorn

CUTS = 1000
KILL_EVERY = 3
"""One round of so many has a worker killed."""
WORKERS = 3
COUNT = 60
"""Events of each view."""
ROUTES = ("thread", "process", "again")
GROUP_FOLLOWERS = 2
BYTES = 700
"""Between two cuts, on average."""
SECONDS = 0.3
"""The longest that a connection is left without a word before it is cut."""
PATIENCE = 90.0


class Following:
    """A client of one stream, cut and resumed until it has what it wants. Used in one thread.

    :param path: of the stream.
    :param ends: how many ends of tasks it waits for.
    """

    def __init__(self, port: int, path: str, ends: int, seed: int) -> None:
        self.got: list[Message] = []
        """All events that have an id."""
        self.present: str | None = None
        """The state that it was told before the first of them."""
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
        """Follow to the end."""
        deadline = time.monotonic() + PATIENCE
        while not self.is_done:
            check(time.monotonic() < deadline, f"{self._path}: {len(self.got)} events, and no end of it")
            try:
                self._connect()
            except (OSError, HTTPException):
                pass  # its worker was killed, or the time to cut it came while nothing was said

    @property
    def is_done(self) -> bool:
        """Whether it has seen all ends."""
        return sum(message.name == END for message in self.got) >= self._ends

    def _connect(self) -> None:
        """Read a stream to its end, or until it is cut."""
        budget = int(self._chance.expovariate(1 / BYTES))
        with Stream(self._port, self._path, self._last_id, timeout=10 if self._last_id is None else SECONDS) as stream:
            if stream.status == 204:
                check(self.is_done, f"{self._path} has no more to tell, but not all ends were told")
                return
            check(stream.status == 200, f"{self._path} was answered {stream.status}")
            self.pids.append(stream.pid)
            while not self.is_done:
                data = stream.read(self._chance.randint(1, 300))
                if not data:
                    return
                self._take(stream.parser.feed(data))
                # A client of a group that has no id yet could not know what it missed.
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


def prove(share: float) -> str:
    """Cut the streams of each store; return the figures."""
    told = []
    stores = list(sqlite_and_postgresql())
    for name, opened in stores:
        with opened as url:
            told.append(f"{name}: {trial(url, scaled(CUTS, share, 20) // len(stores))}")
    return "; ".join(told)


def trial(store: str, cuts: int) -> str:
    """Serve on a store, and go on until so many streams were cut."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        (folder / "gunicorn.conf.py").write_text(START)
        app = f"prove.apps.news:create_app({name!r}, store={store!r}, max_streams=16, drain=0.5)"
        options = ["--workers", str(WORKERS), "--threads", "24", "--config", str(folder / "gunicorn.conf.py")]
        with gunicorn(folder / "log", app, *options) as server:
            done: list[Following] = []
            rounds = kills = events = 0
            while sum(following.cuts for following in done) < cuts or not kills:
                rounds += 1
                with_kill = rounds % KILL_EVERY == 1
                kills += with_kill
                followings, seen = one_round(server, rounds, with_kill)
                done += followings
                events += seen
    moved = sum(a != b for each in done for a, b in zip(each.pids, each.pids[1:], strict=False))
    check(moved, "no stream was resumed on another worker")
    return (
        f"{sum(each.cuts for each in done)} cuts and {kills} kills of a worker in {rounds} rounds, {moved} times resumed on "
        f"another worker, {events} events, 0 lost, 0 doubled, in order"
    )


def one_round(server: Server, number: int, with_kill: bool) -> tuple[list[Following], int]:
    """Start a task of each kind, follow and cut; return who followed, and how many events there were."""
    port = server.port
    seed = number * 100
    groups = [Following(port, "/tasks/events?group=burst", len(ROUTES), seed + n) for n in range(GROUP_FOLLOWERS)]
    with ThreadPoolExecutor(len(groups) + len(ROUTES)) as pool:
        running = [pool.submit(each.run) for each in groups]
        for each in groups:
            check(each.has_begun.wait(PATIENCE), "the stream of a group does not begin")
        tasks = {route: start(port, f"/burst/{route}/{COUNT}") for route in ROUTES}
        alone = {
            task_id: Following(port, f"/task/{task_id}/events", 1, seed + 50 + n)
            for n, task_id in enumerate(tasks.values())
        }
        running += [pool.submit(each.run) for each in alone.values()]
        if with_kill:
            for each in groups:
                check(each.has_id.wait(PATIENCE), "nothing comes from a group")
            pause = threading.Event()
            pause.wait(random.Random(seed).uniform(0, 0.2))
            os.kill(random.Random(seed).choice(server.workers()), signal.SIGKILL)
        for future in running:
            future.result()
    compare(port, groups, alone, tasks, with_kill)
    return [*groups, *alone.values()], len(groups[0].got)


def compare(
    port: int, groups: list[Following], alone: dict[str, Following], tasks: dict[str, str], with_kill: bool
) -> None:
    """Check that all have the same, and that it is what happened."""
    first = groups[0].got
    ids = [message.id for message in first]
    check(len(set(ids)) == len(ids), "an event of a group came twice")
    for other in groups[1:]:
        check([message.id for message in other.got] == ids, "two clients of a group have different events")
    of_task = {message.id: task_id for task_id, each in alone.items() for message in each.got}
    of_task |= {message.id: message.data["Id"] for message in first if message.name in STATES}
    for route, task_id in tasks.items():
        whole = [message for message in first if of_task.get(message.id) == task_id]
        last = check_history(route, whole, with_kill)
        check_alone(alone[task_id], whole)
        late = [message for message in read_late(port, task_id) if message.id is not None]
        sent = [message for message in whole if message.name not in STATES]
        check(late == [*sent, last], f"{task_id}: who comes late is told something else")
        check(send(port, "GET", f"/task/{task_id}/events", headers={"Last-Event-ID": str(last.id)}).status == 204,
              f"{task_id}: who has all is told more")  # fmt: skip
    check(set(of_task) == set(ids), "a client of a group has not all events of its tasks, or more than these")


def check_history(route: str, whole: list[Message], with_kill: bool) -> Message:
    """Check what a group's client was told of one task; return the last of it."""
    runs: list[list[int]] = []
    states = [message.short for message in whole if message.name in STATES]
    for message in whole:
        if message.name not in STATES:
            runs[-1].append(message.short)
        elif message.short == "Running":
            runs.append([])
    expected = ["NotStarted", "Running"] * max(len(runs), 1)
    check(len(runs) == 1 or (route == "again" and with_kill), f"a task ran {len(runs)} times: {states}")
    check(states[:-1] == expected or (not runs and states[:-1] == expected[:1]), f"the states were {states}")
    for run in runs:
        check(run == list(range(len(run))), f"the events of a view came as {run}")
    if route == "again" or not with_kill:
        check(states[-1] == "Completed", f"a task ended {states[-1]}")
    if states[-1] == "Completed":
        check(len(runs[-1]) == COUNT, f"{len(runs[-1])} events of a view came")
    check(whole[-1].name == END, f"the last event was {whole[-1].name}")
    return whole[-1]


def check_alone(following: Following, whole: list[Message]) -> None:
    """Check what a client of one task was told: all of it, but for states before the one that it began with."""
    # An id stands for what has happened. The object that comes with it may have later progress, and so be another.
    ids = [message.id for message in following.got]
    known: set[str | None] = set()
    fits = False
    for message in whole:
        if message.name in STATES:
            if message.name != END:
                known.add(message.id)
            if message.short == following.present:
                fits = fits or ids == [each.id for each in whole if each.id not in known]
    check(fits, f"a client of one task, told first that it is {following.present}, has something else than its group's")


def read_late(port: int, task_id: str) -> list[Message]:
    """Return what a client is told who asks for the first time when all is over."""
    with Stream(port, f"/task/{task_id}/events") as stream:
        return list(stream.messages())


def start(port: int, path: str) -> str:
    """Start a task; return its id."""
    reply = send(port, "PUT", path)
    check(reply.status == 202, f"a start was answered {reply.status}: {reply.body[:300]!r}")
    return str(reply.json()["Id"])
