"""The executor that leaves tasks to worker processes: how many tasks it accepts."""

from __future__ import annotations

import pytest

from flask_asyncroute.errors import QueueFull
from flask_asyncroute.executors import queue as module
from flask_asyncroute.executors.base import PoolSettings, TaskExecutor
from flask_asyncroute.executors.queue import QueueTaskExecutor


class Store:
    """Counts the waiting tasks of a pool."""

    def __init__(self) -> None:
        self.waiting = 0
        self.counts = 0

    def count(self, most: int) -> int:
        self.counts += 1
        return min(self.waiting, most)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def queue(store: Store, clock: Clock) -> TaskExecutor:
    def run(executor: TaskExecutor, task_id: str) -> None:
        raise AssertionError("a task runs in the process that leaves it to workers")

    return QueueTaskExecutor(PoolSettings("pool", run, max_workers=2, queue_size=3), store.count)


def accepted(queue: TaskExecutor) -> int:
    """Reserve slots until the queue is full; return their number."""
    for number in range(100):
        try:
            queue.reserve()
        except QueueFull as error:
            assert "5 tasks are waiting" in str(error)
            return number
        queue.submit(f"task {number}")
    raise AssertionError("the queue has no limit")


def test_it_accepts_as_many_tasks_as_one_worker_process_would(queue: TaskExecutor) -> None:
    assert accepted(queue) == 5


def test_tasks_of_other_processes_count(queue: TaskExecutor, store: Store) -> None:
    store.waiting = 4
    assert accepted(queue) == 1


def test_it_accepts_more_when_workers_have_taken_tasks(
    queue: TaskExecutor, store: Store, clock: Clock
) -> None:
    store.waiting = 9
    assert accepted(queue) == 0
    store.waiting = 3
    clock.now += module.COUNT_SECONDS
    assert accepted(queue) == 2


def test_a_released_slot_is_free_again(queue: TaskExecutor) -> None:
    assert accepted(queue) == 5
    queue.release()
    queue.reserve()
    with pytest.raises(QueueFull):
        queue.reserve()


def test_many_starts_count_only_once(queue: TaskExecutor, store: Store) -> None:
    assert accepted(queue) == 5
    assert store.counts == 1


def test_it_takes_no_tasks_and_holds_none(queue: TaskExecutor) -> None:
    queue.reserve()
    queue.submit("task")
    assert queue.takeover_capacity() == 0
    assert not queue.holds("task") and not queue.discard("task")
    assert queue.discard_waiting() == []
    queue.close()
