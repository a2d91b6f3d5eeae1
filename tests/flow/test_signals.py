"""Signals: which are sent, in which order and context, and the effects of failing receivers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from blinker import NamedSignal
from flask import Flask, abort, current_app, has_app_context

from flask_asyncroute import (
    AsyncRouteTask,
    State,
    current_task,
    signals,
    task_aborted,
    task_completed,
    task_created,
    task_failed,
    task_finished,
    task_progressed,
    task_removed,
    task_started,
)
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]
SentSignals = list[tuple[str, AsyncRouteTask]]

TERMINAL = (task_completed, task_failed, task_aborted)


def names(sent_signals: SentSignals) -> list[str]:
    return [name for name, _ in sent_signals]


def test_signals_of_a_completed_task(flow: Flow, executor: Any, hear: Any, eventually: Any) -> None:
    @flow.route(executor=executor)
    def work() -> int:
        return 5

    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    task = flow.run()
    eventually(lambda: len(sent_signals) == 4)
    assert names(sent_signals) == [
        "task-created",
        "task-started",
        "task-completed",
        "task-finished",
    ]
    created, started, completed, finished = (record for _, record in sent_signals)
    assert {record.id for _, record in sent_signals} == {task["Id"]}
    assert (created.state, started.state, completed.state) == (
        State.NOT_STARTED,
        State.RUNNING,
        State.COMPLETED,
    )
    assert created.revision < started.revision < completed.revision
    assert completed == finished
    assert completed.to_dict() == task
    assert completed.result == 5
    assert completed.creation_time <= (completed.starting_time or completed.creation_time)


@pytest.mark.parametrize("ending", ["raises", "aborts"])
def test_signals_of_a_failed_task(
    flow: Flow, executor: Any, hear: Any, eventually: Any, ending: str
) -> None:
    @flow.route(executor=executor)
    def work() -> None:
        if ending == "aborts":
            abort(404)
        raise ValueError

    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    flow.run()
    eventually(lambda: len(sent_signals) == 4)
    assert names(sent_signals) == ["task-created", "task-started", "task-failed", "task-finished"]


def test_signals_of_a_stopped_running_task(flow: Flow, hear: Any) -> None:
    begun = threading.Event()

    @flow.route()
    def work() -> str:
        begun.set()
        current_task.sleep(10)
        return "late"

    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    task = flow.start()
    assert begun.wait(5)
    flow.stop(task)
    flow.still(task)
    assert names(sent_signals) == ["task-created", "task-started", "task-aborted", "task-finished"]
    assert sent_signals[2][1].stopping and sent_signals[2][1].error == "Aborted by the user"


def test_signals_of_a_stopped_waiting_task(flow: Flow, hear: Any, gate: threading.Event) -> None:
    @flow.route(max_workers=1)
    def work() -> None:
        gate.wait(10)

    first = flow.start()
    flow.became(first, "Running")
    second = flow.start()
    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    flow.stop(second)
    assert names(sent_signals) == ["task-aborted", "task-finished"]
    assert not sent_signals[0][1].stopping
    gate.set()
    flow.ended(first)


def test_signals_of_a_task_that_times_out(flow: Flow, hear: Any, eventually: Any) -> None:
    @flow.route(timeout=0.1)
    def work() -> None:
        current_task.sleep(10)

    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    flow.start()
    eventually(lambda: len(sent_signals) == 4)
    assert names(sent_signals) == ["task-created", "task-started", "task-aborted", "task-finished"]
    assert sent_signals[2][1].error == "Timeout"


def test_task_progressed_has_the_reported_progress(flow: Flow, hear: Any, eventually: Any) -> None:
    reported = threading.Event()

    @flow.route()
    def work() -> None:
        current_task.set_progress(40, "so far")
        assert reported.wait(5)

    sent_signals: SentSignals = hear(task_progressed, task_completed)
    task = flow.start()
    eventually(lambda: sent_signals)
    assert (sent_signals[0][1].progress, sent_signals[0][1].progress_message) == (40, "so far")
    reported.set()
    flow.ended(task)
    eventually(lambda: names(sent_signals)[-1] == "task-completed")
    assert (sent_signals[-1][1].progress, sent_signals[-1][1].progress_message) == (100, "so far")


def test_the_sender_is_the_app_and_its_context_is_pushed(
    flow: Flow, listen: Any, executor: Any, eventually: Any
) -> None:
    seen: list[tuple[Any, ...]] = []

    def receive(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        seen.append(
            (
                task.state,
                sender is flow.app,
                type(sender) is Flask,
                has_app_context() and current_app.name == "app",
            )
        )

    listen(receive, task_created, task_started, task_completed, task_finished, sender=flow.app)

    @flow.route(executor=executor)
    def work() -> None: ...

    flow.run()
    eventually(lambda: len(seen) == 4)
    assert [ok for _, *oks in seen for ok in oks] == [True] * 12


def test_signals_are_sent_after_the_change_is_stored(
    flow: Flow, listen: Any, executor: Any, eventually: Any
) -> None:
    found: list[tuple[State, State]] = []

    def receive(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        stored = flow.async_routes.get(task.id)
        assert stored is not None
        found.append((task.state, stored.state))

    @flow.route(executor=executor)
    def work() -> None: ...

    listen(receive, task_created, task_started, task_completed, sender=flow.app)
    flow.run()
    eventually(lambda: len(found) == 3)
    for at_send, in_store in found:
        assert list(State).index(in_store) >= list(State).index(at_send)
    assert found[-1] == (State.COMPLETED, State.COMPLETED)


@pytest.mark.covers("F42")
@pytest.mark.parametrize(
    "error", [RuntimeError("in the receiver"), SystemExit("in the receiver")], ids=repr
)
def test_a_failing_receiver_is_logged_and_the_others_are_called(
    flow: Flow,
    executor: Any,
    error: BaseException,
    listen: Any,
    caplog: pytest.LogCaptureFixture,
    eventually: Any,
) -> None:
    called: list[str] = []

    def raising(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        called.append("raising")
        raise error

    def other(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        called.append("other")

    @flow.route(executor=executor)
    def work() -> str:
        return "done"

    all_signals = (task_created, task_started, task_completed, task_finished)
    listen(raising, *all_signals, sender=flow.app)
    listen(other, *all_signals, sender=flow.app)
    assert flow.result() == "done"
    eventually(lambda: len(called) == 8)
    assert called.count("raising") == called.count("other") == 4
    for signal in all_signals:
        assert any(signal.name in message for message in caplog.messages)
    assert "in the receiver" in caplog.text


def test_a_receiver_that_aborts_does_not_refuse_the_start(flow: Flow, listen: Any) -> None:
    def refuse(sender: Flask, **extra: Any) -> None:
        abort(403)

    @flow.route()
    def work() -> str:
        return "done"

    listen(refuse, task_created, sender=flow.app)
    assert flow.result() == "done"


@pytest.mark.parametrize("signal", [task_created, task_started], ids=lambda signal: signal.name)
def test_a_receiver_may_stop_the_task(
    flow: Flow, executor: Any, listen: Any, signal: NamedSignal
) -> None:
    ran = []

    def stop(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        flow.async_routes.stop(task.id)

    @flow.route(executor=executor)
    def work() -> None:
        ran.append(1)

    listen(stop, signal, sender=flow.app)
    found = flow.still(flow.start())
    assert (found["State"], ran) == ("Aborted", []), (
        "also if it is stopped between the claim and the view"
    )


def test_a_receiver_may_wait_and_query(flow: Flow, listen: Any, eventually: Any) -> None:
    found: list[Any] = []

    def look(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        found.append(
            [flow.async_routes.wait(task.id, 0).id, [one.id for one in flow.async_routes.query()]]
        )

    @flow.route()
    def work() -> None: ...

    listen(look, task_finished, sender=flow.app)
    task = flow.run()
    eventually(lambda: found)
    assert found == [[task["Id"], [task["Id"]]]]


def test_a_receiver_is_bound_to_its_app(make_flow: MakeFlow, hear: Any, eventually: Any) -> None:
    one, two = make_flow(), make_flow()
    for flow in (one, two):
        flow.route()(lambda: 1)
    sent_signals: SentSignals = hear(task_created, task_completed, sender=one.app)
    one.run()
    two.run()
    eventually(lambda: len(sent_signals) == 2)
    assert {record.id for _, record in sent_signals} == set(one.ids())


@pytest.mark.covers("F15")
@pytest.mark.parametrize("executor_name", ["thread", "own"])
def test_each_task_has_one_terminal_signal_if_a_stop_races_its_end(
    flow: Flow, hear: Any, eventually: Any, executor_name: str, own_pool: Any
) -> None:
    """The signal matches the state and the response to the stop."""
    ends = [threading.Event() for _ in range(60)]

    @flow.route(
        "/<int:n>", executor=own_pool if executor_name == "own" else "thread", max_workers=2
    )
    def work(n: int) -> int:
        ends[n].wait(10)
        return n

    sent_signals: SentSignals = hear(*TERMINAL)
    answers: dict[str, int] = {}
    for n, end in enumerate(ends):
        task = flow.start(f"/{n}")
        if n % 3:
            flow.became(task, "Running")
        setter = threading.Thread(target=end.set)
        setter.start()
        answers[task["Id"]] = flow.request("DELETE", f"/task/{task['Id']}").status_code
        setter.join()
        state = flow.still(task)["State"]
        assert (answers[task["Id"]], state) in {(200, "Aborted"), (410, "Completed")}
    eventually(lambda: len(sent_signals) >= len(ends))
    signals_by_id: dict[str, list[str]] = {}
    for name, record in sent_signals:
        signals_by_id.setdefault(record.id, []).append(name)
    assert {
        task_id: ["task-aborted" if status == 200 else "task-completed"]
        for task_id, status in answers.items()
    } == signals_by_id


@pytest.mark.covers("F16")
def test_concurrent_stops_get_the_same_response(
    flow: Flow, hear: Any, gate: threading.Event
) -> None:
    @flow.route(max_workers=20)
    def work() -> None:
        gate.wait(10)

    sent_signals: SentSignals = hear(*TERMINAL)
    for _ in range(10):
        task = flow.start()
        flow.became(task, "Running")
        answers: list[tuple[int, str, str]] = []

        def stop(path: str = f"/task/{task['Id']}", answers: list[Any] = answers) -> None:
            response = flow.app.test_client().delete(path)
            answers.append(
                (
                    response.status_code,
                    response.get_json()["State"],
                    response.get_json()["CompletedTime"],
                )
            )

        threads = [threading.Thread(target=stop) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(answers)) == 1 and answers[0][:2] == (200, "Aborted")
    assert names(sent_signals) == ["task-aborted"] * 10
    gate.set()
    for task_id in flow.ids():
        flow.still(task_id)


def test_a_refused_start_sends_no_signal(flow: Flow, hear: Any) -> None:
    @flow.route(id_generator=lambda: "")
    def work() -> None: ...

    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    flow.start(status=500)
    assert not sent_signals


@pytest.fixture
def removed(flow: Flow, listen: Any) -> list[dict[str, Any]]:
    """Return a list to which ``task_removed`` appends its arguments."""
    received: list[dict[str, Any]] = []
    listen(lambda sender, **values: received.append(values), task_removed, sender=flow.app)
    return received


def test_a_purge_sends_task_removed(flow: Flow, removed: list[dict[str, Any]]) -> None:
    flow.route("/a", endpoint="first")(lambda: 1)
    flow.route("/b", endpoint="second")(lambda: 1)
    one, two = flow.run("/a"), flow.run("/b")
    flow.purge(one)
    assert removed == [{"task_id": one["Id"], "endpoint": "first"}]
    with flow.app.app_context():
        flow.async_routes.purge(two["Id"])
    assert removed[1:] == [{"task_id": two["Id"], "endpoint": "second"}]


def test_a_purge_sends_only_task_removed(flow: Flow, hear: Any, eventually: Any) -> None:
    flow.route()(lambda: 1)
    sent_signals: SentSignals = hear(*signals.PUBLIC_SIGNALS)
    task = flow.run()
    eventually(lambda: len(sent_signals) == 4)
    flow.purge(task)
    assert sent_signals[4:] == [("task-removed", task["Id"])]


def test_a_refused_purge_sends_no_signal(
    flow: Flow, removed: list[dict[str, Any]], gate: threading.Event
) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    flow.purge(task, status=409)
    flow.purge("unknown", status=404)
    gate.set()
    flow.ended(task)
    flow.purge(task)
    flow.purge(task, status=404)
    assert [values["task_id"] for values in removed] == [task["Id"]]


def test_concurrent_purges_send_one_signal(flow: Flow, removed: list[dict[str, Any]]) -> None:
    flow.route()(lambda: 1)
    for _ in range(5):
        task = flow.run()
        statuses: list[int] = []

        def purge(
            path: str = f"/task/{task['Id']}?purge=true", statuses: list[int] = statuses
        ) -> None:
            statuses.append(flow.app.test_client().delete(path).status_code)

        threads = [threading.Thread(target=purge) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [204, 404, 404]
    assert len(removed) == 5


def test_task_removed_is_sent_after_the_commit_in_an_app_context(flow: Flow, listen: Any) -> None:
    found: list[Any] = []

    def receive(sender: Flask, task_id: str, **extra: Any) -> None:
        in_context = current_app._get_current_object() is sender  # type: ignore[attr-defined]
        found.append((in_context, flow.async_routes.exists(task_id)))

    flow.route()(lambda: 1)
    listen(receive, task_removed, sender=flow.app)
    flow.purge(flow.run())
    assert found == [(True, False)]


def test_a_failing_receiver_of_task_removed_is_logged(
    flow: Flow, listen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(sender: Flask, **extra: Any) -> None:
        raise RuntimeError("in the receiver")

    flow.route()(lambda: 1)
    listen(fail, task_removed, sender=flow.app)
    task = flow.run()
    flow.purge(task)
    flow.get(task, status=404)
    assert "A receiver of the signal task-removed raised an exception" in caplog.text
