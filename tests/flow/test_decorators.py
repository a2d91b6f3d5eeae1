"""The ``task`` and ``route`` decorators: their position, other decorators above and below, refused
options.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

import flask
import pytest
from flask import Blueprint, Response, abort, g, request
from flask.views import MethodView, View

from flask_asyncroute import AsyncRoute, ConfigurationError, NoCurrentTask, current_task
from tests.support.flow import IN_MEMORY, Flow, problem
from tests.support.labels import label

MakeFlow = Callable[..., Flow]
F = Callable[..., Any]


@IN_MEMORY
def test_task_with_and_without_parentheses(flow: Flow) -> None:
    @flow.app.post("/a")
    @flow.async_routes.task
    def a() -> str:
        return "a"

    @flow.app.post("/b")
    @flow.async_routes.task()
    def b() -> str:
        return "b"

    @flow.app.post("/c")
    @flow.async_routes.task(timeout=5)
    def c() -> str:
        return "c"

    assert [flow.result(path) for path in ("/a", "/b", "/c")] == ["a", "b", "c"]


def test_task_and_route_together_in_one_app(flow: Flow) -> None:
    @flow.app.put("/asyncParam")
    @flow.async_routes.task(arguments={"sleep_time": 0, "message": "Hi"}, timeout=300)
    def async_param(sleep_time: int, message: str) -> Any:
        time.sleep(sleep_time)
        return {"InnerValue": message}

    @flow.async_routes.route("/report/<int:year>", methods=["POST"], max_workers=4)
    def report(year: int) -> int:
        return year

    assert flow.result("/asyncParam", "PUT") == {"InnerValue": "Hi"}
    assert flow.result("/report/2026") == 2026
    assert inspect.unwrap(report)(2026) == 2026
    assert inspect.unwrap(async_param)(0, "x") == {"InnerValue": "x"}


@IN_MEMORY
def test_route_serves_get_by_default(flow: Flow) -> None:
    @flow.async_routes.route("/work")
    def work() -> str:
        return "done"

    assert flow.result("/work", "GET") == "done"
    assert flow.request("POST", "/work").status_code == 405


@IN_MEMORY
def test_route_accepts_the_options_of_flask(flow: Flow) -> None:
    @flow.async_routes.route(
        "/a/", endpoint="other", methods=["PUT"], strict_slashes=False, defaults={"n": 5}
    )
    def work(n: int) -> Any:
        return [n, request.endpoint]

    assert flow.result("/a", "PUT") == [5, "other"]


@IN_MEMORY
def test_the_decorated_view_keeps_name_docstring_and_signature(flow: Flow) -> None:
    @flow.async_routes.task(name="x")
    def report(year: int = 5, *, full: bool = False) -> int:
        """Make a report."""
        return year

    assert report.__name__ == "report"
    assert report.__doc__ == "Make a report."
    assert list(inspect.signature(report).parameters) == ["year", "full"]


def test_arguments_and_url_variables_arrive_by_name(flow: Flow) -> None:
    values = {"a": object(), "b": [1], "default": 3}

    @flow.route("/<int:n>/<m>", arguments=values)
    def work(*, n: int, m: str, a: Any, b: Any, default: int = 1, other: int = 2) -> Any:
        return [n, m, a is values["a"], b, default, other]

    assert flow.result("/1/x") == [1, "x", True, [1], 3, 2]


def test_arguments_for_a_view_with_keyword_arguments(flow: Flow) -> None:
    @flow.route("/<n>", arguments={"a": 1})
    def work(**given: Any) -> Any:
        return given

    assert flow.result("/x") == {"a": 1, "n": "x"}


@IN_MEMORY
def test_a_view_with_a_default_for_a_missing_variable(flow: Flow) -> None:
    @flow.app.post("/a")
    @flow.app.post("/a/<int:n>")
    @flow.async_routes.task
    def work(n: int = 7) -> Any:
        return n

    assert [flow.result("/a"), flow.result("/a/1")] == [7, 1]


@IN_MEMORY
def test_a_url_variable_without_a_parameter_fails_the_task(flow: Flow) -> None:
    @flow.route("/<int:n>")
    def work() -> None: ...

    assert flow.error("/1").startswith("TypeError: ")


@IN_MEMORY
def test_a_lambda_as_view(flow: Flow) -> None:
    view: Callable[[], Any] = lambda: 5  # noqa: E731
    flow.app.add_url_rule("/work", "work", flow.async_routes.task(view), methods=["POST"])
    assert flow.result() == 5


@IN_MEMORY
def test_one_async_route_under_two_endpoints(flow: Flow) -> None:
    @flow.async_routes.task
    def view() -> Any:
        return request.endpoint

    flow.app.add_url_rule("/a", "a", view, methods=["POST"])
    flow.app.add_url_rule("/b", "b", view, methods=["POST"])
    assert [flow.result("/a"), flow.result("/b")] == ["a", "b"]


@IN_MEMORY
def test_a_view_with_a_plain_and_an_async_endpoint(flow: Flow) -> None:
    """This must not be reported as ``task()`` above the route decorator."""

    def report() -> Any:
        return {"endpoint": request.endpoint}

    flow.app.add_url_rule("/now", "now", report, methods=["POST"])
    flow.app.add_url_rule("/later", "later", flow.async_routes.task(report), methods=["POST"])
    assert flow.client.post("/now").get_json() == {"endpoint": "now"}
    assert flow.result("/later") == {"endpoint": "later"}


# -- decorators of others
# ----------------------------------------------------------------------------------------------


def add_arguments(**injected: Any) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs, **injected)

        return wrapped

    return decorate


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, "é\U0001f600", "", [1, [2, {}]], {"a": {"b": None}}, (), 2**63 - 1, -(2**63), 2**64, 10**400, 1e300, "\x00"],
    ids=ascii,
)  # fmt: skip
def test_decorators_above_may_pass_json_values(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()

    @flow.app.post("/<int:n>")
    @add_arguments(given=value)
    @flow.async_routes.task(arguments={"fixed": 1})
    def work(n: int, fixed: int, given: Any) -> Any:
        return [n, fixed, given]

    assert flow.result("/5") == [5, 1, list(value) if isinstance(value, tuple) else value]


@pytest.mark.parametrize(
    "value",
    [
        object(), {1}, b"x", datetime(2026, 1, 1), uuid.UUID(int=1), 1j, float("nan"), float("inf"), {1: 2}, {None: 1}, {"a": object()}, [{1}],
        "\ud800", lambda: 1, {"a": (1, 2)}, Response(),
    ],
    ids=lambda value: label(value)[:30],
)  # fmt: skip
def test_decorators_above_that_pass_other_values_are_an_error(
    make_flow: MakeFlow, value: Any
) -> None:
    flow = make_flow()
    ran = []

    @flow.app.post("/work")
    @add_arguments(culprit=value)
    @flow.async_routes.task
    def work(culprit: Any) -> None:
        ran.append(1)

    detail = problem(flow.request("POST", "/work"), 500, "cannot-start")["detail"]
    assert "'culprit'" in detail and type(value).__name__ in detail
    assert flow.query() == [] and not ran


def test_decorators_above_that_pass_a_cyclic_list_are_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    cycle: list[Any] = []
    cycle.append(cycle)

    @flow.app.post("/work")
    @add_arguments(culprit=cycle)
    @flow.async_routes.task
    def work(culprit: Any) -> None: ...

    assert "'culprit'" in problem(flow.request("POST", "/work"), 500, "cannot-start")["detail"]


def test_decorators_above_that_pass_positional_arguments_are_an_error(make_flow: MakeFlow) -> None:
    """Decorators often pass the user that way, but an argument without a name cannot be stored."""
    flow = make_flow()

    def with_user(function: F) -> F:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function("anna", *args, **kwargs)

        return wrapped

    @flow.app.post("/work")
    @with_user
    @flow.async_routes.task
    def work(user: str) -> None: ...

    detail = problem(flow.request("POST", "/work"), 500, "cannot-start")["detail"]
    assert "position" in detail or "keyword" in detail


def test_decorators_above_may_remove_and_change_url_variables(flow: Flow) -> None:
    def loading(function: F) -> F:
        @functools.wraps(function)
        def wrapped(shop: str, n: int) -> Any:
            return function(n=n + 1, owner=f"owner of {shop}")

        return wrapped

    @flow.app.post("/<shop>/<int:n>")
    @loading
    @flow.async_routes.task
    def work(n: int, owner: str) -> Any:
        return [n, owner]

    assert flow.result("/acme/1") == [2, "owner of acme"]


def test_decorators_above_run_in_the_request_and_may_refuse_it(flow: Flow, executor: Any) -> None:
    ran: list[str] = []

    def check_key(function: F) -> F:
        @functools.wraps(function)
        def wrapped(**kwargs: Any) -> Any:
            ran.append("above")
            if "key" not in request.args:
                abort(403)
            return function(**kwargs)

        return wrapped

    def below(function: F) -> F:
        @functools.wraps(function)
        def wrapped(**kwargs: Any) -> Any:
            ran.append(f"below in {current_task.id}")
            return function(**kwargs)

        return wrapped

    @flow.app.post("/work")
    @check_key
    @flow.async_routes.task(executor=executor)
    @below
    def work() -> str:
        ran.append("view")
        return "done"

    assert flow.request("POST", "/work").status_code == 403
    assert ran == ["above"] and flow.query() == []
    task = flow.run("/work?key=1")
    assert task["Result"] == "done"
    assert ran == ["above", "above", f"below in {task['Id']}", "view"]


@IN_MEMORY
def test_decorators_above_may_change_the_response(flow: Flow) -> None:
    def marking(function: F) -> F:
        @functools.wraps(function)
        def wrapped(**kwargs: Any) -> Any:
            response = flask.make_response(function(**kwargs))
            response.headers["X-Marked"] = "yes"
            return response

        return wrapped

    @flow.app.post("/work")
    @marking
    @flow.async_routes.task
    def work() -> None: ...

    assert flow.request("POST", "/work").headers["X-Marked"] == "yes"


@IN_MEMORY
def test_decorators_below_may_fail_the_task(flow: Flow) -> None:
    def strict(function: F) -> F:
        @functools.wraps(function)
        def wrapped(**kwargs: Any) -> Any:
            abort(403, "not you")

        return wrapped

    @flow.route()
    @strict
    def work() -> None: ...

    assert flow.error() == "403 Forbidden: not you"


def test_a_decorator_above_without_functools_wraps_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()

    def without_wraps(function: F) -> F:
        return lambda **kwargs: function(**kwargs)

    flow.app.add_url_rule(
        "/work", "work", without_wraps(flow.async_routes.task(lambda: 1)), methods=["POST"]
    )
    with pytest.raises(ConfigurationError, match="__wrapped__|functools.wraps"):
        flow.client.post("/work")


# -- what is refused at decoration
# ---------------------------------------------------------------------------------------


def test_an_argument_that_is_also_a_url_variable_is_an_error(make_flow: MakeFlow) -> None:
    """``route()`` raises at decoration, ``task()`` at first use and each later use."""
    flow = make_flow()
    with pytest.raises(ConfigurationError, match=r"'year'.*URL"):

        @flow.route("/a/<int(min=1):year>", arguments={"year": 1})
        def a(year: int) -> None: ...

    @flow.app.post("/b/<year>")
    @flow.async_routes.task(arguments={"year": 1})
    def b(year: int) -> Any: ...

    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"\.b\(\).*'year'.*URL"):
            flow.client.post("/b/1")
    with flow.app.app_context(), pytest.raises(ConfigurationError, match="'year'"):
        flow.async_routes.get("x")
    with pytest.raises(ConfigurationError, match="'year'"):
        flow.async_routes.start(flow.app)


def test_task_above_the_route_decorator_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.async_routes.task
    @flow.app.post("/work")
    def work() -> Any: ...

    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"work\(\).*task\(\).*above"):
            flow.client.post("/work")
    with pytest.raises(ConfigurationError, match="above"):
        flow.async_routes.start(flow.app)


def test_task_above_the_route_decorator_of_a_blueprint_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    blueprint = Blueprint("shop", "shop")

    @flow.async_routes.task
    @blueprint.post("/work")
    def work() -> Any: ...

    flow.app.register_blueprint(blueprint)
    with pytest.raises(ConfigurationError, match=r"work\(\).*above.*'shop.work'"):
        flow.async_routes.start(flow.app)


def test_task_on_a_method_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    with pytest.raises(
        ConfigurationError, match=r"get\(\) is a method.*decorators = \[async_routes.task\(\)\]"
    ):

        class Report(MethodView):
            @flow.async_routes.task
            def get(self) -> None: ...

    with pytest.raises(ConfigurationError, match="method"):

        class Other:
            @flow.async_routes.route("/x")
            def work(self) -> None: ...

        Other()


def test_an_async_route_decorated_twice_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    with pytest.raises(ConfigurationError, match="already"):

        @flow.route("/a")
        @flow.async_routes.task
        def a() -> None: ...

    with pytest.raises(ConfigurationError, match="already"):

        @flow.async_routes.task
        @add_arguments(x=1)
        @flow.async_routes.task
        def b() -> None: ...


@pytest.mark.parametrize(
    "value", [5, "view", None, object(), [], functools.partial(print), MethodView], ids=label
)
def test_a_view_that_is_not_a_function_is_an_error(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()
    with pytest.raises((ConfigurationError, TypeError)):
        flow.async_routes.task()(value)


class Report(TypedDict):
    rows: int


@dataclass
class ReportResponse:
    """Data, in spite of the name."""

    rows: int


def test_a_view_annotated_to_return_a_response_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    task = flow.async_routes.task

    def by_text() -> Response:
        return Response()

    def by_path() -> flask.Response:
        return Response()

    def by_class() -> Any:
        return Response()

    by_class.__annotations__["return"] = Response

    def subclass() -> Any:
        return Response()

    subclass.__annotations__["return"] = flask.wrappers.Response

    for view in (by_text, by_path, by_class, subclass, add_arguments()(by_text)):
        with pytest.raises(ConfigurationError, match=r"annotated.*Response.*data"):
            task(view)


@IN_MEMORY
def test_a_view_annotated_to_return_data(flow: Flow) -> None:
    @flow.route("/a")
    def a() -> Report:
        return {"rows": 1}

    @flow.route("/b")
    def b() -> ReportResponse:
        return ReportResponse(2)

    def c() -> Any:
        return ReportResponse(3)

    c.__annotations__["return"] = ReportResponse
    flow.route("/c")(c)

    def d():
        return {"rows": 4}

    flow.route("/d")(d)
    assert [flow.result(path)["rows"] for path in ("/a", "/b", "/c", "/d")] == [1, 2, 3, 4]


def test_an_argument_without_a_parameter_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    with pytest.raises(ConfigurationError, match=r"'colour'.*no such parameter"):
        flow.async_routes.task(arguments={"colour": 1})(lambda size: size)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"time_out": 5}, "'time_out'"),
        ({"timeout": "5"}, "timeout="),
        ({"timeout": 0}, "timeout="),
        ({"timeout": -2}, "timeout="),
        ({"cancellable": "False"}, "cancellable="),
        ({"executor": "threads"}, "executor="),
        ({"max_workers": 0}, "max_workers="),
        ({"queue_size": -1}, "queue_size="),
        ({"interrupt_after": "1"}, "interrupt_after="),
        ({"arguments": [1]}, "arguments="),
        ({"id_generator": "uuid4"}, "id_generator="),
        ({"permission": "anna"}, "permission="),
        ({"callback": "http://x"}, "callback="),
        ({"sse": "True"}, "sse="),
        ({"response_types": ["text/html"]}, "response_types="),
        ({"retention": None}, "retention="),
        ({"on_loss": "retry"}, "on_loss="),
        ({"name": ""}, "name="),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_are_checked_at_decoration(
    make_flow: MakeFlow, options: dict[str, Any], culprit: str
) -> None:
    flow = make_flow()
    for decorate in (flow.async_routes.task(**options), flow.async_routes.task(**options)):
        with pytest.raises(ConfigurationError, match=culprit):
            decorate(lambda: None)


def test_an_unknown_option_of_route_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    with pytest.raises((ConfigurationError, TypeError), match="colour"):
        flow.route("/x", colour="red")(lambda: None)


def test_min_workers_above_max_workers_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route(min_workers=5)
    def work() -> None: ...

    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"work\(\).*min_workers=5.*max_workers=2"):
            flow.async_routes.start(flow.app)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("executor", "immediate"),
        ("min_workers", 0),
        ("max_workers", 3),
        ("queue_size", 5),
        ("interrupt_after", 2.0),
    ],
)
def test_routes_of_one_pool_with_different_pool_options_are_an_error(
    make_flow: MakeFlow, name: str, value: Any
) -> None:
    flow = make_flow()
    flow.route("/a", pool="p", endpoint="a")(lambda: None)
    flow.route("/b", pool="p", endpoint="b", **{name: value})(lambda: None)
    with pytest.raises(ConfigurationError, match=f"'a' and 'b'.*'p'.*{name}"):
        flow.async_routes.start(flow.app)


def test_routes_of_one_pool_may_differ_in_other_options(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route("/a", pool="p", endpoint="a", timeout=5)(lambda: 1)
    flow.route("/b", pool="p", endpoint="b", timeout=7)(lambda: 2)
    assert [flow.result("/a"), flow.result("/b")] == [1, 2]


# -- classes
# -------------------------------------------------------------------------------------------------------------


def test_a_view_class(flow: Flow, executor: Any) -> None:
    class Report(View):
        methods = ["POST", "PUT"]
        decorators = [flow.async_routes.task(executor=executor)]

        def __init__(self, title: str) -> None:
            self.title = title

        def dispatch_request(self, year: int) -> Any:  # type: ignore[override]
            return [self.title, year, request.method, current_task.id]

    flow.app.add_url_rule("/report/<int:year>", view_func=Report.as_view("report", "Sales"))
    task = flow.run("/report/2026")
    assert task["Result"] == ["Sales", 2026, "POST", task["Id"]]
    assert task["AsyncRouteId"] == "[Post]/report/<int:year>"
    assert flow.result("/report/2026", "PUT")[2] == "PUT"


def test_a_method_view(flow: Flow) -> None:
    class Report(MethodView):
        decorators = [flow.async_routes.task]
        init_every_request = False

        def post(self, **given: Any) -> Any:
            return ["post", given]

        def get(self, n: int) -> Any:
            return ["get", n]

    view = Report.as_view("report")
    flow.app.add_url_rule("/report", view_func=view, methods=["POST"])
    flow.app.add_url_rule("/report/<int:n>", view_func=view)
    assert flow.result("/report") == ["post", {}]
    assert flow.result("/report/5", "GET") == ["get", 5]
    assert flow.request("HEAD", "/report/5").status_code == 405


@IN_MEMORY
def test_a_view_class_with_arguments_and_decorators_above(flow: Flow) -> None:
    class Report(View):
        methods = ["POST"]
        decorators = [flow.async_routes.task(arguments={"a": 1}), add_arguments(b=2)]

        def dispatch_request(self, a: int, b: int) -> Any:  # type: ignore[override]
            return [a, b]

    flow.app.add_url_rule("/report", view_func=Report.as_view("report"))
    assert flow.result("/report") == [1, 2]


@IN_MEMORY
def test_view_classes_have_their_own_options(flow: Flow) -> None:
    for name, cancellable in (("a", True), ("b", False)):

        class Report(View):
            methods = ["POST"]
            decorators = [flow.async_routes.task(cancellable=cancellable)]

            def dispatch_request(self) -> Any: ...

        flow.app.add_url_rule(f"/{name}", view_func=Report.as_view(name))
    assert [flow.start(f"/{name}")["Cancellable"] for name in "ab"] == [True, False]


# -- elsewhere
# ---------------------------------------------------------------------------------------------------------------


def test_current_task_outside_a_task_raises(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.app.get("/plain")
    def plain() -> str:
        with pytest.raises(NoCurrentTask, match="outside a running task"):
            current_task.progress = 5
        return "fine"

    assert flow.client.get("/plain").text == "fine"
    with pytest.raises(NoCurrentTask, match="current_task"):
        _ = current_task.id
    with pytest.raises(NoCurrentTask):
        current_task.check()


def test_current_task_in_a_view(flow: Flow, executor: Any) -> None:
    @flow.route(executor=executor, timeout=50)
    def work() -> Any:
        remaining = current_task.remaining()
        assert remaining is not None and 45 < remaining <= 50
        current_task.check()
        return [
            current_task.id,
            current_task.user,
            current_task.stop_requested,
            current_task.progress,
        ]

    task = flow.run()
    assert task["Result"] == [task["Id"], None, False, 0]


def test_current_task_has_its_user(flow: Flow) -> None:
    @flow.route(timeout=None)
    def work() -> Any:
        return [current_task.user, current_task.remaining()]

    flow.headers = {"X-User": "anna"}
    task = flow.run()
    assert task["Result"] == ["anna", None]
    assert "ExpireTime" not in task


def test_a_plain_view_that_calls_an_async_route_gets_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> None: ...

    flow.app.post("/other")(lambda: work())
    with pytest.raises(ConfigurationError, match="'<lambda>'|other"):
        flow.client.post("/other")


def test_a_before_task_function_sets_g(flow: Flow) -> None:
    @flow.async_routes.before_task
    def load() -> None:
        g.user = request.headers["X-User"]

    @flow.route()
    def work() -> Any:
        return g.user

    flow.headers = {"X-User": "anna"}
    assert flow.result() == "anna"


def test_the_error_without_init_app_names_the_app() -> None:
    async_routes = AsyncRoute()
    app = flask.Flask("shop")
    with pytest.raises(ConfigurationError, match="'shop'.*init_app"):
        async_routes.start(app)
    with app.app_context(), pytest.raises(ConfigurationError, match="'shop'.*init_app"):
        async_routes.get("x")
    with pytest.raises(RuntimeError, match="application context"):
        async_routes.get("x")


@IN_MEMORY
def test_async_methods_of_a_class_based_view_need_asgiref(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised before a task is started."""
    monkeypatch.setattr("flask_asyncroute.routes.find_spec", lambda name: None)

    class Posted(MethodView):
        decorators = [flow.async_routes.task]

        async def post(self) -> int:
            return 1

    class Dispatched(View):
        methods = ["POST"]
        decorators = [flow.async_routes.task]

        async def dispatch_request(self) -> int:  # type: ignore[override]
            return 1

    for view, name in ((Posted, "post"), (Dispatched, "dispatch_request")):
        app = flask.Flask("app")
        app.config.update(TESTING=True, ASYNCROUTE_STORE="memory://")
        flow.async_routes.init_app(app)
        app.add_url_rule("/work", view_func=view.as_view("work"))
        with pytest.raises(
            ConfigurationError, match=rf"{view.__name__}\.{name}\(\) is async.*flask\[async\]"
        ):
            app.test_client().post("/nowhere")


