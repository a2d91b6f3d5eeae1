"""Raising `TaskAborted` in a view's thread: only in the view of that very task, and only where no lock can be lost."""

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
from flask_asyncroute.execution import Execution
from flask_asyncroute.executors import interruption
from tests.conftest import eventually_true

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 12) and sys.gettrace() is not None,
    reason="CPython 3.11 holds up every traced thread until an exception has arrived in the thread it was raised in",
)


class Runner:
    """Calls views on a thread of its own, each as `worker` does, and keeps how each ended."""

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
    """A view that turns in Python until it is interrupted or told to end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ends = False
        self.cleaned = False

    def __call__(self) -> str:
        self.begun.set()
        end = time.monotonic() + 10
        try:
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


def test_except_exception_does_not_swallow_it(runner: Runner, loop: Loop) -> None:
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


def test_f14_a_view_that_swallows_it_goes_on(runner: Runner, loop: Loop) -> None:
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


def test_a_deep_view_is_interrupted(runner: Runner, loop: Loop) -> None:
    def view(depth: int = 400) -> str:
        return loop() if not depth else view(depth - 1)

    runner.start(view)
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


def test_a_result_and_an_error_pass_through(runner: Runner) -> None:
    assert interruption.call(lambda **given: given, {"a": 1}, runner.execution) == {"a": 1}

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        interruption.call(fail, {}, runner.execution)
    assert runner.execution.thread_id is None


def test_a_view_that_has_ended_or_not_begun_is_nothing_to_interrupt(runner: Runner) -> None:
    assert interruption.interrupt(runner.execution) is True
    interruption.call(lambda: None, {}, runner.execution)
    assert interruption.interrupt(runner.execution) is True


def eventually_interrupted(execution: Execution) -> bool:
    return bool(eventually_true(lambda: interruption.interrupt(execution)))


# --- where it must not happen -----------------------------------------------------------------------------------------


class Hold:
    """A place inside foreign code where a view is held until it may go on; Python code, so that it could be interrupted."""

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
    """The innermost frames are the app's own, with logging's lock held further out."""

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


PLACES = [
    in_logging, in_logging_below_other_code, in_threading, in_queue, in_importlib, in_an_import_statement, in_a_database_pool,
    in_psycopg_pool, in_logging_handlers, in_this_library,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_it_never_happens_where_a_lock_could_be_lost(
    runner: Runner, hold: Hold, loop: Loop, tmp_path: Path, place: Callable[[Hold, Path], None]
) -> None:
    passed: list[int] = []

    def view() -> str:
        place(hold, tmp_path)
        passed.append(1)
        return loop()

    runner.start(view)
    assert hold.inside.wait(5)
    for _ in range(20):
        assert interruption.interrupt(runner.execution) is False
    hold.may_leave = True
    assert loop.begun.wait(5), "it came out as it went in"
    assert passed == [1]
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


@pytest.mark.parametrize(
    "name", ["queue_of_mine", "loggingx", "my.logging", "threading2", "sqlalchemy.orm", "flask_asyncroute_user"]
)
def test_modules_of_a_like_name_are_no_reason(runner: Runner, loop: Loop, name: str) -> None:
    runner.start(lambda: module_code(name)(loop))
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


@pytest.mark.parametrize("name", [None, 5, ""])
def test_code_without_a_module_name_is_no_trouble(runner: Runner, loop: Loop, name: Any) -> None:
    """`exec` and notebooks run code under globals of any kind."""
    scope: dict[str, Any] = {"__name__": name, "loop": loop}
    exec("def view():\n    return loop()\n", scope)
    runner.start(scope["view"])
    assert loop.begun.wait(5)
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


def test_a_thread_that_sits_in_c_code_goes_on_until_it_returns(runner: Runner) -> None:
    lock = threading.Lock()
    lock.acquire()
    after: list[int] = []
    begun = threading.Event()

    def view() -> None:
        begun.set()
        lock.acquire(timeout=10)
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


# --- whom it must not hit ---------------------------------------------------------------------------------------------


def test_the_view_of_another_task_on_the_thread_is_not_hit(runner: Runner, loop: Loop) -> None:
    """A view may run another task inside itself, such as one of an immediate route."""
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
    assert interruption.interrupt(inner) is True, "the inner one has left"
    assert eventually_interrupted(runner.execution)
    assert isinstance(runner.join(), TaskAborted)


def test_an_inner_view_is_interrupted_alone(runner: Runner) -> None:
    inner, inner_loop = Execution("inner"), Loop()

    def view() -> str:
        with pytest.raises(TaskAborted):
            interruption.call(inner_loop, {}, inner)
        return "outer goes on"

    runner.start(view)
    assert inner_loop.begun.wait(5)
    assert eventually_interrupted(inner)
    assert runner.join() == "outer goes on"


def test_what_is_raised_while_a_view_returns_is_taken_back(runner: Runner) -> None:
    """The lock is held by who interrupts; the thread waits for it to leave, and then nothing may follow it."""
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
    """One thread runs view after view; each is stopped at some moment, mostly around its end. Nothing else may be hit."""
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


def test_threads_that_log_and_lock_lose_no_lock(runner: Runner) -> None:
    """Stops of a view that logs, queues and locks in a loop; `prove` does thousands."""
    logger = logging.Logger("busy")
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    box: queue.Queue[int] = queue.Queue()
    lock = threading.RLock()
    turns = [0]

    def view() -> None:
        while True:
            logger.warning("turn %s", turns[0])
            stream.seek(0)
            box.put(1)
            box.get()
            with lock:
                turns[0] += 1

    def has_turned(before: int) -> bool:
        return turns[0] > before

    for _ in range(40):
        before = turns[0]
        runner.start(view)
        eventually_true(partial(has_turned, before))
        interrupt_at_any_moment(runner.execution)
        assert isinstance(runner.join(), TaskAborted)
    for held in (logger.handlers[0].lock, box.mutex, logging._lock):  # type: ignore[attr-defined]
        assert held is not None
        assert held.acquire(timeout=1), "nobody holds it"
        held.release()


def interrupt_at_any_moment(execution: Execution) -> None:
    """Interrupt a view that is almost always in logging: have it let go at any line, not only where it does by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        eventually_true(lambda: interruption.interrupt(execution), 10, 2e-5)
    finally:
        sys.setswitchinterval(interval)
