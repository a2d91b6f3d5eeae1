"""The helpers for users' tests: `wait_task`, `Clock`, `CallbackReceiver`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from flask import Flask, Response, redirect, request, url_for

from flask_asyncroute import Callback, ConfigurationError, Retry, current_task
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.task import skipped_us
from flask_asyncroute.testing import CallbackReceiver, Clock, close, inline, wait_task
from tests.support.flow import IN_MEMORY, Flow

MakeFlow = Callable[..., Flow]
Eventually = Callable[..., Any]
DAY = 86_400


# wait_task


@pytest.mark.parametrize("accept", ["application/json", "application/xml", "application/yaml"])
def test_wait_task_returns_the_finished_task(make_flow: MakeFlow, accept: str) -> None:
    flow = make_flow()
    types = ("application/json", "application/xml", "application/yaml")
    flow.route(response_types=types)(lambda: current_task.set_progress(40) or {"a": [1]})
    response = flow.request("POST", "/work", headers={"Accept": accept, "X-User": "ann"})
    task = wait_task(flow.client, response)
    assert (task["State"], task["Result"]) == ("Completed", {"a": [1]})
    assert task == flow.get(task["Id"], headers={"X-User": "ann"})


def test_wait_task_returns_a_task_that_has_failed(flow: Flow) -> None:
    flow.route()(lambda: 1 / 0)
    task = wait_task(flow.client, flow.request("POST", "/work"))
    assert (task["State"], task["Error"]) == ("Failed", "ZeroDivisionError: division by zero")


def own_answer(task: Any) -> Any:
    return {"Id": "not of the task", "State": "fine"}, 201, {"Location": "/jobs/1"}


@pytest.mark.parametrize(
    "respond", [own_answer, lambda task: redirect("/jobs/1"), lambda task: Response("busy", 418)]
)
@pytest.mark.parametrize("mount", ["", "/mounted"])
def test_wait_task_finds_the_task_of_a_route_with_its_own_answer(
    make_flow: MakeFlow, respond: Any, mount: str
) -> None:
    flow = make_flow(ASYNCROUTE_URL_PREFIX="/api")
    flow.route(respond=respond)(lambda: "done")
    response = flow.request("POST", "/work", environ_overrides={"SCRIPT_NAME": mount})
    assert wait_task(flow.client, response)["Result"] == "done"


def test_wait_task_follows_the_redirect_of_a_form(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route()(lambda: "done")
    response = flow.request("POST", "/work", data={"next": "/"}, headers={"Accept": "text/html"})
    assert response.status_code == 303
    assert wait_task(flow.client, response)["Result"] == "done"


def test_wait_task_refuses_a_response_without_a_task(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.app.get("/plain", endpoint="plain")(lambda: redirect(url_for("plain")))
    with pytest.raises(AssertionError, match="started no task. The response is 404 NOT FOUND: "):
        wait_task(flow.client, flow.client.get("/unknown"))
    with pytest.raises(AssertionError, match="started no task. The response is 302 FOUND: "):
        wait_task(flow.client, flow.client.get("/plain"))


def test_wait_task_names_the_state_after_its_timeout(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route()(lambda: gate.wait() and None)
    response = flow.request("POST", "/work")
    with pytest.raises(TimeoutError, match=r"has not ended within 0.01 s: its State is (Not|Run)"):
        wait_task(flow.client, response, timeout=0.01)


def test_wait_task_names_a_removed_task(make_flow: MakeFlow, eventually: Eventually) -> None:
    flow = make_flow()
    flow.route()(lambda: None)
    response = flow.request("POST", "/work")
    flow.still(response.json["Id"])
    flow.purge(response.json["Id"])
    with pytest.raises(AssertionError, match="does not exist"):
        wait_task(flow.client, response)


def test_wait_task_works_inline(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route()(lambda: 1)
    with inline(flow.app):
        assert wait_task(flow.client, flow.request("POST", "/work"))["Result"] == 1


def test_a_closed_app_can_be_used_again(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    flow.route()(lambda: 1)
    task = flow.run()
    close(flow.app)
    names = [thread.name for thread in threading.enumerate()]
    assert "asyncroute-housekeeper" not in names
    assert flow.get(task)["Result"] == 1
    assert flow.result() == 1


# Clock


def receive(app: Flask) -> None:
    with CallbackReceiver(app):
        pass


def run_inline(app: Flask) -> None:
    with inline(app):
        pass


@pytest.mark.parametrize("begin_anew", [close, receive, run_inline])
def test_a_process_still_takes_tasks_after_its_store_was_closed(
    make_flow: MakeFlow, begin_anew: Callable[[Flask], None]
) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")

    @flow.route(retry=Retry(delay=0.01, jitter=0))
    def work() -> str:
        if current_task.attempt == 1 and request.args.get("fails"):
            raise ValueError("once")
        return "done"

    flow.run()
    begin_anew(flow.app)
    with flow.app.app_context():
        submit, wait = flow.async_routes.submit, flow.async_routes.wait
        assert wait(submit("work").id, 20).result == "done"
        begin_anew(flow.app)
        assert wait(submit("work", start_at=0.01).id, 20).result == "done"
        begin_anew(flow.app)
        assert wait(submit("work", query={"fails": "1"}).id, 20).attempt == 2
        waiting = submit("work", start_at=1)
        begin_anew(flow.app)
        assert wait(waiting.id, 20).result == "done"


def test_a_process_that_only_reads_tasks_takes_none_after_its_store_was_closed(
    make_flow: MakeFlow,
) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    flow.route()(lambda: "done")
    with flow.app.app_context():
        flow.async_routes.query()
        close(flow.app)
        flow.async_routes.query()
        assert not runtime_of(flow.app).runner.dispatcher.is_runner


def test_advance_times_out_a_running_task(flow: Flow, begun: threading.Semaphore) -> None:
    @flow.route(timeout=3600)
    def work() -> None:
        begun.release()
        current_task.sleep(60)
        current_task.check()

    with Clock(flow.app) as clock:
        early, response = flow.request("POST", "/work"), flow.request("POST", "/work")
        for _ in range(2):
            assert begun.acquire(timeout=5)
        flow.stop(early.json["Id"])
        clock.advance(3500)
        assert flow.get(response.json["Id"])["State"] == "Running"
        clock.advance(101)
        assert wait_task(flow.client, response)["Error"] == "Timeout"


@IN_MEMORY
def test_advance_times_out_a_task_as_soon_as_it_is_running(flow: Flow) -> None:
    @flow.route(timeout=60)
    def work() -> None:
        current_task.sleep(60)
        current_task.check()

    with Clock(flow.app) as clock:
        for _ in range(50):
            response = flow.request("POST", "/work")
            flow.became(response.json["Id"], "Running")
            clock.advance(61)
            assert wait_task(flow.client, response)["Error"] == "Timeout"


def test_advance_shortens_the_remaining_time(
    flow: Flow, begun: threading.Semaphore, gate: threading.Event
) -> None:
    @flow.route(timeout=1000)
    def work() -> Any:
        begun.release()
        assert gate.wait(10)
        return current_task.remaining()

    with Clock(flow.app) as clock:
        response = flow.request("POST", "/work")
        assert begun.acquire(timeout=5)
        clock.advance(timedelta(minutes=10))
        gate.set()
        assert 380 < wait_task(flow.client, response)["Result"] <= 400


def test_advance_starts_retries_that_are_due(flow: Flow, eventually: Eventually) -> None:
    attempts: list[int] = []

    @flow.route(retry=Retry(times=2, delay=300, jitter=0))
    def work() -> None:
        attempts.append(current_task.attempt)
        raise ValueError("no")

    with Clock(flow.app) as clock:
        response = flow.request("POST", "/work")
        for number, seconds in ((1, 300), (2, 600)):
            eventually(lambda n=number: len(attempts) == n)
            flow.became(response.json["Id"], "NotStarted")
            clock.advance(seconds - 100)
            assert flow.get(response.json["Id"])["State"] == "NotStarted"
            clock.advance(101)
        task = wait_task(flow.client, response)
    assert (task["State"], task["Attempt"], attempts) == ("Failed", 3, [1, 2, 3])


@pytest.mark.parametrize("is_datetime", [False, True])
def test_advance_starts_tasks_whose_start_time_has_come(flow: Flow, is_datetime: bool) -> None:
    flow.route(endpoint="work")(lambda: 1)
    flow.async_routes.start(flow.app)
    start_at = datetime.now(UTC) + timedelta(hours=2) if is_datetime else 7200.0
    with flow.app.app_context():
        task = flow.async_routes.submit("work", method="POST", start_at=start_at)
        with Clock(flow.app) as clock:
            clock.advance(7000)
            assert flow.async_routes.get(task.id).state == "NotStarted"
            clock.advance(201)
            ended = flow.async_routes.wait(task.id, 10)
            assert ended.result == 1
            assert ended.starting_time - task.creation_time >= timedelta(hours=2)


def test_advance_aborts_tasks_that_were_not_started_in_time(
    flow: Flow, gate: threading.Event
) -> None:
    flow.route(start_timeout=300, max_workers=1)(lambda: gate.wait() and None)
    first = flow.start()
    flow.became(first, "Running")
    second = flow.start()
    with Clock(flow.app) as clock:
        clock.advance(200)
        assert flow.get(second)["State"] == "NotStarted"
        clock.advance(101)
        task = flow.get(second)
        assert (task["State"], task["Error"]) == ("Aborted", "Expired")
    assert flow.get(first)["State"] == "Running"
    gate.set()
    flow.ended(first)


def test_advance_removes_tasks_past_their_retention(flow: Flow) -> None:
    flow.route(retention=DAY)(lambda: 1)
    task = flow.still(flow.start())
    with Clock(flow.app) as clock:
        clock.advance(DAY - 100)
        assert flow.get(task["Id"]) == task
        clock.advance(101)
        flow.get(task["Id"], status=404)


def test_the_clock_is_set_back_at_the_end(flow: Flow) -> None:
    flow.route()(lambda: 1)
    with pytest.raises(RuntimeError, match="on purpose"), Clock(flow.app) as clock:
        clock.advance(DAY)
        clock.advance(DAY)
        assert skipped_us() == 2 * DAY * 1_000_000
        created = datetime.fromisoformat(flow.run()["CreationTime"])
        assert created > datetime.now(UTC) + timedelta(days=1)
        raise RuntimeError("on purpose")
    assert skipped_us() == 0
    task = flow.run()
    assert datetime.fromisoformat(task["CreationTime"]) < datetime.now(UTC) + timedelta(minutes=1)


@IN_MEMORY
@pytest.mark.parametrize("wrong", [-1, "1", None, float("nan")])
def test_advance_refuses_a_negative_time(flow: Flow, wrong: Any) -> None:
    with Clock(flow.app) as clock, pytest.raises(ConfigurationError, match="^time must be"):
        clock.advance(wrong)
    assert skipped_us() == 0


# CallbackReceiver


@pytest.mark.parametrize("is_prepared", [False, True])
def test_the_receiver_verifies_a_callback(flow: Flow, is_prepared: bool) -> None:
    flow.route(callback=Callback(send_result=True))(lambda: [1])
    if is_prepared:
        flow.run()
    before = dict(flow.app.config)
    with CallbackReceiver(flow.app) as receiver:
        task = flow.start(json={"callbackUrl": f"{receiver.url}hooks?a=1"})
        (call,) = receiver.wait()
        assert (call.method, call.path) == ("POST", "/hooks?a=1")
        assert call.data["Id"] == task["Id"] and call.data["Result"] == [1]
        assert call.headers["webhook-id"] and call.body.startswith(b"{")
        assert receiver.calls == [call]
    assert flow.app.config == before
    assert flow.start(json={"callbackUrl": receiver.url}, status=400)["type"].endswith("refused")


@IN_MEMORY
def test_the_receiver_refuses_an_invalid_configuration_and_changes_nothing(flow: Flow) -> None:
    flow.app.config["ASYNCROUTE_CALLBACK_ALLOWED_HOSTS"] = "example.com"
    before = dict(flow.app.config)
    with pytest.raises(ConfigurationError, match="^ASYNCROUTE_CALLBACK_ALLOWED_HOSTS must be"):
        CallbackReceiver(flow.app).__enter__()
    assert flow.app.config == before


@IN_MEMORY
def test_a_receiver_that_cannot_listen_changes_nothing(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_asyncroute.testing.receiver.HOST", "192.0.2.1")  # RFC 5737
    before = dict(flow.app.config)
    with pytest.raises(OSError):
        CallbackReceiver(flow.app).__enter__()
    assert flow.app.config == before


def test_the_receiver_uses_the_secrets_of_the_app(make_flow: MakeFlow) -> None:
    secrets = ["whsec_" + letter * 32 for letter in "ab"]
    flow = make_flow(ASYNCROUTE_CALLBACK_SECRET=secrets)
    flow.route(callback=Callback(content_type="application/xml", method="PUT"))(lambda: 1)
    with CallbackReceiver(flow.app) as receiver:
        assert flow.app.config["ASYNCROUTE_CALLBACK_SECRET"] == secrets
        flow.start(json={"callbackUrl": receiver.url})
        (call,) = receiver.wait()
        assert (call.method, call.data) == ("PUT", None)
        assert call.body.startswith(b"<?xml")


def test_the_receiver_refuses_an_invalid_signature(make_flow: MakeFlow) -> None:
    with CallbackReceiver(make_flow().app) as receiver:
        assert requests.post(receiver.url, json={"Id": "1"}, timeout=5).status_code == 401
        with pytest.raises(TimeoutError, match=r"0 of 1 .* Refused: POST /: Missing required head"):
            receiver.wait(timeout=0.01)
        assert receiver.calls == []


def test_advance_sends_callbacks_again(flow: Flow, eventually: Eventually) -> None:
    flow.route(callback=Callback())(lambda: 1)
    with CallbackReceiver(flow.app) as receiver, Clock(flow.app) as clock:
        receiver.status = 503
        task = flow.start(json={"callbackUrl": receiver.url})
        for number, seconds in ((1, 10), (2, 60), (3, 300)):
            receiver.wait(number)
            eventually(lambda n=number: flow.get(task)["CallbackInfo"]["Tentative"] == n)
            clock.advance(seconds)
        receiver.wait(4)
        eventually(lambda: flow.get(task)["CallbackInfo"]["State"] == "Failed")
    assert {call.headers["webhook-id"] for call in receiver.calls} == {
        receiver.calls[0].headers["webhook-id"]
    }


def test_the_receiver_works_inline(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(callback=Callback())(lambda: 1)
    with inline(flow.app), CallbackReceiver(flow.app) as receiver:
        response = flow.request("POST", "/work", json={"callbackUrl": receiver.url})
        assert response.json["State"] == "Completed"
        assert receiver.wait()[0].data["Id"] == response.json["Id"]
