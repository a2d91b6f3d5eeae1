"""Permissions to read and stop tasks, for single operations and for lists, which must agree."""

from __future__ import annotations

import itertools
import logging
import random
import re
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from flask import Blueprint, request
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user

from flask_asyncroute import Access, AsyncRoute, Permission
from tests.support.flow import Flow, problem

MakeFlow = Callable[..., Flow]
MakeApp = Callable[..., Any]

KINDS = ("users", "groups", "roles", "scopes")


def test_each_kind_of_grant_gives_access(flow: Flow) -> None:
    """Users, groups, roles and scopes match exactly and separately. Write access includes read
    access.
    """
    ids: dict[tuple[str, str], str] = {}
    for side, kind in itertools.product(("read", "write"), KINDS):
        permission = Permission(**{side: Access(**{kind: ["x", "ü Y"]})})
        flow.route(
            f"/{side}/{kind}", endpoint=f"{side}{kind}", permission=permission, executor="immediate"
        )(lambda: 1)
    for side, kind in itertools.product(("read", "write"), KINDS):
        ids[side, kind] = flow.start(f"/{side}/{kind}", headers={"X-User": "anna"})["Id"]
    assert len(flow.query("limit=500", headers={"X-User": "anna"})) == 8
    for kind in KINDS:
        granted = "x" if kind == "users" else f"bert;{kind}=a,x"
        for side in ("read", "write"):
            caller = {"X-User": granted}
            flow.get(ids[side, kind], headers=caller)
            assert flow.request(
                "DELETE", f"/task/{ids[side, kind]}", headers=caller
            ).status_code == (410 if side == "write" else 403)
            assert sorted(flow.ids(headers=caller)) == sorted(
                [ids["read", kind], ids["write", kind]]
            )
            for other in KINDS:
                if other != kind:
                    flow.get(ids[side, other], headers=caller, status=404)
        for nearly in ("X", "x ", "xx", "", "ü y"):
            caller = {"X-User": nearly or "?" if kind == "users" else f"bert;{kind}={nearly}"}
            flow.get(ids["read", kind], headers=caller, status=404)
            assert flow.ids(headers=caller) == []


@pytest.mark.covers("A24", "I5")
def test_readers_may_read_and_writers_may_stop(flow: Flow, gate: threading.Event) -> None:
    flow.route(
        endpoint="work", permission=Permission(read=Access(["reader"]), write=Access(["writer"]))
    )(lambda: gate.wait(10) and None)
    task = flow.start(headers={"X-User": "owner"})
    for user, read, stop in (
        (None, 404, 404),
        ("stranger", 404, 404),
        ("reader", 200, 403),
        ("writer", 200, 200),
        ("owner", 200, 200),
    ):
        headers = {} if user is None else {"X-User": user}
        assert flow.request("GET", f"/task/{task['Id']}", headers=headers).status_code == read
        assert flow.request("DELETE", f"/task/{task['Id']}", headers=headers).status_code == stop
    gate.set()


def test_anyone_with_the_id_may_read_and_stop_an_anonymous_task(
    flow: Flow, gate: threading.Event
) -> None:
    flow.route(endpoint="work")(lambda: gate.wait(10) and None)
    task = flow.start()
    for headers in ({}, {"X-User": "bert"}):
        assert flow.get(task, headers=headers)["Id"] == task["Id"]
    assert flow.stop(task, headers={"X-User": "bert"})["State"] == "Aborted"
    gate.set()
    flow.still(task)
    flow.purge(task, headers={"X-User": "bert"})


@pytest.mark.parametrize("listed", [True, False, None])
def test_anonymous_tasks_in_lists(
    make_flow: MakeFlow, store_url: str, listed: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flask_asyncroute")
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_LIST_ANONYMOUS=listed, TESTING=False)
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    assert flow.query() == []
    assert "ASYNCROUTE_LIST_ANONYMOUS" not in caplog.text, "no task is omitted yet"
    nobody = flow.start()["Id"]
    anna = flow.start(headers={"X-User": "anna"})["Id"]
    for _ in range(2):
        assert flow.ids() == ([nobody] if listed else [])
        assert flow.ids(headers={"X-User": "anna"}) == ([anna, nobody] if listed else [anna])
        assert flow.ids(headers={"X-User": "bert"}) == ([nobody] if listed else [])
    records = [
        record for record in caplog.records if "ASYNCROUTE_LIST_ANONYMOUS" in record.getMessage()
    ]
    assert len(records) == (0 if listed else 1), (
        "the first query that omits tasks logs the reason once"
    )
    assert flow.get(nobody, headers={"X-User": "bert"})


