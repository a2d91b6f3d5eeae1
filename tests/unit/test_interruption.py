"""Interruption of views: `TaskAborted` is raised only in the view of that task, and only at a point
where no lock can stay held.
"""

from __future__ import annotations

import importlib
import io
import logging
import queue
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flask_asyncroute.errors import TaskAborted
from flask_asyncroute.executors import interruption
from flask_asyncroute.executors.execution import Execution
from tests.support.waiting import eventually_true

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 12) and sys.gettrace() is not None,
    reason="CPython 3.11 blocks all traced threads until the exception is raised in its thread",
)


class Runner:
    """Runs views on another thread, as `run_task` does, and records their outcomes."""

    def __init__(self) -> None:
        self.execution = Execution("task")
        self.ended: list[Any] = []
        self._thread: threading.Thread | None = None

    def start(self, view: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self.ended.append(interruption.call(view, {}, self.execution))
            except BaseException as error:
                self.ended.append(error)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def join(self) -> Any:
        assert self._thread is not None
        self._thread.join(5)
        assert not self._thread.is_alive(), "the view has not ended"
        return self.ended[-1]


@pytest.fixture
def runner() -> Runner:
    return Runner()


class Loop:
    """A view that loops in Python until it is interrupted or ``ends`` is set."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ends = False
        self.cleaned = False

    def __call__(self) -> str:
        end = time.monotonic() + 10
        try:
            self.begun.set()
            while not self.ends:
                assert time.monotonic() < end
        finally:
            self.cleaned = True
        return "ended by itself"


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.ends = True


def test_a_loop_is_interrupted(runner: Runner, loop: Loop) -> None:
    runner.start(loop)
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)
    assert loop.cleaned
    assert runner.execution.thread_id is None


def test_except_exception_does_not_catch_the_interruption(runner: Runner, loop: Loop) -> None:
    def view() -> str:
        while True:
            try:
                return loop()
            except Exception:
                continue

    runner.start(view)
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


@pytest.mark.covers("F14")
def test_a_view_that_catches_the_interruption_continues(runner: Runner, loop: Loop) -> None:
    caught: list[int] = []

    def view() -> str:
        while not loop.ends:
            try:
                loop()
            except BaseException:
                caught.append(1)
        return "late"

    runner.start(view)
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    eventually_true(lambda: caught)
    loop.ends = True
    assert runner.join() == "late"


def test_a_view_deep_in_recursion_is_interrupted(runner: Runner, loop: Loop) -> None:
    def view(depth: int = 400) -> str:
        return loop() if not depth else view(depth - 1)

    runner.start(view)
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


def test_call_returns_the_result_and_raises_the_error(runner: Runner) -> None:
    assert interruption.call(lambda **given: given, {"a": 1}, runner.execution) == {"a": 1}

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        interruption.call(fail, {}, runner.execution)
    assert runner.execution.thread_id is None


def test_interrupt_returns_true_before_and_after_the_view(runner: Runner) -> None:
    assert interruption.interrupt(runner.execution) is True
    interruption.call(lambda: None, {}, runner.execution)
    assert interruption.interrupt(runner.execution) is True


def eventually_interrupted(execution: Execution) -> bool:
    return bool(eventually_true(lambda: interruption.interrupt(execution)))


# Code in which a view must not be interrupted


class Hold:
    """A function that code of other modules calls. It blocks the view in a Python loop, so that the
    view could be interrupted there.
    """

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.may_leave = False

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.inside.set()
        end = time.monotonic() + 10
        while not self.may_leave:
            assert time.monotonic() < end


@pytest.fixture
def hold() -> Iterator[Hold]:
    made = Hold()
    yield made
    made.may_leave = True


def in_logging(hold: Hold, tmp_path: Path) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hold()

    logger = logging.Logger("held")
    logger.addHandler(Handler())
    logger.warning("x")


def in_logging_below_other_code(hold: Hold, tmp_path: Path) -> None:
    """The innermost frames are those of the app, but an outer frame holds the lock of `logging`."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            list(map(hold, [0]))
            return ""

    handler = logging.StreamHandler(open(tmp_path / "log", "w"))
    handler.setFormatter(Formatter())
    logger = logging.Logger("held")
    logger.addHandler(handler)
    try:
        logger.warning("x")
    finally:
        handler.stream.close()


def in_threading(hold: Hold, tmp_path: Path) -> None:
    def is_so() -> bool:
        hold()
        return True

    condition = threading.Condition()
    with condition:
        condition.wait_for(is_so)


def in_queue(hold: Hold, tmp_path: Path) -> None:
    class Held(queue.Queue[int]):
        def _put(self, item: int) -> None:
            hold()

    Held().put(1)


def in_importlib(hold: Hold, tmp_path: Path) -> None:
    sys.modules["held_hook"] = types.SimpleNamespace(hold=hold)  # type: ignore[assignment]
    (tmp_path / "held_module.py").write_text("import held_hook\nheld_hook.hold()\n")
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    try:
        importlib.import_module("held_module")
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["held_hook"]
        sys.modules.pop("held_module", None)


def in_an_import_statement(hold: Hold, tmp_path: Path) -> None:
    sys.modules["held_hook"] = types.SimpleNamespace(hold=hold)  # type: ignore[assignment]
    (tmp_path / "held_statement.py").write_text("import held_hook\nheld_hook.hold()\n")
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    try:
        import held_statement  # type: ignore[import-not-found]  # noqa: F401
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["held_hook"]
        sys.modules.pop("held_statement", None)


def in_a_database_pool(hold: Hold, tmp_path: Path) -> None:
    from sqlalchemy.pool import QueuePool

    def connect() -> Any:
        hold()
        raise ValueError("no connection")

    with pytest.raises(ValueError, match="no connection"):
        QueuePool(connect).connect()


def module_code(name: str) -> Callable[[Callable[..., Any]], Any]:
    module = types.ModuleType(name)
    exec("def run(function):\n    return function()\n", module.__dict__)
    return module.run


def in_psycopg_pool(hold: Hold, tmp_path: Path) -> None:
    module_code("psycopg_pool.pool")(hold)


def in_logging_handlers(hold: Hold, tmp_path: Path) -> None:
    module_code("logging.handlers")(hold)


def in_this_library(hold: Hold, tmp_path: Path) -> None:
    from flask_asyncroute.testing import fake_task

    class Number:
        def __float__(self) -> float:
            hold()
            return 5.0

    with fake_task() as task:
        task.set_progress(Number())  # type: ignore[arg-type]


LOCATIONS = [
    in_logging, in_logging_below_other_code, in_threading, in_queue, in_importlib, in_an_import_statement, in_a_database_pool,
    in_psycopg_pool, in_logging_handlers, in_this_library,
]  # fmt: skip


@pytest.mark.parametrize("location", LOCATIONS, ids=lambda location: location.__name__)
def test_a_view_is_not_interrupted_in_code_that_may_hold_a_lock(
    runner: Runner, hold: Hold, loop: Loop, tmp_path: Path, location: Callable[[Hold, Path], None]
) -> None:
    passed: list[int] = []

    def view() -> str:
        location(hold, tmp_path)
        passed.append(1)
        return loop()

    runner.start(view)
    assert hold.inside.wait(5)
    for _ in range(20):
        assert interruption.interrupt(runner.execution) is False
    hold.may_leave = True
    assert loop.begun.wait(5), "the view continues"
    assert passed == [1]
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


@pytest.mark.parametrize(
    "name",
    [
        "queue_of_mine",
        "loggingx",
        "my.logging",
        "threading2",
        "sqlalchemy.orm",
        "flask_asyncroute_user",
    ],
)
def test_modules_with_similar_names_can_be_interrupted(
    runner: Runner, loop: Loop, name: str
) -> None:
    runner.start(lambda: module_code(name)(loop))
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


@pytest.mark.parametrize("name", [None, 5, ""])
def test_code_without_a_valid_module_name_can_be_interrupted(
    runner: Runner, loop: Loop, name: Any
) -> None:
    """Code run by ``exec`` and notebooks may have any ``__name__``."""
    scope: dict[str, Any] = {"__name__": name, "loop": loop}
    exec("def view():\n    return loop()\n", scope)
    runner.start(scope["view"])
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


def test_a_blocking_c_call_is_interrupted_when_it_returns(runner: Runner) -> None:
    lock = threading.Lock()
    lock.acquire()
    after: list[int] = []
    begun = threading.Event()

    def view() -> None:
        begun.set()
        lock.acquire(True, 10)  # no keywords: Python 3.14 would raise at the next call
        after.append(1)

    runner.start(view)
    assert begun.wait(5)
    assert eventually_interrupted(runner.execution)
    pause = threading.Event()
    assert not pause.wait(0.05)
    assert runner.ended == []
    lock.release()
    assert isinstance(runner.join(), TaskAborted)
    assert after == []


@pytest.mark.parametrize("make_lock", [threading.Lock, threading.RLock, threading.Condition])
def test_a_view_interrupted_while_it_waits_for_a_lock_releases_it(
    runner: Runner, loop: Loop, make_lock: Callable[[], Any]
) -> None:
    """The `with` statement that acquires the lock must also release it."""
    lock = make_lock()
    begun = threading.Event()

    def view() -> str:
        begun.set()
        with lock:
            return loop()

    with lock:
        runner.start(view)
        assert begun.wait(5)
        for _ in range(20):
            interruption.interrupt(runner.execution)
    eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_lock_acquired_after_a_call_with_keywords_is_released(runner: Runner, loop: Loop) -> None:
    """Python 3.14 does not raise at the end of such a call, but at the next one."""
    gate, lock = threading.Lock(), threading.Lock()
    begun = threading.Event()

    def view() -> str:
        begun.set()
        gate.acquire(timeout=10)
        with lock:
            return loop()

    with gate:
        runner.start(view)
        assert begun.wait(5)
        for _ in range(20):
            interruption.interrupt(runner.execution)
    eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)
    assert lock.acquire(blocking=False)


