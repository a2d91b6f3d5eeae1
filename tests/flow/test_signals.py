"""The facts: which are sent, in which order, by whom, and what a receiver that raises can and cannot do."""

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
    task_started,
)
from tests.flow.driving import Flow

MakeFlow = Callable[..., Flow]
Heard = list[tuple[str, AsyncRouteTask]]

TERMINAL = (task_completed, task_failed, task_aborted)


def names(heard: Heard) -> list[str]:
    return [name for name, _ in heard]


def test_a_task_that_completes(flow: Flow, executor: Any, hear: Any, eventually: Any) -> None:
    @flow.route(executor=executor)
    def work() -> int:
        return 5

    heard: Heard = hear(*signals.FACTS)
    task = flow.run()
    eventually(lambda: len(heard) == 4)
    assert names(heard) == ["task-created", "task-started", "task-completed", "task-finished"]
    created, started, completed, finished = (record for _, record in heard)
    assert {record.id for _, record in heard} == {task["Id"]}
    assert (created.state, started.state, completed.state) == (State.NOT_STARTED, State.RUNNING, State.COMPLETED)
    assert created.revision < started.revision < completed.revision
    assert completed == finished
    assert completed.to_dict() == task
    assert completed.result == 5
    assert completed.creation_time <= (completed.starting_time or completed.creation_time)


@pytest.mark.parametrize("how", ["raises", "aborts"])
def test_a_task_that_fails(flow: Flow, executor: Any, hear: Any, eventually: Any, how: str) -> None:
    @flow.route(executor=executor)
    def work() -> None:
        if how == "aborts":
            abort(404)
        raise ValueError

    heard: Heard = hear(*signals.FACTS)
    flow.run()
    eventually(lambda: len(heard) == 4)
    assert names(heard) == ["task-created", "task-started", "task-failed", "task-finished"]


def test_a_running_task_that_is_stopped(flow: Flow, hear: Any) -> None:
    begun = threading.Event()

    @flow.route()
    def work() -> str:
        begun.set()
        current_task.sleep(10)
        return "late"

    heard: Heard = hear(*signals.FACTS)
    task = flow.start()
    assert begun.wait(5)
    flow.stop(task)
    flow.still(task)
    assert names(heard) == ["task-created", "task-started", "task-aborted", "task-finished"]
    assert heard[2][1].stopping and heard[2][1].error == "Aborted by the user"


def test_a_waiting_task_that_is_stopped(flow: Flow, hear: Any, gate: threading.Event) -> None:
    @flow.route(max_workers=1)
    def work() -> None:
        gate.wait(10)

    first = flow.start()
    flow.became(first, "Running")
    second = flow.start()
    heard: Heard = hear(*signals.FACTS)
    flow.stop(second)
    assert names(heard) == ["task-aborted", "task-finished"]
    assert not heard[0][1].stopping
    gate.set()
    flow.ended(first)


def test_a_task_that_runs_out_of_time(flow: Flow, hear: Any) -> None:
    @flow.route(timeout=0.1)
    def work() -> None:
        current_task.sleep(10)

    heard: Heard = hear(*signals.FACTS)
    flow.still(flow.start())
    assert names(heard) == ["task-created", "task-started", "task-aborted", "task-finished"]
    assert heard[2][1].error == "Timeout"


def test_progress(flow: Flow, hear: Any, eventually: Any) -> None:
    reported = threading.Event()

    @flow.route()
    def work() -> None:
        current_task.set_progress(40, "so far")
        assert reported.wait(5)

    heard: Heard = hear(task_progressed, task_completed)
    task = flow.start()
    eventually(lambda: heard)
    assert (heard[0][1].progress, heard[0][1].progress_message) == (40, "so far")
    reported.set()
    flow.ended(task)
    eventually(lambda: names(heard)[-1] == "task-completed")
    assert (heard[-1][1].progress, heard[-1][1].progress_message) == (100, "so far")


