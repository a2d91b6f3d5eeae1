"""Two concurrent changes of one task: exactly one wins, the other reports that it lost, and the
task shows only the winner's change.

tests/stress runs more trials of the same races: `race_in_threads` and `race_in_processes` take
their number.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask import Flask

from flask_asyncroute import signals
from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.executors.execution import Execution
from flask_asyncroute.retries import Retry
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import TERMINAL, State, now_us
from tests.support.databases import new_sqlite_store
from tests.support.tasks import new_task

TRIALS = int(os.environ.get("RACE_TRIALS", "500"))
PATIENCE = 30.0
"""Seconds that one side waits for the other."""

Act = Callable[[TaskStore, str], bool]


def _add(store: TaskStore, task_id: str) -> None:
    store.add(new_task(task_id, user="anna"), b"{}", None, [("groups", "g")])


def _add_running(store: TaskStore, task_id: str) -> None:
    _add(store, task_id)
    assert store.claim(task_id, "owner", now_us()) is not None


def _complete(store: TaskStore, task_id: str) -> bool:
    values = {"state": State.COMPLETED, "completed_us": now_us(), "result_json": b"1"}
    return store.update(task_id, Expect((State.RUNNING,), "owner", 1), values) is not None


def _abort(store: TaskStore, task_id: str) -> bool:
    values = {
        "state": State.ABORTED,
        "completed_us": now_us(),
        "error": "Aborted by the user",
        "stopping": True,
    }
    return store.update(task_id, Expect((State.RUNNING,)), values) is not None


def _add_waiting(store: TaskStore, task_id: str) -> None:
    """Add a task whose retry is due."""
    _add_running(store, task_id)
    assert _retry(store, task_id)


def _retry(store: TaskStore, task_id: str) -> bool:
    values = {
        "state": State.NOT_STARTED, "owner": None, "started_us": None, "expires_us": None,
        "attempt": 2, "last_error": "x", "start_at_us": 1,
    }  # fmt: skip
    return store.update(task_id, Expect((State.RUNNING,), "owner", 1), values) is not None


def _abort_waiting(store: TaskStore, task_id: str) -> bool:
    values = {"state": State.ABORTED, "completed_us": now_us(), "error": "Aborted by the user"}
    return store.update(task_id, Expect((State.NOT_STARTED,)), values) is not None


def _claim(store: TaskStore, task_id: str) -> bool:
    return store.claim(task_id, f"{os.getpid()}-{threading.get_ident()}", now_us()) is not None


def _purge(store: TaskStore, task_id: str) -> bool:
    return store.delete(task_id, Expect((State.NOT_STARTED,))) is not None


@dataclass(frozen=True)
class Race:
    """Two concurrent changes, of which exactly one may happen, and the state after each (None:
    removed).
    """

    prepare: Callable[[TaskStore, str], None]
    first: Act
    second: Act
    states: tuple[State | None, State | None]


RACES = {
    "stop-against-end": Race(_add_running, _complete, _abort, (State.COMPLETED, State.ABORTED)),
    "stop-against-stop": Race(_add_running, _abort, _abort, (State.ABORTED, State.ABORTED)),
    "stop-against-start": Race(_add, _claim, _abort_waiting, (State.RUNNING, State.ABORTED)),
    "start-against-start": Race(_add, _claim, _claim, (State.RUNNING, State.RUNNING)),
    "stop-against-retry": Race(_add_running, _retry, _abort, (State.NOT_STARTED, State.ABORTED)),
    "retry-against-retry": Race(
        _add_running, _retry, _retry, (State.NOT_STARTED, State.NOT_STARTED)
    ),
    "stop-against-start-of-a-retry": Race(
        _add_waiting, _claim, _abort_waiting, (State.RUNNING, State.ABORTED)
    ),
    "start-against-start-of-a-retry": Race(
        _add_waiting, _claim, _claim, (State.RUNNING, State.RUNNING)
    ),
    "removal-against-start": Race(_add, _claim, _purge, (State.RUNNING, None)),
}


def race_in_threads(
    race: Race, first: TaskStore, second: TaskStore, trials: int
) -> tuple[int, int]:
    """Run a race in two threads, each with its store; return how often each side won.

    :raises AssertionError: if a trial had no winner or two, or if its task does not match the
        winner.
    """
    ids = [f"race-{number}" for number in range(trials)]
    for task_id in ids:
        race.prepare(first, task_id)
    barrier = threading.Barrier(2)
    wins: tuple[list[bool], list[bool]] = ([], [])

    def run(act: Act, store: TaskStore, won: list[bool]) -> None:
        for task_id in ids:
            barrier.wait(PATIENCE)
            won.append(act(store, task_id))

    sides = [
        threading.Thread(target=run, args=(race.first, first, wins[0])),
        threading.Thread(target=run, args=(race.second, second, wins[1])),
    ]
    for side in sides:
        side.start()
    for side in sides:
        side.join(PATIENCE * 10)
    return check_trials(race, first, ids, wins)


def race_in_processes(name: str, path: Path, trials: int) -> tuple[int, int]:
    """Run the race of this name in two processes on one SQLite file, like `race_in_threads`."""
    race = RACES[name]
    store = new_sqlite_store(path)
    store.open()
    ids = [f"race-{number}" for number in range(trials)]
    for task_id in ids:
        race.prepare(store, task_id)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes, ends = [], []
    for number in (0, 1):
        end, other_end = spawn.Pipe(duplex=False)
        process = spawn.Process(
            target=_race_in_child, args=(name, number, path, ids, barrier, other_end)
        )
        process.start()
        other_end.close()
        processes.append(process)
        ends.append(end)
    try:
        wins = []
        for end in ends:
            assert end.poll(PATIENCE * 10), "a process did not answer"
            wins.append(end.recv())
            end.close()
    finally:
        for process in processes:
            process.join(PATIENCE)
    try:
        return check_trials(race, store, ids, (wins[0], wins[1]))
    finally:
        store.close()


def _race_in_child(
    name: str, number: int, path: Path, ids: list[str], barrier: Any, end: Connection
) -> None:
    act = (RACES[name].first, RACES[name].second)[number]
    store = new_sqlite_store(path)
    store.open()
    won = []
    for task_id in ids:
        barrier.wait(PATIENCE)
        won.append(act(store, task_id))
    end.send(won)
    end.close()
    store.close()


def check_trials(
    race: Race, store: TaskStore, ids: list[str], wins: tuple[list[bool], list[bool]]
) -> tuple[int, int]:
    """Check each trial; return how often each side won."""
    assert len(wins[0]) == len(wins[1]) == len(ids), "a side has not run all trials"
    for task_id, first, second in zip(ids, *wins, strict=True):
        assert first != second, f"{task_id}: {'both' if first else 'none'} of the two won"
        task = store.get(task_id)
        state = race.states[0 if first else 1]
        assert (None if task is None else task.state) is state, (
            f"{task_id}: the winner brought it to {state}, not {task}"
        )
        if task is not None and state in TERMINAL:
            assert (task.result_json is not None) is (state is State.COMPLETED)
            assert (task.error is not None) is (state is State.ABORTED)
            assert task.stopping is (race.second is _abort and state is State.ABORTED)
            assert (
                task.created_us <= (task.started_us or task.created_us) <= (task.completed_us or 0)
            )
    return sum(wins[0]), sum(wins[1])


@pytest.mark.covers("F15", "F48")
@pytest.mark.parametrize("name", RACES)
def test_one_of_two_threads_wins(store: TaskStore, name: str) -> None:
    assert sum(race_in_threads(RACES[name], store, store, TRIALS)) == TRIALS


@pytest.mark.covers("F15")
@pytest.mark.parametrize("name", RACES)
def test_one_of_two_stores_on_a_file_wins(
    make_sqlite_store: Callable[..., TaskStore], name: str
) -> None:
    stores = make_sqlite_store(), make_sqlite_store()
    for store in stores:
        store.open()
    assert sum(race_in_threads(RACES[name], *stores, TRIALS)) == TRIALS


@pytest.mark.covers("F15")
@pytest.mark.parametrize("name", ["stop-against-end", "start-against-start"])
def test_one_of_two_processes_wins(sqlite_path: Path, name: str) -> None:
    assert sum(race_in_processes(name, sqlite_path, TRIALS)) == TRIALS


@pytest.mark.covers("F15")
def test_a_race_sends_each_terminal_signal_once(
    store: TaskStore, make_app: Callable[..., Flask], hear: Callable[..., list[Any]]
) -> None:
    """An end, a stop and a timeout race. Each task has one signal of its State and one
    ``task_finished``.
    """
    trials = max(TRIALS // 4, 1)
    app = make_app()
    lifecycle = Lifecycle(app, store, "owner")
    kinds = hear(signals.task_completed, signals.task_failed, signals.task_aborted, sender=app)
    ends = hear(signals.task_finished, sender=app)
    executions = []
    for number in range(trials):
        lifecycle.create(new_task(f"t{number}"), b"{}", None, ())
        claim = lifecycle.claim(f"t{number}")
        assert claim is not None
        execution = Execution(claim.task.id)
        execution.begin(None, claim.task.epoch, None)
        executions.append((claim.task, execution))
    barrier = threading.Barrier(3)
    won: list[tuple[str, State]] = []

    def run(act: Callable[[Any, Execution], Any]) -> None:
        for task, execution in executions:
            barrier.wait(PATIENCE)
            ended = act(task, execution)
            if ended is not None:
                won.append((ended.id, ended.state))

    acts: list[Callable[[Any, Execution], Any]] = [
        lambda task, execution: lifecycle.finish(execution, State.COMPLETED, {"result_json": b"1"}),
        lambda task, execution: lifecycle.abort(task, "Aborted by the user"),
        lambda task, execution: lifecycle.expire(execution, "Timeout"),
    ]
    sides = [threading.Thread(target=run, args=(act,)) for act in acts]
    for side in sides:
        side.start()
    for side in sides:
        side.join(PATIENCE * 10)
    all_ids = sorted(f"t{number}" for number in range(trials))
    assert sorted(task_id for task_id, _ in won) == all_ids
    assert sorted(task.id for _, task in ends) == all_ids
    assert sorted(task.id for _, task in kinds) == all_ids
    states = dict(won)
    for name, task in kinds:
        assert name == f"task-{states[task.id].lower()}"
        stored = store.get(task.id)
        assert stored is not None and stored.state is states[task.id]
        # Whatever has won, the view has ended, so the task is no longer stopping.
        lifecycle.release(executions[int(task.id[1:])][1])
        stored = store.get(task.id)
        assert stored is not None and not stored.stopping


@pytest.mark.covers("F48")
@pytest.mark.parametrize("new_owner", ["owner", "other"])
def test_a_retry_of_an_earlier_run_has_no_effect(
    store: TaskStore, make_app: Callable[..., Flask], new_owner: str
) -> None:
    """A worker was taken for dead, and its task runs again, perhaps in a worker of the same
    name.
    """
    slow = Lifecycle(make_app(), store, "owner")
    other = Lifecycle(make_app(), store, new_owner)
    task = new_task(on_loss="restart", retry_json=msgspec.json.encode(Retry(times=9).schedule))
    slow.create(task, b"{}", None, ())
    claim = slow.claim("task")
    assert claim is not None
    execution = Execution("task")
    execution.begin(None, claim.task.epoch, None)
    assert other.recover(claim.task) is not None
    assert slow.retry(execution, "x", 1, is_bound=False) is None
    again = other.claim("task")
    assert again is not None and (again.task.attempt, again.task.epoch) == (1, 2)
    assert slow.retry(execution, "x", 1, is_bound=False) is None
    assert store.get("task") == again.task


@pytest.mark.covers("F48")
def test_an_old_list_of_waiting_tasks_does_not_start_a_later_attempt_early(
    store: TaskStore, make_app: Callable[..., Flask]
) -> None:
    lifecycle = Lifecycle(make_app(), store, "owner")
    schedule = msgspec.json.encode(Retry(times=9).schedule)
    lifecycle.create(new_task(retry_json=schedule), b"{}", None, ())

    def fail(start_at_us: int) -> None:
        claim = lifecycle.claim("task")
        assert claim is not None
        execution = Execution("task")
        execution.begin(None, claim.task.epoch, None, attempt=claim.task.attempt or 1)
        assert lifecycle.retry(execution, "x", start_at_us, is_bound=False) is not None

    fail(store.now_us())
    (found,) = store.waiting({"work": 9}, now_us() + 1, store.now_us() + 1)
    fail(store.now_us() + 60_000_000)
    assert lifecycle.claim(found.id) is None
    waiting = store.get("task")
    assert waiting is not None and (waiting.state, waiting.attempt) == (State.NOT_STARTED, 3)


@pytest.mark.covers("F16")
def test_a_second_stop_does_not_change_the_task() -> None:
    store = MemoryTaskStore()
    _add_running(store, "task")
    assert _abort(store, "task") is True
    first = store.get("task")
    assert _abort(store, "task") is False
    assert store.get("task") == first
