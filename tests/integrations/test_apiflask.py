"""APIFlask: validated input for async routes, and its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from apiflask import APIFlask, Schema, abort
from apiflask.fields import DateTime, Integer, String

from flask_asyncroute import AsyncRoute
from tests.support.apps import close_app
from tests.support.flow import Flow


class ReportIn(Schema):
    year = Integer(required=True)
    title = String(load_default="none")


class TaskOut(Schema):
    Id = String()
    State = String()


class MeetingIn(Schema):
    at = DateTime(required=True)


@pytest.fixture
def api_flow(tmp_path: Path) -> Iterator[Flow]:
    app = APIFlask(__name__, instance_path=str(tmp_path))
    app.config.update(TESTING=True)
    yield Flow(app, AsyncRoute(app))
    close_app(app)


def test_input_above_task_validates_before_the_start(api_flow: Flow) -> None:
    app: Any = api_flow.app

    @app.post("/reports")
    @app.input(ReportIn)
    @app.doc(responses=[202])
    @api_flow.async_routes.task
    def report(json_data: dict[str, Any]) -> Any:
        return json_data

    assert api_flow.result("/reports", json={"year": 2031}) == {"year": 2031, "title": "none"}
    response = api_flow.request("POST", "/reports", json={"year": "x"})
    assert response.status_code == 422
    assert response.get_json()["detail"] == {"json": {"year": ["Not a valid integer."]}}
    assert len(api_flow.ids()) == 1
    spec = app.test_client().get("/openapi.json").get_json()
    assert set(spec["paths"]["/reports"]["post"]["responses"]) >= {"202", "422"}


def test_input_that_is_not_json_is_parsed_below_task(api_flow: Flow) -> None:
    """A datetime cannot be stored with the task."""
    app: Any = api_flow.app

    @app.post("/below")
    @api_flow.async_routes.task
    @app.input(MeetingIn)
    def below(json_data: dict[str, Any]) -> Any:
        return json_data["at"].year

    @app.post("/above")
    @app.input(MeetingIn)
    @api_flow.async_routes.task
    def above(json_data: dict[str, Any]) -> None: ...

    at = {"at": "2031-01-02T03:04:05"}
    assert api_flow.result("/below", json=at) == 2031
    assert "status_code=422" in api_flow.error("/below", json={"at": "x"})
    response = api_flow.request("POST", "/above", json=at)
    assert response.status_code == 500
    assert "a dict as 'json_data', which cannot be stored" in response.get_json()["detail"]


def test_output_above_task_lets_the_task_through(api_flow: Flow) -> None:
    app: Any = api_flow.app

    @app.post("/reports")
    @app.output(TaskOut, status_code=202)
    @api_flow.async_routes.task
    def report() -> Any:
        return {"year": 2031}

    assert api_flow.result("/reports") == {"year": 2031}
    spec = app.test_client().get("/openapi.json").get_json()
    assert "TaskOut" in str(spec["paths"]["/reports"]["post"]["responses"]["202"])


def test_output_below_task_fails_the_task_with_a_reason(api_flow: Flow) -> None:
    app: Any = api_flow.app

    @app.post("/reports")
    @api_flow.async_routes.task
    @app.output(TaskOut)
    def report() -> Any:
        return {"year": 2031}

    assert "Put decorators that create responses above task()" in api_flow.error("/reports")


def test_the_errors_of_apiflask_are_not_http_exceptions(api_flow: Flow) -> None:
    """They do not derive from Werkzeug's. The errors of Flask's ``abort()`` keep their code."""

    @api_flow.route("/<kind>")
    def work(kind: str) -> None:
        {"apiflask": abort, "flask": flask.abort}[kind](409, "being written")

    assert api_flow.error("/apiflask") == "HTTPError: <status_code=409, message=being written>"
    assert api_flow.error("/flask") == "409 Conflict: being written"
