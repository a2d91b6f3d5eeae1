"""How many tasks one store takes if several processes only write: add, claim and finish."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from flask_asyncroute.stores.base import Expect
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.task import AsyncRouteTask, State, now_us

from .peers import services

PROCESSES = (1, 2, 4, 8)
SECONDS = 2.0
SLOW_COMMIT_US = 5000
"""The time of a commit on a slow disk, which PostgreSQL imitates by waiting before each commit."""
PATIENCE = 60.0


def measure(url: str, folder: Path, processes: int) -> float:
    """Return the tasks per second of this number of processes on one store.

    :param folder: the base of a relative SQLite path.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    counts: Any = context.Queue()
    namespace = uuid.uuid4().hex
    arguments = (url, str(folder), namespace, barrier, counts)
    workers = [context.Process(target=_write, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        barrier.wait(PATIENCE)
        found = [counts.get(timeout=PATIENCE) for _ in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return float(sum(found)) / SECONDS


@contextmanager
def stores(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the URLs of the stores by their names in the table. PostgreSQL is omitted if it is not
    installed.
    """
    urls = {
        "SQLite": f"sqlite:///{folder}/normal.db",
        "SQLite FULL": f"sqlite:///{folder}/full.db?synchronous=FULL",
    }
    try:
        with services.postgresql() as server, services.EMPTY["postgresql"](server) as url:
            slow = f"-c%20commit_delay={SLOW_COMMIT_US}%20-c%20commit_siblings=0"
            urls["PostgreSQL"] = f"postgresql+psycopg{url}"
            urls["PostgreSQL, commits of 5 ms"] = f"postgresql+psycopg{url}?options={slow}"
            yield urls
    except services.Unavailable:
        yield urls


def _write(url: str, folder: str, namespace: str, barrier: Barrier, counts: Any) -> None:
    store = make_store(url, folder, namespace, True)
    store.open()
    barrier.wait(PATIENCE)
    owner, count, end = f"worker-{os.getpid()}", 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        task_id = str(uuid.uuid4())
        store.add(_task(task_id), b"{}", None, ())
        claim = store.claim(task_id, owner, now_us())
        assert claim is not None
        values = {"state": State.COMPLETED, "completed_us": now_us(), "result_json": b"{}"}
        assert store.update(task_id, Expect((State.RUNNING,), owner, claim.task.epoch), values)
        count += 1
    counts.put(count)


def _task(task_id: str) -> AsyncRouteTask:
    return AsyncRouteTask(
        id=task_id, async_route_id="task", endpoint="task", state=State.NOT_STARTED,
        cancellable=True, user=None, url="http://localhost/task", method="PUT",
        created_us=now_us(), retention_us=86_400_000_000, on_loss="abort",
    )  # fmt: skip
