"""The session of the request that started a task: to read, as it was then, and not to write."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import flask
import pytest
from flask import flash, get_flashed_messages, session
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface
from markupsafe import Markup

from tests.flow.driving import IN_MEMORY, Flow, problem

MakeFlow = Callable[..., Flow]

KINDS = {
    "tuple": (1, "two"),
    "bytes": b"\x00\xff",
    "uuid": uuid.UUID(int=7),
    "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "markup": Markup("<b>x</b>"),
    "nested": {"a": [1, {"b": (2,)}], "é": "\U0001f600"},
    "none": None,
    "number": 10**30,
}


def test_it_holds_what_it_held_at_the_start(flow: Flow, executor: Any) -> None:
    found: list[dict[str, Any]] = []

    @flow.app.before_request
    def before() -> None:
        if flask.request.endpoint == "work":
            session.update(KINDS)
            session.permanent = True

    @flow.route(executor=executor)
    def work() -> Any:
        found.append(dict(session))
        return [session.permanent, isinstance(session["markup"], Markup), isinstance(session["tuple"], tuple)]

    assert flow.result() == [True, True, True]
    assert found == [{**KINDS, "_permanent": True}]


def test_a_later_change_does_not_reach_the_task(flow: Flow, gate: Any) -> None:
    @flow.app.get("/set/<value>")
    def remember(value: str) -> str:
        session["value"] = value
        return ""

    @flow.route()
    def work() -> Any:
        gate.wait(10)
        return session["value"]

    flow.client.get("/set/before")
    task = flow.start()
    flow.client.get("/set/after")
    gate.set()
    assert flow.ended(task)["Result"] == "before"


WRITES: dict[str, Callable[[], Any]] = {
    "set": lambda: session.__setitem__("a", 1),
    "del": lambda: session.__delitem__("kept"),
    "clear": lambda: session.clear(),
    "pop": lambda: session.pop("kept"),
    "pop with a default": lambda: session.pop("missing", None),
    "popitem": lambda: session.popitem(),
    "setdefault": lambda: session.setdefault("a", 1),
    "update": lambda: session.update(a=1),
    "permanent": lambda: setattr(session, "permanent", True),
    "flash": lambda: flash("hello"),
    "or": lambda: session._get_current_object().__ior__({"a": 1}),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_raises_and_says_what_to_do(make_flow: MakeFlow, write: str) -> None:
    flow = make_flow()

    @flow.app.before_request
    def before() -> None:
        session["kept"] = 1

    @flow.route()
    def work() -> Any:
        with pytest.raises(TypeError, match=r"cannot write to session.*async_routes\.state"):
            WRITES[write]()
        return dict(session)

    assert flow.result() == {"kept": 1}


def test_a_write_that_is_not_caught_fails_the_task(flow: Flow) -> None:
    @flow.route()
    def work() -> None:
        session["a"] = 1

    assert flow.error().startswith("SessionIsReadOnly: A task cannot write to session")


@IN_MEMORY
@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, {"deep": [object()]}], ids=["object", "set", "complex", "deep"]
)
def test_what_cannot_be_kept_is_named_and_nothing_started(flow: Flow, value: Any) -> None:
    ran = []

    class Anything(SecureCookieSessionInterface):
        """A session on the server, that could hold anything."""

        def open_session(self, app: Any, request: Any) -> SecureCookieSession:
            return SecureCookieSession({"fine": 1, "cart": value})

        def save_session(self, *args: Any) -> None:
            pass

    flow.app.session_interface = Anything()

    @flow.route()
    def work() -> None:
        ran.append(1)

    found = problem(flow.request("POST", "/work"), 500, "cannot-start")
    assert "'cart'" in found["detail"] and "fine" not in found["detail"]
    assert flow.query() == [] and not ran


def test_a_session_that_contains_itself(make_flow: MakeFlow) -> None:
    flow = make_flow()

    class Cyclic(SecureCookieSessionInterface):
        def open_session(self, app: Any, request: Any) -> SecureCookieSession:
            cart: list[Any] = []
            cart.append(cart)
            return SecureCookieSession({"cart": cart})

        def save_session(self, *args: Any) -> None:
            pass

    flow.app.session_interface = Cyclic()

    @flow.route()
    def work() -> None: ...

    assert "'cart'" in problem(flow.request("POST", "/work"), 500, "cannot-start")["detail"]


def test_without_a_secret_key_there_is_an_empty_one(make_flow: MakeFlow) -> None:
    flow = make_flow(SECRET_KEY=None)

    @flow.route()
    def work() -> Any:
        return [len(session), session.get("x"), list(get_flashed_messages())]

    assert flow.result() == [0, None, []]


def test_the_cookie_of_the_start_is_set_as_ever(flow: Flow) -> None:
    """The start is a plain request to the session: what a hook writes reaches the browser."""

    @flow.app.before_request
    def before() -> None:
        session["seen"] = session.get("seen", 0) + 1

    @flow.route()
    def work() -> Any:
        return session["seen"]

    assert flow.start()["State"] == "NotStarted"
    assert flow.client.get_cookie("session") is not None
    with flow.client.session_transaction() as held:
        assert held["seen"] == 1
