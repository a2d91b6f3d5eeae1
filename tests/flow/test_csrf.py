"""Cross-site request forgery: the browser's headers protect stops, Flask-WTF's tokens protect
starts.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from flask import request, session
from flask_wtf.csrf import CSRFProtect, generate_csrf

from tests.flow.test_forms import MULTIPART, URLENCODED, form_content
from tests.support.flow import IN_MEMORY, Flow, problem

MakeFlow = Callable[..., Flow]


@pytest.mark.covers("A59")
@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x"}, True),
        ({"Sec-Fetch-Site": "Cross-Site", "Cookie": "session=x"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "https://evil.example"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "null"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "https://app.example.evil.example"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "http://app.example"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "https://app.example:444"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "https://app.example, "
                                                                           "https://evil.example"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "https://app.example"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Cookie": "session=x", "Origin": "HTTPS://APP.example"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer x"}, False),
        ({"Sec-Fetch-Site": "same-site", "Cookie": "session=x"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Cookie": "session=x"}, False),
        ({"Sec-Fetch-Site": "none", "Cookie": "session=x"}, False),
        ({"Cookie": "session=x", "Origin": "https://evil.example"}, False),
        ({}, False),
    ],
)  # fmt: skip
def test_a_stop_with_cookies_from_an_untrusted_site_is_refused(
    make_flow: MakeFlow, headers: dict[str, str], is_refused: bool
) -> None:
    flow = make_flow(ASYNCROUTE_TRUSTED_ORIGINS=["https://app.example"])
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work")(lambda: 1)
    task = flow.run()
    for query, status in (("", 410), ("?purge=true", 204)):
        response = flow.request("DELETE", f"/task/{task['Id']}{query}", headers=headers)
        if is_refused:
            assert "ASYNCROUTE_TRUSTED_ORIGINS" in problem(response, 403, "not-permitted")["detail"]
        else:
            assert response.status_code == status
    for method, path in (("GET", "/tasks"), ("POST", "/tasks")):
        response = flow.request(
            method, path, headers=headers, json={} if method == "POST" else None
        )
        assert response.status_code == 200, (
            "reading changes nothing, and the page cannot see the response"
        )
        assert not [
            name for name in response.headers.keys() if name.lower().startswith("access-control-")
        ]


@pytest.mark.covers("A59")
@IN_MEMORY
def test_a_refused_stop_does_not_reveal_whether_the_task_exists(flow: Flow) -> None:
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "one")(lambda: 1)
    flow.run()
    cross_site = {"Sec-Fetch-Site": "cross-site", "Cookie": "session=x"}
    answers = [
        flow.request("DELETE", f"/task/{task_id}", headers=cross_site).get_json()
        for task_id in ("one", "two")
    ]
    for answer in answers:
        answer.pop("instance")
    assert answers[0] == answers[1]


@pytest.fixture
def protected(make_flow: MakeFlow, store_url: str) -> Flow:
    """Return an app with CSRFProtect, exempt operations and a token in its session."""
    flow = make_flow(ASYNCROUTE_STORE=store_url)
    csrf = CSRFProtect(flow.app)
    csrf.exempt(flow.async_routes.blueprint)

    @flow.app.get("/token")
    def token() -> str:
        session["user"] = "anna"
        return generate_csrf()

    return flow


@pytest.mark.parametrize("kind", [MULTIPART, URLENCODED])
def test_a_form_with_a_csrf_token_starts_a_task(protected: Flow, executor: Any, kind: str) -> None:
    @protected.route(executor=executor)
    def work() -> Any:
        return {**form_content(), "user": session["user"]}

    token = protected.client.get("/token").get_data(as_text=True)
    data: dict[str, Any] = {"csrf_token": token, "a": ["1", "é\U0001f600"]}
    if kind == MULTIPART:
        data["f"] = [
            (io.BytesIO(b"one"), "naïve; \U0001f600.csv", "text/csv"),
            (io.BytesIO(b""), "empty"),
        ]
    found = protected.result(data=data, content_type=kind)
    assert found["user"] == "anna"
    assert found["form"] == [["csrf_token", token], ["a", "1"], ["a", "é\U0001f600"]]
    if kind == MULTIPART:
        assert [(file[1], file[5]) for file in found["files"]] == [
            ("naïve; \U0001f600.csv", 3),
            ("empty", 0),
        ]


def test_json_with_a_csrf_token_starts_a_task(protected: Flow) -> None:
    @protected.route()
    def work() -> Any:
        return request.json

    token = protected.client.get("/token").get_data(as_text=True)
    assert protected.result(json={"a": 1}, headers={"X-CSRFToken": token}) == {"a": 1}


@pytest.mark.parametrize("kind", [MULTIPART, URLENCODED])
def test_a_start_without_a_csrf_token_is_refused(protected: Flow, kind: str) -> None:
    @protected.route()
    def work() -> None:
        raise AssertionError("started")

    protected.client.get("/token")
    for data in ({"a": "1"}, {"a": "1", "csrf_token": "forged"}):
        assert protected.request("POST", "/work", data=data, content_type=kind).status_code == 400
    assert protected.query() == []


def test_a_stop_of_an_exempt_blueprint_needs_no_token(protected: Flow, gate: Any) -> None:
    @protected.route(methods=["GET"])
    def work() -> None:
        gate.wait(10)

    task = protected.start("/work", "GET")
    assert protected.stop(task)["State"] == "Aborted"
    gate.set()
    protected.still(task)
