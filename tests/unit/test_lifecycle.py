"""`Lifecycle`, the only writer of the state of a task: each transition in the store, and its
signals.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import flask
import pytest
from flask import Flask

from flask_asyncroute import signals
from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.errors import CommitUnknown, IdTaken
from flask_asyncroute.executors.execution import Execution
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.task import AsyncRouteTask, State, now_us
from tests.support.faulty_store import FaultyStore, Nth

MakeApp = Callable[..., Flask]
NewTask = Callable[..., AsyncRouteTask]
Hear = Callable[..., list[tuple[str, AsyncRouteTask]]]
FAR = 4_000_000_000_000_000
"""A time in the year 2096."""


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app()


@pytest.fixture
def lifecycle(app: Flask, store: TaskStore) -> Lifecycle:
    return Lifecycle(app, store, "owner")


@pytest.fixture
def received(app: Flask, hear: Hear) -> list[tuple[str, AsyncRouteTask]]:
    return hear(*signals.PUBLIC_SIGNALS, sender=app)


def run(lifecycle: Lifecycle, make_task: NewTask, task_id: str = "task") -> Execution:
    """Create and claim a task, as `run_task` does."""
    lifecycle.create(make_task(task_id), b"{}", None, ())
    claim = lifecycle.claim(task_id)
    assert claim is not None
    execution = Execution(task_id)
    execution.begin(claim.task.user, claim.task.epoch, None)
    return execution


def names(received: list[tuple[str, AsyncRouteTask]]) -> list[str]:
    return [name for name, _ in received]


def test_create_sends_task_created(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    assert names(received) == ["task-created"]
    assert received[0][1].id == "task"
    stored = store.get("task")
    assert stored is not None and stored.state is State.NOT_STARTED


def test_a_failed_create_sends_no_signal(
    lifecycle: Lifecycle, make_task: NewTask, received: list[tuple[str, AsyncRouteTask]]
) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    with pytest.raises(IdTaken):
        lifecycle.create(make_task(), b"{}", None, ())
    assert names(received) == ["task-created"]


def test_a_claim_sends_task_started_once(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    lifecycle.create(make_task(), b"request", None, ())
    claim = lifecycle.claim("task")
    assert claim is not None
    assert (claim.request, claim.task.owner) == (b"request", "owner")
    assert lifecycle.claim("task") is None
    assert lifecycle.claim("unknown") is None
    assert names(received) == ["task-created", "task-started"]
    assert received[1][1] == claim.task == store.get("task")


@pytest.mark.parametrize(
    ("state", "name", "values"),
    [
        (State.COMPLETED, "task-completed", {"result_json": b"[1]"}),
        (State.FAILED, "task-failed", {"error": "ValueError: x"}),
        (State.ABORTED, "task-aborted", {"error": "Timeout"}),
    ],
)
def test_finish_writes_the_outcome_once_and_sends_two_signals(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, received: list[tuple[str, AsyncRouteTask]], state: State, name: str,
    values: dict[str, Any],
) -> None:  # fmt: skip
    execution = run(lifecycle, make_task)
    received.clear()
    task = lifecycle.finish(execution, state, values)
    assert task is not None and task == store.get("task")
    assert task.state is state
    assert all(getattr(task, field) == value for field, value in values.items())
    assert (
        task.completed_us is not None
        and task.started_us is not None
        and task.completed_us >= task.started_us
    )
    assert not task.stopping
    assert received == [(name, task), ("task-finished", task)]
    assert lifecycle.finish(execution, State.FAILED, {"error": "again"}) is None
    assert store.get("task") == task
    assert len(received) == 2


@pytest.mark.parametrize(
    ("state", "progress", "expected"),
    [
        (State.COMPLETED, (40, "m"), (100.0, "m")), (State.FAILED, (40, "m"), (40.0, "m")), (State.ABORTED, (40, None), (40.0, None)),
        (State.COMPLETED, None, (None, None)), (State.FAILED, None, (None, None)), (State.COMPLETED, (math.nan, "m"), (100.0, "m")),
    ],
)  # fmt: skip
def test_finish_writes_the_last_progress(
    lifecycle: Lifecycle, make_task: NewTask, state: State, progress: Any, expected: Any
) -> None:
    execution = run(lifecycle, make_task)
    if progress is not None:
        execution.advance(*progress)
    task = lifecycle.finish(execution, state, {})
    assert task is not None and (task.progress, task.progress_message) == expected
    assert not execution.has_report


def test_abort_of_a_waiting_task(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    waiting = store.get("task")
    assert waiting is not None
    task = lifecycle.abort(waiting, "Aborted by the user")
    assert task is not None and task == store.get("task")
    assert (task.state, task.error, task.stopping, task.started_us) == (
        State.ABORTED,
        "Aborted by the user",
        False,
        None,
    )
    assert names(received) == ["task-created", "task-aborted", "task-finished"]
    assert lifecycle.claim("task") is None


def test_abort_of_a_running_task_and_the_later_return_of_its_view(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    execution = run(lifecycle, make_task)
    execution.advance(30)
    running = store.get("task")
    assert running is not None
    received.clear()
    task = lifecycle.abort(running, "Aborted by the user")
    assert task is not None and task.stopping
    assert names(received) == ["task-aborted", "task-finished"]
    # The view returns later: its result is dropped, Stopping is cleared, and no second signal is
    # sent.
    assert lifecycle.finish(execution, State.COMPLETED, {"result_json": b"1"}) is None
    ended = store.get("task")
    assert ended is not None
    assert (ended.state, ended.stopping, ended.result_json, ended.progress) == (
        State.ABORTED,
        False,
        None,
        None,
    )
    assert ended.revision == task.revision + 1, "clients see that Stopping was cleared"
    assert ended.completed_us == task.completed_us
    assert names(received) == ["task-aborted", "task-finished"]
    lifecycle.release(execution)
    assert store.get("task") == ended


def test_abort_returns_none_if_the_state_has_changed(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    waiting = store.get("task")
    lifecycle.claim("task")
    assert waiting is not None
    assert lifecycle.abort(waiting, "x") is None
    running = store.get("task")
    assert running is not None and running.state is State.RUNNING
    assert lifecycle.abort(running, "x") is not None
    assert lifecycle.abort(running, "x") is None


def test_expire_aborts_the_task(
    lifecycle: Lifecycle, make_task: NewTask, received: list[tuple[str, AsyncRouteTask]]
) -> None:
    execution = run(lifecycle, make_task)
    received.clear()
    task = lifecycle.expire(execution, "Timeout")
    assert task is not None and (task.state, task.error, task.stopping) == (
        State.ABORTED,
        "Timeout",
        True,
    )
    assert names(received) == ["task-aborted", "task-finished"]
    assert lifecycle.expire(execution, "Timeout") is None


@pytest.mark.parametrize("method", ["finish", "expire", "release", "progress"])
@pytest.mark.parametrize("other", ["epoch", "owner"])
def test_only_the_owner_in_the_current_epoch_writes(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, method: str, other: str
) -> None:
    """A worker that was declared dead, and whose task another worker runs, changes nothing."""
    execution = run(lifecycle, make_task)
    execution.advance(50)
    if method == "release":
        running = store.get("task")
        assert running is not None
        lifecycle.abort(running, "x")
    before = store.get("task")
    if other == "epoch":
        execution.epoch = 7
    else:
        lifecycle = Lifecycle(app, store, "another owner")
    methods: dict[str, Callable[[], object]] = {
        "finish": lambda: lifecycle.finish(execution, State.COMPLETED, {}),
        "expire": lambda: lifecycle.expire(execution, "x"),
        "release": lambda: lifecycle.release(execution),
        "progress": lambda: lifecycle.write_progress(execution),
    }
    assert methods[method]() is None
    assert store.get("task") == before


@pytest.mark.parametrize(
    "before", [State.NOT_STARTED, State.COMPLETED, State.FAILED, State.ABORTED]
)
@pytest.mark.covers("I2")
def test_no_transition_leaves_a_terminal_state_or_skips_running(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, before: State
) -> None:
    if before is State.NOT_STARTED:
        lifecycle.create(make_task(), b"{}", None, ())
        execution = Execution("task")
    else:
        execution = run(lifecycle, make_task)
        assert lifecycle.finish(execution, before, {}) is not None
    stored = store.get("task")
    assert stored is not None
    for state in (State.COMPLETED, State.FAILED, State.ABORTED):
        assert lifecycle.finish(execution, state, {}) is None
    assert lifecycle.expire(execution, "x") is None
    if before is not State.NOT_STARTED:
        with pytest.raises(ValueError, match=f"transition from {before} to .* is not allowed"):
            lifecycle.abort(stored, "x")
    assert store.get("task") == stored


@pytest.mark.parametrize("state", [State.NOT_STARTED, State.RUNNING])
def test_finish_refuses_a_state_that_is_not_terminal(
    lifecycle: Lifecycle, make_task: NewTask, state: State
) -> None:
    execution = run(lifecycle, make_task)
    with pytest.raises(ValueError, match="is not allowed"):
        lifecycle.finish(execution, state, {})


def test_write_progress_sends_task_progressed(
    app: Flask,
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    execution = run(lifecycle, make_task)
    before = store.get("task")
    received.clear()
    lifecycle.write_progress(execution)
    assert store.get("task") == before, "there was no progress to write"
    execution.advance(10, "a")
    execution.advance(20, "b")
    lifecycle.write_progress(execution)
    task = store.get("task")
    assert task is not None and before is not None
    assert (task.progress, task.progress_message, task.revision) == (20.0, "b", before.revision + 1)
    assert received == [("task-progressed", task)]
    lifecycle.write_progress(execution)
    assert store.get("task") == task


def test_progress_after_the_end_is_dropped(
    app: Flask,
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    execution = run(lifecycle, make_task)
    task = lifecycle.finish(execution, State.FAILED, {})
    received.clear()
    execution.advance(99, "late")
    lifecycle.write_progress(execution)
    assert store.get("task") == task
    assert received == []


def test_purge_deletes_only_ended_tasks(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    assert lifecycle.purge("unknown") is False
    execution = run(lifecycle, make_task)
    assert lifecycle.purge("task") is False
    running = store.get("task")
    assert running is not None
    lifecycle.abort(running, "x")
    assert lifecycle.purge("task") is False, "its view still runs"
    lifecycle.release(execution)
    assert lifecycle.purge("task") is True
    assert lifecycle.purge("task") is False
    assert store.get("task") is None
    lifecycle.create(make_task("waits"), b"{}", None, ())
    assert lifecycle.purge("waits") is False


def test_signals_are_sent_after_the_write_in_an_app_context(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    seen: list[tuple[AsyncRouteTask | None, AsyncRouteTask, Any]] = []

    def receive(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        seen.append((store.get(task.id), task, flask.current_app._get_current_object()))  # type: ignore[attr-defined]

    with (
        signals.task_started.connected_to(receive, app),
        signals.task_finished.connected_to(receive, app),
    ):
        execution = run(lifecycle, make_task)
        lifecycle.finish(execution, State.COMPLETED, {})
    assert len(seen) == 2
    for stored, task, current in seen:
        assert stored == task
        assert current is app


def test_a_receiver_may_abort_and_create_tasks(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    """The store holds no lock while receivers run."""

    def stop(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        lifecycle.abort(task, "stopped by a receiver")
        lifecycle.create(make_task("another"), b"{}", None, ())

    with signals.task_started.connected_to(stop, app):
        run(lifecycle, make_task)
    task = store.get("task")
    assert task is not None and task.error == "stopped by a receiver"
    assert store.get("another") is not None


def test_the_sender_of_a_signal_is_the_app(
    app: Flask, make_app: MakeApp, lifecycle: Lifecycle, make_task: NewTask, hear: Hear
) -> None:
    other_sender = hear(*signals.PUBLIC_SIGNALS, sender=make_app("other"))
    any_sender = hear(*signals.PUBLIC_SIGNALS)
    execution = run(lifecycle, make_task)
    lifecycle.finish(execution, State.COMPLETED, {})
    assert other_sender == []
    assert names(any_sender) == ["task-created", "task-started", "task-completed", "task-finished"]


@pytest.mark.covers("F42")
def test_an_error_of_a_receiver_is_logged_and_changes_nothing(
    app: Flask,
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    hear: Hear,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(sender: Flask, **values: Any) -> None:
        raise RuntimeError("receiver broke")

    failing = (*signals.PUBLIC_SIGNALS, signals.task_changed)
    for signal in failing:
        signal.connect(fail, app)
    received = hear(*signals.PUBLIC_SIGNALS, sender=app)
    try:
        execution = run(lifecycle, make_task)
        execution.advance(5)
        lifecycle.write_progress(execution)
        assert lifecycle.finish(execution, State.COMPLETED, {}) is not None
    finally:
        for signal in failing:
            signal.disconnect(fail)
    expected = [
        "task-created",
        "task-started",
        "task-progressed",
        "task-completed",
        "task-finished",
    ]
    assert names(received) == expected, "later receivers are called"
    task = store.get("task")
    assert task is not None and task.state is State.COMPLETED
    logged = [record for record in caplog.records if "receiver" in record.getMessage().lower()]
    assert {
        record.exc_info[1].args[0] for record in logged if record.exc_info and record.exc_info[1]
    } == {"receiver broke"}
    assert all(name in caplog.text for name in expected)


@pytest.mark.covers("F42")
def test_an_error_of_a_teardown_function_is_logged_and_changes_nothing(
    app: Flask,
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    hear: Hear,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Receivers run in an app context, whose teardown may raise, for example in ``remove()`` of a
    database session. The transition is stored by then and must be returned, or a claimed task would
    never run.
    """

    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise RuntimeError("teardown broke")

    received = hear(*signals.PUBLIC_SIGNALS, sender=app)
    execution = run(lifecycle, make_task)
    assert lifecycle.finish(execution, State.COMPLETED, {}) is not None
    assert names(received) == ["task-created", "task-started", "task-completed", "task-finished"]
    assert "teardown broke" in caplog.text


