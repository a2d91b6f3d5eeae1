"""Call the view of an async route from code: it is a plain function in a task and an error
elsewhere. No call starts the endpoint of the current request a second time.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from flask import Blueprint, Flask, abort, copy_current_request_context, request
from flask.views import MethodView, View

from flask_asyncroute import (
    AsyncRoute,
    AsyncRouteError,
    ConfigurationError,
    NoCurrentTask,
    Permission,
    current_task,
    task_created,
)
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.testing import fake_task, inline
from tests.flow.test_views import spin
from tests.support.flow import IN_MEMORY, Flow, problem

MakeFlow = Callable[..., Flow]
F = Callable[..., Any]

UNWRAP = r"inspect\.unwrap\(.+\)"


def stored(flow: Flow) -> int:
    """Return the number of tasks without sending a request."""
    return len(runtime_of(flow.app).runner.store.query((), NEWEST_FIRST, 50, None, None))


def twice(view: F) -> F:
    """Decorate a view so that each request calls it twice; return the first response."""

    @functools.wraps(view)
    def wrapper(**arguments: Any) -> Any:
        answer = view(**arguments)
        view(**arguments)
        return answer

    return wrapper


def refuse_all(view: F) -> F:
    """Decorate a view so that it answers 401 to every request."""
    return functools.wraps(view)(lambda *passed, **arguments: abort(401))


# -- in a task
# ----------------------------------------------------------------------------------------------


@pytest.mark.covers("A80")
def test_a_view_called_in_a_task_returns_its_data(flow: Flow, executor: Any) -> None:
    @flow.route("/thumbnails")
    def thumbnails() -> Any:
        return {"thumbnails": 3, "task": current_task.id}

    @flow.route("/album", executor=executor)
    def album() -> Any:
        return {"album": thumbnails()}

    task = flow.run("/album")
    assert task["Result"] == {"album": {"thumbnails": 3, "task": task["Id"]}}
    assert flow.ids() == [task["Id"]]


@pytest.mark.covers("A80")
def test_a_view_that_calls_itself_is_ordinary_recursion(flow: Flow) -> None:
    @flow.route("/countdown/<int:number>")
    def countdown(number: int) -> Any:
        return [number, *(countdown(number - 1) if number else [])]

    assert flow.result("/countdown/3") == [3, 2, 1, 0]
    assert len(flow.ids()) == 1


@IN_MEMORY
def test_the_caller_passes_all_arguments(flow: Flow) -> None:
    @flow.route("/sum/<int:first>", arguments={"second": 2})
    def add(first: int, second: int) -> int:
        return first + second

    @flow.route("/work")
    def work() -> Any:
        with pytest.raises(TypeError, match="second"):
            add(1)
        return [add(3, 4), add(5, second=6)]

    assert flow.result("/work") == [7, 11]


@IN_MEMORY
def test_a_view_awaits_a_coroutine_view(flow: Flow) -> None:
    @flow.route("/inner")
    async def inner() -> int:
        return 1

    @flow.route("/outer")
    async def outer() -> int:
        return int(await inner()) + 1

    @flow.route("/sync")
    def sync() -> Any:
        return inner()

    flow.route("/run", endpoint="run")(lambda: asyncio.run(inner()))
    assert flow.result("/outer") == 2
    assert flow.result("/sync") == 1, "a view may return the coroutine"
    assert flow.result("/run") == 1


@IN_MEMORY
@pytest.mark.parametrize("by", ["route", "task", "stacked"])
def test_the_decorators_of_the_called_route_do_not_run_in_a_task(flow: Flow, by: str) -> None:
    def thumbnails() -> str:
        return "thumbnails"

    calling: F
    if by == "route":
        calling = flow.route("/thumbnails", decorators=[refuse_all])(thumbnails)
    elif by == "task":
        task = flow.async_routes.task(decorators=[refuse_all])
        calling = flow.app.post("/thumbnails")(task(thumbnails))
    else:
        calling = flow.async_routes.task(thumbnails)
        flow.app.post("/thumbnails")(refuse_all(calling))

    @flow.route("/album")
    def album() -> Any:
        return calling()

    assert flow.request("POST", "/thumbnails").status_code == 401
    assert flow.result("/album") == "thumbnails"
    assert len(flow.ids()) == 1


@IN_MEMORY
def test_decorators_below_task_run_with_each_call(flow: Flow) -> None:
    def louder(view: F) -> F:
        return functools.wraps(view)(lambda *args, **kwargs: view(*args, **kwargs).upper())

    @flow.route("/name")
    @louder
    def name() -> str:
        return "ann"

    flow.route("/work", endpoint="work")(lambda: [name(), inspect.unwrap(name)()])
    assert flow.result("/work") == ["ANN", "ann"]


@pytest.mark.covers("A80")
@IN_MEMORY
@pytest.mark.parametrize("copy_by", ["request", "context"])
def test_a_thread_of_the_view_calls_plain_functions(flow: Flow, copy_by: str) -> None:
    @flow.route("/page/<int:number>")
    def page(number: int) -> int:
        return number

    @flow.route("/book/<int:number>")
    def book(number: int) -> Any:
        with ThreadPoolExecutor(2) as pool:
            for view in (page, book) if number else (page,):
                run: Any = copy_current_request_context(view)
                if copy_by == "context":
                    run = functools.partial(contextvars.copy_context().run, view)
                called = pool.submit(run, 0).result()
        return [number, called]

    assert flow.result("/book/1") == [1, [0, 0]]
    assert len(flow.ids()) == 1


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_call_in_a_thread_without_the_request_names_inspect_unwrap(flow: Flow) -> None:
    @flow.route("/page")
    def page() -> int:
        return 1

    @flow.route("/book")
    def book() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(page).result()

    error = flow.error("/book")
    assert error.startswith("ConfigurationError: ") and "inspect.unwrap(page)" in error
    assert len(flow.ids()) == 1


@IN_MEMORY
def test_before_task_and_teardown_functions_call_plain_functions(flow: Flow) -> None:
    seen: list[Any] = []

    @flow.route("/report")
    def report(by: str) -> str:
        return f"{by} of {current_task.id}"

    def in_tasks(by: str) -> None:
        with suppress(NoCurrentTask):  # Requests of this test are in no task.
            assert current_task.id
            seen.append(report(by))

    flow.async_routes.before_task(lambda: in_tasks("before"))
    flow.app.teardown_request(lambda error: in_tasks("teardown"))
    flow.app.teardown_appcontext(lambda error: in_tasks("appcontext"))
    flow.route("/work", endpoint="work")(lambda: None)
    task = flow.run("/work")
    assert seen == [f"{by} of {task['Id']}" for by in ("before", "teardown", "appcontext")]
    assert len(flow.ids()) == 1


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_request_that_a_task_sends_is_an_ordinary_request(flow: Flow) -> None:
    @flow.route("/inner")
    def inner() -> str:
        return "inner"

    flow.app.post("/plain", endpoint="plain")(lambda: inner())

    @flow.route("/outer")
    def outer() -> Any:
        client = flow.app.test_client()
        with pytest.raises(ConfigurationError, match=r"'plain'.*was not this endpoint's view"):
            client.post("/plain")
        # Some clients copy the environ of the task's own request.
        copied = {**request.environ, "PATH_INFO": "/inner"}
        return [client.post("/inner").status_code, client.open(copied).status_code]

    assert flow.result("/outer") == [202, 202]
    assert len(flow.ids()) == 3


def test_a_stop_interrupts_a_view_called_by_another_view(
    make_flow: MakeFlow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    flow = make_flow()

    @flow.route("/inner", decorators=[lambda view: functools.wraps(view)(lambda: view())])
    def inner() -> None:
        begun.release()
        spin(gate)

    @flow.route("/middle")
    def middle() -> None:
        inner()

    @flow.route("/outer", interrupt_after=0)
    def outer() -> None:
        middle()

    task = flow.start("/outer")
    assert begun.acquire(timeout=5)
    flow.stop(task)
    flow.still(task, seconds=8)
    assert not gate.is_set()


@IN_MEMORY
def test_class_based_views_call_plain_functions(flow: Flow) -> None:
    class Report(View):
        methods = ("POST",)
        decorators = (flow.async_routes.task(decorators=[refuse_all]),)

        def dispatch_request(self) -> str:
            return "report"

    class Archive(MethodView):
        decorators = (flow.async_routes.task(),)

        def post(self) -> str:
            return "post"

        def get(self) -> str:
            return "get"

    report, archive = Report.as_view("report"), Archive.as_view("archive")
    flow.app.add_url_rule("/report", view_func=report)
    flow.app.add_url_rule("/archive", view_func=archive)
    flow.route("/all", endpoint="all")(lambda: [report(), archive(), Archive().get()])
    assert flow.result("/all") == ["report", "post", "get"]
    assert flow.result("/archive", "GET") == "get"
    assert flow.request("POST", "/report").status_code == 401
    assert len(flow.ids()) == 2


@IN_MEMORY
def test_a_view_with_several_endpoints_rules_and_blueprints_calls_itself(flow: Flow) -> None:
    blueprint = Blueprint("shop", __name__)

    @blueprint.post("/a")
    @blueprint.post("/b", endpoint="b")
    @flow.async_routes.task
    def view(number: int = 2) -> Any:
        return [request.endpoint, *(view(number - 1) if number else [])]

    flow.app.register_blueprint(blueprint, url_prefix="/one")
    flow.app.register_blueprint(blueprint, url_prefix="/two", name="two")
    endpoints = {"/one/a": "shop.view", "/one/b": "shop.b", "/two/a": "two.view", "/two/b": "two.b"}
    for path, endpoint in endpoints.items():
        assert flow.result(path) == [endpoint] * 3
    assert len(flow.ids()) == 4


@IN_MEMORY
def test_a_view_called_in_the_context_of_another_app(
    flow: Flow, make_app: Callable[..., Flask]
) -> None:
    """One instance serves both apps. A task of one calls a view in the other and sends it a
    request.
    """
    other = make_app("other", ASYNCROUTE_STORE="memory://")
    flow.async_routes.init_app(other)

    @flow.route("/inner")
    def inner() -> str:
        return "inner"

    @flow.route("/outer")
    def outer() -> Any:
        with other.app_context():
            called = inner()
        return [called, other.test_client().post("/inner").status_code]

    assert flow.result("/outer") == ["inner", 202]
    assert len(flow.ids()) == 1


@pytest.mark.covers("A80")
def test_inline_tasks_call_plain_functions(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route("/thumbnails")
    def thumbnails() -> str:
        return "thumbnails"

    @flow.route("/album")
    def album() -> Any:
        return thumbnails()

    with inline(flow.app):
        assert flow.start("/album")["Result"] == "thumbnails"
        assert len(flow.ids()) == 1


# -- in a request
# ----------------------------------------------------------------------------------------------


@pytest.mark.covers("A80")
@IN_MEMORY
@pytest.mark.parametrize("decorators", [[], [functools.wraps(refuse_all)(lambda view: view)]])
@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_a_call_by_a_plain_view_is_an_error(flow: Flow, decorators: list[F], method: str) -> None:
    @flow.route("/report", decorators=decorators)
    def report() -> str:
        return "report"

    @flow.app.route("/plain", methods=[method], provide_automatic_options=False)
    def plain() -> Any:
        return report()

    with pytest.raises(ConfigurationError, match=rf"report\(\).*'plain'.*{UNWRAP}"):
        flow.request(method, "/plain")
    assert flow.ids() == []


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_call_of_another_async_view_during_a_start_is_an_error(flow: Flow) -> None:
    other = flow.route("/other", endpoint="other")(lambda: "other")

    def calling(view: F) -> F:
        @functools.wraps(view)
        def wrapper(**arguments: Any) -> Any:
            other()
            return view(**arguments)

        return wrapper

    flow.route("/work", endpoint="work", decorators=[calling])(lambda: "work")
    with pytest.raises(ConfigurationError, match="'work'.*was not this endpoint's view"):
        flow.request("POST", "/work")
    assert flow.ids() == []


@pytest.mark.covers("A80")
@IN_MEMORY
@pytest.mark.parametrize("where", ["decorators", "above"])
def test_a_decorator_that_calls_the_view_twice_starts_one_task(flow: Flow, where: str) -> None:
    if where == "decorators":
        flow.route(endpoint="work", decorators=[twice])(lambda: "done")
    else:
        flow.app.post("/work", endpoint="work")(twice(flow.async_routes.task(lambda: "done")))
    with pytest.raises(ConfigurationError, match=rf"called twice.*{UNWRAP}"):
        flow.request("POST", "/work")
    assert stored(flow) == 1


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_hook_that_calls_the_view_of_its_request_starts_one_task(flow: Flow) -> None:
    @flow.route()
    def work() -> str:
        return "done"

    flow.app.before_request(lambda: work() and None)
    with pytest.raises(ConfigurationError, match="called twice"):
        flow.request("POST", "/work")
    assert stored(flow) == 1


@pytest.mark.covers("A80")
@IN_MEMORY
def test_threads_that_call_the_view_of_one_request_start_one_task(flow: Flow) -> None:
    @flow.route()
    def work() -> str:
        return "done"

    def start_in_threads() -> None:
        barrier = threading.Barrier(8)
        errors = []

        def call() -> None:
            barrier.wait(5)
            try:
                work()
            except ConfigurationError as error:
                errors.append(error)

        threads = [threading.Thread(target=copy_current_request_context(call)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(errors) == 7

    flow.app.before_request_funcs[None] = [start_in_threads]
    with pytest.raises(ConfigurationError, match="called twice"):
        flow.request("POST", "/work")
    assert stored(flow) == 1


@pytest.mark.covers("A80")
@pytest.mark.parametrize("where", ["identity", "id", "permission", "created", "created_key"])
def test_functions_called_during_a_start_cannot_start_the_task_again(
    make_flow: MakeFlow, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    calls: list[str] = []

    def calling(result: Any = None) -> Any:
        calls.append("call")
        work()
        return result

    options: dict[str, Any] = {
        "id": {"id_generator": lambda: calling("x")},
        "permission": {"permission": lambda: calling(Permission())},
    }.get(where, {})

    @flow.route(**options)
    def work() -> str:
        return "done"

    headers = {"X-User": "ann"}
    if where == "created_key":
        headers["Idempotency-Key"] = "key"
    if where == "identity":
        flow.async_routes.identity_loader(calling)
        with pytest.raises(ConfigurationError, match="called twice"):
            flow.request("POST", "/work", headers=headers)
    else:

        def receive(app: Flask, **extra: Any) -> None:
            calling()

        connected = task_created.connected_to(receive, flow.app)
        with connected if "created" in where else nullcontext():
            status = flow.request("POST", "/work", headers=headers).status_code
        assert status == {"id": 500, "permission": 403}.get(where, 202)
    assert calls == ["call"]
    assert stored(flow) == (1 if "created" in where else 0)


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_decorator_may_retry_a_refused_start(flow: Flow) -> None:
    """The reason may be temporary. A refused start stores nothing."""
    known: list[Any] = []

    def identify() -> Any:
        if len(known) < 2:
            known.append(None)
            abort(503)
        return {"id": "ann"}

    def retrying(view: F) -> F:
        @functools.wraps(view)
        def wrapper() -> Any:
            for _ in range(2):
                try:
                    view()
                except Exception as error:
                    assert "503" in str(error)
            return view()

        return wrapper

    flow.async_routes.identity_loader(identify)
    flow.route(decorators=[retrying])(lambda: "done")
    task = flow.start()
    assert task["User"] == "ann" and stored(flow) == 1


@IN_MEMORY
def test_a_start_refused_with_an_answer_is_refused_again(flow: Flow) -> None:
    answers = []

    def repeating(view: F) -> F:
        @functools.wraps(view)
        def wrapper() -> Any:
            answers.extend(view() for _ in range(2))
            return answers[-1]

        return wrapper

    flow.route(id_generator=lambda: "not valid/", decorators=[repeating])(lambda: "done")
    problem(flow.request("POST", "/work"), 500, "cannot-start")
    assert [answer.status_code for answer in answers] == [500, 500]
    assert flow.ids() == []


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_call_in_a_test_request_of_its_rule_starts_one_task(flow: Flow) -> None:
    @flow.route()
    def work() -> str:
        return "done"

    @flow.route("/other")
    def other() -> str:
        return "other"

    with flow.app.test_request_context("/work", method="POST"):
        assert work().status_code == 202
        with pytest.raises(ConfigurationError, match="called twice"):
            work()
        with pytest.raises(ConfigurationError, match="was not this endpoint's view"):
            other()
        with flow.app.request_context(dict(request.environ)):
            assert work().status_code == 202, "it is another request"
    with (
        flow.app.test_request_context("/unknown"),
        pytest.raises(ConfigurationError, match="was not this endpoint's view"),
    ):
        work()
    assert len(flow.ids()) == 2


# -- outside a request
# ----------------------------------------------------------------------------------------------


@IN_MEMORY
@pytest.mark.parametrize("decorators", [[], [refuse_all]])
@pytest.mark.parametrize("context", ["none", "app", "command"])
def test_a_call_outside_a_request_names_inspect_unwrap(
    flow: Flow, context: str, decorators: list[F]
) -> None:
    @flow.route("/report/<int:year>", decorators=decorators)
    def report(year: int) -> int:
        return year

    flow.app.cli.command("report")(lambda: report(2026))
    if context == "command":
        error: Any = flow.app.test_cli_runner().invoke(args=["report"]).exception
        assert isinstance(error, ConfigurationError)
    else:
        with pytest.raises(AsyncRouteError) as raised:
            if context == "app":
                with flow.app.app_context():
                    report(year=2026)
            report(2026)
        error = raised.value
    assert "report()" in str(error) and "inspect.unwrap(report)" in str(error)
    assert inspect.unwrap(report)(2026) == 2026


def test_a_call_without_an_app_is_an_error() -> None:
    @AsyncRoute().task
    def report() -> int:
        return 5

    with pytest.raises(ConfigurationError, match=UNWRAP):
        report()
    with fake_task():
        assert report() == 5


# -- under a fake task
# ----------------------------------------------------------------------------------------------


@IN_MEMORY
@pytest.mark.parametrize("order", ["none", "outside", "inside", "dispatched"])
def test_a_view_is_a_plain_function_under_a_fake_task(flow: Flow, order: str) -> None:
    @flow.route(decorators=[refuse_all])
    def work(year: int = 0) -> Any:
        return year, current_task.id, request and request.get_json()

    sent = flow.app.test_request_context("/work", method="POST", json=[1])
    if order == "none":
        with fake_task("abc"):
            assert work(2026) == (2026, "abc", request)
    elif order == "outside":
        with sent, fake_task("abc"):
            assert work(2026) == (2026, "abc", [1])
    elif order == "inside":
        with fake_task("abc"), sent:
            assert work(2026) == (2026, "abc", [1])
    else:
        with flow.client:
            flow.client.post("/work", json=[1])
            with fake_task("abc"):
                assert work(2026) == (2026, "abc", [1])
    assert stored(flow) == 0


@pytest.mark.covers("A80")
@IN_MEMORY
def test_a_request_sent_under_a_fake_task_starts_a_task(flow: Flow) -> None:
    @flow.route()
    def work() -> str:
        return "done"

    flow.app.post("/plain", endpoint="plain")(lambda: work())
    with fake_task():
        assert flow.start()["State"] == "NotStarted"
        assert work() == "done"
        with pytest.raises(ConfigurationError, match="was not this endpoint's view"):
            flow.request("POST", "/plain")
        assert flow.start()["State"] == "NotStarted"
    assert stored(flow) == 2
