"""Receivers that give trouble (F25 to F31), on every store: what becomes of the callback, while the task stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, Callback, callback_sent
from flask_asyncroute import runner as runner_module
from flask_asyncroute.callbacks import attempt, sender
from flask_asyncroute.runtime import runtime_of
from prove.apps.calling import SECRET
from prove.receivers import FLOOD, Receivers
from tests.conftest import eventually_true


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return {"memory": "memory://", "sqlite": "sqlite:///asyncroute.db"}[request.param]


@pytest.fixture
def receivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receivers]:
    monkeypatch.setattr(sender, "DELAYS", (0.0, 0.02, 0.02, 0.02))
    monkeypatch.setattr(attempt, "ATTEMPT_SECONDS", 0.4)
    monkeypatch.setattr(runner_module, "SEND_SECONDS", 0.02)
    with Receivers() as found:
        yield found


@pytest.fixture
def app(make_app: Callable[..., Flask], store_url: str) -> Flask:
    app = make_app(
        ASYNCROUTE_STORE=store_url,
        ASYNCROUTE_NAMESPACE="shared",
        ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["127.0.0.0/8"],
        ASYNCROUTE_CALLBACK_SECRET=SECRET,
    )
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["POST"], callback=Callback(send_result=True))
    def work() -> Any:
        return {"Answer": 42}

    return app


def call(app: Flask, url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start a task; return it as it was when it had ended, and as it is when its callback is over."""
    client = app.test_client()
    task_id = client.post("/work", json={"callbackUrl": url}).json["Id"]

    def get() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/task/{task_id}").json
        return found

    ended = eventually_true(lambda: task if (task := get())["IsCompleted"] else None)
    over = eventually_true(
        lambda: task if (task := get())["CallbackInfo"]["State"] in ("Completed", "Failed") else None, 15
    )
    return ended, over


@pytest.mark.parametrize(
    ("kind", "state", "attempts"),
    [("hang", "Failed", 4), ("drip", "Failed", 4), ("head", "Failed", 4), ("late", "Completed", 3), ("busy", "Completed", 2),
     ("moved", "Failed", 4), ("gone", "Failed", 1), ("flood", "Completed", 1)],
    ids=["F25-hang", "F25-drip", "F25-head", "F26-500", "F26-503", "F27-307", "F27-410", "F28-flood"],
)  # fmt: skip
def test_f25_to_f28_receivers_that_give_trouble(
    app: Flask, receivers: Receivers, kind: str, state: str, attempts: int
) -> None:
    ended, over = call(app, receivers.url(kind))
    assert (over["CallbackInfo"]["State"], over["CallbackInfo"]["Tentative"]) == (state, attempts)
    assert {**ended, "CallbackInfo": 0} == {**over, "CallbackInfo": 0} and over["State"] == "Completed"
    messages = receivers.of(over["Id"])
    assert len(messages) == attempts and len({message.webhook_id for message in messages}) == 1
    assert not receivers.forged and not receivers.trapped
    assert all(sent < FLOOD for sent in receivers.flooded)


def test_f29_a_host_that_is_gone(app: Flask, receivers: Receivers) -> None:
    ended, over = call(app, "http://127.0.0.1:9/hook")
    assert over["CallbackInfo"]["State"] == "Failed" and over["CallbackInfo"]["Tentative"] == 4
    assert {**ended, "CallbackInfo": 0} == {**over, "CallbackInfo": 0}


def test_receivers_that_hang_hold_up_no_tasks_and_no_other_host(app: Flask, receivers: Receivers) -> None:
    client = app.test_client()
    hanging = [client.post("/work", json={"callbackUrl": receivers.url("hang")}).json["Id"] for _ in range(12)]
    eventually_true(lambda: any(receivers.of(task_id) for task_id in hanging))
    _, over = call(app, receivers.url("good"))
    assert over["CallbackInfo"]["State"] == "Completed"
    states = [client.get(f"/task/{task_id}").json for task_id in hanging]
    assert {task["State"] for task in states} == {"Completed"}
    assert any(task["CallbackInfo"]["State"] in ("NotStarted", "Running") for task in states)


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_f31_two_processes_take_no_callback_twice(
    app: Flask, make_app: Callable[..., Flask], receivers: Receivers
) -> None:
    """Two apps on one store are two workers; while both live, each callback is sent by one of them."""
    other = make_app("other", instance_path=app.instance_path, **{
        key: value for key, value in app.config.items() if key.startswith("ASYNCROUTE_")
    })  # fmt: skip
    AsyncRoute(other)
    runtime_of(other).prepare()
    runtime_of(other).runner.enter()
    senders: set[str] = set()

    def note(sender: Flask, **extra: Any) -> None:
        senders.add(sender.name)

    client = app.test_client()
    with callback_sent.connected_to(note):
        started = [client.post("/work", json={"callbackUrl": receivers.url("good")}).json["Id"] for _ in range(40)]
        for task_id in started:
            eventually_true(
                lambda path=f"/task/{task_id}": client.get(path).json["CallbackInfo"]["State"] == "Completed", 20
            )
    ids = [message.webhook_id for message in receivers.messages]
    assert len(ids) == len(set(ids)) == 40
    assert receivers.most_at_once <= 2
    assert senders == {app.name, other.name}, "both have sent some"


def test_a_process_without_room_for_threads_keeps_no_callback(
    app: Flask, receivers: Receivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    refused: list[str] = []

    def refuse_first(thread: threading.Thread) -> None:
        if thread.name == "asyncroute-callback" and len(refused) < sender.MOST_THREADS:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_first)
    _, over = call(app, receivers.url("good"))
    assert len(refused) == sender.MOST_THREADS
    assert (over["CallbackInfo"]["State"], over["CallbackInfo"]["Tentative"]) == ("Completed", 1)
