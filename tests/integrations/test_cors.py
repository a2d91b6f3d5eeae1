"""Flask-CORS: preflights start nothing, and scripts of another origin may read every answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask_cors import CORS, cross_origin

from tests.support.flow import Flow, path_of

ORIGIN = {"Origin": "https://front.example"}
EXPOSED = ["Location", "Retry-After", "ETag", "Link", "Idempotency-Replayed"]
KEY = {"Idempotency-Key": "AAAAAAAAAAAAAAAAAAAAAQ"}
PREFLIGHT = {
    **ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type, idempotency-key",
}


@pytest.fixture
def cors_flow(flow: Flow) -> Flow:
    CORS(flow.app, origins=[ORIGIN["Origin"]], expose_headers=EXPOSED, supports_credentials=True)
    flow.headers = ORIGIN
    return flow


def test_a_preflight_starts_nothing(cors_flow: Flow) -> None:
    cors_flow.route()(lambda: None)
    response = cors_flow.request("OPTIONS", "/work", headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN["Origin"]
    assert "idempotency-key" in response.headers["Access-Control-Allow-Headers"]
    assert cors_flow.ids() == []


@pytest.mark.parametrize("methods", [["POST"], ["POST", "OPTIONS"]])
def test_cross_origin_above_task(flow: Flow, methods: list[str]) -> None:
    """The decorator makes Flask leave OPTIONS to the view."""
    flow.app.route("/work", methods=methods)(
        cross_origin(expose_headers=EXPOSED)(flow.async_routes.task(lambda: "done"))
    )
    response = flow.request("OPTIONS", "/work", headers=PREFLIGHT)
    assert response.headers["Access-Control-Allow-Origin"]
    assert flow.ids() == []
    started = flow.request("POST", "/work", headers=ORIGIN)
    assert "Location" in started.headers["Access-Control-Expose-Headers"]
    assert flow.ended(started.get_json())["Result"] == "done"


def test_cross_origin_below_task_fails_the_task_with_a_reason(flow: Flow) -> None:
    @flow.app.post("/work")
    @flow.async_routes.task
    @cross_origin()
    def work() -> str:
        return "done"

    flow.request("OPTIONS", "/work", headers=PREFLIGHT)
    assert flow.ids() == []
    assert "Put decorators that create responses above task()" in flow.error()


def test_scripts_may_read_every_answer_and_its_headers(cors_flow: Flow) -> None:
    cors_flow.route()(lambda: "done")
    task = cors_flow.run()
    path = path_of(task)
    etag = cors_flow.request("GET", path).headers["ETag"]
    cors_flow.run()
    answers: dict[str, tuple[str, str, dict[str, Any], int]] = {
        "start": ("POST", "/work", {}, 202),
        "start with a key": ("POST", "/work", {"headers": KEY}, 202),
        "replay": ("POST", "/work", {"headers": {**KEY, "Prefer": "wait=5"}}, 200),
        "start that waits": ("POST", "/work", {"headers": {"Prefer": "wait=5"}}, 200),
        "get": ("GET", path, {}, 200),
        "not modified": ("GET", path, {"headers": {"If-None-Match": etag}}, 304),
        "wait": ("GET", f"{path}?wait=5", {}, 200),
        "result": ("GET", f"{path}/result", {}, 200),
        "list": ("GET", "/tasks?limit=1", {}, 200),
        "stream": ("GET", f"{path}/events", {}, 200),
        "problem": ("GET", "/task/unknown", {}, 404),
        "stop": ("DELETE", path, {}, 410),
    }
    for name, (method, target, given, status) in answers.items():
        response = cors_flow.request(method, target, **given)
        assert response.status_code == status, name
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN["Origin"], name
        assert response.headers["Access-Control-Allow-Credentials"] == "true", name
        exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
        assert sorted(exposed) == sorted(EXPOSED), name
        assert ("Idempotency-Replayed" in response.headers) == (name == "replay"), name
        assert "Accept" in response.headers["Vary"] and "Cookie" in response.headers["Vary"], name


def test_a_stop_has_a_preflight_of_its_own(cors_flow: Flow) -> None:
    cors_flow.route()(lambda: "done")
    task = cors_flow.run()
    asked = {**PREFLIGHT, "Access-Control-Request-Method": "DELETE"}
    response = cors_flow.request("OPTIONS", path_of(task), headers=asked)
    assert response.status_code == 200
    assert "DELETE" in response.headers["Access-Control-Allow-Methods"]
    assert cors_flow.get(task)["State"] == "Completed"


@pytest.mark.parametrize("is_trusted", [True, False])
def test_a_stop_with_cookies_from_another_site_needs_a_trusted_origin(
    make_flow: Callable[..., Flow], is_trusted: bool
) -> None:
    """CORS controls who may read a response. Browsers still send simple requests."""
    flow = make_flow(ASYNCROUTE_TRUSTED_ORIGINS=[ORIGIN["Origin"]] if is_trusted else [])
    CORS(flow.app, origins=[ORIGIN["Origin"]], supports_credentials=True)
    flow.route()(lambda: "done")
    task = flow.run()
    flow.client.set_cookie("session", "x")
    foreign = {**ORIGIN, "Sec-Fetch-Site": "cross-site"}
    flow.purge(task, status=204 if is_trusted else 403, headers=foreign)
