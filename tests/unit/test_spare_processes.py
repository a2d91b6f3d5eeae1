"""Spare child processes: ``min_workers`` of them after the first task, and never a dead child."""

from __future__ import annotations

from typing import Any

import pytest

from flask_asyncroute.executors.base import ChildSettings, PoolSettings
from flask_asyncroute.executors.process.executor import ProcessTaskExecutor


class FakeChild:
    def __init__(self, number: int) -> None:
        self.number = number
        self.is_dead = False
        self.is_dropped = False

    def is_gone(self) -> bool:
        return self.is_dead

    def drop(self) -> None:
        assert not self.is_dropped
        self.is_dropped = True


class FakeServer:
    def __init__(self) -> None:
        self.made: list[FakeChild] = []
        self.is_full = False

    def close(self) -> None: ...

    def start(self) -> FakeChild:
        if self.is_full:
            raise OSError(11, "Resource temporarily unavailable")
        self.made.append(FakeChild(len(self.made)))
        return self.made[-1]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


class Host:
    def child_settings(self) -> ChildSettings:
        return ChildSettings("tests.support.apps.child_app", {}, [], 1024)


def executor_with(server: Any, count: int) -> ProcessTaskExecutor:
    settings = PoolSettings("test", lambda executor, task_id: None, 2, 0, count, host=Host())
    executor = ProcessTaskExecutor(settings)
    executor._server = server
    return executor


def number(child: Any) -> int:
    return int(child.number)


def test_no_child_is_started_before_the_first_task(server: FakeServer) -> None:
    executor_with(server, 5)
    assert server.made == []


def test_without_min_workers_each_task_gets_a_new_child(server: FakeServer) -> None:
    executor = executor_with(server, 0)
    for expected in range(3):
        assert number(executor.take_child()) == expected
        executor.refill()
    assert len(server.made) == 3


def test_take_returns_the_oldest_child_and_refill_replaces_it(server: FakeServer) -> None:
    executor = executor_with(server, 2)
    assert number(executor.take_child()) == 0
    executor.refill()
    assert len(server.made) == 3
    executor.refill()
    assert len(server.made) == 3
    assert [number(executor.take_child()) for _ in range(3)] == [1, 2, 3]
    executor.refill()
    assert len(server.made) == 6


def test_take_drops_dead_children(server: FakeServer) -> None:
    executor = executor_with(server, 2)
    executor.refill()
    server.made[0].is_dead = True
    assert number(executor.take_child()) == 1
    assert [child.is_dropped for child in server.made] == [True, False]
    for child in server.made:
        child.is_dead = True
    executor.refill()
    assert number(executor.take_child()) == 2


def test_take_raises_if_no_child_can_be_started(server: FakeServer) -> None:
    executor = executor_with(server, 1)
    executor.refill()
    server.is_full = True
    assert number(executor.take_child()) == 0
    executor.refill()
    with pytest.raises(OSError, match="unavailable"):
        executor.take_child()
    server.is_full = False
    executor.refill()
    assert number(executor.take_child()) == 1


def test_close_drops_spare_children_and_starts_no_more(server: FakeServer) -> None:
    executor = executor_with(server, 2)
    taken = executor.take_child()
    executor.refill()
    executor.close()
    executor.close()
    assert [child.is_dropped for child in server.made] == [False, True, True]
    executor.refill()
    assert len(server.made) == 3
    assert number(taken) == 0
