"""The port of executors: places, order of events, isolation. What runs is a plain function here, not `worker`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import flask
import pytest

from flask_asyncroute.errors import ConfigurationError, QueueFull, TaskAborted
from flask_asyncroute.executors import futures
from flask_asyncroute.executors.base import TaskExecutor
from flask_asyncroute.executors.children import ForkServer
from flask_asyncroute.executors.futures import FutureTaskExecutor
from flask_asyncroute.executors.immediate import ImmediateTaskExecutor
from flask_asyncroute.executors.processes import ProcessTaskExecutor
from flask_asyncroute.executors.threads import ThreadTaskExecutor
from tests.conftest import eventually_true

MakeExecutor = Callable[..., TaskExecutor]
MAX_WORKERS, QUEUE_SIZE = 2, 3
PLACES = MAX_WORKERS + QUEUE_SIZE


class Work:
    """A run that begins, waits until it may end, and ends, for each task; may raise at the end."""

    def __init__(self) -> None:
        self.begun: dict[str, threading.Event] = {}
        self.may_end: dict[str, threading.Event] = {}
        self.ended: list[str] = []
        self.errors: dict[str, BaseException] = {}
        self.is_held = True
        self._lock = threading.Lock()

    def __call__(self, executor: TaskExecutor, task_id: str) -> None:
        self.event(self.begun, task_id).set()
        if self.is_held:
            assert self.event(self.may_end, task_id).wait(10)
        self.ended.append(task_id)
        if task_id in self.errors:
            raise self.errors[task_id]

    def event(self, events: dict[str, threading.Event], task_id: str) -> threading.Event:
        with self._lock:
            return events.setdefault(task_id, threading.Event())

    def await_begin(self, *task_ids: str) -> None:
        for task_id in task_ids:
            assert self.event(self.begun, task_id).wait(5), f"{task_id} has not begun"

    def let_end(self, *task_ids: str) -> None:
        for task_id in task_ids:
            self.event(self.may_end, task_id).set()

    def has_begun(self, task_id: str) -> bool:
        return self.event(self.begun, task_id).is_set()


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.is_held = False
    made.let_end(*made.begun, *made.may_end)


@pytest.fixture
def make_executor() -> Iterator[MakeExecutor]:
    """Give ``make_executor(kind, run)``; what it made is closed at the end."""
    made: list[TaskExecutor] = []
    pools: list[ThreadPoolExecutor] = []

    def make(kind: str, run: Any, max_workers: int = MAX_WORKERS, queue_size: int = QUEUE_SIZE) -> TaskExecutor:
        if kind == "thread":
            executor: TaskExecutor = ThreadTaskExecutor("contract", run, 1, max_workers, queue_size, 1.0)
        elif kind == "process":
            # What hands a task over is `worker`, which is not here: these runs stay in their supervising threads.
            server = ForkServer("tests.child_app", ({}, []), 1024)
            executor = ProcessTaskExecutor("contract", run, server, 0, max_workers, queue_size)
        elif kind == "futures":
            pools.append(ThreadPoolExecutor(max_workers))
            executor = FutureTaskExecutor(pools[-1], run, max_workers, queue_size)
        else:
            executor = ImmediateTaskExecutor(run, max_workers, queue_size)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()
    for pool in pools:
        pool.shutdown(wait=True, cancel_futures=True)


@pytest.fixture(params=["thread", "futures", "process"])
def executor(request: pytest.FixtureRequest, make_executor: MakeExecutor, work: Work) -> TaskExecutor:
    """Give an executor of each kind that has places to count."""
    return make_executor(request.param, work)


@pytest.fixture(params=["thread", "futures", "process", "immediate"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def places_left(executor: TaskExecutor) -> int:
    taken = 0
    try:
        while taken < 100:
            executor.reserve()
            taken += 1
    except QueueFull:
        pass
    for _ in range(taken):
        executor.unreserve()
    return taken


def start(executor: TaskExecutor, *task_ids: str) -> None:
    for task_id in task_ids:
        executor.reserve()
        executor.submit(task_id)


def test_a69_there_are_as_many_places_as_workers_and_queue(executor: TaskExecutor) -> None:
    for _ in range(PLACES):
        executor.reserve()
    with pytest.raises(QueueFull, match=f"{QUEUE_SIZE} tasks") as refused:
        executor.reserve()
    assert refused.value.status == 503
    assert refused.value.retry_after is not None and refused.value.retry_after > 0
    executor.unreserve()
    executor.reserve()
    with pytest.raises(QueueFull):
        executor.reserve()


def test_a69_places_hold_against_many_at_once(executor: TaskExecutor) -> None:
    got = []

    def grab() -> None:
        for _ in range(20):
            try:
                executor.reserve()
            except QueueFull:
                continue
            got.append(1)

    grabbers = [threading.Thread(target=grab) for _ in range(8)]
    for grabber in grabbers:
        grabber.start()
    for grabber in grabbers:
        grabber.join(10)
    assert len(got) == PLACES


def test_a_submitted_task_runs_once_and_gives_its_place_back(kind: str, make_executor: MakeExecutor) -> None:
    ran: list[tuple[TaskExecutor, str]] = []
    done = threading.Event()

    def run(executor: TaskExecutor, task_id: str) -> None:
        ran.append((executor, task_id))
        done.set()

    executor = make_executor(kind, run)
    before = places_left(executor)
    start(executor, "one")
    assert done.wait(5)
    executor_is_free(executor, before)
    assert ran == [(executor, "one")]
    assert not executor.holds("one")


def executor_is_free(executor: TaskExecutor, places: int) -> None:
    eventually_true(lambda: places_left(executor) == places and executor.free() == MAX_WORKERS)


def test_submit_returns_at_once(executor: TaskExecutor, work: Work) -> None:
    start(executor, "one")
    assert work.ended == []
    work.await_begin("one")


def test_no_more_run_than_there_are_workers(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a", "b", "c", "d")
    work.await_begin("a", "b")
    assert not work.has_begun("c")
    assert all(executor.holds(task_id) for task_id in "abcd")
    work.let_end("b")
    work.await_begin("c")
    assert not work.has_begun("d")
    work.let_end("a", "c", "d")
    executor_is_free(executor, PLACES)
    assert sorted(work.ended) == ["a", "b", "c", "d"]


def test_free_tells_how_many_would_start_at_once(executor: TaskExecutor, work: Work) -> None:
    assert executor.free() == 2
    executor.reserve()
    assert executor.free() == 1
    executor.submit("a")
    assert executor.free() == 1
    start(executor, "b", "c")
    assert executor.free() == 0
    work.let_end("a", "b", "c")
    executor_is_free(executor, PLACES)


@pytest.mark.parametrize("error", [ValueError(), TaskAborted(), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_a_run_that_raises_gives_its_place_back(
    kind: str, make_executor: MakeExecutor, work: Work, error: BaseException
) -> None:
    work.is_held = False
    work.errors["bad"] = error
    executor = make_executor(kind, work)
    before = places_left(executor)
    for _ in range(PLACES + 1):
        executor.reserve()
        try:
            executor.submit("bad")
        except type(error):
            assert kind == "immediate"
        executor_is_free(executor, before)
    start(executor, "good")
    work.await_begin("good")
    executor_is_free(executor, before)
    assert not executor.holds("bad")


def test_f18_a_waiting_task_can_be_taken_out(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a", "b", "waits", "c")
    work.await_begin("a", "b")
    executor.discard("waits")
    executor.discard("waits")
    assert not executor.holds("waits")
    assert places_left(executor) == PLACES - 3
    work.let_end("a", "b", "c", "waits")
    work.await_begin("c")
    executor_is_free(executor, PLACES)
    assert not work.has_begun("waits")


def test_a_running_or_unknown_task_cannot_be_taken_out(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a")
    work.await_begin("a")
    executor.discard("a")
    executor.discard("unknown")
    assert executor.holds("a")
    assert places_left(executor) == PLACES - 1
    work.let_end("a")
    executor_is_free(executor, PLACES)
    executor.discard("a")
    assert places_left(executor) == PLACES


def test_discarding_and_beginning_at_once_count_one_place(executor: TaskExecutor, work: Work) -> None:
    """Whoever is first: the task is either taken out or run, and its place comes back once."""
    work.is_held = False
    for number in range(300):
        task_id = f"t{number}"
        executor.reserve()
        executor.submit(task_id)
        executor.discard(task_id)
    executor_is_free(executor, PLACES)


def test_f14_an_abandoned_run_is_replaced(make_executor: MakeExecutor, work: Work) -> None:
    executor = make_executor("thread", work)
    start(executor, "a", "b", "c", "d", "e")
    work.await_begin("a", "b")
    executor.abandon("a")
    work.await_begin("c")
    executor.abandon("a")
    assert not work.has_begun("d"), "abandoned twice is one place"
    executor.abandon("b")
    work.await_begin("d")
    assert places_left(executor) == PLACES - 3
    # As many as may run may linger, and no more.
    executor.abandon("c")
    assert not work.has_begun("e")
    assert places_left(executor) == PLACES - 3
    assert all(executor.holds(task_id) for task_id in "abcde"), "their code has not ended"
    work.let_end("a", "b")
    work.let_end("c", "d", "e")
    executor_is_free(executor, PLACES)
    assert sorted(work.ended) == ["a", "b", "c", "d", "e"]


def test_an_abandoned_run_that_ends_makes_room_for_another_to_linger(make_executor: MakeExecutor, work: Work) -> None:
    executor = make_executor("thread", work, max_workers=1)
    start(executor, "a")
    work.await_begin("a")
    executor.abandon("a")
    start(executor, "b")
    work.await_begin("b")
    start(executor, "c")
    executor.abandon("b")
    assert not work.has_begun("c")
    work.let_end("a")
    eventually_true(lambda: not executor.holds("a"))
    executor.abandon("b")
    work.await_begin("c")
    work.let_end("b", "c")
    eventually_true(lambda: executor.free() == 1)


def test_abandoning_what_waits_or_is_unknown_does_nothing(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a", "b", "c")
    work.await_begin("a", "b")
    executor.abandon("c")
    executor.abandon("unknown")
    assert places_left(executor) == PLACES - 3
    assert not work.has_begun("c")
    work.let_end("a", "b", "c")
    executor_is_free(executor, PLACES)


def test_an_executor_of_the_app_keeps_counting_what_was_abandoned(make_executor: MakeExecutor, work: Work) -> None:
    executor = make_executor("futures", work)
    start(executor, "a")
    work.await_begin("a")
    executor.abandon("a")
    assert places_left(executor) == PLACES - 1
    work.let_end("a")
    executor_is_free(executor, PLACES)


def test_a_run_sees_nothing_of_the_submitters_context(
    kind: str, make_executor: MakeExecutor, make_app: Callable[..., flask.Flask]
) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    seen: list[Any] = []
    done = threading.Event()

    def run(executor: TaskExecutor, task_id: str) -> None:
        seen.append((variable.get(), flask.has_app_context(), flask.has_request_context()))
        variable.set(task_id)
        done.set()

    executor = make_executor(kind, run, max_workers=1)
    for number in range(2):
        token = variable.set("mine")
        with make_app().test_request_context():
            done.clear()
            start(executor, f"t{number}")
            assert done.wait(5)
            assert variable.get() == "mine"
        variable.reset(token)
    assert seen == [("none", False, False)] * 2, "the second run does not see what the first has set either"


def test_a_closed_executor_lets_its_tasks_end(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a")
    work.await_begin("a")
    executor.close()
    executor.close()
    work.let_end("a")
    executor_is_free(executor, PLACES)
    assert work.ended == ["a"]


def test_a_submit_that_fails_gives_its_place_back(kind: str, make_executor: MakeExecutor, work: Work) -> None:
    """The pool was shut down, by us or by the app whose it is."""
    work.is_held = False
    executor = make_executor(kind, work)
    before = places_left(executor)
    executor.close()
    if isinstance(executor, FutureTaskExecutor):
        executor._executor.shutdown()
    executor.reserve()
    try:
        executor.submit("late")
    except RuntimeError:
        assert kind != "immediate"
    else:
        assert kind == "immediate"
    assert not executor.holds("late")
    assert places_left(executor) == before


def test_a_thread_that_cannot_be_started_costs_nothing(
    make_executor: MakeExecutor, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's limit of threads: the submit fails, and what failed does not run later."""
    executor = make_executor("thread", work, max_workers=1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        executor.reserve()
        with pytest.raises(RuntimeError, match="new thread"):
            executor.submit("unlucky")
    assert not executor.holds("unlucky")
    assert places_left(executor) == 1 + QUEUE_SIZE
    work.is_held = False
    start(executor, "good")
    work.await_begin("good")
    eventually_true(lambda: executor.free() == 1)
    assert not work.has_begun("unlucky")


def test_an_immediate_task_has_ended_when_submit_returns(make_executor: MakeExecutor, work: Work) -> None:
    work.is_held = False
    executor = make_executor("immediate", work, max_workers=1, queue_size=0)
    for number in range(3):
        start(executor, f"t{number}")
        assert work.ended[-1] == f"t{number}"
    # Requests bring their own threads: one in another does not wait.
    executor.reserve()
    executor.reserve()


def test_a_task_that_left_the_process_says_so() -> None:
    with pytest.raises(ConfigurationError, match="outside the process"):
        futures._run_here(-1, "task")
