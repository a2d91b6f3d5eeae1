"""The elastic thread pool: it grows, shrinks, replaces hanging threads, and loses neither a call
nor a thread.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextvars import ContextVar
from typing import Any

import pytest

from flask_asyncroute.errors import TaskAborted
from flask_asyncroute.executors.thread import ElasticThreadPool

MakePool = Callable[..., ElasticThreadPool]
Eventually = Callable[..., Any]
LONG = 60.0


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Return ``make_pool(min_workers, max_workers, idle_seconds=60)``; pools are shut down at the
    end.
    """
    made: list[ElasticThreadPool] = []

    def make(min_workers: int, max_workers: int, idle_seconds: float = LONG) -> ElasticThreadPool:
        pool = ElasticThreadPool("test", min_workers, max_workers, idle_seconds)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.shutdown(wait=False, cancel_futures=True)


def threads_of(pool: ElasticThreadPool) -> int:
    return sum(thread.is_alive() for thread in list(pool._threads))


def is_idle(pool: ElasticThreadPool, count: int) -> bool:
    return pool._idle == count == threads_of(pool)


def wait_at(gate: threading.Event) -> str:
    assert gate.wait(10)
    return threading.current_thread().name


def test_submit_returns_a_future_with_the_result(make_pool: MakePool) -> None:
    pool = make_pool(1, 2)
    assert pool.submit(divmod, 7, 2).result(5) == (3, 1)
    assert pool.submit(dict, a=1, fn=2, self=3).result(5) == {"a": 1, "fn": 2, "self": 3}
    assert list(pool.map(abs, [-1, 2, -3])) == [1, 2, 3]


@pytest.mark.covers("F09")
@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(1), KeyboardInterrupt(), TaskAborted(), MemoryError()]
)
def test_an_exception_in_a_call_does_not_end_the_thread(
    make_pool: MakePool, error: BaseException
) -> None:
    pool = make_pool(1, 1)

    def fail() -> None:
        raise error

    for _ in range(3):
        future = pool.submit(fail)
        assert future.exception(5) is error
    assert pool.submit(abs, -1).result(5) == 1
    assert threads_of(pool) == 1


@pytest.mark.covers("F09")
def test_endless_recursion_does_not_end_the_thread(make_pool: MakePool) -> None:
    pool = make_pool(1, 1)

    def recur() -> None:
        recur()

    for _ in range(3):
        assert isinstance(pool.submit(recur).exception(10), RecursionError)
    assert pool.submit(abs, -1).result(5) == 1


def test_no_thread_is_started_before_the_first_call(make_pool: MakePool) -> None:
    assert threads_of(make_pool(2, 4)) == 0


