"""A worker of gunicorn that is told to end is noticed; handlers of anybody else are left as they are."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flask_asyncroute import termination


class Worker:
    """Handles signals as gunicorn's does."""

    def __init__(self) -> None:
        self.alive = True
        self.handled: list[int] = []

    def handle(self, number: int, frame: Any) -> None:
        self.alive = False
        self.handled.append(number)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(termination, "_workers", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_who_asked_hears_of_it_and_the_worker_too() -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    heard = threading.Event()
    termination.notice(heard.set)
    assert not termination.is_near()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.wait(5)
    assert worker.handled == [signal.SIGTERM] and termination.is_near()


def test_a_worker_that_ends_by_itself_is_seen() -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    termination.notice(lambda: None)
    worker.alive = False
    assert termination.is_near()


def test_other_handlers_are_left_alone() -> None:
    def handle(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    termination.notice(lambda: None)
    assert signal.getsignal(signal.SIGTERM) is handle
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL
    assert not termination.is_near()


def test_in_another_thread_nothing_is_done() -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    thread = threading.Thread(target=termination.notice, args=(lambda: None,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == worker.handle


def test_a_worker_without_room_for_a_thread_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    termination.notice(lambda: None)

    def start(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(termination._thread, "start_new_thread", start)
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM] and termination.is_near()
