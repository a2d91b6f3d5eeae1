"""Stops of threads that log, lock, queue and query in loops: no lock lost, no innocent task hit, no thread lost."""

from __future__ import annotations

import logging
import queue
import random
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from flask import Flask

from flask_asyncroute import AsyncRoute, State
from flask_asyncroute.runtime import runtime_of

STOPS = 3_000
AT_ONCE = 4
DEADLINE = 10.0


def prove(share: float) -> Iterator[str]:
    """Prove it on both stores, half of the stops each."""
    for store in ("memory://", "sqlite:///asyncroute.db"):
        with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
            yield f"{store}: {_prove(store, folder, max(int(STOPS * share) // 2, 60))}"


def _prove(store: str, folder: str, count: int) -> str:
    app = Flask(__name__, instance_path=folder)
    app.config.update(ASYNCROUTE_STORE=store, ASYNCROUTE_INTERRUPT_AFTER=0.0, ASYNCROUTE_MAX_WORKERS=8)
    async_routes = AsyncRoute(app)
    log = logging.Logger("noise")
    with open("/dev/null", "w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        log.addHandler(handler)
        locks: list[Any] = [threading.Lock(), threading.RLock(), threading.Condition(), handler.lock]
        items: queue.Queue[int] = queue.Queue()

        @async_routes.route("/noise", methods=["POST"])
        def noise() -> None:
            connection = sqlite3.connect(":memory:")
            while True:
                log.info("round %s", 1)
                for lock in locks[:3]:
                    with lock:
                        pass
                items.put(1)
                items.get()
                connection.execute("SELECT 1").fetchone()

        @async_routes.route("/innocent", methods=["POST"])
        def innocent() -> int:
            rounds, end = 0, time.monotonic() + 0.05
            while time.monotonic() < end:
                log.info("round %s", rounds)
                rounds += 1
            return rounds

        try:
            return _drive(app, async_routes, locks, count)
        finally:
            runtime_of(app).close()


def _drive(app: Flask, async_routes: AsyncRoute, locks: list[Any], count: int) -> str:
    client = app.test_client()
    chance = random.Random(3)
    innocents = []
    slowest = 0.0
    for _ in range(count // AT_ONCE):
        guilty = [client.post("/noise").get_json()["Id"] for _ in range(AT_ONCE)]
        innocents.append(client.post("/innocent").get_json()["Id"])
        time.sleep(chance.random() * 0.01)
        began = time.monotonic()
        for task_id in guilty:
            assert client.delete(f"/task/{task_id}").status_code == 200
        with app.app_context():
            while any((task := async_routes.get(task_id)) is not None and task.stopping for task_id in guilty):
                assert time.monotonic() - began < DEADLINE, "a thread was not interrupted"
                time.sleep(0.002)
        slowest = max(slowest, time.monotonic() - began)
        for lock in locks:
            assert lock.acquire(timeout=5), f"{lock} was lost"
            lock.release()
    with app.app_context():
        states = [async_routes.wait(task_id, 30).state for task_id in innocents]
    assert set(states) == {State.COMPLETED}, states
    return f"{count // AT_ONCE * AT_ONCE} stops, {len(innocents)} innocents unharmed, the slowest four ended in {slowest:.2f} s"
