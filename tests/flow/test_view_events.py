"""Events sent by views are stored in order and before the end of the task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, State, current_task
from flask_asyncroute.errors import ResultError
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import STATE
from flask_asyncroute.testing import fake_task
from tests.support.flow import Flow

MakeApp = Callable[..., Flask]
STORES = ["memory://", "sqlite:///asyncroute.db"]


def sent_by(app: Flask, task_id: str) -> list[tuple[str, bytes | None]]:
    """Return the events that the view of a task has sent, in order."""
    events = runtime_of(app).runner.store.events(0, 5000, task_id).events
    return [(event.name, event.data) for event in events if event.name != STATE]


@pytest.fixture(params=STORES)
def app(request: pytest.FixtureRequest, make_app: MakeApp) -> Flask:
    return make_app(ASYNCROUTE_STORE=request.param)


def started(app: Flask, path: str) -> str:
    answer = app.test_client().put(path)
    assert answer.status_code == 202, answer.text
    return str(answer.json["Id"])


def ended(async_routes: AsyncRoute, app: Flask, task_id: str) -> Any:
    with app.app_context():
        return async_routes.wait(task_id, 10)


def test_events_are_stored_in_order_and_before_the_end(app: Flask) -> None:
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["PUT"])
    def work() -> None:
        for number in range(2500):
            current_task.send_event({"n": number}, "step")
        current_task.send_event("ü\n")

    task_id = started(app, "/work")
    task = ended(async_routes, app, task_id)
    assert task.state is State.COMPLETED
    sent = sent_by(app, task_id)
    assert sent[-1] == ("message", '"ü\\n"'.encode())
    steps = [data for name, data in sent[:-1]]
    assert steps[-999:] == [b'{"n":%d}' % number for number in range(1501, 2500)]
    with app.app_context():
        events = runtime_of(app).runner.store.events(0, 5000, task_id)
    assert events.events[-1].task.state is State.COMPLETED and events.events[-1].name == STATE


def test_events_are_stored_while_the_view_runs(
    app: Flask, eventually: Callable[..., Any], gate: threading.Event
) -> None:
    """They are not delayed until the next progress update or the end."""
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["PUT"])
    def work() -> None:
        for number in range(3):
            current_task.send_event(number)
            current_task.progress = number
        gate.wait(10)

    task_id = started(app, "/work")
    assert eventually(lambda: len([e for e in sent_by(app, task_id) if e[0] == "message"]) == 3)


def test_events_of_coroutines(app: Flask) -> None:
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["PUT"])
    async def work() -> None:
        current_task.send_event([1], "a")
        current_task.send_event(None, "b")

    task_id = started(app, "/work")
    ended(async_routes, app, task_id)
    assert sent_by(app, task_id) == [("a", b"[1]"), ("b", b"null")]


def test_a_stop_stores_the_events_sent_before_it(app: Flask, gate: threading.Event) -> None:
    """The thread that usually stores them is closed here."""
    async_routes = AsyncRoute(app)
    sent, may_send = threading.Event(), threading.Event()

    @async_routes.route("/work", methods=["PUT"])
    def work() -> None:
        may_send.wait(10)
        current_task.send_event("last word")
        sent.set()
        gate.wait(10)

    task_id = started(app, "/work")
    runner = runtime_of(app).runner
    assert runner.notifier.wait(task_id, lambda task: task.state is State.RUNNING, 10)
    runner.maintenance.close()
    may_send.set()
    assert sent.wait(10)
    assert sent_by(app, task_id) == []
    assert app.test_client().delete(f"/task/{task_id}").status_code == 200
    assert sent_by(app, task_id) == [("message", b'"last word"')]


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "task.state",
        "task.x",
        "a\nb",
        "a\rb",
        "a\0b",
        "x" * 256,
        7,
        None,
        "\ud800",
        " a",
        "a ",
    ],
)
def test_names_of_events_are_checked(name: Any) -> None:
    with fake_task() as task, pytest.raises(ValueError, match="send_event"):
        task.send_event(1, name)


@pytest.mark.parametrize("data", [{1, 2}, b"x", "x" * 64 * 1024, object()])
def test_data_of_events_is_checked(data: Any) -> None:
    with fake_task() as task, pytest.raises(ResultError):
        task.send_event(data)


def test_a_fake_task_accepts_any_number_of_events() -> None:
    with fake_task() as task:
        for number in range(3000):
            task.send_event(number)


@pytest.mark.parametrize("store_url", ["memory", "sqlite"], indirect=True)
def test_an_event_that_is_being_stored_at_the_end_of_the_view_is_kept(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome waits for it: after the end, the store accepts no more events."""
    is_storing, may_store = threading.Event(), threading.Event()

    @flow.route()
    def work() -> str:
        current_task.send_event({"n": 1}, event="tick")
        assert is_storing.wait(20)
        threading.Timer(0.1, may_store.set).start()
        return "done"

    store = runtime_of(flow.app).runner.store
    add_events = store.add_events

    def slow(*arguments: Any) -> int | None:
        is_storing.set()
        assert may_store.wait(20)
        return add_events(*arguments)

    monkeypatch.setattr(store, "add_events", slow)
    task = flow.run()
    assert task["State"] == "Completed"
    assert [event.name for event in store.events(0, 100, task["Id"]).events].count("tick") == 1
