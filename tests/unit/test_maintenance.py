"""The maintenance and timekeeper threads: interruptions, timeouts, progress and retention; their
errors, and how they end.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from flask import Flask, appcontext_pushed

from flask_asyncroute import task_removed
from flask_asyncroute.engine.lifecycle import PAGE, Lifecycle
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.executors.base import PoolSettings, TaskExecutor
from flask_asyncroute.executors.execution import Execution, TimedProgress
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask, State, now_us
from flask_asyncroute.workers import maintenance as module
from flask_asyncroute.workers.maintenance import RETRY_SECONDS, Job, Maintenance, Timekeeper
from tests.support.faulty_store import FaultyStore, Nth

NewTask = Callable[..., AsyncRouteTask]
Eventually = Callable[..., Any]
MakeProcess = Callable[..., Any]
HOUR = 3_600_000_000


class FakeExecutor(TaskExecutor):
    """Records interruptions. Each returns or raises the next of ``answers``, or returns True."""

    def __init__(self, *answers: bool | Exception) -> None:
        super().__init__(PoolSettings("fake", lambda executor, task_id: None, 1, 0))
        self.answers = list(answers)
        self.interrupted: list[str] = []

    def interrupt(self, execution: Execution) -> bool:
        self.interrupted.append(execution.task_id)
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self, task_id: str) -> Any:
        raise AssertionError("no task is submitted")

    def close(self) -> None:
        pass


class FakeDispatcher:
    """Stands in for the dispatcher: the runs of this process, and the calls of ``expire``."""

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
    """A manual clock in place of the module's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr("flask_asyncroute.workers.maintenance.time", made)
    monkeypatch.setattr("flask_asyncroute.executors.execution.time", made)
    return made


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


class Process:
    """The timekeeper and the maintenance of one process; ``_step`` runs one step of each."""

    def __init__(self, maintenance: Maintenance, timekeeper: Timekeeper) -> None:
        self.maintenance = maintenance
        self.timekeeper = timekeeper

    def __getattr__(self, name: str) -> Any:
        return getattr(self.maintenance, name)

    def _step(self) -> float:
        return min(self.timekeeper._step(), self.maintenance._step())

    def start(self) -> None:
        self.timekeeper.start()
        self.maintenance.start()

    def wake(self) -> None:
        self.timekeeper.wake()
        self.maintenance.wake()

    def close(self) -> None:
        self.timekeeper.close()
        self.maintenance.close()


@pytest.fixture
def make_process(app: Flask, dispatcher: FakeDispatcher) -> Iterator[MakeProcess]:
    """Return ``make_process(store=…, interval=30, jobs=…)``; closed at the end."""
    made: list[Process] = []

    def make(
        store: TaskStore | None = None, interval: float = 30.0, jobs: Sequence[Job] = ()
    ) -> Process:
        store = store or MemoryTaskStore()
        lifecycle = Lifecycle(app, store, "owner")
        jobs = [Job(interval, lifecycle.delete_expired), *jobs]
        maintenance = Maintenance(app, lifecycle, dispatcher, jobs)  # type: ignore[arg-type]
        made.append(Process(maintenance, Timekeeper(dispatcher)))  # type: ignore[arg-type]
        made[-1].lifecycle = lifecycle  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for process in made:
        process.close()


@pytest.fixture
def reports(
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[float | None, str | None] | None]:
    """Return the list of progress reports, which are not written to the store."""
    taken: list[tuple[float | None, str | None] | None] = []
    monkeypatch.setattr(
        Lifecycle,
        "write_progress",
        lambda lifecycle, execution: taken.append(execution.take_report()),
    )
    return taken


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "asyncroute-housekeeper"]


def finished(
    store: TaskStore, make_task: NewTask, task_id: str, age_us: int, retention_us: int = HOUR
) -> None:
    created = now_us() - age_us
    store.add(make_task(task_id, created_us=created, retention_us=retention_us), b"", None, ())
    assert store.update(
        task_id, Expect((State.NOT_STARTED,)), {"state": State.ABORTED, "completed_us": created}
    )


# Single steps


def test_with_nothing_due_a_step_returns_the_longest_sleep(
    clock: Clock, make_process: MakeProcess
) -> None:
    assert make_process(interval=3600)._step() == module.LONGEST_SLEEP
    assert make_process(interval=5)._step() == 5


def test_a_run_without_a_timeout_does_not_expire(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher
) -> None:
    execution = Execution("task", 1.0)
    execution.begin(None, 1, None)
    dispatcher.begin(execution)
    assert make_process(interval=3600)._step() == module.LONGEST_SLEEP
    assert dispatcher.expired == []


