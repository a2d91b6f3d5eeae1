"""Detection of dead workers, on one host and on several, and recovery of their tasks."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.executors.execution import Execution
from flask_asyncroute.stores.base import TaskStore, Worker
from flask_asyncroute.task import AsyncRouteTask, State, now_us
from flask_asyncroute.workers import heartbeat as heartbeat_module
from flask_asyncroute.workers import process_lock
from flask_asyncroute.workers import recovery as module
from flask_asyncroute.workers.heartbeat import LEASE_SECONDS, Heartbeat
from flask_asyncroute.workers.recovery import Recovery

NewTask = Callable[..., AsyncRouteTask]
Eventually = Callable[..., Any]
ELSEWHERE = Worker("2-elsewhere", "another host's", 7, "", frozenset({"work"}))


class Clock:
    """A manual clock in place of the module's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Process:
    """One process of the app: the parts that take part in recovery."""

    def __init__(self, app: Flask, store: TaskStore, name: str) -> None:
        assert store.workers is not None
        self.store = store
        self.lifecycle = Lifecycle(app, store, name)
        self.heartbeat = Heartbeat(store.workers, name, ["work", "slow"])
        self.recovery = Recovery(store, self.lifecycle, self.heartbeat)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture(autouse=True)
def process_status(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result of `process_lock.is_running` under ``"is"``; at first None, as for a process of
    another container.
    """
    answer: dict[str, Any] = {"is": None}
    monkeypatch.setattr(process_lock, "is_running", lambda process: answer["is"])
    return answer


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> TaskStore:
    made: TaskStore = request.getfixturevalue(f"make_{request.param}_store")()
    made.open()
    return made


@pytest.fixture
def make_process(
    make_app: Callable[..., Flask], store: TaskStore
) -> Iterator[Callable[[str], Process]]:
    made: list[Process] = []

    def make(name: str) -> Process:
        made.append(Process(make_app(), store, name))
        return made[-1]

    yield make
    for process in made:
        process.heartbeat.leave()


def begin(process: Process, task: AsyncRouteTask) -> AsyncRouteTask:
    process.lifecycle.create(task, b"", None, ())
    process.heartbeat.enter()
    claim = process.lifecycle.claim(task.id)
    assert claim is not None
    return claim.task


def recover(process: Process, clock: Clock, seconds: float) -> None:
    """Run recovery twice a second for this many seconds."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += 0.5
        process.recovery.recover_tasks()


def die(process: Process) -> None:
    """End as a killed process does: release the lock, but keep the row in the store."""
    process.heartbeat.close()
    assert process.heartbeat.lock_file is not None
    process.heartbeat.lock_file.release(process.heartbeat._number)
    process.heartbeat._is_listed = False


def state(store: TaskStore, task_id: str) -> tuple[str, str | None]:
    task = store.get(task_id)
    assert task is not None
    return task.state.value, task.error


@pytest.mark.covers("F01")
def test_a_worker_is_dead_when_its_lock_is_free_at_two_checks(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine, other = make_process("1-mine"), make_process("2-other")
    begin(mine, make_task("mine"))
    begin(other, make_task("theirs"))
    store.add(make_task("waits"), b"", None, ())
    recover(mine, clock, 5)
    assert state(store, "theirs") == ("Running", None)
    die(other)
    mine.recovery.recover_tasks()
    assert state(store, "theirs") == ("Running", None), (
        "one check is not enough: the lock may have been dropped by mistake"
    )
    recover(mine, clock, 0.5)
    assert state(store, "theirs") == ("Aborted", "Worker lost")
    assert state(store, "mine") == ("Running", None)
    assert state(store, "waits") == ("NotStarted", None)
    task = store.get("theirs")
    assert task is not None and not task.stopping
    assert store.workers is not None
    assert [worker.name for worker in store.workers.listed()] == ["1-mine"]


def test_a_worker_is_dead_at_once_if_its_process_does_not_exist(
    make_process: Callable[[str], Process],
    store: TaskStore,
    make_task: NewTask,
    clock: Clock,
    process_status: dict[str, Any],
) -> None:
    mine, other = make_process("1-mine"), make_process("2-other")
    begin(other, make_task())
    process_status["is"] = False
    recover(mine, clock, 5)
    assert state(store, "task") == ("Running", None), (
        "its lock is held, so another process reuses the pid"
    )
    die(other)
    mine.recovery.recover_tasks()
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_an_existing_process_without_its_lock_lives_while_it_sends_heartbeats(
    make_process: Callable[[str], Process],
    store: TaskStore,
    make_task: NewTask,
    clock: Clock,
    process_status: dict[str, Any],
) -> None:
    mine, other = make_process("1-mine"), make_process("2-other")
    begin(other, make_task())
    die(other)
    process_status["is"] = True
    for _ in range(5):
        recover(mine, clock, 20)
        assert other.heartbeat._workers.beat("2-other")
    assert state(store, "task") == ("Running", None)
    recover(mine, clock, LEASE_SECONDS + 1)
    assert state(store, "task") == ("Aborted", "Worker lost")


@pytest.mark.covers("F38")
def test_a_worker_that_holds_its_lock_lives_without_heartbeats(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    """A view that never releases the GIL prevents heartbeats, but the lock stays held."""
    mine, other = make_process("1-mine"), make_process("2-other")
    begin(other, make_task("theirs"))
    other.heartbeat.close()
    recover(mine, clock, 300)
    assert state(store, "theirs") == ("Running", None)


def test_a_worker_of_another_host_lives_while_it_sends_heartbeats(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine = make_process("1-mine")
    workers = store.workers
    assert workers is not None
    workers.enter(ELSEWHERE)
    store.add(make_task(), b"", None, ())
    assert store.claim("task", ELSEWHERE.name, now_us()) is not None
    for _ in range(10):
        recover(mine, clock, 20)
        workers.beat(ELSEWHERE.name)
    assert state(store, "task") == ("Running", None)
    recover(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    recover(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


@pytest.mark.covers("F24")
def test_a_dead_worker_of_another_host_is_detected_by_slow_checks(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine = make_process("1-mine")
    assert store.workers is not None
    store.workers.enter(ELSEWHERE)
    store.add(make_task(), b"", None, ())
    assert store.claim("task", ELSEWHERE.name, now_us()) is not None
    for _ in range(5):
        clock.now += 8
        mine.recovery.recover_tasks()
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_a_worker_whose_row_is_gone_is_listed_again_at_once(
    make_process: Callable[[str], Process], store: TaskStore, eventually: Eventually
) -> None:
    """Another worker declared it dead. If it were killed before its next heartbeat, only the lease
    would reveal that.
    """
    mine = make_process("1-mine")
    assert store.workers is not None
    mine.heartbeat.enter()
    store.workers.leave("1-mine")
    mine.recovery.recover_tasks()
    eventually(lambda: [worker.name for worker in store.workers.listed()] == ["1-mine"])


@pytest.mark.covers("F32")
def test_no_worker_is_dead_because_of_a_gap_between_checks(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While this process or the store was stalled, heartbeats could not be seen, or not even sent."""
    mine = make_process("1-mine")
    workers = store.workers
    assert workers is not None
    workers.enter(ELSEWHERE)
    store.add(make_task(), b"", None, ())
    assert store.claim("task", ELSEWHERE.name, now_us()) is not None
    recover(mine, clock, 25)
    clock.now += 3600
    recover(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)

    def fail() -> list[Worker]:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as away:
        away.setattr(workers, "listed", fail)
        for _ in range(100):
            clock.now += 0.5
            with pytest.raises(StoreUnavailable):
                mine.recovery.recover_tasks()
    recover(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    recover(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_tasks_of_an_unlisted_worker_are_recovered(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine = make_process("1-mine")
    store.add(make_task(), b"", None, ())
    assert store.claim("task", "3-nobody", now_us()) is not None
    recover(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    recover(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_a_lost_task_is_restarted_at_most_twice(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    """It waits again as a new task does. The third loss ends it."""
    mine = make_process("1-mine")
    first = make_process("2-first")
    begin(first, make_task(on_loss="restart", timeout_us=10**9))
    execution = Execution("task")
    execution.begin(None, 1, None)
    execution.advance(50, "half")
    first.lifecycle.write_progress(execution)
    assert store.get("task").progress == 50
    die(first)
    recover(mine, clock, 1)
    task = store.get("task")
    assert task is not None
    assert (task.state, task.started_us, task.expires_us, task.progress, task.progress_message, task.owner) == (
        State.NOT_STARTED, None, None, None, None, None,
    )  # fmt: skip
    for number in (3, 4):
        again = make_process(f"{number}-again")
        again.heartbeat.enter()
        assert again.lifecycle.claim("task") is not None
        die(again)
        recover(mine, clock, 1)
    assert state(store, "task") == ("Aborted", "Worker lost")
    assert first.lifecycle.finish(execution, State.COMPLETED, {}) is None, (
        "an earlier run cannot finish the task"
    )


def test_stopping_is_cleared_for_a_task_of_a_dead_worker(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine, other = make_process("1-mine"), make_process("2-other")
    task = begin(other, make_task())
    assert other.lifecycle.abort(task, "Aborted by the user") is not None
    recover(mine, clock, 1)
    assert store.get("task").stopping
    before = store.get("task").revision
    die(other)
    recover(mine, clock, 1)
    after = store.get("task")
    assert after is not None
    assert (after.stopping, after.error, after.revision) == (
        False,
        "Aborted by the user",
        before + 1,
    )


def test_a_worker_that_was_declared_dead_is_listed_again(
    make_process: Callable[[str], Process], store: TaskStore
) -> None:
    mine = make_process("1-mine")
    workers = store.workers
    assert workers is not None
    mine.heartbeat.enter()
    workers.leave("1-mine")
    assert mine.heartbeat._beat() == heartbeat_module.BEAT_SECONDS
    assert [worker.name for worker in workers.listed()] == ["1-mine"]


def test_a_failed_heartbeat_is_retried_soon(
    make_process: Callable[[str], Process], store: TaskStore, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine = make_process("1-mine")
    mine.heartbeat.enter()
    for error in (StoreUnavailable("not now"), RuntimeError("broken")):

        def fail(name: str, error: Exception = error) -> bool:
            raise error

        monkeypatch.setattr(store.workers, "beat", fail)
        assert mine.heartbeat._beat() == heartbeat_module.RETRY_SECONDS
    assert "The heartbeat of this worker failed" in caplog.text


def test_without_a_lock_file_only_heartbeats_count(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine, other = make_process("1-mine"), make_process("2-other")
    assert store.workers is not None
    store.workers.lock_path = tmp_path / "no folder" / "workers"
    begin(other, make_task())
    assert other.heartbeat.lock_file is None
    message = f"The lock file {store.workers.lock_path} cannot be used"
    assert other.heartbeat._open_lock_file() is None
    assert caplog.text.count(message) == 1
    store.workers.lock_path = tmp_path / "workers"
    recover(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    recover(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


PROBE = """
import sys, pathlib
from flask_asyncroute.workers.process_lock import lock_file
file = lock_file(pathlib.Path(sys.argv[1]))
for line in sys.stdin:
    print(file.is_held(int(sys.argv[2])), flush=True)
"""


def test_a_dropped_lock_is_acquired_again(
    make_process: Callable[[str], Process], store: TaskStore, eventually: Eventually
) -> None:
    """Code that opens and closes the file, such as a copy of its folder, drops the locks of the
    process.
    """
    mine = make_process("1-mine")
    mine.heartbeat.enter()
    assert store.workers is not None
    path = store.workers.lock_path
    command = [sys.executable, "-c", PROBE, str(path), str(mine.heartbeat._number)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        assert probe.stdin is not None and probe.stdout is not None

        def is_held() -> bool:
            print(file=probe.stdin, flush=True)
            return probe.stdout.readline() == "True\n"

        assert is_held()
        mine.heartbeat.close()
        path.read_bytes()
        assert not is_held(), "POSIX drops the lock when any descriptor of the file is closed"
        mine.heartbeat.assert_lock()
        assert is_held()
        probe.stdin.close()


def test_a_worker_reacquires_its_lock_regularly(
    make_process: Callable[[str], Process],
    store: TaskStore,
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At least twice in the time for which a lock must be free before its worker counts as dead."""
    assert 2 * heartbeat_module.ASSERT_SECONDS <= module.CONFIRM_SECONDS
    mine = make_process("1-mine")
    asserted = threading.Event()
    mine.heartbeat.enter()
    assert mine.heartbeat.lock_file is not None
    monkeypatch.setattr(mine.heartbeat.lock_file, "hold", lambda number: asserted.set())
    assert asserted.wait(2)


def test_a_task_is_aborted_after_an_hour_without_a_worker_for_its_route(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine = make_process("1-mine")
    mine.heartbeat.enter()
    store.add(make_task("known", endpoint="work"), b"", None, ())
    store.add(make_task("gone", endpoint="removed"), b"", None, ())
    mine.recovery.abort_unroutable()
    clock.now += module.ROUTE_GONE_SECONDS - 1
    mine.recovery.abort_unroutable()
    assert state(store, "gone") == ("NotStarted", None)
    assert store.workers is not None
    store.workers.enter(Worker("2-old", "", 1, "", frozenset({"removed"})))
    mine.recovery.abort_unroutable()
    store.workers.leave("2-old")
    clock.now += 2
    mine.recovery.abort_unroutable()
    clock.now += module.ROUTE_GONE_SECONDS - 1
    mine.recovery.abort_unroutable()
    assert state(store, "gone") == ("NotStarted", None), "the hour started again"
    clock.now += 1
    mine.recovery.abort_unroutable()
    assert state(store, "gone") == ("Aborted", "Route gone")
    assert state(store, "known") == ("NotStarted", None)
    assert "removed" in caplog.text


def test_a_waiting_task_bound_to_a_dead_process_is_aborted(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    """Tasks of an executor object of the app or of an immediate route, whatever their ``on_loss``."""
    mine, other = make_process("1-mine"), make_process("2-other")
    other.heartbeat.enter()
    store.add(make_task("bound", owner="2-other", on_loss="restart"), b"", None, ())
    store.add(make_task("free"), b"", None, ())
    recover(mine, clock, 5)
    assert state(store, "bound") == ("NotStarted", None)
    die(other)
    recover(mine, clock, 1)
    assert state(store, "bound") == ("Aborted", "Worker lost")
    assert state(store, "free") == ("NotStarted", None)


def test_a_live_worker_of_another_app_is_logged_once(
    make_process: Callable[[str], Process], store: TaskStore, make_task: NewTask, clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A dead worker of an earlier release is not logged. Claims are not refused."""
    mine, other, moved, same, dead = map(make_process, ["1", "2", "3", "4", "5"])
    mine.heartbeat.views = same.heartbeat.views = {"work": ["shop", "/srv", "shop.work"]}
    other.heartbeat.views = {"work": ["api", "/srv", "api.work"]}
    moved.heartbeat.views = {"work": ["shop", "/srv", "shop.views.work"]}
    dead.heartbeat.views = {"work": ["old", "/srv", "old.work"]}
    for process in (mine, other, moved, same, dead):
        process.heartbeat.enter()
    die(dead)
    recover(mine, clock, 2)
    store.workers.enter(replace(ELSEWHERE, views={"work": ["api", "/opt", "api.work"]}))
    recover(mine, clock, 5)
    warnings = [text for text in caplog.messages if "ASYNCROUTE_NAMESPACE" in text]
    assert len(warnings) == 2, warnings
    assert any("the worker 2 " in text and "'shop' and 'api'" in text for text in warnings)
    assert any("the worker 3 " in text and "'work' is shop.work and" in text for text in warnings)
    assert begin(other, make_task("task")).owner == "2"


def test_the_thread_ends_when_its_heartbeat_is_collected(
    store: TaskStore, eventually: Eventually
) -> None:
    assert store.workers is not None
    heartbeat = Heartbeat(store.workers, "1-x", [])
    heartbeat.enter()
    heartbeat.enter()
    thread = heartbeat._thread
    assert thread is not None and thread.is_alive()
    assert [found.name for found in threading.enumerate()].count("asyncroute-beat") == 1
    assert heartbeat.lock_file is not None
    heartbeat.lock_file.release(heartbeat._number)
    del heartbeat
    eventually(lambda: not thread.is_alive())


def test_leave_releases_the_lock_if_the_store_is_unavailable(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert store.workers is not None
    heartbeat = Heartbeat(store.workers, "1-x", [])
    heartbeat.enter()
    file = heartbeat.lock_file
    assert file is not None

    def fail(name: str) -> None:
        raise StoreUnavailable("not now")

    monkeypatch.setattr(store.workers, "leave", fail)
    with pytest.raises(StoreUnavailable):
        heartbeat.leave()
    assert not file.is_held(heartbeat._number)


def test_one_process_with_the_endpoint_is_the_first(
    make_process: Callable[[str], Process], store: TaskStore, clock: Clock
) -> None:
    mine, other = make_process("2-mine"), make_process("3-other")
    assert store.workers is not None
    store.workers.enter(replace(ELSEWHERE, name="1-older", endpoints=frozenset({"old"})))
    store.workers.enter(replace(ELSEWHERE, name="celery-1"))
    for process in (mine, other):
        process.heartbeat.enter()
    for process in (mine, other):
        process.recovery.recover_tasks()
    assert (mine.recovery.is_first({"work"}), other.recovery.is_first({"work"})) == (True, False)
    assert not mine.recovery.is_first({"old"}), "the process of the older release has this endpoint"
    die(mine)
    recover(other, clock, 1)
    assert other.recovery.is_first({"work"})
