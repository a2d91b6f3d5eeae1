"""Flask-JWT-Extended: tokens in headers and cookies, their CSRF protection, and tokens that are
revoked before the task runs.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask import jsonify
from flask_jwt_extended import (
    JWTManager,
    create_access_token,
    get_current_user,
    get_jti,
    get_jwt,
    get_jwt_identity,
    jwt_required,
    set_access_cookies,
    verify_jwt_in_request,
)

from flask_asyncroute import ConfigurationError, current_task
from tests.support.flow import Flow, path_of

MakeFlow = Callable[..., Flow]
SECRET = "a secret of at least thirty-two bytes"


@pytest.fixture
def make_jwt(make_flow: MakeFlow) -> MakeFlow:
    """Return ``make_jwt(**config)``, which creates an app as on the page on extensions."""

    def make(**config: Any) -> Flow:
        flow = make_flow(JWT_SECRET_KEY=SECRET, **config)
        manager = JWTManager(flow.app)
        manager.user_lookup_loader(lambda header, data: {"name": data["sub"].title()})

        @flow.async_routes.identity_loader
        def load_identity() -> dict[str, Any] | None:
            if verify_jwt_in_request(optional=True) is None:
                return None
            return {"id": get_jwt_identity(), "roles": get_jwt().get("roles", [])}

        return flow

    return make


def token(flow: Flow, name: str, **given: Any) -> dict[str, str]:
    with flow.app.app_context():
        return {"Authorization": f"Bearer {create_access_token(name, **given)}"}


def test_the_subject_of_the_token_is_the_owner(make_jwt: MakeFlow) -> None:
    flow = make_jwt()

    @flow.app.post("/work")
    @jwt_required()
    @flow.async_routes.task
    def work() -> Any:
        return current_task.user

    assert flow.request("POST", "/work").status_code == 401
    assert flow.request("POST", "/work", headers={"Authorization": "Bearer x"}).status_code == 422
    flow.headers = token(flow, "ann")
    task = flow.run()
    assert (task["User"], task["Result"]) == ("ann", "ann")
    assert flow.ids() == [task["Id"]]
    flow.get(task, status=404, headers=token(flow, "bob"))


def test_get_jwt_identity_needs_the_token_to_be_verified_in_the_task(make_jwt: MakeFlow) -> None:
    flow = make_jwt()

    @flow.route("/unverified", decorators=[jwt_required()])
    def unverified() -> Any:
        return get_jwt_identity()

    @flow.route("/verified", decorators=[jwt_required()])
    def verified() -> Any:
        verify_jwt_in_request()
        return [get_jwt_identity(), get_jwt()["roles"], get_current_user()["name"]]

    flow.headers = token(flow, "ann", additional_claims={"roles": ["editor"]})
    assert flow.error("/unverified").startswith("RuntimeError: You must call `@jwt_required()`")
    assert flow.result("/verified") == ["ann", ["editor"], "Ann"]


def test_a_token_revoked_while_the_task_waits_fails_only_its_verification(
    make_jwt: MakeFlow, gate: Any
) -> None:
    """``current_task.user`` stays. Another verification of the token fails the task."""
    flow = make_jwt()
    revoked = set()

    @flow.app.extensions["flask-jwt-extended"].token_in_blocklist_loader
    def is_revoked(header: Any, data: Any) -> bool:
        return data["jti"] in revoked

    @flow.route("/work/<kind>", decorators=[jwt_required()], max_workers=2)
    def work(kind: str) -> Any:
        gate.wait(10)
        if kind == "verify":
            verify_jwt_in_request()
        return current_task.user

    old = token(flow, "ann")
    tasks = [flow.start(f"/work/{kind}", headers=old) for kind in ("verify", "keep")]
    with flow.app.app_context():
        revoked.add(get_jti(old["Authorization"].removeprefix("Bearer ")))
    flow.get(tasks[0], status=401, headers=old)
    gate.set()
    flow.headers = token(flow, "ann")
    assert flow.ended(tasks[0])["Error"] == "RevokedTokenError: Token has been revoked"
    assert flow.ended(tasks[1])["Result"] == "ann"


@pytest.mark.parametrize("by_route", [True, False])
def test_jwt_required_below_is_a_configuration_error(make_jwt: MakeFlow, by_route: bool) -> None:
    flow = make_jwt()
    decorate = flow.route() if by_route else flow.async_routes.task
    with pytest.raises(ConfigurationError, match="jwt_required"):
        decorate(jwt_required()(lambda: None))


def test_cookies_with_csrf_protection(make_jwt: MakeFlow) -> None:
    """Each operation that changes something needs the token of the CSRF cookie as well."""
    flow = make_jwt(JWT_TOKEN_LOCATION=["cookies"])

    @flow.app.get("/login/<name>")
    def login(name: str) -> Any:
        response = jsonify({})
        set_access_cookies(response, create_access_token(name))
        return response

    @flow.route(decorators=[jwt_required()])
    def work() -> Any:
        return current_task.user

    flow.client.get("/login/ann")
    assert flow.request("POST", "/work").status_code == 401
    assert flow.ids() == []
    cookie = flow.client.get_cookie("csrf_access_token")
    assert cookie is not None
    csrf = {"X-CSRF-TOKEN": cookie.value}
    task = flow.run(headers=csrf)
    assert task["Result"] == "ann"
    assert flow.request("GET", f"{path_of(task)}?wait=1").status_code == 200
    assert flow.request("POST", "/tasks/query", json={}).status_code == 401
    assert len(flow.request("POST", "/tasks/query", json={}, headers=csrf).get_json()) == 1
    assert flow.request("DELETE", f"{path_of(task)}?purge=true").status_code == 401
    flow.purge(task, headers=csrf)


def test_an_expired_token_is_refused_by_every_operation(make_jwt: MakeFlow) -> None:
    """The errors of the loader reach the handlers that Flask-JWT-Extended registers."""
    flow = make_jwt()
    flow.route()(lambda: None)
    expired = token(flow, "ann", expires_delta=timedelta(seconds=-5))
    for method, path in (("POST", "/work"), ("GET", "/task/x"), ("GET", "/tasks")):
        response = flow.request(method, path, headers=expired)
        assert (response.status_code, response.get_json()) == (401, {"msg": "Token has expired"})
    assert flow.ids() == []
