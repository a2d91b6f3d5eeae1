"""A stop races the end of a task, very many times: exactly one wins, and all reports agree."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from benchmarks.calls import Answer, call, environ_of
from flask_asyncroute import AsyncRoute, AsyncRouteTask, current_task, signals
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from tests.faults.test_races import RACES, Act, race_in_processes, race_in_threads
from tests.support.databases import new_sqlite_store
from tests.support.waiting import eventually_true

AT_STORE = 10_000
OVER_HTTP = 1_000
PATIENCE = 30.0
LATEST = 0.0006
"""The longest random delay of either side, in seconds."""
RACE = "stop-against-end"


@pytest.mark.covers("F15")
def test_races_of_threads_on_a_memory_store(
    scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    store = MemoryTaskStore()
    store.open()
    run_race(store, store, scaled(AT_STORE), figures)


@pytest.mark.covers("F15")
def test_races_of_threads_on_an_sqlite_store(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    stores = [new_sqlite_store(tmp_path / "threads.db") for _ in range(2)]
    try:
        for store in stores:
            store.open()
        run_race(stores[0], stores[1], scaled(AT_STORE), figures)
    finally:
        for store in stores:
            store.close()


def run_race(
    first: TaskStore, second: TaskStore, trials: int, figures: Callable[[str], None]
) -> None:
    race = replace(RACES[RACE], first=_with_random_delay(RACES[RACE].first))
    with _fast_thread_switching():
        wins = race_in_threads(race, first, second, trials)
    figures(f"{trials} races, end:stop {wins[0]}:{wins[1]}")
    assert sum(wins) == trials


@pytest.mark.covers("F15")
def test_races_of_processes_on_an_sqlite_store(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    trials = scaled(AT_STORE)
    wins = race_in_processes(RACE, tmp_path / "processes.db", trials)
    figures(f"{trials} races, end:stop {wins[0]}:{wins[1]}")
    assert sum(wins) == trials


@pytest.mark.covers("F15", "I2")
@pytest.mark.parametrize("store", ["memory://", "sqlite:///asyncroute.db"])
def test_races_of_return_and_delete_over_http(
    tmp_path: Path, store: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """Each task has exactly one terminal signal and one ``task_finished``."""
    trials = scaled(OVER_HTTP)
    app = Flask("races", instance_path=str(tmp_path))
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

    signals_by_id: dict[str, list[str]] = defaultdict(list)
    receivers = {}
    for signal in (
        signals.task_completed,
        signals.task_failed,
        signals.task_aborted,
        signals.task_finished,
    ):

        def receive(
            sender: Flask, task: AsyncRouteTask, name: str = signal.name, **extra: Any
        ) -> None:
            signals_by_id[task.id].append(f"{name} {task.state}")

        receivers[signal] = receive
        signal.connect(receive, sender=app, weak=False)
    chance = random.Random(trials)
    try:
        with _fast_thread_switching():
            states = [_race(app, running, gates, signals_by_id, chance) for _ in range(trials)]
    finally:
        for signal, receiver in receivers.items():
            signal.disconnect(receiver)
        runtime_of(app).close()
    stopped = states.count("Aborted")
    figures(f"{trials} races, one terminal signal each, end:stop {trials - stopped}:{stopped}")


@contextmanager
def _fast_thread_switching() -> Iterator[None]:
    """Switch threads every few microseconds. Otherwise the thread that starts first always wins."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.000_002)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _with_random_delay(act: Act) -> Act:
    chance = random.Random(1)

    def delayed(store: TaskStore, task_id: str) -> bool:
        _spin(chance.uniform(0, 0.000_1))
        return act(store, task_id)

    return delayed


def _spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def _race(
    app: Flask,
    running: threading.Semaphore,
    gate_of: dict[str, threading.Event],
    signals_by_id: dict[str, list[str]],
    chance: random.Random,
) -> str:
    """Start a task, race its return against a DELETE, and check all reports; return its state."""
    task_id = call(app, environ_of("PUT", "/race"), 202).json()["Id"]
    assert running.acquire(timeout=PATIENCE), f"{task_id} did not begin"
    barrier = threading.Barrier(2)
    answers: list[Answer] = []

    def stop() -> None:
        barrier.wait(PATIENCE)
        _spin(chance.uniform(0, LATEST))
        answers.append(call(app, environ_of("DELETE", f"/task/{task_id}")))

    thread = threading.Thread(target=stop)
    thread.start()
    barrier.wait(PATIENCE)
    _spin(chance.uniform(0, LATEST))
    gate_of[task_id].set()
    thread.join(PATIENCE)

    def ended() -> Any:
        task = call(app, environ_of("GET", f"/task/{task_id}"), 200).json()
        return task if task["IsCompleted"] and "Stopping" not in task else None

    # The view of a stopped task may run a moment longer. Then the stop must be complete.
    task = eventually_true(ended, PATIENCE, 0.0005)
    assert len(answers) == 1, f"{task_id}: the stop was not answered"
    state = str(task["State"])
    expected = {200: "Aborted", 410: "Completed"}.get(answers[0].status)
    assert state == expected, (
        f"{task_id}: the stop was answered {answers[0].status}, the State is {state}"
    )
    if state == "Aborted":
        assert "Result" not in task, f"{task_id} is Aborted and has a Result"
    # The signals are sent after the store has committed the end.
    eventually_true(lambda: len(signals_by_id[task_id]) >= 2, PATIENCE, 0.0005)
    assert signals_by_id[task_id] == [f"task-{state.lower()} {state}", f"task-finished {state}"]
    return state
