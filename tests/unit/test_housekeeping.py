"""What is due and when: interruptions, time-outs, progress, sweeps; and a thread that nothing but its closing ends."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import housekeeping as module
from flask_asyncroute import signals
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.execution import Climb, Execution
from flask_asyncroute.executors.base import TaskExecutor
from flask_asyncroute.housekeeping import PAGE, Housekeeper, Job
from flask_asyncroute.lifecycle import Lifecycle
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask, now_us
from flask_asyncroute.timekeeping import RETRY_SECONDS, Timekeeper

NewTask = Callable[..., AsyncRouteTask]
Eventually = Callable[..., Any]
MakeKeeper = Callable[..., Any]
HOUR = 3_600_000_000


class FakeExecutor(TaskExecutor):
    """Counts interruptions; each says what ``answers`` holds next."""

    def __init__(self, *answers: bool | Exception) -> None:
        super().__init__(lambda executor, task_id: None, 1, 0)
        self.answers = list(answers)
        self.interrupted: list[str] = []

    def interrupt(self, execution: Execution) -> bool:
        self.interrupted.append(execution.task_id)
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self, task_id: str) -> Any:
        raise AssertionError("nothing is submitted to it")

    def close(self) -> None:
        pass


class FakeDispatcher:
    """Stands for the dispatcher: what runs here, and what it was asked for."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Execution, TaskExecutor]] = {}
        self.expired: list[str] = []
        self.error: Exception | None = None

    def begin(self, execution: Execution, executor: TaskExecutor | None = None) -> None:
        self.running[execution.task_id] = (execution, executor or FakeExecutor())

    def expire(self, execution: Execution) -> None:
        self.expired.append(execution.task_id)
        execution.is_expired = True
        if self.error is not None:
            raise self.error
        execution.ask_to_stop()