@pytest.mark.parametrize("mode", ["DEBUG", "TESTING"])
def test_anonymous_tasks_are_listed_in_debug_and_testing(make_flow: MakeFlow, mode: str) -> None:
    flow = make_flow(**{"TESTING": False, "DEBUG": False, mode: True})
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    flow.start()
    assert len(flow.query()) == 1


def test_admins_may_read_and_stop_all_tasks(
    make_flow: MakeFlow, store_url: str, gate: threading.Event
) -> None:
    flow = make_flow(
        ASYNCROUTE_STORE=store_url,
        ASYNCROUTE_ADMINS=Access(roles=("admin",), users=("root",)),
        TESTING=False,
    )
    flow.route(endpoint="work")(lambda: gate.wait(10) and None)
    tasks = [
        flow.start(headers=headers)["Id"]
        for headers in ({}, {"X-User": "anna"}, {"X-User": "bert"})
    ]
    for admin in ("root", "x;roles=admin"):
        assert flow.ids(headers={"X-User": admin}) == tasks[::-1]
        for task_id in tasks:
            assert flow.stop(task_id, headers={"X-User": admin})["State"] == "Aborted"
    for other in ("admin", "Root", "x;groups=admin", "x;roles=Admin"):
        assert flow.ids(headers={"X-User": other}) == []
        flow.get(tasks[1], status=404, headers={"X-User": other})
    gate.set()


def test_a_permission_is_evaluated_at_the_start(flow: Flow) -> None:
    """Later results of the function apply to later tasks."""
    readers = ["bert"]
    flow.route(
        endpoint="work", permission=lambda: Permission(read=Access(readers)), executor="immediate"
    )(lambda: 1)
    first = flow.start(headers={"X-User": "anna"})
    readers[:] = ["carl"]
    second = flow.start(headers={"X-User": "anna"})
    assert flow.ids(headers={"X-User": "bert"}) == [first["Id"]]
    assert flow.ids(headers={"X-User": "carl"}) == [second["Id"]]


@pytest.mark.covers("A25", "I5")
def test_lists_and_their_pages_have_only_readable_tasks(flow: Flow) -> None:
    """Permission applies before the limit, so each page except the last is full."""
    flow.route(
        "/shared",
        endpoint="shared",
        permission=Permission(read=Access(groups=["g"])),
        executor="immediate",
    )(lambda: 1)
    flow.route("/own", endpoint="own", executor="immediate")(lambda: 1)
    shared = []
    for number in range(6):
        for _ in range(3):
            flow.start("/own", headers={"X-User": "anna"})
        shared.append(flow.start("/shared", headers={"X-User": f"u{number}"})["Id"])
    caller = {"X-User": "bert;groups=g"}
    for limit in (1, 2, 3, 6, 7):
        found: list[str] = []
        target: str | None = f"/tasks?limit={limit}"
        while target is not None:
            response = flow.request("GET", target, headers=caller)
            page = response.get_json()
            link = response.headers.get("Link")
            assert len(page) == limit or link is None
            found += [task["Id"] for task in page]
            target = None if link is None else link[1 : link.index(">")]
        assert found == shared[::-1]
    assert "Link" not in flow.request("GET", "/tasks?limit=6", headers=caller).headers


@pytest.mark.covers("A27")
def test_a_query_for_another_user_does_not_reveal_its_tasks(flow: Flow) -> None:
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    for _ in range(3):
        flow.start(headers={"X-User": "victim"})
    for query in (
        "User={}",
        "filter[User][EQ]={}",
        "filter[User][LIKE]={}",
        "filter[User][GE]={}",
        "User={}&limit=1",
        "User={}&sort=CompletedTime",
    ):
        answers = [
            flow.request("GET", f"/tasks?{query.format(user)}", headers={"X-User": "bert"})
            for user in ("victim", "nobody")
        ]
        assert answers[0].data == answers[1].data == b"[]\n"
        assert sorted(answers[0].headers) == sorted(answers[1].headers)


def test_a_caller_of_many_groups_sees_each_task_once(flow: Flow) -> None:
    """Several grants match, and the caller has more groups than the query tests one by one."""
    groups = [f"g{number}" for number in range(60)]
    everything = Permission(
        read=Access(["bert"], groups, ["r"], ["s"]), write=Access(["bert"], groups[:3])
    )
    flow.route(endpoint="work", permission=everything, executor="immediate")(lambda: 1)
    ids = [flow.start(headers={"X-User": user})["Id"] for user in ("anna", "bert", "carl")]
    for held in (groups[:2], groups[:30], groups):
        caller = {"X-User": f"bert;groups={','.join(held)};roles=r;scopes=s"}
        for query in ("", "State=Completed", "sort=CompletedTime", "User=anna&State=Completed"):
            wanted = ids if query.startswith("sort") else ids[::-1]
            assert flow.ids(query, headers=caller) == (ids[:1] if "anna" in query else wanted)