def test_async_methods_of_a_class_based_view_if_the_app_runs_them(make_flow: MakeFlow) -> None:
    flow = make_flow()

    class Async(flask.Flask):
        def async_to_sync(self, function: Any) -> Any:
            return lambda *args, **given: asyncio.run(function(*args, **given))

    class Report(MethodView):
        decorators = [flow.async_routes.task]

        async def post(self) -> int:
            await asyncio.sleep(0)
            return 1

    flow.app.__class__ = Async
    flow.app.add_url_rule("/work", view_func=Report.as_view("work"))
    assert flow.result() == 1


def test_a_misspelt_option_of_route_is_an_error_at_the_call() -> None:
    async_routes = AsyncRoute()
    with pytest.raises(ConfigurationError, match=r"route\('/work'\): 'max_worker' .*max_workers"):
        async_routes.route("/work", methods=["POST"], max_worker=3)
    async_routes.route(
        "/work", methods=["POST"], strict_slashes=False, provide_automatic_options=False
    )(lambda: 1)


def test_task_above_the_route_with_a_decorator_between_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.async_routes.task
    @add_arguments()
    @flow.app.post("/work")
    def work() -> int:
        return 1

    with pytest.raises(ConfigurationError, match=r"above the route decorator of endpoint 'work'"):
        flow.client.post("/work")


async def load_nothing() -> None: ...


@pytest.mark.parametrize("function", [load_nothing, 5, None, int], ids=label)
def test_functions_that_are_not_plain_functions_are_an_error(function: Any) -> None:
    """For example, a coroutine function would not be awaited."""
    async_routes = AsyncRoute()
    for register in (async_routes.before_task, async_routes.identity_loader):
        with pytest.raises(ConfigurationError, match="a function that is not async"):
            register(function)
    if function is not None:
        with pytest.raises(ConfigurationError, match=r"permission=… must be"):
            async_routes.task(permission=function)(lambda: 1)
        with pytest.raises(ConfigurationError, match=r"id_generator=… must be a function"):
            async_routes.task(id_generator=function)(lambda: 1)