def test_the_pool_grows_to_max_workers(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    pool = make_pool(1, 3)
    futures = []
    for number in range(6):
        futures.append(pool.submit(wait_at, gate))
        eventually(
            lambda number=number: sum(future.running() for future in futures) == min(number + 1, 3)
        )
        assert threads_of(pool) == min(number + 1, 3)
    gate.set()
    assert not wait(futures, 5).not_done
    assert len({future.result() for future in futures}) == 3


def test_an_idle_thread_is_reused(make_pool: MakePool, eventually: Eventually) -> None:
    pool = make_pool(1, 4)
    names = set()
    for _ in range(5):
        names.add(pool.submit(lambda: threading.current_thread().name).result(5))
        eventually(lambda: is_idle(pool, 1))
    assert len(names) == 1


def test_two_concurrent_calls_do_not_share_one_idle_thread(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    """The thread woken by the first call still counts as idle when the second call comes."""
    pool = make_pool(1, 2)
    pool.submit(abs, 1).result(5)
    eventually(lambda: is_idle(pool, 1))
    futures = [pool.submit(wait_at, gate) for _ in range(2)]
    eventually(lambda: all(future.running() for future in futures))


@pytest.mark.parametrize("min_workers", [0, 1, 2])
def test_the_pool_shrinks_to_min_workers(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually, min_workers: int
) -> None:
    pool = make_pool(min_workers, 4, 0.05)
    futures = [pool.submit(wait_at, gate) for _ in range(4)]
    eventually(lambda: threads_of(pool) == 4)
    gate.set()
    assert not wait(futures, 5).not_done
    eventually(lambda: threads_of(pool) == min_workers)
    if min_workers:
        pause = threading.Event()
        assert not pause.wait(0.2)
        assert threads_of(pool) == min_workers, "min_workers threads stay"
    assert pool.submit(abs, -1).result(5) == 1


def test_a_call_submitted_while_the_last_thread_ends_is_run(make_pool: MakePool) -> None:
    """A thread that has decided to end must no longer count as available."""
    decided, may_end = threading.Event(), threading.Event()

    class Slow(ElasticThreadPool):
        def _work_once(self, thread: threading.Thread) -> bool:
            goes_on = super()._work_once(thread)
            if not goes_on and not decided.is_set():
                decided.set()
                assert may_end.wait(5)
            return goes_on

    pool = Slow("test", 0, 1, 0.01)
    try:
        pool.submit(abs, 1).result(5)
        assert decided.wait(5)
        future = pool.submit(abs, -2)
        may_end.set()
        assert future.result(5) == 2
    finally:
        may_end.set()
        pool.shutdown(wait=False, cancel_futures=True)


def test_calls_submitted_while_threads_end_are_run(make_pool: MakePool) -> None:
    pool = make_pool(0, 2, 0.0005)
    pause = threading.Event()
    for number in range(400):
        future = pool.submit(abs, -number)
        assert future.result(5) == number
        pause.wait(0.0005)


def test_a_waiting_call_can_be_cancelled(make_pool: MakePool, gate: threading.Event) -> None:
    pool = make_pool(1, 1)
    ran: list[int] = []
    first = pool.submit(wait_at, gate)
    waiting = pool.submit(ran.append, 1)
    last = pool.submit(ran.append, 2)
    assert waiting.cancel()
    gate.set()
    first.result(5)
    last.result(5)
    assert ran == [2]
    with pytest.raises(CancelledError):
        waiting.result(0)


def test_a_running_call_cannot_be_cancelled(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    future = make_pool(1, 1).submit(wait_at, gate)
    eventually(future.running)
    assert not future.cancel()


@pytest.mark.covers("F14")
def test_an_abandoned_thread_is_replaced(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    pool = make_pool(1, 1)
    hung = pool.submit(wait_at, gate)
    eventually(hung.running)
    waiting = pool.submit(abs, -1)
    assert pool.abandon(hung) is True
    assert waiting.result(5) == 1, "calls that waited before are run too"
    assert pool.submit(abs, -2).result(5) == 2
    gate.set()
    hung.result(5)
    eventually(lambda: threads_of(pool) == 1)
    assert pool.submit(abs, -3).result(5) == 3


@pytest.mark.covers("F14")
def test_at_most_max_workers_threads_may_be_abandoned(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    pool = make_pool(1, 2)
    futures: list[Future[str]] = []
    for _ in range(2):
        futures.extend([pool.submit(wait_at, gate), pool.submit(wait_at, gate)])
        eventually(lambda: all(future.running() for future in futures))
        results = [pool.abandon(future) for future in futures[-2:]]
    assert results == [False, False]
    assert threads_of(pool) == 4
    waiting = pool.submit(wait_at, gate)
    assert not waiting.running()
    gate.set()
    assert not wait([*futures, waiting], 5).not_done
    eventually(lambda: threads_of(pool) <= 2)


@pytest.mark.covers("F14")
def test_the_return_of_an_abandoned_thread_allows_another_to_be_abandoned(
    make_pool: MakePool, eventually: Eventually
) -> None:
    gates = [threading.Event() for _ in range(3)]
    pool = make_pool(1, 1)
    try:
        first = pool.submit(wait_at, gates[0])
        eventually(first.running)
        assert pool.abandon(first) is True
        second = pool.submit(wait_at, gates[1])
        eventually(second.running)
        assert pool.abandon(second) is False
        gates[0].set()
        first.result(5)
        eventually(lambda: threads_of(pool) == 1)
        assert pool.abandon(second) is True
        third = pool.submit(wait_at, gates[2])
        eventually(third.running)
    finally:
        for event in gates:
            event.set()


def test_only_a_running_call_of_this_pool_can_be_abandoned(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    pool = make_pool(1, 1)
    running, waiting = pool.submit(wait_at, gate), pool.submit(abs, 1)
    eventually(running.running)
    assert pool.abandon(waiting) is False
    assert pool.abandon(Future()) is False
    gate.set()
    waiting.result(5)
    assert pool.abandon(running) is False
    assert threads_of(pool) == 1


def test_shutdown_waits_for_submitted_calls(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    pool = make_pool(1, 1)
    futures = [pool.submit(wait_at, gate) for _ in range(3)]
    eventually(futures[0].running)
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(abs, 1)
    gate.set()
    pool.shutdown(wait=True)
    assert all(future.done() and not future.cancelled() for future in futures)
    assert threads_of(pool) == 0


def test_shutdown_with_cancel_futures_cancels_waiting_calls(
    make_pool: MakePool, gate: threading.Event, eventually: Eventually
) -> None:
    pool = make_pool(1, 1)
    running, waiting = pool.submit(wait_at, gate), pool.submit(abs, 1)
    eventually(running.running)
    pool.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    gate.set()
    assert running.result(5)
    pool.shutdown()


def test_shutdown_ends_idle_threads_at_once(make_pool: MakePool, eventually: Eventually) -> None:
    pool = make_pool(2, 2)
    wait([pool.submit(abs, 1) for _ in range(2)], 5)
    pool.shutdown(wait=True)
    assert threads_of(pool) == 0


def test_the_pool_is_a_context_manager(make_pool: MakePool) -> None:
    with make_pool(1, 2) as pool:
        futures = [pool.submit(abs, -number) for number in range(10)]
    assert [future.result(0) for future in futures] == list(range(10))


def test_each_call_runs_in_its_own_context(make_pool: MakePool) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    variable.set("mine")

    def swap() -> str:
        before = variable.get()
        variable.set("theirs")
        return before

    pool = make_pool(1, 1)
    assert [pool.submit(swap).result(5) for _ in range(2)] == ["none", "none"]
    assert variable.get() == "mine"


def test_threads_are_daemons_named_after_the_pool(make_pool: MakePool) -> None:
    thread = make_pool(1, 1).submit(threading.current_thread).result(5)
    assert thread.daemon
    assert thread.name.startswith("asyncroute-test-")


def test_a_running_call_does_not_delay_interpreter_exit() -> None:
    code = (
        "import threading; from flask_asyncroute.executors.thread import ElasticThreadPool\n"
        "pool = ElasticThreadPool('x', 1, 1); begun = threading.Event()\n"
        "pool.submit(lambda: (begun.set(), threading.Event().wait(60))); assert begun.wait(5); "
        "print('out')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True
    )
    assert (ended.stdout, ended.stderr) == ("out\n", "")


def raise_in(thread: threading.Thread) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(TaskAborted)
    )


def test_a_stray_interruption_loses_no_call(
    make_pool: MakePool, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """Raised in a thread that is idle or between two calls. The package never does so, but other
    code may use the same threads.
    """
    pool = make_pool(1, 1)
    for number in range(100):
        thread = pool.submit(threading.current_thread).result(5)
        if number % 2:
            eventually(lambda: pool._idle == 1)
        raise_in(thread)
        future = pool.submit(abs, -number)
        try:
            assert future.result(5) == number
        except TaskAborted:
            pass  # it was raised inside the call, which is allowed
        assert pool.submit(abs, -1).result(5) == 1
    eventually(lambda: is_idle(pool, 1))
