"""A stop against an end, very many times: exactly one of them happens, and everybody hears of that one."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flask import Flask

from benchmarks.calls import Answer, call, environ_of
from flask_asyncroute import AsyncRoute, AsyncRouteTask, current_task, signals
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from tests.conftest import new_sqlite_store
from tests.faults.test_races import RACES, Act, race_in_processes, race_in_threads

from . import check, scaled

AT_STORE = 10_000
OVER_HTTP = 1_000
PATIENCE = 30.0
LATEST = 0.0006
"""Seconds by which either side is at most late."""
RACE = "stop-against-end"


def prove_at_store(share: float) -> str:
    """Race in threads on each kind of store, and in processes on one SQLite file."""
    trials = scaled(AT_STORE, share)
    figures = []

    def add(where: str, wins: tuple[int, int]) -> None:
        check(sum(wins) == trials, f"{where}: {wins} wins in {trials} trials")
        figures.append(f"{where} {wins[0]}:{wins[1]}")

    race = replace(RACES[RACE], first=_at_times_late(RACES[RACE].first))
    memory = MemoryTaskStore()
    memory.open()
    with _restless():
        add("memory, threads", race_in_threads(race, memory, memory, trials))
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
        stores = [new_sqlite_store(Path(folder) / "threads.db") for _ in range(2)]
        try:
            for store in stores:
                store.open()
            with _restless():
                add("SQLite, threads", race_in_threads(race, stores[0], stores[1], trials))
        finally:
            for store in stores:
                store.close()
        add("SQLite, processes", race_in_processes(RACE, Path(folder) / "processes.db", trials))
    return f"{trials} races each, end:stop {', '.join(figures)}"


@contextmanager
def _restless() -> Iterator[None]:
    """Have threads take turns within a few microseconds: left alone, the one that is first would always be done first."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.000_002)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _at_times_late(act: Act) -> Act:
    chance = random.Random(1)

    def late(store: TaskStore, task_id: str) -> bool:
        _spin(chance.uniform(0, 0.000_1))
        return act(store, task_id)

    return late


def _spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def prove_over_http(share: float) -> str:
    """Race a view's return against a DELETE, and count the terminal signals."""
    trials = scaled(OVER_HTTP, share)
    figures = [f"{name} {wins[0]}:{wins[1]}" for name, wins in (
        ("memory", _over_http("memory://", trials)), ("SQLite", _over_http(None, trials)))]  # fmt: skip
    return f"{trials} races each, one terminal signal each, end:stop {', '.join(figures)}"


def _over_http(store: str | None, trials: int) -> tuple[int, int]:
    """Return how often the end won, and how often the stop."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
        app = Flask("races", instance_path=folder)
        if store is not None:
            app.config["ASYNCROUTE_STORE"] = store
        async_routes = AsyncRoute(app)
        running = threading.Semaphore(0)
        gates: dict[str, threading.Event] = {}

        @app.put("/race")
        @async_routes.task
        def race() -> dict[str, bool]:
            gate = gates.setdefault(current_task.id, threading.Event())
            running.release()
            return {"Won": gate.wait(PATIENCE)}

        heard: dict[str, list[str]] = defaultdict(list)
        receivers = {}
        for signal in (signals.task_completed, signals.task_failed, signals.task_aborted, signals.task_finished):

            def receive(sender: Flask, task: AsyncRouteTask, name: str = signal.name, **extra: Any) -> None:
                heard[task.id].append(f"{name} {task.state}")

            receivers[signal] = receive
            signal.connect(receive, sender=app, weak=False)
        try:
            with _restless():
                wins = _race(app, running, gates, trials, heard)
        finally:
            for signal, receiver in receivers.items():
                signal.disconnect(receiver)
            runtime_of(app).close()
    return wins


def _race(
    app: Flask,
    running: threading.Semaphore,
    gates: dict[str, threading.Event],
    trials: int,
    heard: dict[str, list[str]],
) -> tuple[int, int]:
    chance = random.Random(trials)
    wins = [0, 0]
    for _ in range(trials):
        task_id = call(app, environ_of("PUT", "/race"), 202).json()["Id"]
        check(running.acquire(timeout=PATIENCE), f"{task_id} did not begin")
        barrier = threading.Barrier(2)
        answers: list[Answer] = []

        def stop(task_id: str = task_id, barrier: threading.Barrier = barrier, answers: list[Answer] = answers) -> None:
            barrier.wait(PATIENCE)
            _spin(chance.uniform(0, LATEST))
            answers.append(call(app, environ_of("DELETE", f"/task/{task_id}")))

        thread = threading.Thread(target=stop)
        thread.start()
        barrier.wait(PATIENCE)
        _spin(chance.uniform(0, LATEST))
        gates[task_id].set()
        thread.join(PATIENCE)
        # The code of a stopped task may go on for a moment, and must be said to have ended then.
        deadline = time.monotonic() + PATIENCE
        task: dict[str, Any] = {}
        while not task.get("IsCompleted") or "Stopping" in task:
            check(time.monotonic() < deadline, f"{task_id} does not end: {task}")
            time.sleep(0.0005)
            task = call(app, environ_of("GET", f"/task/{task_id}"), 200).json()
        check(len(answers) == 1, f"{task_id}: the stop was not answered")
        state = task["State"]
        expected = {200: "Aborted", 410: "Completed"}.get(answers[0].status)
        check(state == expected, f"{task_id}: the stop was answered {answers[0].status}, the State is {state}")
        if state == "Aborted":
            check("Result" not in task, f"{task_id} is Aborted and has a Result")
        wins[state == "Aborted"] += 1
        wanted = [f"task-{state.lower()} {state}", f"task-finished {state}"]
        # The signal of an end goes out after the store has it.
        deadline = time.monotonic() + PATIENCE
        while len(heard[task_id]) < 2 and time.monotonic() < deadline:
            time.sleep(0.0005)
        check(heard[task_id] == wanted, f"{task_id} is {state}; its terminal signals: {heard[task_id]}")
    return wins[0], wins[1]
