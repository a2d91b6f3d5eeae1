"""The contract of executors: slots, concurrency and isolation. They run a plain function here
instead of `run_task`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import flask
import pytest

from flask_asyncroute.errors import ConfigurationError, QueueFull, TaskAborted
from flask_asyncroute.executors import inline, registry
from flask_asyncroute.executors.base import ChildSettings, PoolSettings, TaskExecutor
from flask_asyncroute.executors.inline import FutureTaskExecutor
from flask_asyncroute.executors.registry import IMMEDIATE
from tests.support.waiting import eventually_true

MakeExecutor = Callable[..., TaskExecutor]
MAX_WORKERS, QUEUE_SIZE = 2, 3
SLOTS = MAX_WORKERS + QUEUE_SIZE
KINDS = [kind.name for kind in registry.KINDS.values() if not kind.runs_elsewhere] + ["futures"]
"""The kinds that run tasks on this machine; "futures" is an executor object of the app."""


class Work:
    """The function that is run. For each task it waits until it may end, and may raise at the end."""

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


class Host:
    """Stands in for the runner. `run_task` would pass tasks to child processes; here they run in
    the threads of the process executor.
    """

    def child_settings(self) -> ChildSettings:
        return ChildSettings("tests.support.apps.child_app", {}, [], 1024)


@pytest.fixture
def make_executor() -> Iterator[MakeExecutor]:
    """Return ``make_executor(kind, run)``; executors are closed at the end."""
    made: list[TaskExecutor] = []
    pools: list[ThreadPoolExecutor] = []

    def make(
        kind: str, run: Any, max_workers: int = MAX_WORKERS, queue_size: int = QUEUE_SIZE
    ) -> TaskExecutor:
        option: str | Executor = kind
        if kind == "futures":
            option = ThreadPoolExecutor(max_workers)
            pools.append(option)
        settings = PoolSettings(
            "contract", run, max_workers, queue_size, 1, 1.0, option, host=Host()
        )
        executor = registry.make_executor(settings)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()
    for pool in pools:
        pool.shutdown(wait=True, cancel_futures=True)


@pytest.fixture(params=[name for name in KINDS if name != IMMEDIATE.name])
def executor(
    request: pytest.FixtureRequest, make_executor: MakeExecutor, work: Work
) -> TaskExecutor:
    """Return an executor of each kind that has slots."""
    return make_executor(request.param, work)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def slots_left(executor: TaskExecutor) -> int:
    taken = 0
    try:
        while taken < 100:
            executor.reserve()
            taken += 1
    except QueueFull:
        pass
    for _ in range(taken):
        executor.release()
    return taken


def start(executor: TaskExecutor, *task_ids: str) -> None:
    for task_id in task_ids:
        executor.reserve()
        executor.submit(task_id)


@pytest.mark.covers("A69")
def test_slots_are_workers_plus_queue_size(executor: TaskExecutor) -> None:
    for _ in range(SLOTS):
        executor.reserve()
    with pytest.raises(QueueFull, match=f"{QUEUE_SIZE} tasks") as refused:
        executor.reserve()
    assert refused.value.status == 503
    assert refused.value.retry_after is not None and refused.value.retry_after > 0
    executor.release()
    executor.reserve()
    with pytest.raises(QueueFull):
        executor.reserve()


@pytest.mark.covers("A69")
def test_concurrent_reservations_do_not_exceed_the_slots(executor: TaskExecutor) -> None:
    reserved = []

    def reserve() -> None:
        for _ in range(20):
            try:
                executor.reserve()
            except QueueFull:
                continue
            reserved.append(1)

    threads = [threading.Thread(target=reserve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(reserved) == SLOTS


def test_a_submitted_task_runs_once_and_releases_its_slot(
    kind: str, make_executor: MakeExecutor
) -> None:
    ran: list[tuple[TaskExecutor, str]] = []
    done = threading.Event()

    def run(executor: TaskExecutor, task_id: str) -> None:
        ran.append((executor, task_id))
        done.set()

    executor = make_executor(kind, run)
    before = slots_left(executor)
    start(executor, "one")
    assert done.wait(5)
    executor_is_free(executor, before)
    assert ran == [(executor, "one")]
    assert not executor.holds("one")


def executor_is_free(executor: TaskExecutor, slots: int) -> None:
    eventually_true(lambda: slots_left(executor) == slots and executor.free() == MAX_WORKERS)


def test_submit_returns_at_once(executor: TaskExecutor, work: Work) -> None:
    start(executor, "one")
    assert work.ended == []
    work.await_begin("one")


def test_at_most_max_workers_tasks_run(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a", "b", "c", "d")
    work.await_begin("a", "b")
    assert not work.has_begun("c")
    assert all(executor.holds(task_id) for task_id in "abcd")
    work.let_end("b")
    work.await_begin("c")
    assert not work.has_begun("d")
    work.let_end("a", "c", "d")
    executor_is_free(executor, SLOTS)
    assert sorted(work.ended) == ["a", "b", "c", "d"]


def test_free_is_the_number_of_idle_workers(executor: TaskExecutor, work: Work) -> None:
    assert executor.free() == 2
    executor.reserve()
    assert executor.free() == 1
    executor.submit("a")
    assert executor.free() == 1
    start(executor, "b", "c")
    assert executor.free() == 0
    work.let_end("a", "b", "c")
    executor_is_free(executor, SLOTS)


@pytest.mark.parametrize(
    "error", [ValueError(), TaskAborted(), SystemExit(3), KeyboardInterrupt(), MemoryError()]
)
def test_a_run_that_raises_releases_its_slot(
    kind: str, make_executor: MakeExecutor, work: Work, error: BaseException
) -> None:
    work.is_held = False
    work.errors["bad"] = error
    executor = make_executor(kind, work)
    before = slots_left(executor)
    for _ in range(SLOTS + 1):
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


@pytest.mark.covers("F18")
def test_a_waiting_task_can_be_discarded(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a", "b", "waits", "c")
    work.await_begin("a", "b")
    executor.discard("waits")
    executor.discard("waits")
    assert not executor.holds("waits")
    assert slots_left(executor) == SLOTS - 3
    work.let_end("a", "b", "c", "waits")
    work.await_begin("c")
    executor_is_free(executor, SLOTS)
    assert not work.has_begun("waits")


def test_a_running_or_unknown_task_cannot_be_discarded(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a")
    work.await_begin("a")
    executor.discard("a")
    executor.discard("unknown")
    assert executor.holds("a")
    assert slots_left(executor) == SLOTS - 1
    work.let_end("a")
    executor_is_free(executor, SLOTS)
    executor.discard("a")
    assert slots_left(executor) == SLOTS


def test_discard_while_a_task_begins_releases_one_slot(executor: TaskExecutor, work: Work) -> None:
    """The task is either discarded or run, and its slot is released once."""
    work.is_held = False
    for number in range(300):
        task_id = f"t{number}"
        executor.reserve()
        executor.submit(task_id)
        executor.discard(task_id)
    executor_is_free(executor, SLOTS)


@pytest.mark.covers("F14")
def test_an_abandoned_run_is_replaced(make_executor: MakeExecutor, work: Work) -> None:
    executor = make_executor("thread", work)
    start(executor, "a", "b", "c", "d", "e")
    work.await_begin("a", "b")
    executor.abandon("a")
    work.await_begin("c")
    executor.abandon("a")
    assert not work.has_begun("d"), "the second call has no effect"
    executor.abandon("b")
    work.await_begin("d")
    assert slots_left(executor) == SLOTS - 3
    # At most max_workers runs may be abandoned.
    executor.abandon("c")
    assert not work.has_begun("e")
    assert slots_left(executor) == SLOTS - 3
    assert all(executor.holds(task_id) for task_id in "abcde"), "these runs have not ended"
    work.let_end("a", "b")
    work.let_end("c", "d", "e")
    executor_is_free(executor, SLOTS)
    assert sorted(work.ended) == ["a", "b", "c", "d", "e"]


def test_the_end_of_an_abandoned_run_allows_another_to_be_abandoned(
    make_executor: MakeExecutor, work: Work
) -> None:
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


def test_abandoning_a_waiting_or_unknown_task_does_nothing(
    executor: TaskExecutor, work: Work
) -> None:
    start(executor, "a", "b", "c")
    work.await_begin("a", "b")
    executor.abandon("c")
    executor.abandon("unknown")
    assert slots_left(executor) == SLOTS - 3
    assert not work.has_begun("c")
    work.let_end("a", "b", "c")
    executor_is_free(executor, SLOTS)


def test_an_executor_object_of_the_app_does_not_replace_abandoned_runs(
    make_executor: MakeExecutor, work: Work
) -> None:
    executor = make_executor("futures", work)
    start(executor, "a")
    work.await_begin("a")
    executor.abandon("a")
    assert slots_left(executor) == SLOTS - 1
    work.let_end("a")
    executor_is_free(executor, SLOTS)


def test_a_run_does_not_see_the_context_of_the_submitter(
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
    assert seen == [("none", False, False)] * 2, "the second run does not see changes by the first"


def test_running_tasks_end_normally_after_close(executor: TaskExecutor, work: Work) -> None:
    start(executor, "a")
    work.await_begin("a")
    executor.close()
    executor.close()
    work.let_end("a")
    executor_is_free(executor, SLOTS)
    assert work.ended == ["a"]


def test_a_failed_submit_releases_its_slot(
    kind: str, make_executor: MakeExecutor, work: Work
) -> None:
    """The pool was shut down by the package or by the app."""
    work.is_held = False
    executor = make_executor(kind, work)
    before = slots_left(executor)
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
    assert slots_left(executor) == before


def test_a_failed_thread_start_releases_the_slot_and_does_not_run_the_task(
    make_executor: MakeExecutor, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is at its thread limit."""
    executor = make_executor("thread", work, max_workers=1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        executor.reserve()
        with pytest.raises(RuntimeError, match="new thread"):
            executor.submit("unlucky")
    assert not executor.holds("unlucky")
    assert slots_left(executor) == 1 + QUEUE_SIZE
    work.is_held = False
    start(executor, "good")
    work.await_begin("good")
    eventually_true(lambda: executor.free() == 1)
    assert not work.has_begun("unlucky")


def test_an_immediate_task_has_ended_when_submit_returns(
    make_executor: MakeExecutor, work: Work
) -> None:
    work.is_held = False
    executor = make_executor("immediate", work, max_workers=1, queue_size=0)
    for number in range(3):
        start(executor, f"t{number}")
        assert work.ended[-1] == f"t{number}"
    # Immediate tasks run in the threads of requests, so the number of slots is unlimited.
    executor.reserve()
    executor.reserve()


def test_an_executor_object_must_run_tasks_in_this_process() -> None:
    with pytest.raises(ConfigurationError, match="outside the process"):
        inline._run_here(-1, "task")
