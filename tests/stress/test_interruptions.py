"""Threads are interrupted while they log, hold locks, use queues and query databases: no lock,
connection or thread is lost.

Half of the tasks in the shared pool are not stopped and must complete.
"""

from __future__ import annotations

import gc
import io
import logging
import queue
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

from benchmarks.calls import call, environ_of
from flask_asyncroute import (
    AsyncRoute,
    AsyncRouteTask,
    current_task,
    task_aborted,
    task_completed,
    task_failed,
)
from flask_asyncroute.runtime import runtime_of
from tests.support.waiting import eventually_true

STOPS = 3_000
WORKERS = 8
INTERRUPT_AFTER = 0.003
ENDED_SECONDS = 30.0
"""A view that only logs can rarely be interrupted, because it is nearly always in logging."""
PATIENCE = 60.0
ROUNDS = 60
"""The number of rounds of a task that is not stopped."""

Work = Callable[[], object]


class Resources:
    """The locks, queues, loggers and databases that the views use.

    :param folder: for databases.
    """

    def __init__(self, folder: Path) -> None:
        self.lock = threading.Lock()
        self.rlock = threading.RLock()
        self.condition = threading.Condition()
        self.queue: queue.Queue[int] = queue.Queue(maxsize=4)
        self.logger = logging.getLogger("tests.interruptions")
        self.handler = logging.StreamHandler(io.StringIO())
        self.logger.addHandler(self.handler)
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)
        self.engine = create_engine(
            f"sqlite:///{folder / 'pooled.db'}",
            poolclass=QueuePool,
            pool_size=WORKERS,
            max_overflow=0,
            pool_timeout=10,
        )
        self.plain = folder / "plain.db"
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE numbers (n INTEGER)"))
            connection.execute(text("INSERT INTO numbers VALUES (1), (2), (3)"))
        plain = sqlite3.connect(self.plain)
        plain.execute("CREATE TABLE numbers AS SELECT 1 AS n UNION SELECT 2")
        plain.close()
        self.works: dict[str, Work] = {
            "log": self._log, "lock": self._lock, "queue": self._queue, "query": self._query,
            "pool": self._pool,
        }  # fmt: skip

    def close(self) -> None:
        """Close files."""
        self.engine.dispose()
        self.logger.removeHandler(self.handler)

    def check(self) -> None:
        """Check that every lock is free and every connection is back in the pool."""
        for lock in (
            self.lock,
            self.rlock,
            self.condition,
            self.handler.lock,
            self.queue.mutex,
            logging._lock,  # type: ignore[attr-defined]
        ):
            assert lock is not None
            assert lock.acquire(timeout=5), f"a lock was lost: {lock}"
            lock.release()
        eventually_true(
            lambda: gc.collect() is not None and not self.engine.pool.checkedout(),  # type: ignore[attr-defined]
            5,
            0.01,
            "connections of the pool were lost",
        )
        for work in self.works.values():
            work()

    def _log(self) -> None:
        self.logger.info("number %d", 1)

    def _lock(self) -> None:
        with self.lock, self.rlock:
            sum(range(50))
        with self.condition:
            self.condition.notify_all()

    def _queue(self) -> None:
        try:
            self.queue.put(1, timeout=0.01)
            self.queue.get(timeout=0.01)
        except (queue.Full, queue.Empty):
            pass

    def _query(self) -> None:
        connection = sqlite3.connect(self.plain)
        try:
            connection.execute("SELECT sum(n) FROM numbers").fetchone()
        finally:
            connection.close()

    def _pool(self) -> None:
        with self.engine.connect() as connection:
            connection.execute(text("SELECT sum(n) FROM numbers")).scalar()