def test_a_run_expires_once_at_its_deadline(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher
) -> None:
    process = make_process(interval=3600)
    execution = Execution("task", 1.0)
    execution.begin(None, 1, 5.0)
    dispatcher.begin(execution)
    assert process._step() == pytest.approx(5.0)
    clock.now += 4.9
    assert process._step() == pytest.approx(0.1)
    assert dispatcher.expired == []
    clock.now += 0.1
    process._step()
    assert dispatcher.expired == ["task"]
    assert process._step() == pytest.approx(1.0), "until the interruption"
    clock.now += 0.5
    process._step()
    assert dispatcher.expired == ["task"]


def test_a_stopped_run_does_not_expire(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher
) -> None:
    execution = Execution("task", None)
    execution.begin(None, 1, 5.0)
    dispatcher.begin(execution)
    execution.ask_to_stop()
    clock.now += 10
    make_process()._step()
    assert dispatcher.expired == []


def test_interrupt_after_is_the_delay_from_stop_to_interruption(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher
) -> None:
    process, executor = make_process(interval=3600), FakeExecutor(False, False, True)
    execution = Execution("task", 2.0)
    dispatcher.begin(execution, executor)
    process._step()
    execution.ask_to_stop()
    assert process._step() == pytest.approx(2.0)
    clock.now += 1.9
    process._step()
    assert executor.interrupted == []
    clock.now += 0.1
    waits = []
    while execution.interrupt_at is not None:
        waits.append(process._step())
        clock.now += waits[-1]
    assert executor.interrupted == ["task"] * 3
    assert waits[:2] == [pytest.approx(RETRY_SECONDS)] * 2, (
        "retried until the interruption succeeds"
    )
    clock.now += 60
    process._step()
    assert executor.interrupted == ["task"] * 3


def test_a_run_without_interrupt_after_is_not_interrupted(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher
) -> None:
    executor = FakeExecutor()
    execution = Execution("task", None)
    dispatcher.begin(execution, executor)
    execution.ask_to_stop()
    clock.now += 1000
    make_process()._step()
    assert executor.interrupted == []


def test_a_coroutine_is_not_interrupted(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher
) -> None:
    executor = FakeExecutor()
    execution = Execution("task", 1.0)
    dispatcher.begin(execution, executor)
    execution.cancel_with(lambda: None)
    execution.ask_to_stop()
    clock.now += 1000
    make_process()._step()
    assert executor.interrupted == []