class Clock:
    """Stands for the module's clock; time passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr("flask_asyncroute.timekeeping.time", made)
    monkeypatch.setattr("flask_asyncroute.execution.time", made)
    return made


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


class Keepers:
    """The timekeeper and the housekeeper of one process, which take turns here as their threads would."""

    def __init__(self, housekeeper: Housekeeper, timekeeper: Timekeeper) -> None:
        self.housekeeper = housekeeper
        self.timekeeper = timekeeper

    def __getattr__(self, name: str) -> Any:
        return getattr(self.housekeeper, name)

    def _step(self) -> float:
        return min(self.timekeeper._step(), self.housekeeper._step())

    def start(self) -> None:
        self.timekeeper.start()
        self.housekeeper.start()

    def wake(self) -> None:
        self.timekeeper.wake()
        self.housekeeper.wake()

    def close(self) -> None:
        self.timekeeper.close()
        self.housekeeper.close()


@pytest.fixture
def make_keeper(app: Flask, dispatcher: FakeDispatcher) -> Iterator[MakeKeeper]:
    """Give ``make_keeper(store=…, interval=30, jobs=…)``; closed at the end."""
    made: list[Keepers] = []

    def make(store: TaskStore | None = None, interval: float = 30.0, jobs: Sequence[Job] = ()) -> Keepers:
        store = store or MemoryTaskStore()
        lifecycle = Lifecycle(app, store, "owner")
        housekeeper = Housekeeper(app, store, lifecycle, dispatcher, interval, jobs)  # type: ignore[arg-type]
        made.append(Keepers(housekeeper, Timekeeper(dispatcher)))  # type: ignore[arg-type]
        made[-1].lifecycle = lifecycle  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def reports(app: Flask) -> Iterator[list[tuple[float | None, str | None] | None]]:
    """Give what is reported as progress, in place of the lifecycle."""
    taken: list[tuple[float | None, str | None] | None] = []

    def take(sender: Flask, execution: Execution, **extra: Any) -> None:
        taken.append(execution.take_report())

    with signals.progress_reported.connected_to(take, app):
        yield taken


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "asyncroute-housekeeper"]


def finished(store: TaskStore, make_task: NewTask, task_id: str, age_us: int, retention_us: int = HOUR) -> None:
    created = now_us() - age_us
    store.add(make_task(task_id, created_us=created, retention_us=retention_us), b"", None, ())
    assert store.update(task_id, Expect((State.NOT_STARTED,)), {"state": State.ABORTED, "completed_us": created})


# --- one look ---------------------------------------------------------------------------------------------------------


def test_with_nothing_due_it_sleeps_long(clock: Clock, make_keeper: MakeKeeper) -> None:
    assert make_keeper(interval=3600)._step() == module.LONGEST_SLEEP
    assert make_keeper(interval=5)._step() == 5


def test_a_run_without_a_limit_is_left_alone(clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher) -> None:
    execution = Execution("task", 1.0)
    execution.begin(None, 1, None)
    dispatcher.begin(execution)
    assert make_keeper(interval=3600)._step() == module.LONGEST_SLEEP
    assert dispatcher.expired == []


def test_a_run_is_timed_out_when_its_time_is_up_and_once(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher
) -> None:
    keeper = make_keeper(interval=3600)
    execution = Execution("task", 1.0)
    execution.begin(None, 1, 5.0)
    dispatcher.begin(execution)
    assert keeper._step() == pytest.approx(5.0)
    clock.now += 4.9
    assert keeper._step() == pytest.approx(0.1)
    assert dispatcher.expired == []
    clock.now += 0.1
    keeper._step()
    assert dispatcher.expired == ["task"]
    assert keeper._step() == pytest.approx(1.0), "until the interruption"
    clock.now += 0.5
    keeper._step()
    assert dispatcher.expired == ["task"]


def test_a_run_that_was_stopped_is_not_timed_out_too(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher
) -> None:
    execution = Execution("task", None)
    execution.begin(None, 1, 5.0)
    dispatcher.begin(execution)
    execution.ask_to_stop()
    clock.now += 10
    make_keeper()._step()
    assert dispatcher.expired == []


def test_a_run_is_interrupted_some_time_after_it_was_asked(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher
) -> None:
    keeper, executor = make_keeper(interval=3600), FakeExecutor(False, False, True)
    execution = Execution("task", 2.0)
    dispatcher.begin(execution, executor)
    keeper._step()
    execution.ask_to_stop()
    assert keeper._step() == pytest.approx(2.0)
    clock.now += 1.9
    keeper._step()
    assert executor.interrupted == []
    clock.now += 0.1
    waits = []
    while execution.interrupt_at is not None:
        waits.append(keeper._step())
        clock.now += waits[-1]
    assert executor.interrupted == ["task"] * 3
    assert waits[:2] == [pytest.approx(RETRY_SECONDS)] * 2, "until it is safe"
    clock.now += 60
    keeper._step()
    assert executor.interrupted == ["task"] * 3


def test_a_run_that_is_asked_only_is_not_interrupted(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher
) -> None:
    executor = FakeExecutor()
    execution = Execution("task", None)
    dispatcher.begin(execution, executor)
    execution.ask_to_stop()
    clock.now += 1000
    make_keeper()._step()
    assert executor.interrupted == []


def test_a_coroutine_is_not_interrupted(clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher) -> None:
    executor = FakeExecutor()
    execution = Execution("task", 1.0)
    dispatcher.begin(execution, executor)
    execution.cancel_with(lambda: None)
    execution.ask_to_stop()
    clock.now += 1000
    make_keeper()._step()
    assert executor.interrupted == []


def test_a71_progress_is_written_at_most_ten_times_a_second(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    keeper = make_keeper(interval=3600)
    execution = Execution("task", None, keeper.wake)
    dispatcher.begin(execution)
    for number in range(2000):
        execution.advance(number / 20)
        wait = keeper._step()
        assert wait <= module.REPORT_SECONDS or not execution.has_report
        clock.now += 0.001
    assert 20 <= len(reports) <= 21
    clock.now += 1
    keeper._step()
    assert reports[-1] == (99.95, None), "the last is written too"
    assert not execution.has_report


def test_the_first_progress_is_written_at_once(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    execution = Execution("task")
    dispatcher.begin(execution)
    execution.advance(1, "m")
    make_keeper()._step()
    assert reports == [(1.0, "m")]


def test_progress_of_one_task_does_not_wait_for_that_of_another(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    keeper = make_keeper()
    executions = [Execution(f"t{number}") for number in range(5)]
    for number, execution in enumerate(executions):
        dispatcher.begin(execution)
        execution.advance(number)
    keeper._step()
    assert sorted(reports) == [(float(number), None) for number in range(5)]


def test_progress_that_climbs_by_itself_is_written(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    keeper = make_keeper(interval=3600)
    execution = Execution("task")
    dispatcher.begin(execution)
    execution.advance(0, climb=Climb(0, 80, 10, 5))
    waits = []
    for _ in range(3):
        waits.append(keeper._step())
        clock.now += waits[-1]
    assert reports == [(0.0, None), (40.0, None), (80.0, None)]
    assert waits[:2] == [5, 5]


def test_a71_a_climb_in_tiny_steps_lets_it_sleep(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    keeper = make_keeper(interval=3600)
    execution = Execution("task")
    dispatcher.begin(execution)
    execution.advance(0, climb=Climb(0, 100, 10, 1e-9))
    looks = 0
    while clock.now < 1010 and looks < 10_000:
        clock.now += max(keeper._step(), 1e-6)
        looks += 1
    assert looks <= 500


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_f34_what_has_outlived_its_retention_is_removed(
    store: TaskStore, make_keeper: MakeKeeper, make_task: NewTask
) -> None:
    keeper = make_keeper(store, 0.1)
    finished(store, make_task, "old", 2 * HOUR)
    finished(store, make_task, "young", HOUR // 2)
    store.add(make_task("waits", created_us=0, retention_us=0), b"", None, ())
    store.add(make_task("runs", created_us=0, retention_us=0), b"", None, ())
    store.claim("runs", "owner", 0)
    store.add(make_task("stopping", created_us=0, retention_us=0), b"", None, ())
    store.claim("stopping", "owner", 0)
    store.update("stopping", Expect((State.RUNNING,)), {"state": State.ABORTED, "completed_us": 0, "stopping": True})
    keeper._sweep()
    left = {name for name in ("old", "young", "waits", "runs", "stopping") if store.get(name) is not None}
    assert left == {"young", "waits", "runs", "stopping"}


def test_more_than_one_page_is_removed(make_keeper: MakeKeeper, make_task: NewTask) -> None:
    store = MemoryTaskStore()
    for number in range(PAGE + 3):
        finished(store, make_task, f"t{number}", 2 * HOUR)
    make_keeper(store)._sweep()
    assert store.outlived(now_us(), 10) == []


def test_sweeps_come_at_their_interval(
    clock: Clock, make_keeper: MakeKeeper, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = make_keeper(interval=5.0)
    swept: list[float] = []
    monkeypatch.setattr(keeper._jobs[0], "work", lambda: swept.append(clock.now - 1000))
    while clock.now < 1021:
        clock.now += keeper._step()
    assert swept == [5, 10, 15, 20]


def test_jobs_come_at_their_intervals(clock: Clock, make_keeper: MakeKeeper) -> None:
    calls: list[tuple[str, float]] = []
    jobs = [
        Job(0.5, lambda: calls.append(("often", clock.now - 1000))),
        Job(2.0, lambda: calls.append(("seldom", clock.now - 1000))),
    ]
    keeper = make_keeper(interval=3600, jobs=jobs)
    while clock.now < 1004.1:
        clock.now += keeper._step()
    assert [at for name, at in calls if name == "often"] == [0.5 * number for number in range(1, 9)]
    assert [at for name, at in calls if name == "seldom"] == [2, 4]


def test_an_outcome_waits_for_one_job_and_not_for_all(clock: Clock, make_keeper: MakeKeeper) -> None:
    """Beside a view that computes, each of them takes long."""
    done: list[str] = []

    def end_a_task() -> None:
        keeper.lifecycle.unwritten.keep("task", lambda: done.append("outcome"))

    keeper = make_keeper(jobs=[Job(1.0, end_a_task), Job(1.0, lambda: done.append("job"))])
    clock.now += 1
    keeper._step()
    assert done == ["outcome", "job"]


# --- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StoreUnavailable("not now"), RuntimeError("broken"), AttributeError("startswith")])
def test_a_run_that_cannot_be_attended_to_keeps_no_other_from_it(
    clock: Clock,
    make_keeper: MakeKeeper,
    dispatcher: FakeDispatcher,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    keeper = make_keeper(interval=3600)
    executors = [FakeExecutor(error), FakeExecutor()]
    for number, executor in enumerate(executors):
        execution = Execution(f"t{number}", 0.0)
        dispatcher.begin(execution, executor)
        execution.ask_to_stop()
    clock.now += 1
    assert keeper._step() <= 1.0
    assert executors[1].interrupted == ["t1"]
    assert "t0" in caplog.text
    clock.now += 1
    keeper._step()
    assert executors[0].interrupted == ["t0", "t0"], "and it is tried again"


def test_a_time_out_that_cannot_be_written_is_logged(
    clock: Clock, make_keeper: MakeKeeper, dispatcher: FakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher.error = StoreUnavailable("not now")
    execution = Execution("task", None)
    execution.begin(None, 1, 1.0)
    dispatcher.begin(execution)
    clock.now += 2
    make_keeper()._step()
    assert "task" in caplog.text and "not now" in caplog.text


def test_a_sweep_that_fails_is_logged_and_tried_again(
    clock: Clock,
    make_keeper: MakeKeeper,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryTaskStore()
    finished(store, make_task, "old", 2 * HOUR)
    keeper = make_keeper(store, 1.0)

    def fail(now_us: int, limit: int) -> list[str]:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as patched:
        patched.setattr(store, "outlived", fail)
        clock.now += 1
        assert keeper._step() == 1.0
        clock.now += 1
        keeper._step()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "Housekeeping (_sweep) waits for the store: not now"
    ]
    assert store.get("old") is not None
    clock.now += 1
    keeper._step()
    assert store.get("old") is None


# --- the thread -------------------------------------------------------------------------------------------------------


def test_a_call_that_fails_is_logged_by_its_name_and_is_over(
    make_keeper: MakeKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    def settle_up(account: str) -> None:
        raise ValueError(account)

    keeper = make_keeper()
    keeper.start()
    assert keeper.call(partial(settle_up, "empty")).wait(5)
    keeper.close()
    assert "Housekeeping (settle_up) failed." in caplog.text and "ValueError: empty" in caplog.text


def test_the_thread_starts_once_and_when_asked(make_keeper: MakeKeeper) -> None:
    keeper = make_keeper()
    assert threads() == []
    starters = [threading.Thread(target=keeper.start) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(5)
    assert len(threads()) == 1
    assert threads()[0].daemon


def test_it_is_woken_for_what_is_due_at_once(
    make_keeper: MakeKeeper, dispatcher: FakeDispatcher, reports: list[Any], eventually: Eventually
) -> None:
    keeper = make_keeper()
    keeper.start()
    execution = Execution("task", None, keeper.wake)
    dispatcher.begin(execution)
    execution.advance(5)
    eventually(lambda: reports == [(5.0, None)], 2)


def test_a_time_out_is_never_more_than_a_fifth_of_a_second_late(
    make_keeper: MakeKeeper, dispatcher: FakeDispatcher, eventually: Eventually
) -> None:
    keeper = make_keeper()
    keeper.start()
    execution = Execution("task", None, keeper.wake)
    execution.begin(None, 1, 0.3)
    due = time.monotonic() + 0.3
    dispatcher.begin(execution)
    keeper.wake()
    eventually(lambda: dispatcher.expired)
    assert -0.01 < time.monotonic() - due < 0.2


def test_the_thread_survives_whatever_goes_wrong(
    make_keeper: MakeKeeper,
    dispatcher: FakeDispatcher,
    reports: list[Any],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without it nothing in this process would be stopped, timed out or taken over any more."""
    keeper = make_keeper()
    executor = FakeExecutor(RuntimeError("broken"))
    broken = Execution("broken", 0.0, keeper.wake)
    dispatcher.begin(broken, executor)
    keeper.start()
    broken.ask_to_stop()
    eventually(lambda: executor.interrupted)
    good = Execution("good", None, keeper.wake)
    dispatcher.begin(good)
    good.advance(5)
    eventually(lambda: (5.0, None) in reports, 3)
    assert len(threads()) == 1


