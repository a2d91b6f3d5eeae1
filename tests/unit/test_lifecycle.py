"""The only writer of State: each step against the store, and what is told of it, to whom, when."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import flask
import pytest
from flask import Flask

from flask_asyncroute import signals
from flask_asyncroute.errors import IdTaken
from flask_asyncroute.execution import Execution
from flask_asyncroute.lifecycle import Lifecycle
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask

MakeApp = Callable[..., Flask]
NewTask = Callable[..., AsyncRouteTask]
Hear = Callable[..., list[tuple[str, AsyncRouteTask]]]


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app()


@pytest.fixture
def lifecycle(app: Flask, store: TaskStore) -> Lifecycle:
    return Lifecycle(app, store, "owner")


@pytest.fixture
def heard(app: Flask, hear: Hear) -> list[tuple[str, AsyncRouteTask]]:
    return hear(*signals.FACTS, sender=app)


def run(lifecycle: Lifecycle, make_task: NewTask, task_id: str = "task") -> Execution:
    """Bring a task to Running as `worker` does."""
    lifecycle.create(make_task(task_id), b"{}", None, ())
    claim = lifecycle.claim(task_id)
    assert claim is not None
    execution = Execution(task_id)
    execution.begin(claim.task.user, claim.task.epoch, None)
    return execution


def names(heard: list[tuple[str, AsyncRouteTask]]) -> list[str]:
    return [name for name, _ in heard]


def test_a_creation_is_told_of(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    assert names(heard) == ["task-created"]
    assert heard[0][1].id == "task"
    stored = store.get("task")
    assert stored is not None and stored.state is State.NOT_STARTED


def test_a_creation_that_fails_is_not_told_of(
    lifecycle: Lifecycle, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    with pytest.raises(IdTaken):
        lifecycle.create(make_task(), b"{}", None, ())
    assert names(heard) == ["task-created"]


def test_a_claim_is_told_of_once(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
) -> None:
    lifecycle.create(make_task(), b"request", None, ())
    claim = lifecycle.claim("task")
    assert claim is not None
    assert (claim.request, claim.task.owner) == (b"request", "owner")
    assert lifecycle.claim("task") is None
    assert lifecycle.claim("unknown") is None
    assert names(heard) == ["task-created", "task-started"]
    assert heard[1][1] == claim.task == store.get("task")


@pytest.mark.parametrize(
    ("state", "name", "values"),
    [
        (State.COMPLETED, "task-completed", {"result_json": b"[1]"}),
        (State.FAILED, "task-failed", {"error": "ValueError: x"}),
        (State.ABORTED, "task-aborted", {"error": "Timeout"}),
    ],
)
def test_an_end_is_told_of_twice_and_written_once(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]], state: State, name: str,
    values: dict[str, Any],
) -> None:  # fmt: skip
    execution = run(lifecycle, make_task)
    heard.clear()
    task = lifecycle.finish(execution, state, values)
    assert task is not None and task == store.get("task")
    assert task.state is state
    assert all(getattr(task, field) == value for field, value in values.items())
    assert task.completed_us is not None and task.started_us is not None and task.completed_us >= task.started_us
    assert not task.stopping
    assert heard == [(name, task), ("task-finished", task)]
    assert lifecycle.finish(execution, State.FAILED, {"error": "again"}) is None
    assert store.get("task") == task
    assert len(heard) == 2


@pytest.mark.parametrize(
    ("state", "reported", "kept"),
    [
        (State.COMPLETED, (40, "m"), (100.0, "m")), (State.FAILED, (40, "m"), (40.0, "m")), (State.ABORTED, (40, None), (40.0, None)),
        (State.COMPLETED, None, (None, None)), (State.FAILED, None, (None, None)), (State.COMPLETED, (math.nan, "m"), (100.0, "m")),
    ],
)  # fmt: skip
def test_the_last_progress_goes_with_the_end(
    lifecycle: Lifecycle, make_task: NewTask, state: State, reported: Any, kept: Any
) -> None:
    execution = run(lifecycle, make_task)
    if reported is not None:
        execution.advance(*reported)
    task = lifecycle.finish(execution, state, {})
    assert task is not None and (task.progress, task.progress_message) == kept
    assert not execution.has_report


def test_a_stop_of_a_waiting_task(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
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
    assert names(heard) == ["task-created", "task-aborted", "task-finished"]
    assert lifecycle.claim("task") is None


def test_a_stop_of_a_running_task_and_the_end_of_its_code(
    lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
) -> None:
    execution = run(lifecycle, make_task)
    execution.advance(30)
    running = store.get("task")
    assert running is not None
    heard.clear()
    task = lifecycle.abort(running, "Aborted by the user")
    assert task is not None and task.stopping
    assert names(heard) == ["task-aborted", "task-finished"]
    # The view returns after all: its result is dropped, its end is noted, and nobody hears of a second end.
    assert lifecycle.finish(execution, State.COMPLETED, {"result_json": b"1"}) is None
    ended = store.get("task")
    assert ended is not None
    assert (ended.state, ended.stopping, ended.result_json, ended.progress) == (State.ABORTED, False, None, None)
    assert ended.revision == task.revision + 1, "the end of Stopping is a change that clients see"
    assert ended.completed_us == task.completed_us
    assert names(heard) == ["task-aborted", "task-finished"]
    lifecycle.release(execution)
    assert store.get("task") == ended


def test_a_stop_needs_the_task_as_it_was_seen(lifecycle: Lifecycle, store: TaskStore, make_task: NewTask) -> None:
    lifecycle.create(make_task(), b"{}", None, ())
    waiting = store.get("task")
    lifecycle.claim("task")
    assert waiting is not None
    assert lifecycle.abort(waiting, "x") is None
    running = store.get("task")
    assert running is not None and running.state is State.RUNNING
    assert lifecycle.abort(running, "x") is not None
    assert lifecycle.abort(running, "x") is None


def test_a_time_out(lifecycle: Lifecycle, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]) -> None:
    execution = run(lifecycle, make_task)
    heard.clear()
    task = lifecycle.expire(execution, "Timeout")
    assert task is not None and (task.state, task.error, task.stopping) == (State.ABORTED, "Timeout", True)
    assert names(heard) == ["task-aborted", "task-finished"]
    assert lifecycle.expire(execution, "Timeout") is None


@pytest.mark.parametrize("step", ["finish", "expire", "release", "progress"])
@pytest.mark.parametrize("other", ["epoch", "owner"])
def test_only_who_holds_the_task_writes(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, step: str, other: str
) -> None:
    """A worker that was thought dead, whose task somebody else runs by now, changes nothing."""
    execution = run(lifecycle, make_task)
    execution.advance(50)
    if step == "release":
        running = store.get("task")
        assert running is not None
        lifecycle.abort(running, "x")
    before = store.get("task")
    if other == "epoch":
        execution.epoch = 7
    else:
        lifecycle = Lifecycle(app, store, "another owner")
    steps: dict[str, Callable[[], object]] = {
        "finish": lambda: lifecycle.finish(execution, State.COMPLETED, {}),
        "expire": lambda: lifecycle.expire(execution, "x"),
        "release": lambda: lifecycle.release(execution),
        "progress": lambda: lifecycle.on_progress_reported(app, execution),
    }
    assert steps[step]() is None
    assert store.get("task") == before


@pytest.mark.parametrize("before", [State.NOT_STARTED, State.COMPLETED, State.FAILED, State.ABORTED])
def test_i2_no_step_leaves_a_terminal_state_or_skips_one(
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
        with pytest.raises(ValueError, match=f"no step from {before}"):
            lifecycle.abort(stored, "x")
    assert store.get("task") == stored


@pytest.mark.parametrize("state", [State.NOT_STARTED, State.RUNNING])
def test_a_run_cannot_end_in_a_state_that_is_no_end(lifecycle: Lifecycle, make_task: NewTask, state: State) -> None:
    execution = run(lifecycle, make_task)
    with pytest.raises(ValueError, match="no step"):
        lifecycle.finish(execution, state, {})


def test_progress_is_written_and_told_of(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
) -> None:
    execution = run(lifecycle, make_task)
    before = store.get("task")
    heard.clear()
    signals.progress_reported.send(app, execution=execution)
    assert store.get("task") == before, "there was nothing to write"
    execution.advance(10, "a")
    execution.advance(20, "b")
    signals.progress_reported.send(app, execution=execution)
    task = store.get("task")
    assert task is not None and before is not None
    assert (task.progress, task.progress_message, task.revision) == (20.0, "b", before.revision + 1)
    assert heard == [("task-progressed", task)]
    signals.progress_reported.send(app, execution=execution)
    assert store.get("task") == task


def test_progress_after_the_end_is_dropped(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, heard: list[tuple[str, AsyncRouteTask]]
) -> None:
    execution = run(lifecycle, make_task)
    task = lifecycle.finish(execution, State.FAILED, {})
    heard.clear()
    execution.advance(99, "late")
    signals.progress_reported.send(app, execution=execution)
    assert store.get("task") == task
    assert heard == []


def test_progress_of_another_app_is_not_ours(
    make_app: MakeApp, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    execution = run(lifecycle, make_task)
    execution.advance(10)
    signals.progress_reported.send(make_app("other"), execution=execution)
    task = store.get("task")
    assert task is not None and task.progress is None
    assert execution.has_report


def test_only_what_has_ended_is_purged(lifecycle: Lifecycle, store: TaskStore, make_task: NewTask) -> None:
    assert lifecycle.purge("unknown") is False
    execution = run(lifecycle, make_task)
    assert lifecycle.purge("task") is False
    running = store.get("task")
    assert running is not None
    lifecycle.abort(running, "x")
    assert lifecycle.purge("task") is False, "its code goes on"
    lifecycle.release(execution)
    assert lifecycle.purge("task") is True
    assert lifecycle.purge("task") is False
    assert store.get("task") is None
    lifecycle.create(make_task("waits"), b"{}", None, ())
    assert lifecycle.purge("waits") is False


def test_a_fact_is_told_of_when_the_store_has_it(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    seen: list[tuple[AsyncRouteTask | None, AsyncRouteTask, Any]] = []

    def receive(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        seen.append((store.get(task.id), task, flask.current_app._get_current_object()))  # type: ignore[attr-defined]

    with signals.task_started.connected_to(receive, app), signals.task_finished.connected_to(receive, app):
        execution = run(lifecycle, make_task)
        lifecycle.finish(execution, State.COMPLETED, {})
    assert len(seen) == 2
    for stored, told, current in seen:
        assert stored == told
        assert current is app


def test_a_receiver_may_take_steps_itself(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask
) -> None:
    """No lock of the store is held while facts are told: a receiver may read, start and stop tasks."""

    def stop(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        lifecycle.abort(task, "stopped by a receiver")
        lifecycle.create(make_task("another"), b"{}", None, ())

    with signals.task_started.connected_to(stop, app):
        run(lifecycle, make_task)
    task = store.get("task")
    assert task is not None and task.error == "stopped by a receiver"
    assert store.get("another") is not None


def test_facts_are_told_to_the_receivers_of_the_app_alone(
    app: Flask, make_app: MakeApp, lifecycle: Lifecycle, make_task: NewTask, hear: Hear
) -> None:
    others = hear(*signals.FACTS, sender=make_app("other"))
    alls = hear(*signals.FACTS)
    execution = run(lifecycle, make_task)
    lifecycle.finish(execution, State.COMPLETED, {})
    assert others == []
    assert names(alls) == ["task-created", "task-started", "task-completed", "task-finished"]


def test_f42_a_receiver_that_raises_harms_nobody(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, hear: Hear, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(sender: Flask, **values: Any) -> None:
        raise RuntimeError("receiver broke")

    failing = (*signals.FACTS, signals.task_changed)
    for signal in failing:
        signal.connect(fail, app)
    heard = hear(*signals.FACTS, sender=app)
    try:
        execution = run(lifecycle, make_task)
        execution.advance(5)
        signals.progress_reported.send(app, execution=execution)
        assert lifecycle.finish(execution, State.COMPLETED, {}) is not None
    finally:
        for signal in failing:
            signal.disconnect(fail)
    wanted = ["task-created", "task-started", "task-progressed", "task-completed", "task-finished"]
    assert names(heard) == wanted, "later receivers are called"
    task = store.get("task")
    assert task is not None and task.state is State.COMPLETED
    logged = [record for record in caplog.records if "receiver" in record.getMessage().lower()]
    assert {record.exc_info[1].args[0] for record in logged if record.exc_info and record.exc_info[1]} == {
        "receiver broke"
    }
    assert all(name in caplog.text for name in wanted)


def test_f42_an_app_whose_teardown_raises_harms_nobody(
    app: Flask, lifecycle: Lifecycle, store: TaskStore, make_task: NewTask, hear: Hear, caplog: pytest.LogCaptureFixture
) -> None:
    """The app context that is pushed for receivers is torn down by the app's own functions; a database session's remove()
    may raise there. The step was taken: who took it must hear of it, or a task that was claimed would never be run."""

    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise RuntimeError("teardown broke")

    heard = hear(*signals.FACTS, sender=app)
    execution = run(lifecycle, make_task)
    assert lifecycle.finish(execution, State.COMPLETED, {}) is not None
    assert names(heard) == ["task-created", "task-started", "task-completed", "task-finished"]
    assert "teardown broke" in caplog.text


def test_an_app_context_is_pushed_where_somebody_listens(app: Flask, lifecycle: Lifecycle, make_task: NewTask) -> None:
    pushed: list[str] = []

    def note(sender: Flask, **extra: Any) -> None:
        pushed.append("x")

    with flask.appcontext_pushed.connected_to(note, app):
        execution = run(lifecycle, make_task)
        lifecycle.finish(execution, State.COMPLETED, {})
        assert pushed == [], "nobody listens, nothing is pushed"
        receiver: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        with signals.task_created.connected_to(receiver, app):
            lifecycle.create(make_task("two"), b"{}", None, ())
            assert pushed == ["x"]
            with app.app_context():
                pushed.clear()
                lifecycle.create(make_task("three"), b"{}", None, ())
            assert pushed == [], "it is there already"


def test_the_context_of_another_app_is_not_taken_for_ours(
    app: Flask, make_app: MakeApp, lifecycle: Lifecycle, make_task: NewTask
) -> None:
    current: list[str] = []

    def receive(sender: Flask, **values: Any) -> None:
        current.append(flask.current_app.name)

    with signals.task_created.connected_to(receive, app), make_app("other").app_context():
        lifecycle.create(make_task(), b"{}", None, ())
        assert flask.current_app.name == "other"
    assert current == ["app"]


def test_a_lifecycle_that_is_dropped_hears_no_more(make_app: MakeApp) -> None:
    app = make_app()
    lifecycle = Lifecycle(app, MemoryTaskStore(), "owner")
    reference = weakref.ref(lifecycle)
    del lifecycle
    gc.collect()
    assert reference() is None
    signals.progress_reported.send(app, execution=Execution("task"))
