"""The request in a view, rebuilt after the original request was answered."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from flask import Blueprint, Flask, current_app, g, request, url_for
from werkzeug.routing import BaseConverter

from tests.support.flow import IN_MEMORY, Flow

MakeFlow = Callable[..., Flow]


def test_args_headers_cookies_and_authorization(flow: Flow, executor: Any) -> None:
    @flow.route("/work", methods=["PUT"], executor=executor)
    def work() -> dict[str, Any]:
        authorization = request.authorization
        assert authorization is not None
        return {
            "args": request.args.to_dict(flat=False),
            "method": request.method,
            "path": request.path,
            "full_path": request.full_path,
            "url": request.url,
            "header": request.headers["X-Thing"],
            "agent": request.headers["User-Agent"],
            "cookies": dict(request.cookies),
            "user": authorization.username,
            "password": authorization.password,
            "endpoint": request.endpoint,
            "rule": str(request.url_rule),
            "remote": request.remote_addr,
            "app": current_app.name,
        }

    flow.client.set_cookie("colour", "rot & grün; 'x'")
    found = flow.result(
        "/work?a=1&a=2&b=%C3%A9+x&c",
        "PUT",
        headers={"X-Thing": "a, b", "User-Agent": "me/1"},
        auth=("anna", "geheim:ü"),
    )
    assert found == {
        "args": {"a": ["1", "2"], "b": ["é x"], "c": [""]},
        "method": "PUT",
        "path": "/work",
        "full_path": "/work?a=1&a=2&b=%C3%A9+x&c",
        "url": "http://localhost/work?a=1&a=2&b=é+x&c",
        "header": "a, b",
        "agent": "me/1",
        "cookies": {"colour": "rot & grün; 'x'"},
        "user": "anna",
        "password": "geheim:ü",
        "endpoint": "work",
        "rule": "/work",
        "remote": "127.0.0.1",
        "app": "app",
    }


def test_a_json_body(flow: Flow, executor: Any) -> None:
    @flow.route(executor=executor)
    def work() -> Any:
        return {
            "json": request.json,
            "data": request.get_data(as_text=True),
            "is_json": request.is_json,
        }

    sent = {"a": [1, None, "\u00e9\U0001f600"], "b": {"c": 1.5}}
    assert flow.result(json=sent) == {"json": sent, "data": json.dumps(sent), "is_json": True}


def test_a_body_of_another_type_is_kept_byte_for_byte(flow: Flow) -> None:
    sent = bytes(range(256)) * 3000

    @flow.route()
    def work() -> Any:
        assert request.get_data() == sent
        return [request.content_length, request.mimetype]

    assert flow.result(data=sent, content_type="application/x-thing") == [
        len(sent),
        "application/x-thing",
    ]


def test_a_compressed_body_is_kept_as_it_is(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        return [request.headers["Content-Encoding"], request.get_data().hex()]

    assert flow.result(data=b"\x1f\x8b\x08", headers={"Content-Encoding": "gzip"}) == [
        "gzip",
        "1f8b08",
    ]


@IN_MEMORY
def test_a_request_without_a_body(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        return [
            request.get_data().hex(),
            len(request.form),
            len(request.files),
            request.get_json(silent=True),
        ]

    assert flow.result() == ["", 0, 0, None]


@IN_MEMORY
def test_invalid_json_fails_the_task_as_it_would_fail_a_request(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        return request.json

    assert flow.error(data="{", content_type="application/json").startswith("400 Bad Request: ")
    assert flow.error(data="x", content_type="text/plain").startswith(
        "415 Unsupported Media Type: "
    )


def test_a_large_body(flow: Flow) -> None:
    """It exceeds the 256 KiB that stay in memory."""
    sent = b"0123456789abcdef" * 200_000

    @flow.route()
    def work() -> Any:
        body = request.get_data()
        return [len(body), body == sent]

    assert flow.result(data=sent) == [3_200_000, True]


@IN_MEMORY
@pytest.mark.parametrize(
    ("rule", "path", "arguments"),
    [
        ("/a/<int:n>", "/a/42", {"n": 42}),
        ("/a/<int(signed=True):n>", "/a/-42", {"n": -42}),
        ("/a/<float:n>", "/a/1.5", {"n": 1.5}),
        ("/a/<path:n>", "/a/x/y%20z/%C3%A9", {"n": "x/y z/é"}),
        ("/a/<any(x,y):n>", "/a/y", {"n": "y"}),
        ("/a/<n>", "/a/%22%3C%E2%82%AC%F0%9F%98%80", {"n": '"<€\U0001f600'}),
        ("/a/<int:n>/<m>", "/a/1/2", {"n": 1, "m": "2"}),
    ],
)
def test_url_variables(flow: Flow, rule: str, path: str, arguments: dict[str, Any]) -> None:
    @flow.route(rule)
    def work(**given: Any) -> Any:
        return [given, request.view_args]

    assert flow.result(path) == [arguments, arguments]


def test_url_variables_that_are_not_json(flow: Flow) -> None:
    """They are matched again from the URL instead of being stored."""

    class Listed(BaseConverter):
        regex = "[^/]+"

        def to_python(self, value: str) -> frozenset[str]:
            return frozenset(value.split("+"))

    flow.app.url_map.converters["listed"] = Listed

    @flow.route("/a/<uuid:one>/<listed:two>")
    def work(one: uuid.UUID, two: frozenset[str]) -> Any:
        assert isinstance(one, uuid.UUID) and isinstance(two, frozenset)
        assert request.view_args == {"one": one, "two": two}
        return [one, sorted(two)]

    one = "12345678-1234-5678-1234-567812345678"
    assert flow.result(f"/a/{one}/x+y") == [one, ["x", "y"]]


@IN_MEMORY
def test_defaults_of_the_rule(flow: Flow) -> None:
    @flow.app.post("/pages", defaults={"page": 1})
    @flow.app.post("/pages/<int:page>")
    @flow.async_routes.task
    def pages(page: int) -> Any:
        return page

    assert [flow.result("/pages"), flow.result("/pages/5")] == [1, 5]


@IN_MEMORY
def test_a_url_value_preprocessor_may_remove_a_variable(flow: Flow) -> None:
    @flow.app.url_value_preprocessor
    def take(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if values is not None:
            g.language = values.pop("language", None)

    @flow.route("/<language>/<int:page>")
    def work(page: int) -> Any:
        return [page, request.view_args, g.language]

    assert flow.result("/de/7") == [7, {"page": 7}, "de"]


def test_url_processors_of_an_app_and_of_its_blueprints(flow: Flow) -> None:
    """As in Flask's documentation, a preprocessor removes a value that ``url_defaults`` adds again.
    Preprocessors also run in the task, because its ``g`` is fresh.
    """
    outer = Blueprint("outer", __name__, url_prefix="/<language>/x")
    inner = Blueprint("inner", __name__, url_prefix="/<int:number>")
    order: list[tuple[str, str | None]] = []

    @flow.app.url_value_preprocessor
    def first(endpoint: str | None, values: dict[str, Any] | None) -> None:
        order.append(("app", endpoint))

    @outer.url_value_preprocessor
    def take(endpoint: str | None, values: dict[str, Any] | None) -> None:
        order.append(("outer", endpoint))
        g.language = (values or {}).pop("language")

    @inner.url_value_preprocessor
    def look(endpoint: str | None, values: dict[str, Any] | None) -> None:
        order.append(("inner", endpoint))

    @outer.url_defaults
    def put(endpoint: str, values: dict[str, Any]) -> None:
        values.setdefault("language", g.language)

    def seen(number: int, name: str) -> Any:
        return [
            number,
            name,
            request.view_args,
            g.language,
            url_for(".work", number=2, name="other"),
        ]

    inner.add_url_rule("/work/<name>", "work", flow.async_routes.task(seen), methods=["POST"])
    inner.add_url_rule("/plain/<name>", "plain", seen)
    outer.register_blueprint(inner)
    flow.app.register_blueprint(outer)
    found = flow.result("/de/x/7/work/caf%C3%A9")
    called = [place for place, endpoint in order if endpoint == "outer.inner.work"]
    assert called == 2 * ["app", "outer", "inner"], "they run in the request and in the task"
    assert found == [7, "café", {"number": 7, "name": "café"}, "de", "/de/x/2/work/other"]
    assert found == flow.request("GET", "/de/x/7/plain/caf%C3%A9").get_json()


def test_a_url_value_preprocessor_that_raises_in_the_task(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    @flow.app.url_value_preprocessor
    def twice(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if endpoint == "work":
            calls.append(1)
            if len(calls) > 1:
                raise LookupError("gone")

    flow.route(endpoint="work")(lambda: 1)
    assert flow.error() == "LookupError: gone"
    assert "Traceback" in caplog.text and "LookupError: gone" in caplog.text


def test_a_url_value_preprocessor_may_change_a_variable(flow: Flow) -> None:
    @flow.app.url_value_preprocessor
    def change(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if values is not None and "language" in values:
            values["language"] = values["language"].upper()

    @flow.route("/<language>/page")
    def work(language: str) -> Any:
        return [language, request.view_args]

    assert flow.result("/de/page") == ["DE", {"language": "DE"}]


def test_a_url_value_preprocessor_may_add_a_variable(flow: Flow) -> None:
    @flow.app.url_value_preprocessor
    def add(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if values is not None and endpoint == "work":
            values["tenant"] = "acme"

    @flow.route("/page/<int:number>")
    def work(number: int, tenant: str) -> Any:
        return [number, tenant]

    assert flow.result("/page/7") == [7, "acme"]


def test_a_url_value_preprocessor_with_variables_that_are_objects(flow: Flow) -> None:
    """They are not JSON and equal only themselves. The preprocessor does not change them."""

    class Thing:
        def __init__(self, name: str) -> None:
            self.name = name

    class Things(BaseConverter):
        def to_python(self, value: str) -> Thing:
            return Thing(value)

    flow.app.url_map.converters["thing"] = Things
    flow.app.url_value_preprocessor(
        lambda endpoint, values: (values or {}).pop("language", None) and None
    )

    @flow.route("/<language>/<thing:thing>")
    def work(thing: Thing) -> Any:
        return thing.name

    assert flow.result("/de/x") == "x"


@pytest.mark.parametrize("value", [True, 1.0, "1"], ids=repr)
def test_a_decorator_may_change_the_type_of_a_variable(make_flow: MakeFlow, value: Any) -> None:
    """Equal values may differ in type, like 1 and True."""
    flow = make_flow()

    def changing(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(n: int) -> Any:
            return function(n=value)

        return wrapped

    @flow.app.post("/<int:n>")
    @changing
    @flow.async_routes.task
    def work(n: Any) -> Any:
        return repr(n)

    assert flow.result("/1") == repr(value)


@IN_MEMORY
def test_url_for_in_a_task(flow: Flow) -> None:
    @flow.route("/a/<int:n>")
    def work(n: int) -> Any:
        return [
            url_for("work", n=n + 1),
            url_for("work", n=1, _external=True),
            url_for("asyncroute.get", task_id="x"),
            url_for("static", filename="y"),
        ]

    assert flow.result("/a/1", base_url="https://shop.example:8443/app") == [
        "/app/a/2",
        "https://shop.example:8443/app/a/1",
        "/app/task/x",
        "/app/static/y",
    ]


@IN_MEMORY
def test_url_for_in_a_blueprint(flow: Flow) -> None:
    blueprint = Blueprint("shop", "shop")

    @blueprint.post("/a")
    @flow.async_routes.task
    def work() -> Any:
        return [request.blueprint, request.endpoint, url_for(".work")]

    flow.app.register_blueprint(blueprint, url_prefix="/shop")
    assert flow.result("/shop/a") == ["shop", "shop.work", "/shop/a"]


def test_hooks_of_the_request_run_once(flow: Flow, executor: Any) -> None:
    ran: list[str] = []
    flow.app.before_request(lambda: ran.append("before"))

    @flow.app.after_request
    def after(response: Any) -> Any:
        ran.append("after")
        return response

    @flow.app.teardown_request
    def teardown(error: BaseException | None) -> None:
        ran.append(f"teardown {type(error).__name__}")

    @flow.route(executor=executor)
    def work() -> None:
        ran.append("view")

    @flow.route("/bad", executor=executor)
    def bad() -> None:
        ran.append("view")
        raise ValueError

    for path, error in (("/work", "NoneType"), ("/bad", "ValueError")):
        task = flow.start(path)
        with flow.app.app_context():
            flow.async_routes.wait(task["Id"], 5)
        if executor == "immediate":
            assert ran == ["before", "view", f"teardown {error}", "after", "teardown NoneType"]
        else:
            assert sorted(ran) == sorted(
                ["before", "after", "teardown NoneType", "view", f"teardown {error}"]
            )
            assert (
                ran.index("view") + 1 == len(ran) - ran[::-1].index(f"teardown {error}") - 1
                or error == "NoneType"
            )
        ran.clear()


def test_teardown_of_the_app_context_runs_for_the_task(flow: Flow, eventually: Any) -> None:
    ran: list[str] = []

    @flow.app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        ran.append("view ran" if getattr(g, "ran", False) else "other")

    @flow.route()
    def work() -> None:
        g.ran = True

    flow.run()
    eventually(lambda: ran.count("view ran") == 1)


def test_g_is_fresh(flow: Flow, executor: Any) -> None:
    @flow.app.before_request
    def before() -> None:
        g.thing = "of the request"

    @flow.route(executor=executor)
    def work() -> Any:
        had = hasattr(g, "thing")
        g.thing = "of the task"
        return had

    assert flow.result() is False
    assert flow.result() is False


def test_before_task_functions_run_in_order_in_the_rebuilt_request(
    flow: Flow, executor: Any
) -> None:
    @flow.async_routes.before_task
    def first() -> None:
        g.seen = [request.args["x"]]

    @flow.async_routes.before_task
    def second() -> None:
        g.seen.append("second")

    @flow.route(executor=executor)
    def work() -> Any:
        return g.seen

    assert flow.result("/work?x=first") == ["first", "second"]


def test_an_exception_in_before_task_fails_the_task(flow: Flow, executor: Any) -> None:
    ran = []

    @flow.async_routes.before_task
    def refuse() -> None:
        raise LookupError("nobody here")

    @flow.async_routes.before_task
    def later() -> None:
        ran.append("later")

    @flow.route(executor=executor)
    def work() -> None:
        ran.append("view")

    task = flow.run()
    assert (task["State"], task["Error"], ran) == ("Failed", "LookupError: nobody here", [])
    assert task["StartingTime"] >= task["CreationTime"]


def test_snapshot_drop_removes_headers_and_cookies(make_flow: MakeFlow, store_url: str) -> None:
    flow = make_flow(
        ASYNCROUTE_STORE=store_url, ASYNCROUTE_SNAPSHOT_DROP=["Authorization", "X-Secret", "token"]
    )

    @flow.route()
    def work() -> Any:
        return [
            request.authorization,
            "X-Secret" in request.headers,
            request.headers["X-Other"],
            dict(request.cookies),
        ]

    for name, value in {"token": "secret", "colour": 'grün; "x"', "empty": "", "b": "2"}.items():
        flow.client.set_cookie(name, value)
    found = flow.result(
        headers={"Authorization": "Bearer secret", "X-Secret": "secret", "X-Other": "y"}
    )
    assert found == [None, False, "y", {"colour": 'grün; "x"', "empty": "", "b": "2"}]


@pytest.mark.parametrize(
    "cookies",
    [
        "a=1; =x; é=2; b c=3; d",
        "a=1; token=2; token=3",
        "token=1",
        "",
        ";;",
        'a="x\\"y"',
        " token =1; a = 2 ",
        'a=1;TOKEN="x; b=2',
    ],
)
def test_dropping_a_cookie_keeps_unusual_cookies(make_flow: MakeFlow, cookies: str) -> None:
    flow = make_flow(ASYNCROUTE_SNAPSHOT_DROP=["token"])
    at_start: list[Any] = []

    @flow.app.before_request
    def before() -> None:
        if request.endpoint == "work":
            at_start[:] = [
                (name, value)
                for name, value in request.cookies.items(multi=True)
                if name.lower() != "token"
            ]

    @flow.route()
    def work() -> Any:
        return list(request.cookies.items(multi=True))

    flow.client = flow.app.test_client(use_cookies=False)
    found = flow.result(environ_overrides={"HTTP_COOKIE": cookies.encode().decode("latin-1")})
    assert [tuple(pair) for pair in found] == at_start


@pytest.mark.parametrize(
    "cookies", ["a=\xff; token=2", "a=\xc3\xbc; token=1", "a=\\303; token=1", "\xe9=1; token=2"]
)
def test_dropping_a_cookie_keeps_cookies_that_are_not_utf_8(
    make_flow: MakeFlow, cookies: str
) -> None:
    flow = make_flow(ASYNCROUTE_SNAPSHOT_DROP=["token"])
    flow.client = flow.app.test_client(use_cookies=False)

    def seen() -> Any:
        return [[*pair] for pair in request.cookies.items(multi=True) if pair[0] != "token"]

    flow.route(endpoint="work")(seen)
    flow.app.add_url_rule("/plain", view_func=seen)
    given: dict[str, Any] = {"environ_overrides": {"HTTP_COOKIE": cookies}}
    assert flow.result(**given) == flow.client.get("/plain", **given).get_json() != []


def test_dropping_a_cookie_keeps_a_long_cookie(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_SNAPSHOT_DROP=["token"])

    @flow.route()
    def work() -> Any:
        return {name: len(value) for name, value in request.cookies.items()}

    flow.client = flow.app.test_client(use_cookies=False)
    assert flow.result(environ_overrides={"HTTP_COOKIE": f"token=1; a={'x' * 6000}"}) == {"a": 6000}


def test_dropped_headers_and_cookies_are_not_stored(
    make_flow: MakeFlow, gate: Any, tmp_path: Any, eventually: Any
) -> None:
    flow = make_flow(
        ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/tasks.db",
        ASYNCROUTE_SNAPSHOT_DROP=["authorization", "token"],
    )

    @flow.route()
    def work() -> None:
        gate.wait(10)

    flow.client.set_cookie("token", "verysecret")
    task = flow.start(headers={"Authorization": "Bearer verysecret", "X-Kept": "keptvalue"})
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("tasks.db*"))
    assert b"keptvalue" in stored and b"verysecret" not in stored
    gate.set()
    flow.ended(task)


def test_the_environ_of_a_task_has_only_plain_values(flow: Flow) -> None:
    """Objects of the server are dropped: sockets, files and WSGI callables."""

    @flow.route()
    def work() -> Any:
        return sorted(
            f"{key}: {type(value).__name__}"
            for key, value in request.environ.items()
            if not isinstance(value, (str, int, bool)) and not key.startswith("werkzeug.")
        )

    found = flow.result(
        environ_overrides={"server.socket": object(), "server.list": [1], "server.text": "kept"}
    )
    assert [name.partition(":")[0] for name in found] == [
        "wsgi.errors",
        "wsgi.input",
        "wsgi.version",
    ]


@IN_MEMORY
def test_a_url_that_no_longer_matches_fails_the_task(flow: Flow) -> None:
    class MatchesOnce(BaseConverter):
        is_there = True

        def to_python(self, value: str) -> str:
            if not MatchesOnce.is_there:
                from werkzeug.routing import ValidationError

                raise ValidationError
            MatchesOnce.is_there = False
            return value

    flow.app.url_map.converters["fickle"] = MatchesOnce

    @flow.route("/a/<fickle:n>")
    def work(n: str) -> str:
        return n

    assert flow.error("/a/x").startswith("404 Not Found: ")


def test_an_app_with_its_own_request_class(
    make_app: Callable[..., Flask], make_flow: MakeFlow
) -> None:
    flow = make_flow()

    class MyRequest(flow.app.request_class):  # type: ignore[name-defined, misc]
        @property
        def shout(self) -> str:
            return str(self.args["x"]).upper()

    flow.app.request_class = MyRequest

    @flow.route()
    def work() -> Any:
        return request.shout  # type: ignore[attr-defined]

    assert flow.result("/work?x=abc") == "ABC"
