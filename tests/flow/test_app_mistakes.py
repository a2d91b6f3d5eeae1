"""Mistakes of apps that are reported with their remedy."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flask import after_this_request, g, request
from werkzeug.exceptions import BadRequestKeyError
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from flask_asyncroute import ConfigurationError
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.testing import inline
from tests.support.flow import Flow


@pytest.mark.parametrize("use", ["init_app", "start", "inline"])
def test_a_middleware_in_place_of_the_app_is_refused(
    make_flow: Callable[..., Flow], use: str
) -> None:
    flow = make_flow()
    wrapped: Any = DispatcherMiddleware(flow.app)
    call: Any = inline if use == "inline" else getattr(flow.async_routes, use)
    with pytest.raises(ConfigurationError, match=r"DispatcherMiddleware is not a Flask.*wsgi_app"):
        call(wrapped)


def test_eventlet_is_refused(
    make_flow: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_flow()
    patcher = SimpleNamespace(is_monkey_patched=lambda name: name == "thread")
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    with pytest.raises(ConfigurationError, match="eventlet.*Use gevent or threads"):
        flow.async_routes.start(flow.app)


def test_a_missing_value_of_g_names_before_task(make_flow: Callable[..., Flow]) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        return g.user

    assert flow.error() == (
        "AttributeError: g.user is not set, because before_request functions do not run in a "
        "task. Set it in a before_task function."
    )


def test_a_missing_attribute_of_something_else_keeps_its_message(
    make_flow: Callable[..., Flow],
) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        return request.no_such_attribute  # type: ignore[attr-defined]

    assert flow.error().endswith("has no attribute 'no_such_attribute'")


def test_a_missing_form_field_is_named(make_flow: Callable[..., Flow]) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        return request.form["traveller"]

    error = flow.error(data={"name": "Ada"})
    assert error.startswith("400 Bad Request: ")
    assert error.endswith("(missing: 'traveller')")


def test_after_this_request_is_logged_once(
    make_flow: Callable[..., Flow], caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> str:
        @after_this_request
        def add_header(response: Any) -> Any:
            return response

        return "done"

    assert flow.result() == flow.result() == "done"
    found = [r.getMessage() for r in caplog.records if "after_this_request" in r.getMessage()]
    assert len(found) == 1
    assert "endpoint work" in found[0]


def test_lists_that_leave_out_tasks_warn_once_when_they_are_empty(
    make_flow: Callable[..., Flow], caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow(ASYNCROUTE_LIST_ANONYMOUS=False)
    flow.route()(lambda: None)
    flow.run()
    flow.headers = {"X-User": "ann"}
    flow.run()
    store = runtime_of(flow.app).runner.store
    asked = []
    query = store.query
    store.query = lambda *args: asked.append(args) or query(*args)  # type: ignore

    def warnings() -> int:
        return sum("ASYNCROUTE_LIST_ANONYMOUS" in r.getMessage() for r in caplog.records)

    assert len(flow.ids()) == len(asked) == 1
    assert warnings() == 0
    flow.headers = {"X-User": "bob"}
    for _ in range(2):
        assert flow.ids() == []
        assert warnings() == 1
    assert len(asked) == 4, "a list that is empty is checked once more, until the warning"


def test_the_configuration_shows_no_secrets(make_flow: Callable[..., Flow]) -> None:
    secret = "whsec_" + 8 * "abcd1234"
    flow = make_flow(ASYNCROUTE_CALLBACK_SECRET=secret)
    assert secret not in repr(runtime_of(flow.app).prepare())


def test_an_executor_that_cannot_be_created_leaves_other_pools_alone(
    make_flow: Callable[..., Flow],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flow = make_flow()
    flow.route(endpoint="work")(lambda: None)
    flow.route("/broken", endpoint="broken", pool="broken")(lambda: None)
    runner = runtime_of(flow.app).runner
    make = runner._make_executor

    def failing(route: Any) -> Any:
        if route.endpoint == "broken":
            raise OSError("no more processes")
        return make(route)

    monkeypatch.setattr(runner, "_make_executor", failing)
    caplog.set_level(logging.ERROR)
    for _ in range(2):
        assert runner._takeover_capacity(runner.routes["broken"]) == 0
    assert runner._takeover_capacity(runner.routes["work"]) > 0
    assert caplog.text.count("The executor of pool broken could not be created") == 1


def test_a_message_of_the_app_about_g_is_kept(make_flow: Callable[..., Flow]) -> None:
    class Globals:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"{name} is not configured", name=name, obj=self)

    flow = make_flow()
    flow.app.app_ctx_globals_class = Globals  # type: ignore[assignment]

    @flow.route()
    def work() -> Any:
        return g.database

    assert flow.error() == "AttributeError: database is not configured"


def test_a_key_error_of_a_form_without_a_key_keeps_its_message(
    make_flow: Callable[..., Flow],
) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> Any:
        error = BadRequestKeyError()
        error.description = "my own text"
        raise error

    assert flow.error() == "400 Bad Request: my own text"
