"""Flask-HTTPAuth keeps the user in ``g``, which a task does not have; ``current_task.user`` is the
owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import request
from flask_httpauth import HTTPBasicAuth, HTTPTokenAuth

from flask_asyncroute import Access, ConfigurationError, Permission, current_task
from flask_asyncroute.http import streams
from tests.support.event_streams import messages, told
from tests.support.flow import Flow, path_of

MakeFlow = Callable[..., Flow]
TOKENS = {"t-ann": "ann", "t-bob": "bob", "t-eve": "eve"}


def by(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def auth() -> HTTPTokenAuth:
    auth = HTTPTokenAuth()
    auth.verify_token(TOKENS.get)
    auth.get_user_roles(lambda user: ["admin"] if user == "eve" else [])
    return auth


@pytest.fixture
def auth_flow(make_flow: MakeFlow, auth: HTTPTokenAuth) -> Flow:
    """Return an app whose operations need a token, as on the page on extensions."""
    flow = make_flow(decorators=[auth.login_required])

    @flow.async_routes.identity_loader
    def load_identity() -> dict[str, str] | None:
        given = request.authorization
        user = TOKENS.get(given.token or "") if given else None
        return {"id": user} if user else None

    return flow


def test_the_user_of_the_token_is_the_owner(auth_flow: Flow, auth: HTTPTokenAuth) -> None:
    @auth_flow.app.post("/work")
    @auth.login_required
    @auth_flow.async_routes.task
    def work() -> Any:
        return [current_task.user, auth.current_user()]

    assert auth_flow.request("POST", "/work").status_code == 401
    auth_flow.headers = by("t-ann")
    task = auth_flow.run()
    assert task["Result"] == ["ann", None] and task["User"] == "ann"
    auth_flow.get(task, status=404, headers=by("t-bob"))
    assert auth_flow.request("GET", path_of(task), headers=by("forged")).status_code == 401
    assert auth_flow.ids() == [task["Id"]] and auth_flow.ids(headers=by("t-bob")) == []


def test_a_before_task_function_may_authenticate_again(
    auth_flow: Flow, auth: HTTPTokenAuth
) -> None:
    """For code that calls ``auth.current_user()``. The rebuilt request has the credentials."""
    auth_flow.async_routes.before_task(auth.login_required(lambda: None))

    @auth_flow.route(decorators=[auth.login_required])
    def work() -> Any:
        return auth.current_user()

    auth_flow.headers = by("t-ann")
    assert auth_flow.result() == "ann"


def test_a_role_guards_the_start(auth_flow: Flow, auth: HTTPTokenAuth) -> None:
    @auth_flow.route(decorators=[auth.login_required(role="admin")])
    def work() -> Any:
        return current_task.user

    assert auth_flow.request("POST", "/work", headers=by("t-ann")).status_code == 403
    auth_flow.headers = by("t-eve")
    assert auth_flow.result() == "eve"
    assert auth_flow.ids() != []


@pytest.mark.parametrize("by_route", [True, False])
def test_login_required_below_is_a_configuration_error(
    auth_flow: Flow, auth: HTTPTokenAuth, by_route: bool
) -> None:
    decorate = auth_flow.route() if by_route else auth_flow.async_routes.task
    with pytest.raises(ConfigurationError, match=r"login_required.*decorators=\[login_required\]"):
        decorate(auth.login_required(lambda: None))


def test_basic_credentials(make_flow: MakeFlow) -> None:
    auth = HTTPBasicAuth()
    auth.verify_password(lambda name, password: name if password == f"{name}!" else None)
    flow = make_flow(decorators=[auth.login_required])

    @flow.async_routes.identity_loader
    def load_identity() -> dict[str, str] | None:
        return {"id": user} if (user := auth.current_user()) else None

    @flow.route(
        decorators=[auth.login_required], permission=Permission(read=Access(users=("bob",)))
    )
    def work() -> Any:
        assert request.authorization is not None
        return [current_task.user, request.authorization.username]

    assert flow.request("POST", "/work", auth=("ann", "wrong")).status_code == 401
    task = flow.start(auth=("ann", "ann!"))
    flow.get(task, status=404, auth=("eve", "eve!"))
    path = f"{path_of(task)}/result"
    waited = flow.request("GET", f"{path_of(task)}?wait=5", auth=("bob", "bob!"))
    assert waited.get_json()["State"] == "Completed"
    assert flow.request("GET", path, auth=("bob", "bob!")).get_json() == ["ann", "ann"]


@pytest.mark.parametrize("reads_g", [True, False])
def test_a_stream_identifies_its_caller_again_from_the_request_alone(
    auth_flow: Flow,
    auth: HTTPTokenAuth,
    monkeypatch: pytest.MonkeyPatch,
    gate: Any,
    begun: Any,
    reads_g: bool,
) -> None:
    """Decorators do not run then. A loader that reads only ``g`` finds no user, and the stream
    ends.
    """
    monkeypatch.setattr(streams, "LOOK_AGAIN_SECONDS", 0.05)
    if reads_g:
        auth_flow.async_routes.identity_loader(lambda: (u := auth.current_user()) and {"id": u})

    @auth_flow.route(decorators=[auth.login_required])
    def work() -> None:
        current_task.send_event({"n": 1}, event="step")
        begun.release()
        gate.wait(10)

    auth_flow.headers = by("t-ann")
    task = auth_flow.start()
    assert begun.acquire(timeout=5)
    response = auth_flow.client.get(
        f"{path_of(task)}/events", headers=auth_flow.headers, buffered=False
    )
    events = messages(response.iter_encoded())
    assert told([next(events), next(events)]) == ["Running", "step"]
    if not reads_g:
        gate.set()
    assert told(events) == ([] if reads_g else ["Completed"])
    response.close()
