"""Flask-Login: the owner of a task, who may start one, and ``current_user`` in the task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import request
from flask_login import (
    LoginManager,
    UserMixin,
    confirm_login,
    current_user,
    fresh_login_required,
    login_fresh,
    login_required,
    login_user,
    logout_user,
)

from flask_asyncroute import Access, ConfigurationError, Permission, current_task
from tests.support.flow import Flow, path_of

MakeFlow = Callable[..., Flow]


class User(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name
        self.roles = ["editor"] if name == "ed" else []


def with_login(flow: Flow, **settings: Any) -> Flow:
    """Add Flask-Login, ``/login/<name>``, ``/confirm`` and ``/logout``."""
    manager = LoginManager(flow.app)
    for name, value in settings.items():
        setattr(manager, name, value)
    flow.app.extensions["test.gone"] = gone = set()

    @manager.user_loader
    def load(name: str) -> User | None:
        return None if name in gone else User(name)

    @flow.app.get("/login/<name>")
    def login(name: str) -> str:
        login_user(User(name), remember="remember" in request.args)
        return ""

    @flow.app.get("/confirm")
    def confirm() -> str:
        confirm_login()
        return ""

    @flow.app.get("/logout")
    def logout() -> str:
        logout_user()
        return ""

    return flow


def signed_in(flow: Flow, name: str) -> Flow:
    """Return a client of the same app that is signed in."""
    other = Flow(flow.app, flow.async_routes)
    assert other.client.get(f"/login/{name}").status_code == 200
    return other


@pytest.fixture
def login_flow(flow: Flow) -> Flow:
    return with_login(flow)


def test_the_current_user_is_the_owner(login_flow: Flow) -> None:
    @login_flow.app.post("/work")
    @login_required
    @login_flow.async_routes.task
    def work() -> Any:
        return [current_user.id, current_user.is_authenticated, current_task.user]

    ann, bob = signed_in(login_flow, "ann"), signed_in(login_flow, "bob")
    task = ann.run()
    assert task["Result"] == ["ann", True, "ann"]
    assert task["User"] == "ann" and ann.ids() == [task["Id"]]
    for other in (bob, login_flow):
        other.get(task, status=404)
        other.stop(task, status=404)
        assert other.ids() == []


@pytest.mark.parametrize("by", ["above", "task", "route"])
def test_anonymous_users_start_nothing(login_flow: Flow, by: str) -> None:
    """Above ``task()`` as in Flask; ``decorators=`` is the same for ``task()`` and ``route()``."""

    def work() -> str:
        return str(current_user.id)

    flow, task = login_flow, login_flow.async_routes.task
    if by == "above":
        flow.app.post("/work")(login_required(task(work)))
    elif by == "task":
        flow.app.post("/work")(task(decorators=[login_required])(work))
    else:
        flow.route(decorators=[login_required])(work)
    assert flow.request("POST", "/work").status_code == 401
    assert flow.ids() == []
    assert signed_in(flow, "ann").result() == "ann"


@pytest.mark.parametrize("by", ["task", "route"])
def test_login_required_below_is_a_configuration_error(login_flow: Flow, by: str) -> None:
    decorate = login_flow.async_routes.task if by == "task" else login_flow.route()
    with pytest.raises(ConfigurationError, match=r"decorators=\[login_required\]"):
        decorate(login_required(lambda: None))


def test_decorators_guard_every_operation(make_flow: MakeFlow) -> None:
    flow = with_login(make_flow(decorators=[login_required]))

    @flow.route(decorators=[login_required])
    def work() -> None: ...

    ann = signed_in(flow, "ann")
    task = ann.run()
    for method, path in (
        ("GET", path_of(task)),
        ("GET", f"{path_of(task)}/result"),
        ("GET", f"{path_of(task)}/events"),
        ("DELETE", path_of(task)),
        ("GET", "/tasks"),
        ("POST", "/tasks/query"),
    ):
        assert flow.request(method, path).status_code == 401
    assert ann.ids() == [task["Id"]]


def test_with_a_login_view_anonymous_users_are_redirected(make_flow: MakeFlow) -> None:
    flow = with_login(make_flow(decorators=[login_required]), login_view="sign_in")
    flow.app.add_url_rule("/sign-in", "sign_in", lambda: "")

    @flow.route(decorators=[login_required])
    def work() -> None: ...

    for method, path in (("POST", "/work"), ("GET", "/tasks")):
        response = flow.request(method, path)
        assert response.status_code == 302 and response.location.startswith("/sign-in?next=")


def test_a_remembered_user_must_sign_in_again_if_a_fresh_login_is_required(
    login_flow: Flow, warnings_of: Callable[[], list[str]]
) -> None:
    @login_flow.route("/any", decorators=[login_required])
    def any_login() -> Any:
        return [current_user.id, login_fresh()]

    @login_flow.route("/fresh", decorators=[fresh_login_required])
    def fresh_login() -> Any:
        return [current_user.id, login_fresh()]

    login_flow.client.get("/login/ann?remember=1")
    assert login_flow.result("/fresh") == ["ann", True]
    login_flow.client.delete_cookie("session")
    assert login_flow.request("POST", "/fresh").status_code == 401
    assert login_flow.result("/any") == ["ann", False]
    login_flow.client.get("/confirm")
    assert login_flow.result("/fresh") == ["ann", True]
    assert warnings_of() == []


def test_a_remembered_user_who_is_restored_in_the_task(
    login_flow: Flow, warnings_of: Callable[[], list[str]]
) -> None:
    """Flask-Login restores the user from the cookie and writes to the session of the task."""
    login_flow.async_routes.identity_loader(lambda: {"id": "robot"})

    @login_flow.route()
    def work() -> Any:
        return [current_user.id, current_task.user]

    login_flow.client.get("/login/ann?remember=1")
    login_flow.client.delete_cookie("session")
    assert login_flow.result() == ["ann", "robot"]
    (warning,) = warnings_of()
    assert "'_user_id'" in warning and "changes are lost" in warning


@pytest.mark.parametrize("protection", ["basic", "strong"])
def test_session_protection_accepts_the_rebuilt_request(
    login_flow: Flow, protection: str, warnings_of: Callable[[], list[str]]
) -> None:
    """It compares a hash of the client's address and User-Agent with the session."""
    login_flow.app.login_manager.session_protection = protection  # type: ignore[attr-defined]

    @login_flow.route()
    def work() -> Any:
        return [current_user.get_id(), login_fresh()]

    login_flow.headers = {"User-Agent": "browser/1"}
    login_flow.request("GET", "/login/ann")
    assert login_flow.result() == ["ann", True]
    assert warnings_of() == []