def test_lists_and_get_agree(flow: Flow) -> None:
    """For random tasks and callers, a task is listed if and only if the caller can get it."""
    chance = random.Random(7)
    names = ["a", "b", "c"]

    def access() -> Access:
        return Access(**{kind: chance.sample(names, chance.choice([0, 0, 1])) for kind in KINDS})

    permissions = [Permission(read=access(), write=access()) for _ in range(8)]
    for number, permission in enumerate(permissions):
        flow.route(
            f"/{number}",
            endpoint=f"e{number}",
            permission=permission,
            executor="immediate",
            cancellable=number % 2 == 0,
        )(lambda: 1)
    flow.route("/free", endpoint="free", executor="immediate")(lambda: 1)
    started = []
    for number in range(8):
        started.append(flow.start(f"/{number}", headers={"X-User": chance.choice(names)})["Id"])
    started.append(flow.start("/free")["Id"])
    callers: list[dict[str, str]] = [{}]
    for user in (*names, "d"):
        for kind in ("groups", "roles", "scopes"):
            callers.append({"X-User": f"{user};{kind}={chance.choice(names)}"})
    for caller in callers:
        readable = [
            one
            for one in started
            if flow.request("GET", f"/task/{one}", headers=caller).status_code == 200
        ]
        assert flow.ids(headers=caller) == readable[::-1]
        assert flow.ids("State=Completed&sort=CreationTime", headers=caller) == readable
        for one in started:
            status = flow.request("DELETE", f"/task/{one}", headers=caller).status_code
            assert (status == 404) is (one not in readable)
            assert status in (403, 404, 410)


def test_an_anonymous_caller_cannot_use_the_cursor_of_a_user(flow: Flow) -> None:
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    for _ in range(3):
        flow.start(headers={"X-User": "anna"})
    link = flow.request("GET", "/tasks?limit=1", headers={"X-User": "anna"}).headers["Link"]
    target = link[1 : link.index(">")]
    problem(flow.request("GET", target), 400, "invalid-query")
    assert re.search("cursor", target)


# -- Flask-Login
# -------------------------------------------------------------------------------------------------------------


class User(UserMixin):  # type: ignore[misc]
    def __init__(self, name: str, groups: tuple[str, ...] = ()) -> None:
        self.id = name
        self.groups = groups


@pytest.fixture
def login(make_app: MakeApp, store_url: str) -> Flow:
    """Return an app with Flask-Login and without an identity loader."""
    app = make_app(ASYNCROUTE_STORE=store_url)
    manager = LoginManager(app)
    manager.user_loader(lambda name: User(name, ("staff",) if name == "carl" else ()))
    flow = Flow(app, AsyncRoute(app))

    @app.get("/login/<name>")
    def sign_in(name: str) -> str:
        login_user(User(name), remember="remember" in request.args)
        return ""

    return flow


@pytest.mark.parametrize("executor", ["thread", "immediate", "own"], indirect=True)
def test_flask_login_identifies_the_caller(login: Flow, executor: Any) -> None:
    @login.app.post("/work")
    @login_required
    @login.async_routes.task(
        executor=executor, permission=Permission(read=Access(groups=["staff"]))
    )
    def work() -> Any:
        return current_user.id

    assert login.request("POST", "/work").status_code == 401
    login.client.get("/login/anna")
    task = login.run()
    assert (task["User"], task["Result"]) == ("anna", "anna")
    for name, status in (("bert", 404), ("carl", 200), ("anna", 200)):
        login.client = login.app.test_client()
        login.client.get(f"/login/{name}")
        login.get(task, status=status)
        assert len(login.query()) == (status == 200)
    login.client = login.app.test_client()
    login.get(task, status=404)


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning:flask_login")
def test_flask_login_identifies_the_caller_by_the_remember_cookie(login: Flow) -> None:
    """The session cookie is missing. The task has its user and does not write to the session."""

    @login.route()
    def work() -> Any:
        return current_user.id

    login.client.get("/login/anna?remember")
    login.client.delete_cookie("session")
    task = login.run()
    assert (task["User"], task["Result"]) == ("anna", "anna")


