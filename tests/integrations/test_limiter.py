"""Flask-Limiter: limits of starts and of polling, and a limit below ``task()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import request
from flask_limiter import Limiter

from tests.support.flow import Flow, path_of


@pytest.fixture
def make_limiter(flow: Flow) -> Callable[..., Limiter]:
    """Return ``make_limiter(**settings)``, which creates a limiter by the header ``X-User``."""

    def make(**settings: Any) -> Limiter:
        return Limiter(
            lambda: request.headers.get("X-User", "nobody"),
            app=flow.app,
            storage_uri="memory://",
            **settings,
        )

    return make


@pytest.mark.parametrize("by", ["above", "task", "route"])
def test_a_start_over_the_limit_is_refused(
    flow: Flow, make_limiter: Callable[..., Limiter], by: str
) -> None:
    limit = make_limiter(headers_enabled=True).limit("2/minute")

    def work() -> None: ...

    if by == "above":
        flow.app.post("/work")(limit(flow.async_routes.task(work)))
    elif by == "task":
        flow.app.post("/work")(flow.async_routes.task(decorators=[limit])(work))
    else:
        flow.route(decorators=[limit])(work)
    ids = {flow.run()["Id"], flow.run()["Id"]}
    response = flow.request("POST", "/work")
    assert response.status_code == 429 and "2 per 1 minute" in response.text
    assert response.headers["X-RateLimit-Limit"] == "2"
    assert set(flow.ids()) == ids
    assert flow.request("POST", "/work", headers={"X-User": "ann"}).status_code == 202
    assert flow.request("GET", "/tasks").status_code == 200, "operations are not limited"


def test_default_limits_count_operations_unless_the_blueprint_is_exempt(
    flow: Flow, make_limiter: Callable[..., Limiter]
) -> None:
    limiter = make_limiter(default_limits=["5/minute"])

    @flow.route()
    def work() -> None: ...

    task = flow.run(headers={"X-User": "ann"})
    poll = {"method": "GET", "path": path_of(task), "headers": {"X-User": "bob"}}
    assert [flow.request(**poll).status_code for _ in range(7)] == [200] * 5 + [429] * 2
    limiter.exempt(flow.async_routes.blueprint)
    assert [flow.request(**poll).status_code for _ in range(9)] == [200] * 9
    starts = [flow.request("POST", "/work").status_code for _ in range(6)]
    assert starts == [202] * 5 + [429], "routes that start tasks are still limited"


def test_a_limit_below_task_fails_the_task(
    flow: Flow, make_limiter: Callable[..., Limiter]
) -> None:
    """It runs in the task, so the start is accepted and the task is stored."""
    limiter = make_limiter()

    @flow.app.post("/work")
    @flow.async_routes.task
    @limiter.limit("1/minute")
    def work() -> str:
        return "done"

    assert flow.result() == "done"
    task = flow.run()
    assert (task["State"], task["Error"]) == ("Failed", "429 Too Many Requests: 1 per 1 minute")
    assert flow.request("GET", f"{path_of(task)}/result").status_code == 429
