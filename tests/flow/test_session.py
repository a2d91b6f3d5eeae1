"""The session in a task: a working copy of its contents at the start."""

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

from tests.support.flow import IN_MEMORY, Flow, problem

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


def test_the_session_has_its_contents_at_the_start(flow: Flow, executor: Any) -> None:
    found: list[dict[str, Any]] = []

    @flow.app.before_request
    def before() -> None:
        if flask.request.endpoint == "work":
            session.update(KINDS)
            session.permanent = True

    @flow.route(executor=executor)
    def work() -> Any:
        found.append(dict(session))
        return [
            session.permanent,
            isinstance(session["markup"], Markup),
            isinstance(session["tuple"], tuple),
        ]

    assert flow.result() == [True, True, True]
    assert found == [{**KINDS, "_permanent": True}]


def test_a_later_change_is_not_visible_in_the_task(flow: Flow, gate: Any) -> None:
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


WRITES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "set": (lambda: session.__setitem__("a", 1), {"kept": 1, "a": 1}, "'a'"),
    "del": (lambda: session.__delitem__("kept"), {}, "'kept'"),
    "clear": (lambda: session.clear(), {}, "'kept'"),
    "pop": (lambda: session.pop("kept"), {}, "'kept'"),
    "popitem": (lambda: session.popitem(), {}, "'kept'"),
    "setdefault": (lambda: session.setdefault("a", 1), {"kept": 1, "a": 1}, "'a'"),
    "update": (lambda: session.update(b=2, a=1), {"kept": 1, "a": 1, "b": 2}, "'a', 'b'"),
    "permanent": (lambda: setattr(session, "permanent", True), {"kept": 1, "_permanent": True},
                  "'_permanent'"),
    "flash": (lambda: flash("hello"), {"kept": 1, "_flashes": [("message", "hello")]},
              "'_flashes'"),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_visible_to_the_view_and_dropped_with_a_warning(
    make_flow: MakeFlow, write: str, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    change, seen, names = WRITES[write]

    @flow.app.before_request
    def before() -> None:
        session["kept"] = 1

    @flow.route()
    def work() -> Any:
        change()
        return dict(session)

    @flow.app.get("/session")
    def shown() -> Any:
        return dict(session)

    for _ in range(2):
        assert flow.result() == through_json(seen)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "once per route, keys and process"
    assert f"wrote the session keys {names}." in warnings[0] and "endpoint work" in warnings[0]

    assert flow.request("GET", "/session").get_json() == {"kept": 1}


def test_writes_are_logged_once_for_each_route_and_set_of_keys(
    make_flow: MakeFlow, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()

    def work(key: str) -> None:
        session[key] = 1

    flow.route("/one/<key>", endpoint="one")(work)

    @flow.route("/two/<key>")
    def two(key: str) -> None:
        session[key] = 1

    for path in ("/one/a", "/one/b", "/one/a", "/two/a"):
        flow.result(path)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(" wrote")[0].split()[-1] for message in warned] == [
        "one",
        "one",
        "two",
    ]


def test_flashed_messages_can_be_read_in_a_task(flow: Flow, executor: Any) -> None:
    """Base templates read flashed messages, which removes them from the session."""

    @flow.app.before_request
    def before() -> None:
        flash("Your report is on its way")

    @flow.route(executor=executor)
    def work() -> Any:
        return flask.render_template_string(
            "{% for m in get_flashed_messages() %}{{ m }}{% endfor %}"
        )

    assert flow.result() == "Your report is on its way"


def test_reading_the_session_is_not_logged_as_a_write(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    @flow.app.before_request
    def before() -> None:
        session["list"] = [1]

    @flow.route()
    def work() -> Any:
        session.modified = True
        session.setdefault("list", [])
        return [session.get("list"), session.pop("missing", None), list(get_flashed_messages())]

    assert flow.result() == [[1], None, []]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


class Incomparable:
    def __ne__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    __eq__ = __ne__
    __hash__ = None  # type: ignore[assignment]


def test_writes_do_not_change_the_outcome(
    make_flow: MakeFlow, caplog: pytest.LogCaptureFixture
) -> None:
    """This includes values that cannot be encoded, keys that cannot be sorted, failing views."""
    flow = make_flow()

    @flow.route("/odd")
    def odd() -> str:
        session["a"] = Incomparable()
        session.update({1: 2, "b": float("nan")})  # type: ignore[call-overload]
        return "done"

    @flow.route("/failing")
    def failing() -> None:
        session["a"] = Incomparable()
        raise LookupError("the view's own")

    assert flow.result("/odd") == "done"
    assert flow.error("/failing") == "LookupError: the view's own"
    warnings = [record.getMessage() for record in caplog.records if "wrote" in record.message]
    assert [message.partition("session keys ")[2].partition(". ")[0] for message in warnings] == [
        "'a', 'b', 1",
        "'a'",
    ]


@IN_MEMORY
def test_a_task_does_not_open_or_change_a_server_side_session(flow: Flow) -> None:
    """The session interface returns the live session itself."""
    live = SecureCookieSession({"cart": [1]})
    opened = []

    class Server(SecureCookieSessionInterface):
        def open_session(self, app: Any, request: Any) -> SecureCookieSession:
            opened.append(request.path)
            return live

        def save_session(self, *args: Any) -> None:
            pass

    flow.app.session_interface = Server()

    @flow.route()
    def work() -> Any:
        session["cart"].append(9)
        session["user"] = "x"
        return session["cart"]

    task = flow.ended(flow.start())
    assert task["Result"] == [1, 9]
    assert dict(live) == {"cart": [1]} and opened.count("/work") == 1


def through_json(value: Any) -> Any:
    """Return a value after it was encoded as JSON and decoded."""
    return flask.json.loads(flask.json.dumps(value))


@IN_MEMORY
@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, {"deep": [object()]}], ids=["object", "set", "complex", "deep"]
)
def test_a_value_that_cannot_be_stored_is_named_and_starts_nothing(flow: Flow, value: Any) -> None:
    ran = []

    class Anything(SecureCookieSessionInterface):
        """A server-side session, which can hold any value."""

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


def test_a_session_with_a_cyclic_value_is_refused(make_flow: MakeFlow) -> None:
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


def test_without_a_secret_key_the_session_is_empty(make_flow: MakeFlow) -> None:
    flow = make_flow(SECRET_KEY=None)

    @flow.route()
    def work() -> Any:
        return [len(session), session.get("x"), list(get_flashed_messages())]

    assert flow.result() == [0, None, []]


def test_the_start_sets_the_session_cookie(flow: Flow) -> None:
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
