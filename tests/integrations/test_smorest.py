"""flask-smorest: arguments as keywords, responses above ``task()``, and method views."""

from __future__ import annotations

from typing import Any

import pytest
from flask.views import MethodView
from flask_smorest import Api, Blueprint, abort
from marshmallow import Schema, fields

from flask_asyncroute import ConfigurationError
from tests.support.flow import Flow


class ReportIn(Schema):
    year = fields.Integer(required=True)


class TaskOut(Schema):
    Id = fields.String()
    State = fields.String()


@pytest.fixture
def blueprint(flow: Flow) -> Blueprint:
    flow.app.config.update(API_TITLE="Test", API_VERSION="1", OPENAPI_VERSION="3.0.3")
    return Blueprint("reports", __name__)


def register(flow: Flow, blueprint: Blueprint) -> Api:
    api = Api(flow.app)
    api.register_blueprint(blueprint)
    return api


def test_arguments_as_keywords(flow: Flow, blueprint: Blueprint) -> None:
    @blueprint.route("/reports", methods=["POST"])
    @blueprint.arguments(ReportIn, as_kwargs=True)
    @blueprint.response(202, TaskOut)
    @flow.async_routes.task
    def report(year: int) -> Any:
        return {"Year": year}

    api = register(flow, blueprint)
    assert flow.result("/reports", json={"year": 2031}) == {"Year": 2031}
    response = flow.request("POST", "/reports", json={"year": "x"})
    assert response.status_code == 422
    assert response.get_json()["errors"] == {"json": {"year": ["Not a valid integer."]}}
    assert len(flow.ids()) == 1
    operation = api.spec.to_dict()["paths"]["/reports"]["post"]
    assert set(operation["responses"]) >= {"202", "422"}


def test_arguments_by_position_are_refused(flow: Flow, blueprint: Blueprint) -> None:
    @blueprint.route("/reports", methods=["POST"])
    @blueprint.arguments(ReportIn)
    @flow.async_routes.task
    def report(data: dict[str, int]) -> None: ...

    register(flow, blueprint)
    response = flow.request("POST", "/reports", json={"year": 2031})
    assert response.status_code == 500
    assert "Pass it by keyword" in response.get_json()["detail"]
    assert flow.ids() == []


def test_arguments_below_task_are_parsed_in_the_task(flow: Flow, blueprint: Blueprint) -> None:
    @blueprint.route("/reports", methods=["POST"])
    @flow.async_routes.task
    @blueprint.arguments(ReportIn)
    def report(data: dict[str, int]) -> Any:
        return data

    register(flow, blueprint)
    assert flow.result("/reports", json={"year": 2031}) == {"year": 2031}
    error = flow.error("/reports", json={})
    assert error == (
        '422 Unprocessable Entity: {"json": {"year": ["Missing data for required field."]}}'
    )


def test_response_below_task_fails_the_task_with_a_reason(flow: Flow, blueprint: Blueprint) -> None:
    @blueprint.route("/reports", methods=["POST"])
    @flow.async_routes.task
    @blueprint.response(200, ReportIn)
    def report() -> Any:
        return {"year": 1}

    register(flow, blueprint)
    assert "Put decorators that create responses above task()" in flow.error("/reports")


def test_a_method_view(flow: Flow, blueprint: Blueprint) -> None:
    @blueprint.route("/reports/<int:year>")
    class Reports(MethodView):
        decorators = [flow.async_routes.task()]

        def post(self, year: int) -> Any:
            if year == 1:
                abort(409, message="being written")
            return year

    register(flow, blueprint)
    assert flow.result("/reports/2031") == 2031
    assert flow.error("/reports/1") == "409 Conflict: being written"
    with pytest.raises(ConfigurationError, match=r"decorators = \[async_routes.task\(\)\]"):

        class Other(MethodView):
            @flow.async_routes.task
            def post(self) -> None: ...