# Views and code that must not be interrupted


def test_the_view_of_another_task_on_the_thread_is_not_interrupted(
    runner: Runner, loop: Loop
) -> None:
    """A view may run another task on its own thread, such as one of an immediate route."""
    inner, inner_loop = Execution("inner"), Loop()
    results: list[Any] = []

    def view() -> str:
        results.append(interruption.call(inner_loop, {}, inner))
        return loop()

    runner.start(view)
    assert inner_loop.begun.wait(5)
    for _ in range(20):
        assert interruption.interrupt(runner.execution) is False
    inner_loop.ends = True
    assert loop.begun.wait(5)
    assert results == ["ended by itself"]
    assert interruption.interrupt(inner) is True, "the inner view has ended"
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


def test_interrupting_an_inner_view_does_not_interrupt_the_outer_one(runner: Runner) -> None:
    inner, inner_loop = Execution("inner"), Loop()

    def view() -> str:
        with pytest.raises(TaskAborted):
            interruption.call(inner_loop, {}, inner)
        return "outer goes on"

    runner.start(view)
    assert inner_loop.begun.wait(5)
    assert eventually_interrupted(inner)
    assert runner.join() == "outer goes on"


def test_an_exception_raised_while_a_view_returns_is_cleared(runner: Runner) -> None:
    """The interrupting thread holds the lock. The view's thread waits for it in `leave`, and must
    not receive an exception after that.
    """
    execution = runner.execution
    begun, may_return = threading.Event(), threading.Event()

    def view() -> str:
        begun.set()
        assert may_return.wait(5)
        return "result"

    for _ in range(50):
        begun.clear()
        may_return.clear()
        runner.start(view)
        assert begun.wait(5)
        with execution.thread_lock:
            may_return.set()
            ident = execution.thread_id
            assert ident is not None

            def is_leaving(ident: int = ident) -> bool:
                frame = sys._current_frames().get(ident)
                return frame is not None and frame.f_code is interruption.leave.__code__

            eventually_true(is_leaving)
            interruption._set_in(ident, id(TaskAborted))
        assert runner.join() == "result"
        assert execution.thread_id is None