def test_signing_out_does_not_change_the_user_of_a_task(
    login_flow: Flow, gate: threading.Event
) -> None:
    @login_flow.route()
    def work() -> Any:
        gate.wait(10)
        return current_user.id

    ann = signed_in(login_flow, "ann")
    task = ann.start()
    ann.client.get("/logout")
    ann.get(task, status=404)
    gate.set()
    assert signed_in(login_flow, "ann").ended(task)["Result"] == "ann"


def test_a_user_who_was_deleted_meanwhile_is_anonymous_in_the_task(
    login_flow: Flow, gate: threading.Event
) -> None:
    @login_flow.route()
    def work() -> Any:
        gate.wait(10)
        return [current_user.is_authenticated, current_task.user]

    ann = signed_in(login_flow, "ann")
    task = ann.start()
    login_flow.app.extensions["test.gone"].add("ann")
    gate.set()
    with login_flow.app.app_context():
        ended = login_flow.async_routes.wait(task["Id"], 5)
    assert ended.to_dict()["Result"] == [False, "ann"]


def test_a_token_that_the_request_loader_reads(login_flow: Flow) -> None:
    @login_flow.app.login_manager.request_loader  # type: ignore[attr-defined]
    def from_token(request: Any) -> User | None:
        return User(request.authorization.token) if request.authorization else None

    @login_flow.route(decorators=[login_required])
    def work() -> Any:
        return current_user.id

    login_flow.headers = {"Authorization": "Bearer ann"}
    task = login_flow.run()
    assert (task["Result"], task["User"]) == ("ann", "ann")
    assert login_flow.client.get_cookie("session") is None


def test_roles_of_the_user_count_in_permissions(login_flow: Flow) -> None:
    @login_flow.route(permission=Permission(read=Access(roles=("editor",))))
    def work() -> None: ...

    task = signed_in(login_flow, "ann").run()
    editor, bob = signed_in(login_flow, "ed"), signed_in(login_flow, "bob")
    assert editor.get(task)["State"] == "Completed"
    editor.stop(task, status=403)
    bob.get(task, status=404)
