"""Ten times as many starts as there are places, from many clients at once, while somebody polls a task.

Each start is taken (202) or refused (429 over the quota, 503 over the bound); what is refused leaves nothing, polls stay
quick, and the workers do not grow.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import check, scaled
from .apps.flood import ADMIN
from .client import Connection, Reply, send
from .server import Server, gunicorn

WORKERS = 2
QUEUE_SIZE = 200
"""Places of each worker beside the one task that runs."""
TIMES = 10
QUOTA = 50
PROCESSES, THREADS = 2, 8
HOLD = "/hold/600"
P99_SECONDS = 0.1
POLL_SECONDS = 0.01
GROWTH_KIB = 10 * 1024
KINDS: tuple[dict[str, str], ...] = ({}, {"X-User": "anna"}, {"X-User": "ben"}, {})
BODIES = (b"", b"x" * 1000, b"x" * 400_000, b"")


def prove(share: float) -> str:
    """Flood a fresh server once to warm it up and then in earnest."""
    queue_size = scaled(QUEUE_SIZE, share, 10)
    quota = scaled(QUOTA, share, 3)
    bound = WORKERS * (queue_size + 1)
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
        config = f"queue_size={queue_size}, max_tasks_per_user={quota}, drain=0.5"
        app = f"prove.apps.flood:create_app({folder!r}, {config})"
        with gunicorn(Path(folder) / "log", app, "--workers", str(WORKERS), "--threads", "8") as server:
            polled = send(server.port, "POST", HOLD, headers={"X-User": ADMIN}).json()["Id"]
            # Fills the places, and warms up what refuses.
            first = _flood(server, 2 * bound)
            before = _memory(server)
            with _Poller(server.port, polled) as poller:
                second = _flood(server, TIMES * bound)
            growth = max(after - before[pid] for pid, after in _memory(server).items())
            stored = _stored(server.port)
    answers = first + second
    taken = answers[202]
    check(set(answers) <= {202, 429, 503}, f"other answers than 202, 429 and 503: {dict(answers)}")
    check(answers[429] and answers[503], f"not all kinds of refusals came up: {dict(answers)}")
    check(taken + 1 <= bound, f"{taken + 1} tasks were taken, {bound} are the bound")
    check(stored == taken + 1, f"{stored} tasks are stored, {taken + 1} were taken")
    check(set(poller.statuses) == {200}, f"polls were answered with {dict(poller.statuses)}")
    waits = sorted(poller.seconds)
    p99 = waits[int(len(waits) * 0.99)]
    check(p99 < P99_SECONDS, f"the 99th percentile of {len(waits)} polls was {p99 * 1000:.0f} ms")
    check(growth < GROWTH_KIB, f"a worker grew by {growth} KiB")
    return (
        f"{answers.total():,} starts for {bound} places: {taken} taken, {answers[429]} over the quota, {answers[503]} over the "
        f"bound; {len(waits)} polls, median {waits[len(waits) // 2] * 1000:.1f} ms, 99 % under {p99 * 1000:.1f} ms; "
        f"workers grew by {growth} KiB at most"
    )


class _Poller:
    """Gets one task over and over, on a thread and connections of its own, while it is used as a context manager."""

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
    """Send so many starts from several processes, each with several threads; return how often each status came."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        sent = [pool.submit(_flood_from_here, server.port, count // PROCESSES) for _ in range(PROCESSES)]
        return sum((each.result() for each in sent), Counter())


def _flood_from_here(port: int, count: int) -> Counter[int]:
    with ThreadPoolExecutor(THREADS) as pool:
        return Counter(pool.map(lambda number: _start(port, number), range(count)))


def _start(port: int, number: int) -> int:
    reply: Reply = send(
        port, "POST", HOLD, body=BODIES[number // len(KINDS) % len(BODIES)], headers=KINDS[number % len(KINDS)]
    )
    if reply.status in (429, 503):
        wait = int(reply.headers["retry-after"])
        check(1 <= wait <= 60, f"Retry-After: {wait}")
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


def _memory(server: Server) -> dict[int, int]:
    """Return what each worker has resident, in KiB (Linux)."""
    return {
        pid: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("ascii"))[1])  # type: ignore[index]
        for pid in server.workers()
    }
