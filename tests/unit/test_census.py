"""Who counts as gone, on one host and over several, and what becomes of what they left."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import census as module
from flask_asyncroute import locks, signals
from flask_asyncroute import presence as presence_module
from flask_asyncroute.census import Census
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.execution import Execution
from flask_asyncroute.lifecycle import Lifecycle
from flask_asyncroute.presence import LEASE_SECONDS, Presence
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import TaskStore, Worker
from flask_asyncroute.task import AsyncRouteTask, now_us

NewTask = Callable[..., AsyncRouteTask]
Eventually = Callable[..., Any]
ELSEWHERE = Worker("2-elsewhere", "another host's", 7, "", frozenset({"work"}))


class Clock:
    """Stands for the module's clock; time passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Office:
    """One process of the app, as far as the census goes."""

    def __init__(self, app: Flask, store: TaskStore, name: str) -> None:
        assert store.workers is not None
        self.store = store
        self.lifecycle = Lifecycle(app, store, name)
        self.presence = Presence(store.workers, name, ["work", "slow"])
        self.census = Census(store, store.workers, self.lifecycle, self.presence)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Give what is said of whether the processes that locks were free of are running; as from another container at first."""
    answer: dict[str, Any] = {"is": None}
    monkeypatch.setattr(locks, "is_running", lambda process: answer["is"])
    return answer


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> TaskStore:
    made: TaskStore = request.getfixturevalue(f"make_{request.param}_store")()
    made.open()
    return made


@pytest.fixture
def make_office(make_app: Callable[..., Flask], store: TaskStore) -> Iterator[Callable[[str], Office]]:
    made: list[Office] = []

    def make(name: str) -> Office:
        made.append(Office(make_app(), store, name))
        return made[-1]

    yield make
    for office in made:
        office.presence.leave()


def begin(office: Office, task: AsyncRouteTask) -> AsyncRouteTask:
    office.lifecycle.create(task, b"", None, ())
    office.presence.enter()
    claim = office.lifecycle.claim(task.id)
    assert claim is not None
    return claim.task


def look(office: Office, clock: Clock, seconds: float) -> None:
    """Have it look twice a second for so long."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += 0.5
        office.census.look()


def die(office: Office) -> None:
    """Leave as a killed process does: the lock is free, nothing is written."""
    office.presence.close()
    assert office.presence.lock_file is not None
    office.presence.lock_file.release(office.presence._number)
    office.presence._is_listed = False


def state(store: TaskStore, task_id: str) -> tuple[str, str | None]:
    task = store.get(task_id)
    assert task is not None
    return task.state.value, task.error