def test_an_app_context_is_pushed_only_for_receivers_and_if_none_is_active(
    app: Flask, lifecycle: Lifecycle, make_task: NewTask
) -> None:
    pushed: list[str] = []

    def note(sender: Flask, **extra: Any) -> None:
        pushed.append("x")

    with flask.appcontext_pushed.connected_to(note, app):
        execution = run(lifecycle, make_task)
        lifecycle.finish(execution, State.COMPLETED, {})
        assert pushed == [], "no receiver, no context"
        receiver: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        with signals.task_created.connected_to(receiver, app):
            lifecycle.create(make_task("two"), b"{}", None, ())
            assert pushed == ["x"]
            with app.app_context():
                pushed.clear()
                lifecycle.create(make_task("three"), b"{}", None, ())
            assert pushed == [], "the active context is used"


def test_receivers_run_in_the_context_of_their_own_app(
    app: Flask, make_app: MakeApp, lifecycle: Lifecycle, make_task: NewTask
) -> None:
    current: list[str] = []

    def receive(sender: Flask, **values: Any) -> None:
        current.append(flask.current_app.name)

    with signals.task_created.connected_to(receive, app), make_app("other").app_context():
        lifecycle.create(make_task(), b"{}", None, ())
        assert flask.current_app.name == "other"
    assert current == ["app"]


