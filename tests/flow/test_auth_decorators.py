"""Authentication decorators: ``decorators=`` run in the request that starts a task. A decorator
below the async route is a configuration error.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, abort, request

from flask_asyncroute import AsyncRoute, ConfigurationError
from tests.support.flow import IN_MEMORY, Flow

flask_login = pytest.importorskip("flask_login")

MakeFlow = Callable[..., Flow]


def login_required(view: Any) -> Any:
    @functools.wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if "X-User" not in request.headers:
            abort(401)
        return view(*args, **kwargs)

    return guarded


@IN_MEMORY
@pytest.mark.parametrize("by", ["route", "task"])
def test_decorators_run_in_the_request_and_may_refuse_it(flow: Flow, by: str) -> None:
    def work() -> str:
        return "done"

    if by == "route":
        flow.route(decorators=[login_required])(work)
    else:
        flow.app.post("/work")(flow.async_routes.task(decorators=[login_required])(work))
    assert flow.request("POST", "/work").status_code == 401
    assert flow.query() == []
    flow.headers = {"X-User": "ann"}
    assert flow.result() == "done"


@IN_MEMORY
def test_the_last_decorator_is_the_outermost(flow: Flow) -> None:
    calls: list[str] = []

    def recording(name: str) -> Any:
        def decorate(view: Any) -> Any:
            @functools.wraps(view)
            def wrapper(**arguments: Any) -> Any:
                calls.append(name)
                return view(**arguments)

            return wrapper

        return decorate

    @flow.route(decorators=[recording("inner"), recording("outer")])
    def work() -> None: ...

    flow.result()
    assert calls == ["outer", "inner"]


@pytest.mark.parametrize("given", [login_required, "login_required", [1], {login_required}])
def test_decorators_that_are_not_a_list_of_functions_are_refused(
    make_flow: MakeFlow, given: Any
) -> None:
    flow = make_flow()
    with pytest.raises(ConfigurationError, match="decorators"):
        flow.route(decorators=given)(lambda: None)


def without_wraps(view: Any) -> Any:
    return lambda **arguments: view(**arguments)


@IN_MEMORY
@pytest.mark.parametrize(
    "decorator",
    [without_wraps, lambda view: None, lambda view: "text", print],
    ids=["no functools.wraps", "None", "text", "print"],
)
@pytest.mark.parametrize("by", ["route", "task"])
def test_a_decorator_that_hides_the_view_is_refused(flow: Flow, by: str, decorator: Any) -> None:
    def work() -> None: ...

    decorate_view = flow.route if by == "route" else flow.async_routes.task
    with pytest.raises(ConfigurationError, match=r"work\(\).*functools\.wraps"):
        decorate_view(decorators=[login_required, decorator, login_required])(work)


@IN_MEMORY
def test_a_decorator_that_is_an_object_or_a_coroutine_function(flow: Flow) -> None:
    """A class may be a decorator. Flask runs a coroutine function if asgiref is installed."""

    class Guard:
        def __init__(self, view: Any) -> None:
            functools.update_wrapper(self, view)

        def __call__(self, **arguments: Any) -> Any:
            return login_required(self.__wrapped__)(**arguments)  # type: ignore[attr-defined]

    def coroutine(view: Any) -> Any:
        @functools.wraps(view)
        async def wrapper(**arguments: Any) -> Any:
            return view(**arguments)

        return wrapper

    flow.app.async_to_sync = lambda func: lambda **given: asyncio.run(func(**given))  # type: ignore[method-assign, assignment]
    flow.route(endpoint="work", decorators=[Guard, coroutine])(lambda: "done")
    assert flow.request("POST", "/work").status_code == 401
    flow.headers = {"X-User": "ann"}
    assert flow.result() == "done"


@pytest.mark.parametrize("by", ["route", "task"])
def test_flask_login_below_the_async_route_is_a_configuration_error(
    make_app: Callable[..., Flask], by: str
) -> None:
    async_routes = AsyncRoute(make_app())

    def work() -> None: ...

    decorate_view = (
        async_routes.route("/work", methods=["POST"]) if by == "route" else async_routes.task
    )
    with pytest.raises(ConfigurationError, match=r"login_required.*decorators=\[login_required\]"):
        decorate_view(flask_login.login_required(work))


def test_flask_login_as_a_decorator_refuses_unknown_users(make_app: Callable[..., Flask]) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    flask_login.LoginManager(app).request_loader(lambda request: None)
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["POST"], decorators=[flask_login.login_required])
    def work() -> None: ...

    assert app.test_client().post("/work").status_code == 401
