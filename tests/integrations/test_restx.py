"""Flask-RESTX: a Resource as an async route, its errors, and its documentation."""

from __future__ import annotations

from typing import Any

import pytest
from flask import request
from flask_restx import Api, Resource, fields

from flask_asyncroute import ConfigurationError, current_task
from tests.support.flow import Flow, path_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:jsonschema.RefResolver is deprecated:DeprecationWarning"
)


@pytest.fixture
def api(flow: Flow) -> Api:
    return Api(flow.app, validate=False)


def test_a_resource_with_the_decorator_of_the_class(flow: Flow, api: Api) -> None:
    model = api.model("Report", {"year": fields.Integer, "title": fields.String})

    @api.route("/reports/<int:year>")
    class Reports(Resource):  # type: ignore[misc]
        decorators = [flow.async_routes.task(timeout=60)]

        @api.marshal_with(model)
        def post(self, year: int) -> Any:
            return {"year": year, "title": request.json["title"], "secret": current_task.id}

    task = flow.run("/reports/2031", json={"title": "é"})
    assert task["Result"] == {"year": 2031, "title": "é"}
    assert task["AsyncRouteId"] == "[Post]/reports/<int:year>"
    assert flow.request("GET", "/reports/2031").status_code == 405
    assert "/reports/{year}" in flow.request("GET", "/swagger.json").get_json()["paths"]


def test_a_method_is_a_configuration_error(flow: Flow, api: Api) -> None:
    with pytest.raises(ConfigurationError, match=r"decorators = \[async_routes.task\(\)\]"):

        class Reports(Resource):  # type: ignore[misc]
            @flow.async_routes.task
            def post(self) -> None: ...


def test_method_decorators_are_a_configuration_error(flow: Flow, api: Api) -> None:
    """Flask-RESTX applies them to a method at each request."""

    @api.route("/reports")
    class Reports(Resource):  # type: ignore[misc]
        method_decorators = [flow.async_routes.task()]

        def post(self) -> None: ...

    with pytest.raises(ConfigurationError, match=r"decorators = \[async_routes.task\(\)\]"):
        flow.request("POST", "/reports")


def test_the_reason_of_abort_is_in_the_error(flow: Flow, api: Api) -> None:
    @api.route("/reports")
    class Reports(Resource):  # type: ignore[misc]
        decorators = [flow.async_routes.task()]

        def post(self) -> None:
            api.abort(409, "Report 2031 is being written", errors={"year": "taken"})

    task = flow.run("/reports")
    assert task["Error"] == '409 Conflict: Report 2031 is being written; {"year": "taken"}'
    result = flow.request("GET", f"{path_of(task)}/result")
    assert result.status_code == 409 and "being written" in result.get_json()["detail"]


def test_expect_validates_in_the_task(flow: Flow, api: Api) -> None:
    """The decorator belongs to the method, so an invalid payload is accepted and fails the task."""
    model = api.model("Report", {"year": fields.Integer(required=True)})

    @api.route("/reports")
    class Reports(Resource):  # type: ignore[misc]
        decorators = [flow.async_routes.task()]

        @api.expect(model, validate=True)
        def post(self) -> Any:
            return request.json["year"]

    assert flow.result("/reports", json={"year": 2031}) == 2031
    error = flow.error("/reports", json={"year": "x"})
    assert error.startswith("400 Bad Request: Input payload validation failed; ")
    assert "'x' is not of type 'integer'" in error


def test_refusals_and_unknown_tasks_are_not_answered_by_the_api(flow: Flow, api: Api) -> None:
    @api.route("/reports")
    class Reports(Resource):  # type: ignore[misc]
        decorators = [flow.async_routes.task()]

        def post(self) -> None: ...

    for method, path, status in (("POST", "/reports", 406), ("GET", "/task/x", 404)):
        accept = {"Accept": "image/png"} if status == 406 else {}
        response = flow.request(method, path, headers=accept)
        assert response.status_code == status
        assert response.mimetype == "application/problem+json"