@pytest.mark.covers("F14")
def test_interruptions_lose_no_lock_connection_or_thread(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    resources = Resources(tmp_path)
    app = Flask("interruptions", instance_path=str(tmp_path))
    app.config.update(ASYNCROUTE_STORE="memory://")
    try:
        figures(_Trial(app, resources).run(scaled(STOPS, 100)))
    finally:
        runtime_of(app).close()
        resources.close()


class _Trial:
    def __init__(self, app: Flask, resources: Resources) -> None:
        self.app = app
        self.resources = resources
        self.ends: dict[str, AsyncRouteTask] = {}
        self.begun: dict[str, threading.Event] = {}
        self.errors: Counter[str] = Counter()
        self.barrier = threading.Barrier(WORKERS)
        async_routes = AsyncRoute(app)
        options: dict[str, Any] = {
            "pool": "all",
            "max_workers": WORKERS,
            "interrupt_after": INTERRUPT_AFTER,
        }

        @app.put("/endless/<kind>")
        @async_routes.task(**options)
        def endless(kind: str) -> dict[str, str]:
            work = resources.works[kind]
            self._event(current_task.id).set()
            while True:
                work()

        @app.put("/brief/<kind>")
        @async_routes.task(**options)
        def brief(kind: str) -> dict[str, int]:
            # Ends about when it would be interrupted, so that some interruptions come too late.
            work = resources.works[kind]
            self._event(current_task.id).set()
            until = time.monotonic() + INTERRUPT_AFTER * 1.2
            while time.monotonic() < until:
                work()
            return {"Done": 1}

        @app.put("/innocent/<kind>")
        @async_routes.task(**options)
        def innocent(kind: str) -> dict[str, int]:
            work = resources.works[kind]
            done = 0
            for _ in range(ROUNDS):
                work()
                done += 1
            return {"Done": done}

        @app.put("/meet")
        @async_routes.task(**options)
        def meet() -> dict[str, int]:
            return {"Number": self.barrier.wait(10)}

    def run(self, stops: int) -> str:
        """Start and stop tasks from several clients; check the resources; return the figures."""
        chance = random.Random(stops)
        with self._listening():
            plans = [
                (path, kind) for number in range(stops) for path, kind in self._plan(chance, number)
            ]
            share = [plans[number::WORKERS] for number in range(WORKERS)]
            waits: list[float] = []
            failures: list[BaseException] = []

            def drive(mine: list[tuple[str, str]]) -> None:
                try:
                    for path, kind in mine:
                        self._run_task(path, kind, waits)
                except BaseException as error:
                    failures.append(error)

            clients = [threading.Thread(target=drive, args=(mine,)) for mine in share]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            if failures:
                raise failures[0]
            self._check_threads()
            self.resources.check()
        innocents = sum(path == "innocent" for path, _ in plans)
        late = len(plans) - innocents - len(waits)
        return (
            f"{stops} stops ({', '.join(self.resources.works)}; {late} of them too late), {innocents} "
            "innocent tasks unharmed, "
            f"all locks and {WORKERS} threads there, code ended after {median(waits) * 1000:.0f} "
            "ms, at most "
            f"{max(waits) * 1000:.0f} ms"
        )

    def _plan(self, chance: random.Random, number: int) -> Iterator[tuple[str, str]]:
        kinds = list(self.resources.works)
        yield ("brief" if number % 4 == 3 else "endless"), kinds[number % len(kinds)]
        yield "innocent", chance.choice(kinds)

    def _run_task(self, path: str, kind: str, waits: list[float]) -> None:
        task_id = call(self.app, environ_of("PUT", f"/{path}/{kind}"), 202).json()["Id"]
        if path == "innocent":
            task = self._wait_for_end(task_id)
            assert task["State"] == "Completed" and task["Result"] == {"Done": ROUNDS}, (
                f"an innocent task ({kind}) was hit: {task['State']}, {task.get('Error')}, "
                f"{task.get('Result')}"
            )
            return
        assert self._event(task_id).wait(PATIENCE), (
            f"{path}/{kind} did not begin: {self._task(task_id)}"
        )
        asked_at = time.monotonic()
        answer = call(self.app, environ_of("DELETE", f"/task/{task_id}"))
        if answer.status == 410:
            assert path == "brief", "an endless task has ended before its stop"
            return
        assert answer.status == 200, f"a stop was answered {answer.status}"
        task = self._wait_for_end(task_id)
        assert task["State"] == "Aborted", f"a stopped task ({kind}) is {task['State']}"
        waits.append(time.monotonic() - asked_at)
        assert waits[-1] <= ENDED_SECONDS, (
            f"{path}/{kind} went on for {waits[-1]:.1f} s after its stop"
        )

    def _wait_for_end(self, task_id: str) -> dict[str, Any]:
        def ended() -> Any:
            task = self._task(task_id)
            return task if task["IsCompleted"] and "Stopping" not in task else None

        found: dict[str, Any] = eventually_true(ended, PATIENCE, 0.003)
        return found

    def _task(self, task_id: str) -> dict[str, Any]:
        return call(self.app, environ_of("GET", f"/task/{task_id}"), 200).json()

    def _event(self, task_id: str) -> threading.Event:
        return self.begun.setdefault(task_id, threading.Event())

    def _check_threads(self) -> None:
        """Check that the pool still runs as many tasks at once as it may."""
        ids = [call(self.app, environ_of("PUT", "/meet"), 202).json()["Id"] for _ in range(WORKERS)]
        ends = [self._wait_for_end(task_id) for task_id in ids]
        assert {end.get("Result", {}).get("Number") for end in ends} == set(range(WORKERS)), (
            f"the pool has lost threads: {[(end['State'], end.get('Error')) for end in ends]}"
        )

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Check that each task has exactly one terminal signal."""
        ends: Counter[str] = Counter()

        def receive(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
            ends[task.id] += 1

        signals = (task_completed, task_failed, task_aborted)
        for signal in signals:
            signal.connect(receive, sender=self.app, weak=False)
        try:
            yield
            twice = [task_id for task_id, count in ends.items() if count != 1]
            assert not twice, f"{len(twice)} tasks had more than one terminal signal"
        finally:
            for signal in signals:
                signal.disconnect(receive)
