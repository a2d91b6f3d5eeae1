"""Detection of the server that handles the signals of this process, and of its shutdown."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest

from flask_asyncroute.workers import shutdown


class Worker:
    """Handles signals like a gunicorn worker."""

    def __init__(self) -> None:
        self.alive = True
        self.handled: list[int] = []
        self.cfg: Any = None
        self.notified = 0

    def notify(self) -> None:
        self.notified += 1

    def handle(self, number: int, frame: Any) -> None:
        self.alive = False
        self.handled.append(number)


@pytest.fixture(autouse=True)
def restore_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shutdown, "_servers", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_calls_the_callback_and_the_handler_of_the_server() -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    called = threading.Event()
    shutdown.notice(called.set)
    assert not shutdown.is_server_ending()
    os.kill(os.getpid(), signal.SIGTERM)
    assert called.wait(5)
    assert worker.handled == [signal.SIGTERM] and shutdown.is_server_ending()


def test_a_worker_that_ends_without_a_signal_is_detected() -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    shutdown.notice(lambda: None)
    worker.alive = False
    assert shutdown.is_server_ending()


def test_other_handlers_are_not_replaced() -> None:
    def handle(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    shutdown.notice(lambda: None)
    assert signal.getsignal(signal.SIGTERM) is handle
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL
    assert not shutdown.is_server_ending()


def test_outside_the_main_thread_no_handler_is_replaced() -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    thread = threading.Thread(target=shutdown.notice, args=(lambda: None,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == worker.handle


def test_the_worker_ends_even_if_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker()
    signal.signal(signal.SIGTERM, worker.handle)
    shutdown.notice(lambda: None)

    def start(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shutdown._thread, "start_new_thread", start)
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM] and shutdown.is_server_ending()


def test_a_second_signal_does_not_interrupt_the_handler_of_the_first() -> None:
    """gunicorn's handler for SIGINT and SIGQUIT acquires a lock that is not reentrant."""
    lock = threading.Lock()

    class Quitting(Worker):
        def handle(self, number: int, frame: Any) -> None:
            assert lock.acquire(blocking=False), "the second call would never return"
            super().handle(number, frame)
            signal.raise_signal(signal.SIGQUIT)
            lock.release()

    worker = Quitting()
    signal.signal(signal.SIGTERM, worker.handle)
    signal.signal(signal.SIGQUIT, worker.handle)
    shutdown.notice(lambda: None)
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM]


def test_a_signal_with_another_handler_is_handled_after_the_first() -> None:
    class Graceful(Worker):
        def quit(self, number: int, frame: Any) -> None:
            self.handled.append(number)

    worker = Graceful()
    signal.signal(signal.SIGTERM, worker.handle)
    signal.signal(signal.SIGQUIT, worker.quit)
    shutdown.notice(lambda: None)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGQUIT)
    assert worker.handled == [signal.SIGTERM, signal.SIGQUIT]


def test_an_interrupt_calls_the_callback_before_keyboard_interrupt() -> None:
    """Every time, because a second Ctrl-C ends a process whose shutdown takes too long."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    called = threading.Event()
    shutdown.notice(called.set)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert called.wait(5)


class UvicornServer:
    """Handles signals like a uvicorn server."""

    def __init__(self) -> None:
        self.should_exit = False
        self.handled: list[int] = []

    def handle(self, number: int, frame: Any) -> None:
        self.should_exit = True
        self.handled.append(number)


def test_uvicorn_is_detected_without_start() -> None:
    server = UvicornServer()
    signal.signal(signal.SIGTERM, server.handle)
    assert not shutdown.is_server_ending()
    signal.raise_signal(signal.SIGTERM)
    assert server.handled == [signal.SIGTERM] and shutdown.is_server_ending()


def test_uvicorn_gets_an_interrupt_instead_of_sigterm() -> None:
    """After SIGTERM, uvicorn kills its process, and running tasks cannot finish."""
    server = UvicornServer()
    signal.signal(signal.SIGTERM, server.handle)
    called = threading.Event()
    shutdown.notice(called.set)
    signal.raise_signal(signal.SIGTERM)
    assert called.wait(5)
    assert server.handled == [signal.SIGINT] and shutdown.is_server_ending()


@pytest.mark.parametrize("is_handled", [False, True])
def test_a_warning_if_uvicorn_would_kill_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_handled: bool
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", types.ModuleType("uvicorn"))
    signal.signal(signal.SIGTERM, (lambda *args: sys.exit()) if is_handled else signal.SIG_DFL)
    shutdown.notice(lambda: None)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (not is_handled)


@pytest.mark.parametrize(("setting", "seconds"), [(30, 30.0), (0, math.inf)])
def test_the_timeout_of_a_gunicorn_worker_is_restarted(setting: int, seconds: float) -> None:
    assert shutdown.restart_gunicorn_timeout() == math.inf
    worker = Worker()
    worker.cfg = types.SimpleNamespace(timeout=setting)
    signal.signal(signal.SIGTERM, worker.handle)
    assert shutdown.restart_gunicorn_timeout() == seconds
    assert worker.notified == (setting > 0)
