"""Requests that never start a task: OPTIONS, as a browser's CORS preflight sends it, HEAD and TRACE."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.support.flow import IN_MEMORY, Flow, problem


@IN_MEMORY
@pytest.mark.parametrize("where", ["methods", "rule", "app", "function"])
def test_options_gets_the_default_answer_and_starts_nothing(flow: Flow, where: str) -> None:
    def work() -> str:
        return "done"

    if where == "function":
        work.provide_automatic_options = False  # type: ignore[attr-defined]
        work.methods = ["POST", "OPTIONS"]  # type: ignore[attr-defined]
    if where == "app":
        flow.app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    rule_options: dict[str, Any] = {
        "methods": {"methods": ["POST", "OPTIONS"]},
        "rule": {"methods": ["POST", "OPTIONS"], "provide_automatic_options": False},
        "app": {"methods": ["POST", "OPTIONS"]},
        "function": {},
    }[where]
    flow.app.route("/work", **rule_options)(flow.async_routes.task(work))
    response = flow.request("OPTIONS", "/work")
    assert response.status_code == 200 and response.get_data() == b""
    assert {"POST", "OPTIONS"} <= set(response.headers["Allow"].split(", "))
    assert flow.ids() == []
    assert flow.result() == "done"


@IN_MEMORY
@pytest.mark.parametrize("method", ["HEAD", "TRACE"])
def test_head_and_trace_are_refused(flow: Flow, method: str) -> None:
    flow.app.route("/work", methods=["GET", method])(flow.async_routes.task(lambda: "done"))
    response = flow.request(method, "/work")
    assert response.status_code == 405
    assert set(response.headers["Allow"].split(", ")) == {"GET", "OPTIONS"}
    if method != "HEAD":
        assert method in problem(response, 405, "method-not-allowed")["detail"]
    assert flow.ids() == []


@IN_MEMORY
def test_options_to_a_route_with_a_decorator_starts_nothing(flow: Flow) -> None:
    def plain(view: Any) -> Any:
        return functools.wraps(view)(lambda **arguments: view(**arguments))

    rule = flow.app.route("/work", methods=["POST", "OPTIONS"], provide_automatic_options=False)
    rule(plain(flow.async_routes.task(lambda: "done")))
    assert flow.request("OPTIONS", "/work").status_code == 200
    assert flow.ids() == []


@IN_MEMORY
@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "TRACE"])
def test_options_head_and_trace_with_a_decorator_that_adds_a_positional_argument(
    flow: Flow, method: str
) -> None:
    def with_user(view: Any) -> Any:
        return functools.wraps(view)(lambda **arguments: view("ann", **arguments))

    rule = flow.app.route("/work", methods=["GET", method], provide_automatic_options=False)
    rule(with_user(flow.async_routes.task(lambda user: user)))
    response = flow.request(method, "/work")
    assert response.status_code == (200 if method == "OPTIONS" else 405)
    assert "GET" in response.headers["Allow"]
    problem(flow.request("GET", "/work"), 500, "cannot-start")
    assert flow.ids() == []