def test_f01_a_worker_whose_lock_is_free_is_gone_at_once(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine, other = make_office("1-mine"), make_office("2-other")
    begin(mine, make_task("mine"))
    begin(other, make_task("theirs"))
    store.add(make_task("waits"), b"", None, ())
    look(mine, clock, 5)
    assert state(store, "theirs") == ("Running", None)
    die(other)
    mine.census.look()
    assert state(store, "theirs") == ("Running", None), "one look is none: the lock may have been dropped by mistake"
    look(mine, clock, 0.5)
    assert state(store, "theirs") == ("Aborted", "Worker lost")
    assert state(store, "mine") == ("Running", None)
    assert state(store, "waits") == ("NotStarted", None)
    task = store.get("theirs")
    assert task is not None and not task.stopping
    assert store.workers is not None
    assert [worker.name for worker in store.workers.listed()] == ["1-mine"]


def test_a_process_that_is_not_there_is_gone_at_once(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock, told: dict[str, Any]
) -> None:
    mine, other = make_office("1-mine"), make_office("2-other")
    begin(other, make_task())
    told["is"] = False
    look(mine, clock, 5)
    assert state(store, "task") == ("Running", None), "its lock is held: somebody else has the number"
    die(other)
    mine.census.look()
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_a_process_that_is_there_lives_without_its_lock_while_it_beats(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock, told: dict[str, Any]
) -> None:
    mine, other = make_office("1-mine"), make_office("2-other")
    begin(other, make_task())
    die(other)
    told["is"] = True
    for _ in range(5):
        look(mine, clock, 20)
        assert other.presence._workers.beat("2-other")
    assert state(store, "task") == ("Running", None)
    look(mine, clock, LEASE_SECONDS + 1)
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_f38_a_worker_that_holds_its_lock_lives_however_silent(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    """A view that never lets go of the interpreter keeps it from beating, not from holding its lock."""
    mine, other = make_office("1-mine"), make_office("2-other")
    begin(other, make_task("theirs"))
    other.presence.close()
    look(mine, clock, 300)
    assert state(store, "theirs") == ("Running", None)


def test_a_worker_of_another_host_lives_while_it_beats(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine = make_office("1-mine")
    workers = store.workers
    assert workers is not None
    workers.enter(ELSEWHERE)
    store.add(make_task(), b"", None, ())
    assert store.claim("task", ELSEWHERE.name, now_us()) is not None
    for _ in range(10):
        look(mine, clock, 20)
        workers.beat(ELSEWHERE.name)
    assert state(store, "task") == ("Running", None)
    look(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    look(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_f24_a_worker_of_another_host_is_found_though_each_look_takes_seconds(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine = make_office("1-mine")
    assert store.workers is not None
    store.workers.enter(ELSEWHERE)
    store.add(make_task(), b"", None, ())
    assert store.claim("task", ELSEWHERE.name, now_us()) is not None
    for _ in range(5):
        clock.now += 8
        mine.census.look()
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_f21_a_worker_whose_row_is_gone_is_listed_again_at_once(
    make_office: Callable[[str], Office], store: TaskStore, eventually: Eventually
) -> None:
    """As where the file of the store is another: a kill before the next beat would be found by the lease alone."""
    mine = make_office("1-mine")
    assert store.workers is not None
    mine.presence.enter()
    store.workers.leave("1-mine")
    mine.census.look()
    eventually(lambda: [worker.name for worker in store.workers.listed()] == ["1-mine"])


def test_f32_nobody_is_gone_because_time_has_passed_unseen(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While this process stood still, or the store was away, the others' beats could not be seen; nor could they beat."""
    mine = make_office("1-mine")
    workers = store.workers
    assert workers is not None
    workers.enter(ELSEWHERE)
    store.add(make_task(), b"", None, ())
    assert store.claim("task", ELSEWHERE.name, now_us()) is not None
    look(mine, clock, 25)
    clock.now += 3600
    look(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)

    def fail() -> list[Worker]:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as away:
        away.setattr(workers, "listed", fail)
        for _ in range(100):
            clock.now += 0.5
            with pytest.raises(StoreUnavailable):
                mine.census.look()
    look(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    look(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_tasks_of_a_worker_that_is_not_listed_are_found(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine = make_office("1-mine")
    store.add(make_task(), b"", None, ())
    assert store.claim("task", "3-nobody", now_us()) is not None
    look(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    look(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


def test_a_task_that_is_to_be_restarted_is_so_twice(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    """It waits again, as if it had never run; a third loss ends it."""
    mine = make_office("1-mine")
    first = make_office("2-first")
    begin(first, make_task(on_loss="restart", timeout_us=10**9))
    execution = Execution("task")
    execution.begin(None, 1, None)
    execution.advance(50, "half")
    signals.progress_reported.send(first.lifecycle._app, execution=execution)
    assert store.get("task").progress == 50
    die(first)
    look(mine, clock, 1)
    task = store.get("task")
    assert task is not None
    assert (task.state, task.started_us, task.expires_us, task.progress, task.progress_message, task.owner) == (
        State.NOT_STARTED, None, None, None, None, None,
    )  # fmt: skip
    for number in (3, 4):
        again = make_office(f"{number}-again")
        again.presence.enter()
        assert again.lifecycle.claim("task") is not None
        die(again)
        look(mine, clock, 1)
    assert state(store, "task") == ("Aborted", "Worker lost")
    assert first.lifecycle.finish(execution, State.COMPLETED, {}) is None, "a run that comes back has lost its task"


def test_a_stopping_task_of_a_lost_worker_has_stopped(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    mine, other = make_office("1-mine"), make_office("2-other")
    task = begin(other, make_task())
    assert other.lifecycle.abort(task, "Aborted by the user") is not None
    look(mine, clock, 1)
    assert store.get("task").stopping
    before = store.get("task").revision
    die(other)
    look(mine, clock, 1)
    after = store.get("task")
    assert after is not None
    assert (after.stopping, after.error, after.revision) == (False, "Aborted by the user", before + 1)


def test_a_worker_that_was_taken_for_dead_enters_again(make_office: Callable[[str], Office], store: TaskStore) -> None:
    mine = make_office("1-mine")
    workers = store.workers
    assert workers is not None
    mine.presence.enter()
    workers.leave("1-mine")
    assert mine.presence._beat() == presence_module.BEAT_SECONDS
    assert [worker.name for worker in workers.listed()] == ["1-mine"]


def test_a_beat_that_fails_comes_again_soon(
    make_office: Callable[[str], Office], store: TaskStore, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine = make_office("1-mine")
    mine.presence.enter()
    for error in (StoreUnavailable("not now"), RuntimeError("broken")):

        def fail(name: str, error: Exception = error) -> bool:
            raise error

        monkeypatch.setattr(store.workers, "beat", fail)
        assert mine.presence._beat() == presence_module.RETRY_SECONDS
    assert "could not say that it lives" in caplog.text


def test_without_a_lock_file_a_worker_has_its_beat(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine, other = make_office("1-mine"), make_office("2-other")
    assert store.workers is not None
    store.workers.lock_path = tmp_path / "no folder" / "workers"
    begin(other, make_task())
    assert other.presence.lock_file is None
    assert "Workers cannot keep their locks in" in caplog.text
    store.workers.lock_path = tmp_path / "workers"
    look(mine, clock, LEASE_SECONDS - 1)
    assert state(store, "task") == ("Running", None)
    look(mine, clock, 2)
    assert state(store, "task") == ("Aborted", "Worker lost")


PROBE = """
import sys, pathlib
from flask_asyncroute.locks import lock_file
file = lock_file(pathlib.Path(sys.argv[1]))
for line in sys.stdin:
    print(file.is_held(int(sys.argv[2])), flush=True)
"""


def test_a_lock_that_was_dropped_is_taken_again(
    make_office: Callable[[str], Office], store: TaskStore, eventually: Eventually
) -> None:
    """Whatever in a process opens the file and closes it drops its locks; a copy of the folder does."""
    mine = make_office("1-mine")
    mine.presence.enter()
    assert store.workers is not None
    path = store.workers.lock_path
    command = [sys.executable, "-c", PROBE, str(path), str(mine.presence._number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdin is not None and probe.stdout is not None

        def is_held() -> bool:
            print(file=probe.stdin, flush=True)
            return probe.stdout.readline() == "True\n"

        assert is_held()
        mine.presence.close()
        path.read_bytes()
        assert not is_held(), "this is what POSIX says, and the reason for all this"
        mine.presence.assert_lock()
        assert is_held()
        probe.stdin.close()


def test_a_worker_makes_sure_of_its_lock(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than anybody needs to believe that it is gone."""
    assert 2 * presence_module.ASSERT_SECONDS <= module.CONFIRM_SECONDS
    mine = make_office("1-mine")
    asserted = threading.Event()
    mine.presence.enter()
    assert mine.presence.lock_file is not None
    monkeypatch.setattr(mine.presence.lock_file, "hold", lambda number: asserted.set())
    assert asserted.wait(2)


def test_route_gone_after_an_hour_that_no_worker_has_it(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine = make_office("1-mine")
    mine.presence.enter()
    store.add(make_task("known", endpoint="work"), b"", None, ())
    store.add(make_task("gone", endpoint="removed"), b"", None, ())
    mine.census.find_forsaken()
    clock.now += module.ROUTE_GONE_SECONDS - 1
    mine.census.find_forsaken()
    assert state(store, "gone") == ("NotStarted", None)
    assert store.workers is not None
    store.workers.enter(Worker("2-old", "", 1, "", frozenset({"removed"})))
    mine.census.find_forsaken()
    store.workers.leave("2-old")
    clock.now += 2
    mine.census.find_forsaken()
    clock.now += module.ROUTE_GONE_SECONDS - 1
    mine.census.find_forsaken()
    assert state(store, "gone") == ("NotStarted", None), "the hour began anew"
    clock.now += 1
    mine.census.find_forsaken()
    assert state(store, "gone") == ("Aborted", "Route gone")
    assert state(store, "known") == ("NotStarted", None)
    assert "removed" in caplog.text


def test_a_waiting_task_that_nobody_else_can_run_goes_with_its_process(
    make_office: Callable[[str], Office], store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    """That of an Executor of the app's own, or of a request; whatever its route says of a loss."""
    mine, other = make_office("1-mine"), make_office("2-other")
    other.presence.enter()
    store.add(make_task("bound", owner="2-other", on_loss="restart"), b"", None, ())
    store.add(make_task("free"), b"", None, ())
    look(mine, clock, 5)
    assert state(store, "bound") == ("NotStarted", None)
    die(other)
    look(mine, clock, 1)
    assert state(store, "bound") == ("Aborted", "Worker lost")
    assert state(store, "free") == ("NotStarted", None)


def test_a_presence_that_is_dropped_ends_its_thread(store: TaskStore, eventually: Eventually) -> None:
    assert store.workers is not None
    presence = Presence(store.workers, "1-x", [])
    presence.enter()
    presence.enter()
    thread = presence._thread
    assert thread is not None and thread.is_alive()
    assert [found.name for found in threading.enumerate()].count("asyncroute-beat") == 1
    assert presence.lock_file is not None
    presence.lock_file.release(presence._number)
    del presence
    eventually(lambda: not thread.is_alive())


def test_leaving_where_the_store_is_away_frees_the_lock(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert store.workers is not None
    presence = Presence(store.workers, "1-x", [])
    presence.enter()
    file = presence.lock_file
    assert file is not None

    def fail(name: str) -> None:
        raise StoreUnavailable("not now")

    monkeypatch.setattr(store.workers, "leave", fail)
    with pytest.raises(StoreUnavailable):
        presence.leave()
    assert not file.is_held(presence._number)
