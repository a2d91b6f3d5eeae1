"""The option ``respond``: the app's own answer to a start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import pytest
from flask import Response, abort, jsonify, make_response, redirect

from flask_asyncroute import AsyncRouteTask
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]


@pytest.mark.parametrize(
    ("value", "status", "body"),
    [
        ({"job_id": 1}, 202, b'{"job_id":1}\n'),
        (["a"], 202, b'["a"]\n'),
        ("text", 202, b"text"),
        ("", 202, b""),
        (b"bytes", 202, b"bytes"),
        (("text", 200), 200, b"text"),
        (("text", "201 Created"), 201, b"text"),
        (("text", HTTPStatus.ACCEPTED), 202, b"text"),
        (("text", {"X-Own": "1"}), 202, b"text"),
        (("text", [("X-Own", "1")]), 202, b"text"),
        (("text", 299, {"X-Own": "1"}), 299, b"text"),
        (("text", None, {"X-Own": "1"}), 202, b"text"),
        (Response("r", 200), 200, b"r"),
        (Response("r", 418), 418, b"r"),
        ((Response("r", 201), {"X-Own": "1"}), 201, b"r"),
        ((Response("r", 201), 203), 203, b"r"),
        (iter(["streamed"]), 202, b"streamed"),
    ],
)
def test_respond_returns_what_a_view_may_return(
    make_flow: MakeFlow, gate: threading.Event, value: Any, status: int, body: bytes
) -> None:
    flow = make_flow()
    seen: list[AsyncRouteTask] = []

    def respond(task: AsyncRouteTask) -> Any:
        seen.append(task)
        return value

    flow.route(respond=respond)(lambda: gate.wait() and None)
    response = flow.request("POST", "/work")
    assert (response.status_code, response.data) == (status, body)
    (task,) = seen
    assert response.headers["Location"] == f"/task/{task.id}"
    assert int(response.headers["Retry-After"]) >= 1
    assert response.headers["Cache-Control"] == "no-store"
    if "X-Own" in str(value):
        assert response.headers["X-Own"] == "1"
    assert flow.get(task.id)["Id"] == task.id


def test_headers_of_the_answer_are_kept(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow()

    def respond(task: AsyncRouteTask) -> Response:
        response = redirect("/jobs/1", 303)
        response.headers["Retry-After"] = "17"
        response.headers["Cache-Control"] = "private"
        return response  # type: ignore[return-value]

    flow.route(respond=respond)(lambda: gate.wait() and None)
    response = flow.request("POST", "/work")
    assert (response.status_code, response.headers["Location"]) == (303, "/jobs/1")
    (task,) = flow.query()
    assert response.headers["Link"] == f'</task/{task["Id"]}>; rel="status"'
    assert response.headers["Retry-After"] == "17"
    assert response.headers["Cache-Control"] == "private"


def test_a_redirect_in_a_tuple_keeps_its_status(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(respond=lambda task: (redirect("/jobs/1"), {"X-Own": "1"}))(lambda: None)
    assert flow.request("POST", "/work").status_code == 302


@pytest.mark.covers("A81")
@pytest.mark.parametrize(
    "respond",
    [
        lambda task: None,
        lambda task: 5,
        lambda task: object(),
        lambda task: (),
        lambda task: ("a", 200, {}, "b"),
        lambda task: {1, 2},
        lambda task: 1 / 0,
        lambda task: abort(409),
        lambda: {"no": "parameter"},
    ],
)
def test_if_respond_fails_the_client_gets_the_task_object(
    make_flow: MakeFlow, respond: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    flow.route(endpoint="work", respond=respond)(lambda: "done")
    assert flow.result() == "done"
    assert "The respond function of endpoint work raised an exception" in caplog.text


def test_if_respond_fails_a_browser_gets_the_page(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(respond=lambda task: 1 / 0)(lambda: None)
    response = flow.request("POST", "/work", data={"a": "b"}, headers={"Accept": "text/html"})
    assert response.status_code == 303


def test_respond_takes_precedence_over_pages(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(respond=lambda task: {"job_id": task.id})(lambda: None)
    response = flow.request("POST", "/work", data={"a": "b"}, headers={"Accept": "text/html"})
    assert response.status_code == 202
    assert list(response.get_json()) == ["job_id"]


def test_respond_is_called_for_replays_and_unique_hits(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow()
    flow.headers = {"X-User": "anna"}
    flow.route(unique=True, respond=lambda task: {"job_id": task.id, "state": task.state.value})(
        lambda: gate.wait() and None
    )
    keyed = {"Idempotency-Key": "k" * 30}
    answers = [flow.start(headers=headers)["job_id"] for headers in (keyed, keyed, {})]
    assert len(set(answers)) == 1
    gate.set()
    flow.ended(answers[0])
    response = flow.request("POST", "/work", headers=keyed)
    assert response.get_json() == {"job_id": answers[0], "state": "Completed"}
    assert response.headers["Idempotency-Replayed"] == "true"
    assert "Retry-After" not in response.headers


def test_respond_of_an_immediate_task_gets_the_outcome(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(executor="immediate", respond=lambda task: {"result": task.result})(lambda: 42)
    response = flow.request("POST", "/work")
    assert (response.status_code, response.get_json()) == (202, {"result": 42})
    assert "Retry-After" not in response.headers


def test_respond_answers_at_once_with_prefer_wait(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow()
    flow.route(respond=lambda task: {"job_id": task.id})(lambda: gate.wait() and None)
    response = flow.request("POST", "/work", headers={"Prefer": "wait=20"})
    assert list(response.get_json()) == ["job_id"]
    assert "Preference-Applied" not in response.headers


@pytest.mark.parametrize("accept", ["text/csv", "image/png", "application/xml"])
def test_respond_can_answer_in_any_media_type(make_flow: MakeFlow, accept: str) -> None:
    flow = make_flow()
    flow.route(respond=lambda task: (f"id\n{task.id}\n", {"Content-Type": "text/csv"}))(
        lambda: None
    )
    response = flow.request("POST", "/work", headers={"Accept": accept})
    assert (response.status_code, response.content_type) == (202, "text/csv")


def test_without_get_there_is_no_location(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_OPERATIONS=["query"])
    flow.route(respond=lambda task: {"job_id": task.id})(lambda: None)
    assert "Location" not in flow.request("POST", "/work").headers


def test_a_refused_start_is_not_answered_by_respond(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_MAX_BODY=1)
    called: list[Any] = []
    flow.route(respond=called.append)(lambda: None)
    flow.start(status=413, data=b"too large")
    assert called == []


def test_respond_can_set_cookies_and_the_session(make_flow: MakeFlow) -> None:
    flow = make_flow(SECRET_KEY="x")

    def respond(task: AsyncRouteTask) -> Response:
        response = make_response(jsonify(job_id=task.id))
        response.set_cookie("job", task.id)
        return response

    flow.route(respond=respond)(lambda: None)
    response = flow.request("POST", "/work")
    assert response.status_code == 200, "the app has chosen this status"
    assert "job=" in response.headers["Set-Cookie"]