def test_flask_login_identifies_the_caller_by_a_request_loader(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    manager = LoginManager(app)
    manager.request_loader(
        lambda request: User(request.headers["X-Key"]) if "X-Key" in request.headers else None
    )
    flow = Flow(app, AsyncRoute(app))
    flow.route(endpoint="work")(lambda: current_user.get_id())
    task = flow.start(headers={"X-Key": "anna"})
    assert task["User"] == "anna"
    flow.headers = {"X-Key": "anna"}
    assert flow.ended(task)["Result"] == "anna"
    flow.headers = {}
    assert "User" not in flow.start()


def test_an_identity_loader_takes_precedence_over_flask_login(login: Flow) -> None:
    login.async_routes.identity_loader(lambda: {"id": "from the loader"})
    login.route(endpoint="work")(lambda: 1)
    login.client.get("/login/anna")
    assert login.start()["User"] == "from the loader"


def test_operations_behind_login_required(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    LoginManager(app).user_loader(User)
    flow = Flow(app, AsyncRoute(app, decorators=[login_required]))
    flow.route(endpoint="work", executor="immediate")(lambda: 1)
    app.get("/login/<name>", endpoint="login")(lambda name: str(login_user(User(name))))
    task = flow.start()
    for method, path in (
        ("GET", f"/task/{task['Id']}"),
        ("DELETE", f"/task/{task['Id']}"),
        ("GET", "/tasks"),
        ("POST", "/tasks"),
    ):
        assert flow.request(method, path).status_code == 401
    flow.client.get("/login/anna")
    assert flow.get(task)["State"] == "Completed"


def test_the_identity_loader_runs_in_each_request_of_an_app_with_blueprints(flow: Flow) -> None:
    seen: list[str | None] = []
    blueprint = Blueprint("shop", "shop")

    @flow.async_routes.identity_loader
    def load_identity() -> dict[str, str]:
        seen.append(request.endpoint)
        return {"id": "anna"}

    @blueprint.post("/work")
    @flow.async_routes.task(executor="immediate")
    def work() -> Any:
        return 1

    flow.app.register_blueprint(blueprint)
    task = flow.start()
    flow.get(task)
    flow.query()
    flow.stop(task, status=410)
    assert seen == ["shop.work", "asyncroute.get", "asyncroute.query", "asyncroute.stop"]


class Role(str, Enum):  # noqa: UP042 - StrEnum is a separate case
    ADMIN = "admin"


class Team(Enum):
    FINANCE = "finance"


def test_members_of_an_enum_count_by_their_value(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_ADMINS=Access(roles=(Role.ADMIN,)))
    current_identity: dict[str, Any] = {"id": "owner"}
    flow.async_routes.identity_loader(lambda: current_identity)
    flow.route(endpoint="work", permission=Permission(read=Access(groups=("finance",))))(lambda: 1)
    task = flow.start()
    for identity in (
        {"id": "a", "roles": [Role.ADMIN]},
        {"id": "b", "groups": [Team.FINANCE]},
        {"id": Role.ADMIN, "roles": ["admin"]},
    ):
        current_identity.clear()
        current_identity.update(identity)
        flow.get(task)
        assert flow.ids() == [task["Id"]]
    assert flow.start()["User"] == "admin"


@pytest.mark.parametrize(
    "identity",
    [
        {"id": "a", "groups": [None]}, {"id": "a", "groups": b"g"}, {"id": "a", "roles": ["r\0"]},
        {"id": "a", "scopes": ["\udfff"]}, {"id": "a", "scopes": 5}, {"id": "a", "scopes": [b"s"]},
    ],
    ids=repr,
)  # fmt: skip
def test_names_that_cannot_be_stored_or_compared_are_500(
    make_flow: MakeFlow, identity: dict[str, Any]
) -> None:
    """The store would refuse them later, or they would never match."""
    flow = make_flow()
    flow.async_routes.identity_loader(lambda: identity)
    flow.route(endpoint="work")(lambda: 1)
    for method, path in (("POST", "/work"), ("GET", "/task/x"), ("GET", "/tasks")):
        problem(flow.request(method, path), 500, "cannot-start")


@pytest.mark.parametrize(
    "user_id", ["a\0", "\ud800", "", None, b"anna", True, "x" * 256], ids=ascii
)
def test_a_user_id_that_cannot_be_stored_starts_and_owns_no_task(
    make_flow: MakeFlow, user_id: Any
) -> None:
    flow = make_flow()
    flow.async_routes.identity_loader(lambda: {"id": user_id})
    flow.route(endpoint="work")(lambda: 1)
    problem(flow.request("POST", "/work"), 500, "cannot-start")
    problem(flow.request("GET", "/task/x"), 404, "task-not-found")
    assert flow.query() == []