@pytest.mark.covers("A71")
def test_progress_is_written_at_most_ten_times_a_second(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    process = make_process(interval=3600)
    execution = Execution("task", None, process.wake)
    dispatcher.begin(execution)
    for number in range(2000):
        execution.advance(number / 20)
        wait = process._step()
        assert wait <= module.REPORT_SECONDS or not execution.has_report
        clock.now += 0.001
    assert 20 <= len(reports) <= 21
    clock.now += 1
    process._step()
    assert reports[-1] == (99.95, None), "the last progress is written too"
    assert not execution.has_report


def test_the_first_progress_is_written_at_once(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    execution = Execution("task")
    dispatcher.begin(execution)
    execution.advance(1, "m")
    make_process()._step()
    assert reports == [(1.0, "m")]


def test_the_progress_limit_applies_to_each_task(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    process = make_process()
    executions = [Execution(f"t{number}") for number in range(5)]
    for number, execution in enumerate(executions):
        dispatcher.begin(execution)
        execution.advance(number)
    process._step()
    assert sorted(reports) == [(float(number), None) for number in range(5)]


def test_timed_progress_is_written(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    process = make_process(interval=3600)
    execution = Execution("task")
    dispatcher.begin(execution)
    execution.advance(0, timed_progress=TimedProgress(0, 80, 10, 5))
    waits = []
    for _ in range(3):
        waits.append(process._step())
        clock.now += waits[-1]
    assert reports == [(0.0, None), (40.0, None), (80.0, None)]
    assert waits[:2] == [5, 5]


@pytest.mark.covers("A71")
def test_timed_progress_in_tiny_intervals_causes_few_steps(
    clock: Clock, make_process: MakeProcess, dispatcher: FakeDispatcher, reports: list[Any]
) -> None:
    process = make_process(interval=3600)
    execution = Execution("task")
    dispatcher.begin(execution)
    execution.advance(0, timed_progress=TimedProgress(0, 100, 10, 1e-9))
    steps = 0
    while clock.now < 1010 and steps < 10_000:
        clock.now += max(process._step(), 1e-6)
        steps += 1
    assert steps <= 500


# Retention and jobs


@pytest.mark.covers("F34")
def test_only_ended_tasks_past_their_retention_are_deleted(
    store: TaskStore, make_process: MakeProcess, make_task: NewTask
) -> None:
    process = make_process(store, 0.1)
    finished(store, make_task, "old", 2 * HOUR)
    finished(store, make_task, "young", HOUR // 2)
    store.add(make_task("waits", created_us=0, retention_us=0), b"", None, ())
    store.add(make_task("runs", created_us=0, retention_us=0), b"", None, ())
    store.claim("runs", "owner", 0)
    store.add(make_task("stopping", created_us=0, retention_us=0), b"", None, ())
    store.claim("stopping", "owner", 0)
    store.update(
        "stopping",
        Expect((State.RUNNING,)),
        {"state": State.ABORTED, "completed_us": 0, "stopping": True},
    )
    process.lifecycle.delete_expired()
    left = {
        name
        for name in ("old", "young", "waits", "runs", "stopping")
        if store.get(name) is not None
    }
    assert left == {"young", "waits", "runs", "stopping"}


def test_more_than_one_page_is_deleted(make_process: MakeProcess, make_task: NewTask) -> None:
    store = MemoryTaskStore()
    for number in range(PAGE + 3):
        finished(store, make_task, f"t{number}", 2 * HOUR)
    make_process(store).lifecycle.delete_expired()
    assert store.past_retention(now_us(), 10) == []


@pytest.mark.parametrize("has_receiver", [False, True])
def test_retention_reads_no_task_that_it_removes(
    store: TaskStore, make_process: MakeProcess, make_task: NewTask, app: Flask, has_receiver: bool
) -> None:
    """Without a receiver of task_removed, it pushes no app context either."""
    for number in range(3):
        finished(store, make_task, f"t{number}", 2 * HOUR)
    faults = Nth(0, "before")
    process = make_process(FaultyStore(store, faults))  # type: ignore[arg-type]
    pushed: list[Any] = []
    removed: list[str] = []

    def receive(sender: Flask, task_id: str, endpoint: str, **extra: Any) -> None:
        removed.append(endpoint)

    with appcontext_pushed.connected_to(lambda *_, **__: pushed.append(1), app):
        if has_receiver:
            task_removed.connect(receive, app)
        process.lifecycle.delete_expired()
        task_removed.disconnect(receive)
    assert faults.calls == ["past_retention", "delete", "delete", "delete"]
    assert removed == ["work"] * (3 if has_receiver else 0)
    assert len(pushed) == len(removed)


def test_retention_runs_at_its_interval(
    clock: Clock, make_process: MakeProcess, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make_process(interval=5.0)
    runs: list[float] = []
    monkeypatch.setattr(process._jobs[0], "work", lambda: runs.append(clock.now - 1000))
    while clock.now < 1021:
        clock.now += process._step()
    assert runs == [5, 10, 15, 20]


def test_jobs_run_at_their_intervals(clock: Clock, make_process: MakeProcess) -> None:
    calls: list[tuple[str, float]] = []
    jobs = [
        Job(0.5, lambda: calls.append(("often", clock.now - 1000))),
        Job(2.0, lambda: calls.append(("seldom", clock.now - 1000))),
    ]
    process = make_process(interval=3600, jobs=jobs)
    while clock.now < 1004.1:
        clock.now += process._step()
    assert [at for name, at in calls if name == "often"] == [0.5 * number for number in range(1, 9)]
    assert [at for name, at in calls if name == "seldom"] == [2, 4]


def test_pending_outcomes_are_written_between_jobs(clock: Clock, make_process: MakeProcess) -> None:
    """Each job may take long while a view computes."""
    done: list[str] = []

    def end_a_task() -> None:
        process.lifecycle.pending_writes.keep("task", lambda: done.append("outcome"))

    process = make_process(jobs=[Job(1.0, end_a_task), Job(1.0, lambda: done.append("job"))])
    clock.now += 1
    process._step()
    assert done == ["outcome", "job"]


def test_pending_outcomes_are_written_without_any_job(app: Flask) -> None:
    """A Celery worker has no jobs."""
    lifecycle = Lifecycle(app, MemoryTaskStore(), "owner")
    done: list[str] = []
    maintenance = Maintenance(app, lifecycle, FakeDispatcher(), ())  # type: ignore[arg-type]
    lifecycle.pending_writes.keep("task", lambda: done.append("outcome"))
    maintenance._step()
    assert done == ["outcome"]


# Errors


@pytest.mark.parametrize(
    "error", [StoreUnavailable("not now"), RuntimeError("broken"), AttributeError("startswith")]
)
def test_an_error_for_one_run_does_not_affect_others(
    clock: Clock,
    make_process: MakeProcess,
    dispatcher: FakeDispatcher,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    process = make_process(interval=3600)
    executors = [FakeExecutor(error), FakeExecutor()]
    for number, executor in enumerate(executors):
        execution = Execution(f"t{number}", 0.0)
        dispatcher.begin(execution, executor)
        execution.ask_to_stop()
    clock.now += 1
    assert process._step() <= 1.0
    assert executors[1].interrupted == ["t1"]
    assert "t0" in caplog.text
    clock.now += 1
    process._step()
    assert executors[0].interrupted == ["t0", "t0"], "it is retried"


def test_an_error_while_a_task_expires_is_logged(
    clock: Clock,
    make_process: MakeProcess,
    dispatcher: FakeDispatcher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dispatcher.error = StoreUnavailable("not now")
    execution = Execution("task", None)
    execution.begin(None, 1, 1.0)
    dispatcher.begin(execution)
    clock.now += 2
    make_process()._step()
    assert "task" in caplog.text and "not now" in caplog.text


def test_a_failed_deletion_is_logged_and_retried(
    clock: Clock,
    make_process: MakeProcess,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryTaskStore()
    finished(store, make_task, "old", 2 * HOUR)
    process = make_process(store, 1.0)

    def fail(now_us: int, limit: int) -> list[str]:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as patched:
        patched.setattr(store, "past_retention", fail)
        clock.now += 1
        assert process._step() == 1.0
        clock.now += 1
        process._step()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "Background job delete_expired is waiting for the store: not now"
    ]
    assert store.get("old") is not None
    clock.now += 1
    process._step()
    assert store.get("old") is None


# The threads


def test_an_error_of_a_call_is_logged_with_its_name(
    make_process: MakeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    def settle_up(account: str) -> None:
        raise ValueError(account)

    process = make_process()
    process.start()
    assert process.call(partial(settle_up, "empty")).wait(5)
    process.close()
    assert "Background job settle_up failed." in caplog.text and "ValueError: empty" in caplog.text


def test_concurrent_starts_start_one_thread(make_process: MakeProcess) -> None:
    process = make_process()
    assert threads() == []
    starters = [threading.Thread(target=process.start) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(5)
    assert len(threads()) == 1
    assert threads()[0].daemon


def test_wake_writes_progress_at_once(
    make_process: MakeProcess,
    dispatcher: FakeDispatcher,
    reports: list[Any],
    eventually: Eventually,
) -> None:
    process = make_process()
    process.start()
    execution = Execution("task", None, process.wake)
    dispatcher.begin(execution)
    execution.advance(5)
    eventually(lambda: reports == [(5.0, None)], 2)


def test_a_run_expires_within_200_ms_of_its_deadline(
    make_process: MakeProcess, dispatcher: FakeDispatcher, eventually: Eventually
) -> None:
    process = make_process()
    process.start()
    execution = Execution("task", None, process.wake)
    execution.begin(None, 1, 0.3)
    due = time.monotonic() + 0.3
    dispatcher.begin(execution)
    process.wake()
    eventually(lambda: dispatcher.expired)
    assert -0.01 < time.monotonic() - due < 0.2


def test_a_run_with_an_earlier_deadline_than_the_next_step_expires_punctually(
    make_process: MakeProcess, dispatcher: FakeDispatcher, eventually: Eventually
) -> None:
    """Only `Timekeeper.begin` wakes the timekeeper, which else sleeps 30 seconds."""
    timekeeper = make_process().timekeeper
    timekeeper.start()
    for task_id, seconds in (("late", 20.0), ("early", 0.3)):
        eventually(lambda: timekeeper._due < math.inf)
        execution = Execution(task_id, None, lambda: None)
        execution.begin(None, 1, seconds)
        due = time.monotonic() + seconds
        dispatcher.begin(execution)
        timekeeper.begin(execution)
    eventually(lambda: dispatcher.expired)
    assert dispatcher.expired == ["early"]
    assert -0.01 < time.monotonic() - due < 0.2


def test_a_run_that_begins_during_a_step_expires_punctually(
    make_process: MakeProcess, dispatcher: FakeDispatcher, eventually: Eventually
) -> None:
    """The step has already read the list of runs."""
    in_step, may_end = threading.Event(), threading.Event()

    class SlowExecutor(FakeExecutor):
        def interrupt(self, execution: Execution) -> bool:
            if self.interrupted:  # in the second step, so that an earlier one has set its due time
                in_step.set()
                assert may_end.wait(10)
            return super().interrupt(execution)

    timekeeper = make_process().timekeeper
    stopped = Execution("stopped", 0.0, lambda: None)
    dispatcher.begin(stopped, SlowExecutor(False))
    stopped.ask_to_stop()
    timekeeper.start()
    assert in_step.wait(5)
    execution = Execution("task", None, lambda: None)
    execution.begin(None, 1, 0.3)
    due = time.monotonic() + 0.3
    dispatcher.begin(execution)
    timekeeper.begin(execution)
    may_end.set()
    eventually(lambda: dispatcher.expired == ["task"])
    assert -0.01 < time.monotonic() - due < 0.2


def test_a_run_with_a_later_deadline_than_the_next_step_does_not_wake_the_timekeeper(
    make_process: MakeProcess, dispatcher: FakeDispatcher, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    timekeeper = make_process().timekeeper
    timekeeper.start()
    eventually(lambda: timekeeper._due < math.inf)
    woken: list[str] = []
    for task_id, seconds in (("none", None), ("late", 3600.0), ("early", 20.0)):
        execution = Execution(task_id, None, lambda: None)
        execution.begin(None, 1, seconds)
        with monkeypatch.context() as patch:
            patch.setattr(timekeeper, "wake", lambda task_id=task_id: woken.append(task_id))
            timekeeper.begin(execution)
    assert woken == ["early"]


def test_the_thread_survives_errors(
    make_process: MakeProcess,
    dispatcher: FakeDispatcher,
    reports: list[Any],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the thread, this process would stop, expire and recover no more tasks."""
    process = make_process()
    executor = FakeExecutor(RuntimeError("broken"))
    broken = Execution("broken", 0.0, process.wake)
    dispatcher.begin(broken, executor)
    process.start()
    broken.ask_to_stop()
    eventually(lambda: executor.interrupted)
    good = Execution("good", None, process.wake)
    dispatcher.begin(good)
    good.advance(5)
    eventually(lambda: (5.0, None) in reports, 3)
    assert len(threads()) == 1


def test_close_ends_the_thread_at_once(make_process: MakeProcess, eventually: Eventually) -> None:
    process = make_process()
    process.start()
    before = time.monotonic()
    process.close()
    process.close()
    assert threads() == []
    assert time.monotonic() - before < 2
    process.start()
    assert threads() == [], "a closed thread does not start again"


def test_close_wakes_a_thread_that_is_about_to_sleep(
    make_process: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``close`` runs after the thread has checked whether it is closed, and before it clears its
    wake-up event.
    """
    process = make_process(interval=3600)
    clear = process._wake.clear
    checked, closing = threading.Event(), threading.Event()
    is_first = [True]

    def late_clear() -> None:
        if is_first.pop() if is_first else False:
            checked.set()
            assert closing.wait(5)
        clear()

    set_wake = process._wake.set
    monkeypatch.setattr(process._wake, "clear", late_clear)

    def set_and_go_on() -> None:
        set_wake()
        closing.set()

    monkeypatch.setattr(process._wake, "set", set_and_go_on)
    process.start()
    assert checked.wait(5)
    before = time.monotonic()
    process.close()
    assert time.monotonic() - before < 3
    assert threads() == []


def test_the_thread_ends_when_its_maintenance_is_collected(
    app: Flask, dispatcher: FakeDispatcher, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_SLEEP", 0.05)
    store = MemoryTaskStore()
    maintenance = Maintenance(app, Lifecycle(app, store, "o"), dispatcher, [])  # type: ignore[arg-type]
    maintenance.start()
    reference = weakref.ref(maintenance)
    del maintenance
    eventually(lambda: (gc.collect(), reference() is None)[1])
    eventually(lambda: threads() == [])


def test_an_idle_hour_takes_few_steps_and_logs_nothing(
    clock: Clock, make_process: MakeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    process = make_process(interval=30.0)
    steps = 0
    while clock.now < 4600:
        clock.now += process._step()
        steps += 1
    assert steps <= 125
    assert caplog.text == ""


def test_start_works_after_a_failed_thread_start(
    make_process: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process at its thread limit can start threads again later."""
    maintenance = make_process().maintenance

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            maintenance.start()
    assert not maintenance.is_running
    maintenance.start()
    assert maintenance.call(lambda: None).wait(5)
