"""The points of a thread at which an exception from another thread could skip the end of a `with`
block.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.executors.arrival import may_skip_a_block

LOCK = threading.Lock()
ENTERED = "LOAD_SPECIAL" not in dis.opmap
"""Python 3.13 and older enter a `with` block in one step."""
found: list[bool] = []


def check(depth: int = 1) -> None:
    found.append(may_skip_a_block(sys._getframe(depth)))


class Checking:
    def __enter__(self) -> None:
        check(2)

    def __exit__(self, *error: object) -> None:
        pass


def block_begins() -> None:
    with Checking():
        pass


def block_is_next() -> None:
    check()
    with LOCK:
        pass


def block_may_be_next() -> None:
    check()
    if found:
        with LOCK:
            pass


def block_is_next_in_the_loop() -> None:
    for number in (1, 2):
        if number == 2:
            with LOCK:
                pass
            break
        check()
        continue


def block_is_next_of_the_caller() -> None:
    def called() -> None:
        return check()

    called()
    with LOCK:
        pass


def block_is_next_in_the_consumer_of_a_generator() -> None:
    def values() -> Any:
        yield check()

    for _ in values():
        with LOCK:
            pass


def block_after_another_call() -> None:
    check()
    len("")
    with LOCK:
        pass


def block_after_a_loop() -> None:
    check()
    while not found:
        pass
    with LOCK:
        pass


def block_has_begun() -> None:
    with LOCK:
        check()


def no_block() -> None:
    check()


@pytest.mark.skipif(ENTERED, reason="a `with` block is entered in one step")
@pytest.mark.parametrize(
    "function",
    [
        block_begins, block_is_next, block_may_be_next, block_after_a_loop,
        block_is_next_of_the_caller, block_is_next_in_the_consumer_of_a_generator,
    ],
)  # fmt: skip
def test_a_with_block_that_may_begin_next_is_detected(function: Callable[[], None]) -> None:
    found.clear()
    function()
    assert found == [True]


@pytest.mark.parametrize(
    "function",
    [block_is_next_in_the_loop, block_after_another_call, block_has_begun, no_block],
)
def test_a_thread_at_another_point_may_be_interrupted(function: Callable[[], None]) -> None:
    """Such as when the exception arrives first at the next turn of a loop, or at a call."""
    found.clear()
    function()
    assert found == [False]


class Watched:
    @property
    def checked(self) -> None:
        check(3)


def test_the_frames_of_callers_can_be_read_during_any_call() -> None:
    """In Python 3.12, the bytecode offset of a caller may lie in the inline cache of a CALL."""
    found.clear()
    watched = Watched()
    for _ in range(100):
        watched.checked  # noqa: B018
        no_block()
    assert len(found) == 200