def test_no_interruption_reaches_the_code_between_two_views() -> None:
    """One thread runs many views. Each is interrupted at some point, mostly near its end. No other
    code may be interrupted.
    """
    count = 300
    executions = [Execution(f"t{number}") for number in range(count)]
    current = [0]
    ended: list[str] = []
    stray: list[BaseException] = []
    done = threading.Event()

    def view(number: int) -> int:
        total = 0
        for step in range(200 + number % 7 * 40):
            total += step
        return total

    def run() -> None:
        try:
            for number, execution in enumerate(executions):
                current[0] = number
                try:
                    interruption.call(view, {"number": number}, execution)
                except TaskAborted:
                    ended.append("aborted")
                else:
                    ended.append("returned")
        except BaseException as error:
            stray.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        while not done.is_set():
            interruption.interrupt(executions[current[0]])
    finally:
        sys.setswitchinterval(interval)
    thread.join(10)
    assert stray == []
    assert len(ended) == count


def test_interrupted_views_leave_no_lock_held(runner: Runner) -> None:
    """Interrupts a view that logs, queues and locks in a loop; tests/stress does so thousands of
    times.
    """
    logger = logging.Logger("busy")
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    box: queue.Queue[int] = queue.Queue()
    lock = threading.RLock()
    rounds = [0]

    def view() -> None:
        while True:
            logger.warning("turn %s", rounds[0])
            stream.seek(0)
            box.put(1)
            box.get()
            with lock:
                rounds[0] += 1

    def has_advanced(before: int) -> bool:
        return rounds[0] > before

    for _ in range(40):
        before = rounds[0]
        runner.start(view)
        eventually_true(partial(has_advanced, before))
        interrupt_at_any_moment(runner.execution)
        assert isinstance(runner.join(), TaskAborted)
    for held in (logger.handlers[0].lock, box.mutex, logging._lock):  # type: ignore[attr-defined]
        assert held is not None
        assert held.acquire(timeout=1), "the lock is free"
        held.release()


def interrupt_at_any_moment(execution: Execution) -> None:
    """Interrupt a view that is almost always in logging. With a short switch interval, its thread
    may release the GIL at any line.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        eventually_true(lambda: interruption.interrupt(execution), 10, 2e-5)
    finally:
        sys.setswitchinterval(interval)