def test_close_ends_the_thread_at_once(make_keeper: MakeKeeper, eventually: Eventually) -> None:
    keeper = make_keeper()
    keeper.start()
    before = time.monotonic()
    keeper.close()
    keeper.close()
    assert threads() == []
    assert time.monotonic() - before < 2
    keeper.start()
    assert threads() == [], "what is closed does not start again"


def test_close_is_not_overheard_by_a_thread_about_to_sleep(
    make_keeper: MakeKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The close comes between the thread's look whether it is closed and the moment that it takes back its wake-up."""
    keeper = make_keeper(interval=3600)
    clear = keeper._wake.clear
    looked, closing = threading.Event(), threading.Event()
    is_first = [True]

    def late_clear() -> None:
        if is_first.pop() if is_first else False:
            looked.set()
            assert closing.wait(5)
        clear()

    set_wake = keeper._wake.set
    monkeypatch.setattr(keeper._wake, "clear", late_clear)

    def set_and_go_on() -> None:
        set_wake()
        closing.set()

    monkeypatch.setattr(keeper._wake, "set", set_and_go_on)
    keeper.start()
    assert looked.wait(5)
    before = time.monotonic()
    keeper.close()
    assert time.monotonic() - before < 3
    assert threads() == []


def test_a_housekeeper_that_is_dropped_ends_its_thread(
    app: Flask, dispatcher: FakeDispatcher, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_SLEEP", 0.05)
    store = MemoryTaskStore()
    keeper = Housekeeper(app, store, Lifecycle(app, store, "o"), dispatcher, 3600)  # type: ignore[arg-type]
    keeper.start()
    reference = weakref.ref(keeper)
    del keeper
    eventually(lambda: (gc.collect(), reference() is None)[1])
    eventually(lambda: threads() == [])


def test_a_quiet_hour_costs_nothing(clock: Clock, make_keeper: MakeKeeper, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keeper = make_keeper(interval=30.0)
    looks = 0
    while clock.now < 4600:
        clock.now += keeper._step()
        looks += 1
    assert looks <= 125
    assert caplog.text == ""


def test_a_thread_that_could_not_be_begun_is_begun_by_the_next(
    make_keeper: MakeKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process at its limit of threads has room again later."""
    housekeeper = make_keeper().housekeeper

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            housekeeper.start()
    assert not housekeeper.is_running
    housekeeper.start()
    assert housekeeper.call(lambda: None).wait(5)
