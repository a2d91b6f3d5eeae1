"""Spare children: as many as are wanted, from the first use on, and never one that is dead."""

from __future__ import annotations

from typing import Any

import pytest

from flask_asyncroute.executors.spares import Spares


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

    def start(self) -> FakeChild:
        if self.is_full:
            raise OSError(11, "Resource temporarily unavailable")
        self.made.append(FakeChild(len(self.made)))
        return self.made[-1]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def spares(server: Any, count: int) -> Spares:
    return Spares(server, count)


def number(child: Any) -> int:
    return int(child.number)


def test_nothing_is_started_before_the_first_use(server: FakeServer) -> None:
    spares(server, 5)
    assert server.made == []


def test_without_a_minimum_each_is_new(server: FakeServer) -> None:
    kept = spares(server, 0)
    for expected in range(3):
        assert number(kept.take()) == expected
        kept.refill()
    assert len(server.made) == 3


def test_the_oldest_is_taken_and_replaced(server: FakeServer) -> None:
    kept = spares(server, 2)
    assert number(kept.take()) == 0
    kept.refill()
    assert len(server.made) == 3
    kept.refill()
    assert len(server.made) == 3
    assert [number(kept.take()) for _ in range(3)] == [1, 2, 3]
    kept.refill()
    assert len(server.made) == 6


def test_a_dead_one_is_dropped(server: FakeServer) -> None:
    kept = spares(server, 2)
    kept.refill()
    server.made[0].is_dead = True
    assert number(kept.take()) == 1
    assert [child.is_dropped for child in server.made] == [True, False]
    for child in server.made:
        child.is_dead = True
    kept.refill()
    assert number(kept.take()) == 2


def test_where_none_can_be_started_the_caller_hears_of_it(server: FakeServer) -> None:
    kept = spares(server, 1)
    kept.refill()
    server.is_full = True
    assert number(kept.take()) == 0
    kept.refill()
    with pytest.raises(OSError, match="unavailable"):
        kept.take()
    server.is_full = False
    kept.refill()
    assert number(kept.take()) == 1


def test_closing_lets_them_go_for_good(server: FakeServer) -> None:
    kept = spares(server, 2)
    taken = kept.take()
    kept.refill()
    kept.close()
    kept.close()
    assert [child.is_dropped for child in server.made] == [False, True, True]
    kept.refill()
    assert len(server.made) == 3
    assert number(taken) == 0
