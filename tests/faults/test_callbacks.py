"""Faulty receivers, on every store: the outcome of a callback, while the task does not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, Callback, callback_sent
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.webhooks import client as attempt
from flask_asyncroute.webhooks import sender
from flask_asyncroute.workers import runner as runner_module
from tests.support.apps.calling import SECRET
from tests.support.receivers import FLOOD, Receivers
from tests.support.waiting import eventually_true


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
    """Start a task; return it as it is when it has finished and when its callback has ended."""
    client = app.test_client()
    task_id = client.post("/work", json={"callbackUrl": url}).json["Id"]

    def get() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/task/{task_id}").json
        return found

    ended = eventually_true(lambda: task if (task := get())["IsCompleted"] else None)
    final = eventually_true(
        lambda: (
            task if (task := get())["CallbackInfo"]["State"] in ("Completed", "Failed") else None
        ),
        15,
    )
    return ended, final


@pytest.mark.covers("F25", "F28")
@pytest.mark.parametrize(
    ("kind", "state", "attempts"),
    [("hang", "Failed", 4), ("drip", "Failed", 4), ("head", "Failed", 4), ("late", "Completed", 3), ("busy", "Completed", 2),
     ("moved", "Failed", 4), ("gone", "Failed", 1), ("flood", "Completed", 1)],
    ids=["F25-hang", "F25-drip", "F25-head", "F26-500", "F26-503", "F27-307", "F27-410", "F28-flood"],
)  # fmt: skip
def test_callbacks_to_faulty_receivers(
    app: Flask, receivers: Receivers, kind: str, state: str, attempts: int
) -> None:
    ended, final = call(app, receivers.url(kind))
    assert (final["CallbackInfo"]["State"], final["CallbackInfo"]["Tentative"]) == (state, attempts)
    assert {**ended, "CallbackInfo": 0} == {**final, "CallbackInfo": 0} and final[
        "State"
    ] == "Completed"
    messages = receivers.of(final["Id"])
    assert len(messages) == attempts and len({message.webhook_id for message in messages}) == 1
    assert not receivers.forged and not receivers.trapped
    assert all(sent < FLOOD for sent in receivers.flooded)


@pytest.mark.covers("F29")
def test_a_callback_to_an_unreachable_host_fails(app: Flask, receivers: Receivers) -> None:
    ended, final = call(app, "http://127.0.0.1:9/hook")
    assert final["CallbackInfo"]["State"] == "Failed" and final["CallbackInfo"]["Tentative"] == 4
    assert {**ended, "CallbackInfo": 0} == {**final, "CallbackInfo": 0}


def test_hanging_receivers_do_not_delay_tasks_or_other_hosts(
    app: Flask, receivers: Receivers
) -> None:
    client = app.test_client()
    hanging = [
        client.post("/work", json={"callbackUrl": receivers.url("hang")}).json["Id"]
        for _ in range(12)
    ]
    eventually_true(lambda: any(receivers.of(task_id) for task_id in hanging))
    _, final = call(app, receivers.url("good"))
    assert final["CallbackInfo"]["State"] == "Completed"

    def completed() -> list[dict[str, Any]] | None:
        tasks = [client.get(f"/task/{task_id}").json for task_id in hanging]
        return tasks if all(task["State"] == "Completed" for task in tasks) else None

    states = eventually_true(completed)
    assert any(task["CallbackInfo"]["State"] in ("NotStarted", "Running") for task in states)


@pytest.mark.covers("F31")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_two_processes_send_each_callback_once(
    app: Flask, make_app: Callable[..., Flask], receivers: Receivers, separate_processes: None
) -> None:
    """Two apps on one store act as two workers. Tasks are started until both have sent callbacks,
    because the choice depends on timing.
    """
    other = make_app("other", instance_path=app.instance_path, **{
        key: value for key, value in app.config.items() if key.startswith("ASYNCROUTE_")
    })  # fmt: skip
    AsyncRoute(other)
    runtime_of(other).prepare()
    runtime_of(other).runner.enter()
    senders: set[str] = set()

    def record_sender(sender: Flask, **extra: Any) -> None:
        senders.add(sender.name)

    client = app.test_client()

    def start_some() -> list[str]:
        started = [
            client.post("/work", json={"callbackUrl": receivers.url("good")}).json["Id"]
            for _ in range(40)
        ]
        for task_id in started:
            eventually_true(
                lambda path=f"/task/{task_id}": (
                    client.get(path).json["CallbackInfo"]["State"] == "Completed"
                ),
                20,
            )
        return started

    with callback_sent.connected_to(record_sender):
        started = start_some()
        for _ in range(10):
            if senders == {app.name, other.name}:
                break
            started += start_some()
    assert senders == {app.name, other.name}, "both have sent some"
    ids = [message.webhook_id for message in receivers.messages]
    assert len(ids) == len(set(ids)) == len(started)
    assert receivers.most_at_once <= 2


def test_a_callback_is_sent_after_no_thread_could_start(
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
    _, final = call(app, receivers.url("good"))
    assert len(refused) == sender.MOST_THREADS
    assert (final["CallbackInfo"]["State"], final["CallbackInfo"]["Tentative"]) == ("Completed", 1)
