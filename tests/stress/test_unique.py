"""Double clicks on a ``unique`` route of four worker processes: at no time do two unfinished tasks
have one key.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.client import Connection, Reply, send
from tests.support.crew import Crew
from tests.support.server import START, gunicorn
from tests.support.waiting import eventually_true

CLICKS = 10_000
CLIENTS, WORKERS = 8, 4
PER_CONNECTION = 50
"""Double clicks until a client connects again, perhaps to another worker."""
PATIENCE = 60.0
ANNA, BEN = "anna", "ben"
OWN, SHARED = [f"own-{number}" for number in range(6)], [f"shared-{number}" for number in range(6)]
"""Keys that only anna uses, and keys that all callers use."""


@dataclass(frozen=True)
class Click:
    """One of the two starts of a double click."""

    user: str | None
    key: str
    is_waiting: bool
    reply: Reply


def test_double_clicks_start_one_task_per_key(
    tmp_path: Path, store_url: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    count = scaled(CLICKS, 100)
    app = f"tests.support.apps.clicks:create_app({str(tmp_path)!r}, store={store_url!r})"
    options = ("--workers", str(WORKERS), "--threads", "8", "--keep-alive", "60")
    with gunicorn(tmp_path / "log", app, *options, conf=START) as server:
        ready: set[int] = set()
        while len(ready) < WORKERS:  # so that the figures do not include the start of the workers
            ready.add(send(server.port, "GET", "/pid").pid)
        began = time.monotonic()
        with _Clients(server.port, count) as clients:
            eventually_true(lambda: clients.are_done, 3600, 0.1)
        took = time.monotonic() - began
        answers = Counter(click.reply.status for click in clients.clicks)
        assert answers.total() == 2 * count
        started = {task_id for click in clients.clicks for task_id in _task_of(click)}
        eventually_true(lambda: _lines(tmp_path)[-1:] and _ended(tmp_path) == started, PATIENCE)
        server.assert_no_traceback()
        assert "The store cannot be used" not in server.output()
    assert answers[202] and answers[409], f"not all kinds of answers occurred: {answers}"
    hits = answers[200] + answers[202] - len(started)
    slowest = max(click.reply.answered_at - click.reply.sent_at for click in clients.clicks)
    figures(
        f"{count:,} double clicks in {took:.0f} s: {len(started):,} tasks, {hits:,} answers with "
        f"the task of another start, {answers[409]:,} times 409, {answers[503]:,} times 503; "
        f"slowest answer {slowest:.1f} s"
    )


def _task_of(click: Click) -> Iterable[str]:
    """Check an answer; yield the id of its task, if any."""
    reply, document = click.reply, click.reply.json()
    if reply.status in (200, 202):
        assert reply.status == 202 or click.is_waiting
        assert document["State"] == "Completed" or reply.status == 202
        assert document["Url"].endswith(f"/{click.key}")
        assert document.get("User") == click.user
        yield document["Id"]
    else:
        slug = {409: "task-exists", 503: "queue-full"}[reply.status]
        assert document["type"].endswith(f":{slug}"), document
        assert "Id" not in document
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.status == 503 or click.key in SHARED, "anna may read all tasks with this key"


def _lines(folder: Path) -> list[tuple[str, str, str]]:
    """Return (what, key, id) of each line that a view has written, in order."""
    journal = folder / "journal"
    lines = map(json.loads, journal.read_text().splitlines() if journal.exists() else ())
    return [(line["what"], line["key"], line["id"]) for line in lines]


def _ended(folder: Path) -> set[str]:
    """Check that the tasks of each key ran one after the other; return the ids of ended tasks."""
    running: dict[str, str] = {}
    ended: set[str] = set()
    for what, key, task_id in _lines(folder):
        if what == "begin":
            other = running.setdefault(key, task_id)
            assert other == task_id, f"{task_id} began while {other} was running ({key})"
            assert task_id not in ended, f"{task_id} ran twice"
        else:
            assert running.pop(key) == task_id
            ended.add(task_id)
    return ended


class _Clients(Crew):
    """Clients with two threads each, which send a start with the same key at the same time."""

    def __init__(self, port: int, count: int) -> None:
        super().__init__(2 * CLIENTS)
        self.clicks: list[Click] = []
        self._port = port
        self._count = count
        self._barriers = [threading.Barrier(2) for _ in range(CLIENTS)]

    @property
    def are_done(self) -> bool:
        return len(self.clicks) == 2 * self._count or bool(self._errors)

    def _run(self, number: int) -> None:
        client, hand = divmod(number, 2)
        mine = range(client, self._count, CLIENTS)
        try:
            for first in range(0, len(mine), PER_CONNECTION):
                with Connection(self._port) as connection:
                    for click in mine[first : first + PER_CONNECTION]:
                        self._click(connection, self._barriers[client], click, is_second=hand == 1)
        except BaseException:
            self._barriers[client].abort()
            raise

    def _click(
        self, connection: Connection, barrier: threading.Barrier, number: int, is_second: bool
    ) -> None:
        chance = random.Random(number)  # both threads of the client choose the same
        user = chance.choice([ANNA, ANNA, ANNA, BEN, None])
        key = chance.choice(OWN + SHARED if user == ANNA else SHARED)
        is_waiting = is_second and chance.random() < 0.3
        headers = {} if user is None else {"X-User": user}
        if is_waiting:
            headers["Prefer"] = "wait=10"
        barrier.wait(PATIENCE)
        reply = connection.send("POST", f"/click/{key}", headers=headers)
        self.clicks.append(Click(user, key, is_waiting, reply))
