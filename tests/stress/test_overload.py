"""Starts from many clients at once, ten times as many as the queues can hold, while a client polls.

Each start is accepted (202) or refused (429 over the quota, 503 over the capacity). Refused starts
store nothing, polls stay fast, and the workers do not grow.
"""

from __future__ import annotations

import multiprocessing
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.apps.flood import ADMIN
from tests.support.client import Connection, Reply, send
from tests.support.processes import memory
from tests.support.server import Server, gunicorn

WORKERS = 2
QUEUE_SIZE = 200
"""Tasks that wait in each worker, besides the running one."""
TIMES = 10
QUOTA = 50
PROCESSES, THREADS = 2, 8
HOLD = "/hold/600"
P99_SECONDS = 0.1
POLL_SECONDS = 0.01
GROWTH_KIB = 10 * 1024
KINDS: tuple[dict[str, str], ...] = ({}, {"X-User": "anna"}, {"X-User": "ben"}, {})
BODIES = (b"", b"x" * 1000, b"x" * 400_000, b"")


@pytest.mark.covers("A69", "A70")
def test_starts_over_the_capacity_are_refused(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    figures(flood(tmp_path, scaled(QUEUE_SIZE, 10), scaled(QUOTA, 3)))


def flood(folder: Path, queue_size: int, quota: int) -> str:
    """Flood a new server, first to warm it up, then with the full count; return the figures."""
    bound = WORKERS * (queue_size + 1)
    config = f"queue_size={queue_size}, max_tasks_per_user={quota}, drain=0.5"
    app = f"tests.support.apps.flood:create_app({str(folder)!r}, {config})"
    with gunicorn(folder / "log", app, "--workers", str(WORKERS), "--threads", "8") as server:
        polled = send(server.port, "POST", HOLD, headers={"X-User": ADMIN}).json()["Id"]
        # Fill the queues, and run the code that refuses.
        first = _flood(server, 2 * bound)
        before = {pid: memory(pid) for pid in server.workers()}
        with _Poller(server.port, polled) as poller:
            second = _flood(server, TIMES * bound)
        growth = max(memory(pid) - size for pid, size in before.items()) // 1024
        stored = _stored(server.port)
    answers = first + second
    accepted = answers[202]
    assert set(answers) <= {202, 429, 503}, f"other answers than 202, 429 and 503: {dict(answers)}"
    assert answers[429] and answers[503], f"not all kinds of refusals occurred: {dict(answers)}"
    assert accepted + 1 <= bound, f"{accepted + 1} tasks were accepted, the capacity is {bound}"
    assert stored == accepted + 1, f"{stored} tasks are stored, {accepted + 1} were accepted"
    assert set(poller.statuses) == {200}, f"polls were answered with {dict(poller.statuses)}"
    waits = sorted(poller.seconds)
    p99 = waits[int(len(waits) * 0.99)]
    assert p99 < P99_SECONDS, f"the 99th percentile of {len(waits)} polls was {p99 * 1000:.0f} ms"
    assert growth < GROWTH_KIB, f"a worker grew by {growth} KiB"
    return (
        f"{answers.total():,} starts for {bound} tasks: {accepted} accepted, {answers[429]} over the "
        f"quota, {answers[503]} over the capacity; {len(waits)} polls, median "
        f"{waits[len(waits) // 2] * 1000:.1f} ms, 99 % under {p99 * 1000:.1f} ms; workers grew by "
        f"{growth} KiB at most"
    )


class _Poller:
    """Gets a task repeatedly on its own thread while the context lasts."""

    def __init__(self, port: int, task_id: str) -> None:
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self._port = port
        self._path = f"/task/{task_id}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> _Poller:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            reply = send(self._port, "GET", self._path, headers={"X-User": ADMIN})
            self.statuses[reply.status] += 1
            self.seconds.append(reply.answered_at - reply.sent_at)


def _flood(server: Server, count: int) -> Counter[int]:
    """Send starts from several processes with several threads; count the statuses."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        sent = [
            pool.submit(_flood_from_here, server.port, count // PROCESSES) for _ in range(PROCESSES)
        ]
        return sum((each.result() for each in sent), Counter())


def _flood_from_here(port: int, count: int) -> Counter[int]:
    with ThreadPoolExecutor(THREADS) as pool:
        return Counter(pool.map(lambda number: _start(port, number), range(count)))


def _start(port: int, number: int) -> int:
    reply: Reply = send(
        port,
        "POST",
        HOLD,
        body=BODIES[number // len(KINDS) % len(BODIES)],
        headers=KINDS[number % len(KINDS)],
    )
    if reply.status in (429, 503):
        wait = int(reply.headers["retry-after"])
        assert 1 <= wait <= 60, f"Retry-After: {wait}"
    return reply.status


def _stored(port: int) -> int:
    count, path = 0, "/tasks?limit=500"
    with Connection(port) as connection:
        while path:
            reply = connection.send("GET", path, headers={"X-User": ADMIN})
            count += len(reply.json())
            following = re.search(r'<([^>]+)>; rel="next"', reply.headers.get("link", ""))
            path = following[1] if following else ""
    return count