def test_purge_sends_no_signal_if_another_process_may_have_removed_the_task(
    app: Flask,
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store returns an empty endpoint if its connection failed during the commit."""
    lifecycle.finish(run(lifecycle, make_task), State.COMPLETED, {})
    received.clear()
    monkeypatch.setattr(store, "delete", lambda task_id, expect: "")
    assert lifecycle.purge("task") is True
    assert received == []
    monkeypatch.undo()
    assert lifecycle.purge("task") is True
    assert lifecycle.purge("task") is False
    assert names(received) == ["task-removed"]


def test_a_task_that_no_executor_accepts_is_removed_with_a_signal(
    lifecycle: Lifecycle, make_task: NewTask, received: list[tuple[str, AsyncRouteTask]]
) -> None:
    task = make_task()
    lifecycle.create(task, b"{}", None, ())
    assert lifecycle.withdraw(task) is True
    assert lifecycle.withdraw(task) is False
    assert names(received) == ["task-created", "task-removed"]


def test_a_restart_ends_the_limit_of_the_wait(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    lifecycle.create(make_task(on_loss="restart", start_by_us=FAR), b"{}", None, ())
    claim = lifecycle.claim("task")
    assert claim is not None
    task = lifecycle.recover(claim.task)
    assert task is not None
    assert (task.state, task.start_by_us) == (State.NOT_STARTED, None)


def test_the_limit_of_the_wait_applies_after_an_undone_claim(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task has not run, because the process does not know whether its claim was stored."""
    lifecycle.create(make_task(start_by_us=FAR), b"{}", None, ())
    faults = Nth(1, "after")
    monkeypatch.setattr(lifecycle, "_store", FaultyStore(store, faults))
    with pytest.raises(CommitUnknown):
        lifecycle.claim("task")
    lifecycle.pending_writes.retry(math.inf)
    task = store.get("task")
    assert task is not None and task.epoch == 1
    assert (task.state, task.start_by_us) == (State.NOT_STARTED, FAR)


def test_abort_expired_aborts_only_tasks_that_wait_too_long(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    run(lifecycle, make_task, "runs")
    for name, start_by in (("late", 1), ("punctual", FAR), ("unlimited", None)):
        lifecycle.create(make_task(name, start_by_us=start_by), b"{}", None, ())
    lifecycle.create(make_task("of another", owner="another", start_by_us=1), b"{}", None, ())
    received.clear()
    lifecycle.abort_expired()
    assert names(received) == ["task-aborted", "task-finished"]
    ended = received[0][1]
    assert ended == store.get("late")
    assert (ended.state, ended.error, ended.stopping) == (State.ABORTED, "Expired", False)
    lifecycle.abort_expired()
    assert len(received) == 2


def test_abort_expired_reads_further_pages(
    app: Flask, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_asyncroute.engine.lifecycle.PAGE", 2)
    store = make_store("memory://", "", "test", True)
    lifecycle = Lifecycle(app, store, "owner")
    for number in range(5):
        store.add(make_task(f"t{number}", start_by_us=1), b"{}", None, ())
    lifecycle.abort_expired()
    assert store.not_started_in_time(FAR, "owner", 9) == []


def test_abort_expired_ends_after_a_while(
    app: Flask, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other maintenance must not wait until thousands of tasks are aborted."""
    monkeypatch.setattr("flask_asyncroute.engine.lifecycle.EXPIRING_SECONDS", 0)
    store = make_store("memory://", "", "test", True)
    lifecycle = Lifecycle(app, store, "owner")
    for number in range(3):
        store.add(make_task(f"t{number}", start_by_us=number), b"{}", None, ())
    lifecycle.abort_expired()
    assert [task.id for task in store.not_started_in_time(FAR, "owner", 9)] == ["t1", "t2"]


def test_a_check_without_expired_tasks_is_one_read(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifecycle.create(make_task(start_by_us=FAR), b"{}", None, ())
    faults = Nth(0, "before")
    monkeypatch.setattr(lifecycle, "_store", FaultyStore(store, faults))
    lifecycle.abort_expired()
    assert faults.calls == ["not_started_in_time"]


@pytest.mark.parametrize("is_first", [True, False])
def test_either_the_claim_or_the_expiry_of_a_task_succeeds(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
    is_first: bool,
) -> None:
    """The claim is stored after the expired tasks were read, but before they are aborted."""
    lifecycle.create(make_task(start_by_us=FAR), b"{}", None, ())
    late = store.get("task")
    assert late is not None
    received.clear()
    if is_first:
        assert lifecycle.claim("task") is not None
        assert lifecycle.abort(late, "Expired") is None
        assert names(received) == ["task-started"]
    else:
        assert lifecycle.abort(late, "Expired") is not None
        assert lifecycle.claim("task") is None
        assert names(received) == ["task-aborted", "task-finished"]


def test_concurrent_claims_and_checks_start_or_abort_each_task_once(
    lifecycle: Lifecycle,
    store: TaskStore,
    make_task: NewTask,
    received: list[tuple[str, AsyncRouteTask]],
) -> None:
    ids = [f"t{number}" for number in range(40)]
    for number, name in enumerate(ids):
        limit = now_us() + number * 1000
        lifecycle.create(make_task(name, start_by_us=limit), b"{}", None, ())
    received.clear()

    def is_waiting() -> bool:
        return len([name for name, _ in received if name != "task-finished"]) < len(ids)

    def claim_all() -> None:
        while is_waiting():
            for name in reversed(ids):
                lifecycle.claim(name)

    def abort_all() -> None:
        while is_waiting():
            lifecycle.abort_expired()

    threads = [threading.Thread(target=work) for work in (claim_all, abort_all, abort_all)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    outcomes = [(task.id, name) for name, task in received if name != "task-finished"]
    assert sorted(task_id for task_id, _ in outcomes) == sorted(ids)
    for task_id, name in outcomes:
        task = store.get(task_id)
        assert task is not None
        assert task.state is (State.RUNNING if name == "task-started" else State.ABORTED)