def test_the_sender_is_the_app_and_its_context_is_there(
    flow: Flow, listen: Any, executor: Any, eventually: Any
) -> None:
    seen: list[tuple[Any, ...]] = []

    def receive(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        seen.append(
            (task.state, sender is flow.app, type(sender) is Flask, has_app_context() and current_app.name == "app")
        )

    listen(receive, task_created, task_started, task_completed, task_finished, sender=flow.app)

    @flow.route(executor=executor)
    def work() -> None: ...

    flow.run()
    eventually(lambda: len(seen) == 4)
    assert [ok for _, *oks in seen for ok in oks] == [True] * 12


def test_the_store_has_the_fact_when_it_is_sent(flow: Flow, listen: Any, executor: Any, eventually: Any) -> None:
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


@pytest.mark.parametrize("error", [RuntimeError("in the receiver"), SystemExit("in the receiver")], ids=repr)
def test_f42_a_receiver_that_raises_is_logged_and_later_ones_are_called(
    flow: Flow, executor: Any, error: BaseException, listen: Any, caplog: pytest.LogCaptureFixture, eventually: Any
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

    facts = (task_created, task_started, task_completed, task_finished)
    listen(raising, *facts, sender=flow.app)
    listen(other, *facts, sender=flow.app)
    assert flow.result() == "done"
    eventually(lambda: len(called) == 8)
    assert called.count("raising") == called.count("other") == 4
    for signal in facts:
        assert any(signal.name in message for message in caplog.messages)
    assert "in the receiver" in caplog.text


def test_a_receiver_that_aborts_the_request_harms_no_start(flow: Flow, listen: Any) -> None:
    def refuse(sender: Flask, **extra: Any) -> None:
        abort(403)

    @flow.route()
    def work() -> str:
        return "done"

    listen(refuse, task_created, sender=flow.app)
    assert flow.result() == "done"


@pytest.mark.parametrize("fact", [task_created, task_started], ids=lambda fact: fact.name)
def test_a_receiver_may_stop_the_task(flow: Flow, executor: Any, listen: Any, fact: NamedSignal) -> None:
    ran = []

    def stop(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        flow.async_routes.stop(task.id)

    @flow.route(executor=executor)
    def work() -> None:
        ran.append(1)

    listen(stop, fact, sender=flow.app)
    found = flow.still(flow.start())
    assert (found["State"], ran) == ("Aborted", []), "also where it is stopped after the claim and before the view"


def test_a_receiver_may_wait_and_query(flow: Flow, listen: Any, eventually: Any) -> None:
    found: list[Any] = []

    def look(sender: Flask, task: AsyncRouteTask, **extra: Any) -> None:
        found.append([flow.async_routes.wait(task.id, 0).id, [one.id for one in flow.async_routes.query()]])

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
    heard: Heard = hear(task_created, task_completed, sender=one.app)
    one.run()
    two.run()
    eventually(lambda: len(heard) == 2)
    assert {record.id for _, record in heard} == set(one.ids())


@pytest.mark.parametrize("executor_name", ["thread", "own"])
def test_f15_one_terminal_signal_each_whatever_wins(
    flow: Flow, hear: Any, eventually: Any, executor_name: str, own_pool: Any
) -> None:
    """Stops that race with ends: one terminal state, one signal of it, and the answers tell the truth."""
    ends = [threading.Event() for _ in range(60)]

    @flow.route("/<int:n>", executor=own_pool if executor_name == "own" else "thread", max_workers=2)
    def work(n: int) -> int:
        ends[n].wait(10)
        return n

    heard: Heard = hear(*TERMINAL)
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
    eventually(lambda: len(heard) >= len(ends))
    told: dict[str, list[str]] = {}
    for name, record in heard:
        told.setdefault(record.id, []).append(name)
    assert {
        task_id: ["task-aborted" if status == 200 else "task-completed"] for task_id, status in answers.items()
    } == told


def test_f16_two_stops_at_once(flow: Flow, hear: Any, gate: threading.Event) -> None:
    @flow.route(max_workers=20)
    def work() -> None:
        gate.wait(10)

    heard: Heard = hear(*TERMINAL)
    for _ in range(10):
        task = flow.start()
        flow.became(task, "Running")
        answers: list[tuple[int, str, str]] = []

        def stop(path: str = f"/task/{task['Id']}", answers: list[Any] = answers) -> None:
            response = flow.app.test_client().delete(path)
            answers.append((response.status_code, response.get_json()["State"], response.get_json()["CompletedTime"]))

        threads = [threading.Thread(target=stop) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(answers)) == 1 and answers[0][:2] == (200, "Aborted")
    assert names(heard) == ["task-aborted"] * 10
    gate.set()
    for task_id in flow.ids():
        flow.still(task_id)


def test_nothing_is_sent_for_a_start_that_is_refused(flow: Flow, hear: Any) -> None:
    @flow.route(id_generator=lambda: "")
    def work() -> None: ...

    heard: Heard = hear(*signals.FACTS)
    flow.start(status=500)
    assert not heard


def test_a_purge_is_no_fact(flow: Flow, hear: Any, eventually: Any) -> None:
    flow.route()(lambda: 1)
    task = flow.run()
    heard: Heard = hear(*signals.FACTS)
    flow.purge(task)
    assert not [name for name, record in heard if name != "task-finished" and name != "task-completed"]
