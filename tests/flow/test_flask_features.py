"""Flask features in tasks: proxies, hosts, templates, threads, nested requests, hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flask
import pytest
from flask import (
    Flask,
    after_this_request,
    copy_current_request_context,
    g,
    render_template_string,
    request,
    url_for,
)
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_asyncroute import AsyncRoute, ConfigurationError, current_task
from tests.support.apps import close_app
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]
MakeApp = Callable[..., Flask]


def test_behind_a_proxy(flow: Flow) -> None:
    flow.app.wsgi_app = ProxyFix(flow.app.wsgi_app, x_for=1, x_proto=1, x_host=1, x_prefix=1)  # type: ignore[method-assign]

    @flow.route()
    def work() -> Any:
        return [
            request.url,
            request.remote_addr,
            request.is_secure,
            url_for("work", _external=True),
            request.script_root,
        ]

    forwarded = {
        "X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "shop.example", "X-Forwarded-Prefix": "/app",
    }  # fmt: skip
    response = flow.request("POST", "/work?x=1", headers=forwarded)
    assert response.headers["Location"].startswith("/app/task/")
    task = flow.ended(response.get_json())
    assert task["Url"] == "https://shop.example/app/work"
    assert task["Result"] == [
        "https://shop.example/app/work?x=1", "203.0.113.7", True, "https://shop.example/app/work", "/app",
    ]  # fmt: skip


def use_every_operation(app: Flask, async_routes: AsyncRoute, path: str, base_url: str) -> Any:
    """Start a task and call every operation at ``base_url``; return the result of the task."""
    client = app.test_client()
    started = client.post(path, base_url=base_url)
    assert started.status_code == 202, started.text
    task_id = started.get_json()["Id"]
    location = started.headers["Location"]
    with app.app_context():
        async_routes.wait(task_id, 5)
    found = client.get(location, base_url=base_url)
    assert found.status_code == 200 and found.get_json()["Id"] == task_id
    assert (
        client.get(f"{location}/result", base_url=base_url).get_json() == found.get_json()["Result"]
    )
    assert client.delete(location, base_url=base_url).status_code == 410
    for answer in (
        client.get("/tasks", base_url=base_url),
        client.post("/tasks", base_url=base_url, json={}),
        client.post("/tasks/query", base_url=base_url, json={}),
    ):
        assert task_id in [task["Id"] for task in answer.get_json()]
    return found.get_json()["Result"]


def test_subdomains(tmp_path: Any) -> None:
    app = Flask("app", subdomain_matching=True, instance_path=str(tmp_path))
    app.config.update(TESTING=True, ASYNCROUTE_STORE="memory://", SERVER_NAME="shop.example")
    async_routes = AsyncRoute(app)

    @async_routes.route("/work/<int:n>", methods=["POST"], subdomain="<tenant>")
    def work(tenant: str, n: int) -> Any:
        return [
            tenant,
            n,
            request.host,
            url_for("work", tenant="b", n=2),
            url_for("asyncroute.get", task_id="x"),
        ]

    @async_routes.route("/main", methods=["POST"])
    def main() -> Any:
        return url_for("asyncroute.get", task_id="x")

    @app.get("/tasks", subdomain="admin")
    def other_tasks() -> str:
        return "of the app"

    try:
        for tenant in ("a", "b.c"):
            assert use_every_operation(app, async_routes, "/work/1", f"http://{tenant}.shop.example/") == [
                tenant, 1, f"{tenant}.shop.example", "http://b.shop.example/work/2", "http://shop.example/task/x",
            ]  # fmt: skip
        assert use_every_operation(app, async_routes, "/main", "http://shop.example/") == "/task/x"
        assert (
            app.test_client().get("/tasks", base_url="http://admin.shop.example/").text
            == "of the app"
        )
    finally:
        close_app(app)


def test_host_matching(tmp_path: Any) -> None:
    app = Flask("app", host_matching=True, static_host="a.example", instance_path=str(tmp_path))
    app.config.update(TESTING=True, ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)

    @app.post("/work", host="a.example")
    @app.post("/work", host="b.example:8000")
    @async_routes.task
    def work() -> Any:
        return [request.host, url_for("asyncroute.get", task_id="x"), url_for("asyncroute.query")]

    try:
        for host in ("a.example", "b.example:8000"):
            assert use_every_operation(app, async_routes, "/work", f"http://{host}/") == [
                host,
                "/task/x",
                "/tasks",
            ]
    finally:
        close_app(app)


@pytest.mark.parametrize("host", ["a.example", "<anywhere>"])
def test_a_rule_that_hides_an_operation_on_the_host_of_a_route_is_an_error(
    tmp_path: Any, host: str
) -> None:
    app = Flask("app", host_matching=True, static_host="a.example", instance_path=str(tmp_path))
    app.config.update(TESTING=True, ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    app.post("/work", host="a.example")(async_routes.task(lambda: 1))
    app.add_url_rule("/tasks", "mine", lambda **given: "mine", host=host)
    with pytest.raises(ConfigurationError, match=r"'mine'.*ASYNCROUTE_URL_PREFIX"):
        app.test_client().get("/tasks", base_url="http://a.example/")


def test_templates_in_a_task(flow: Flow) -> None:
    flow.app.context_processor(lambda: {"added": "by a processor"})

    @flow.route()
    def work() -> Any:
        g.thing = "in g"
        return render_template_string(
            "{{ request.args.x }}, {{ g.thing }}, {{ session.get('y') }}, {{ added }}, {{ "
            "url_for('work') }}"
        )

    assert flow.result("/work?x=1") == "1, in g, None, by a processor, /work"


def test_threads_of_a_view_have_its_request(flow: Flow) -> None:
    """``copy_current_request_context`` copies the request. The task is passed as an object."""

    @flow.route()
    def work() -> Any:
        found: list[Any] = []
        task = current_task._get_current_object()  # type: ignore[attr-defined]

        @copy_current_request_context
        def more() -> None:
            found.append([request.args["x"], task.id])

        thread = threading.Thread(target=more)
        thread.start()
        thread.join()
        return found

    task = flow.run("/work?x=1")
    assert task["Result"] == [["1", task["Id"]]]


@pytest.mark.covers("F13")
def test_a_task_completes_when_its_view_returns(flow: Flow, gate: threading.Event) -> None:
    """Threads that the view has started may still run."""
    threads: list[threading.Thread] = []

    @flow.route()
    def work() -> str:
        thread = threading.Thread(target=lambda: gate.wait(10))
        thread.start()
        threads.append(thread)
        return "done"

    assert flow.result() == "done"
    assert threads[0].is_alive()
    gate.set()
    threads[0].join()


def test_a_task_starts_another_by_a_request(flow: Flow, executor: Any) -> None:
    flow.route("/other", endpoint="other", executor=executor)(
        lambda: [current_task.id, request.path]
    )

    @flow.route()
    def work() -> Any:
        response = flow.app.test_client().post("/other")
        assert response.status_code == 202
        found = flow.async_routes.wait(response.get_json()["Id"], 5)
        return [current_task.id, request.path, found.id, found.result]

    task = flow.run()
    own, path, other, result = task["Result"]
    assert (own, path) == (task["Id"], "/work")
    assert result == [other, "/other"] and other != own


def test_a_test_client_that_preserves_its_context(flow: Flow, executor: Any) -> None:
    flow.route(endpoint="work", executor=executor)(lambda: request.path)
    with flow.app.test_client() as client:
        response = client.post("/work")
        assert flask.request.path == "/work"
        task = response.get_json()
    assert flow.ended(task)["Result"] == "/work"


def test_a_view_called_in_a_test_request_starts_a_task(flow: Flow) -> None:
    @flow.route("/a/<int:n>")
    def work(n: int) -> int:
        return n + 1

    with flow.app.test_request_context("/a/5", method="POST"):
        response: Any = work(n=5)
    assert response.status_code == 202
    assert flow.ended(response.get_json())["Result"] == 6


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "application/x-www-form-urlencoded", "application/json"]
)
def test_forms_in_debug_mode(make_flow: MakeFlow, content_type: str) -> None:
    """In debug mode Flask replaces ``files``, to explain a wrong form encoding."""
    flow = make_flow(DEBUG=True)
    flow.app.before_request(lambda: request.form.get("a") and None)

    @flow.route()
    def work() -> Any:
        return [request.form.get("a"), request.get_json(silent=True)]

    if content_type == "application/json":
        assert flow.result(json={"a": 1}) == [None, {"a": 1}]
    else:
        assert flow.result(data={"a": "1"}, content_type=content_type) == ["1", None]


def test_after_this_request_in_a_task_has_no_effect(flow: Flow) -> None:
    ran = []

    def later(response: Any) -> Any:
        ran.append(1)
        return response

    @flow.route()
    def work() -> str:
        after_this_request(later)
        return "done"

    assert flow.result() == "done"
    assert not ran


@pytest.mark.parametrize("method", ["PATCH", "DELETE", "REPORT", "PROPFIND"])
def test_routes_with_other_methods(flow: Flow, method: str) -> None:
    flow.route(endpoint="work", methods=[method])(lambda: request.method)
    task = flow.run("/work", method)
    assert (task["Method"], task["AsyncRouteId"], task["Result"]) == (
        method,
        f"[{method.capitalize()}]/work",
        method,
    )


def test_a_redirect_to_a_trailing_slash_starts_nothing(flow: Flow) -> None:
    flow.route("/work/", endpoint="work")(lambda: 1)
    assert flow.request("POST", "/work").status_code == 308
    assert flow.query() == []
    assert flow.result("/work/") == 1


def test_a_before_request_function_may_refuse_a_start(flow: Flow) -> None:
    flow.app.before_request(lambda: flask.abort(403) if request.method == "POST" else None)
    flow.route(endpoint="work")(lambda: 1)
    assert flow.request("POST", "/work").status_code == 403
    assert flow.query() == []


def test_an_after_request_function_may_change_the_response(flow: Flow) -> None:
    @flow.app.after_request
    def mark(response: Any) -> Any:
        response.headers["X-Marked"] = "yes"
        return response

    flow.route(endpoint="work")(lambda: 1)
    assert flow.request("POST", "/work").headers["X-Marked"] == "yes"
    assert flow.request("GET", "/tasks").headers["X-Marked"] == "yes"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_an_async_before_task_function_runs_or_is_refused(make_flow: MakeFlow) -> None:
    flow = make_flow()
    ran = []

    async def load() -> None:
        ran.append(1)

    try:
        flow.async_routes.before_task(load)
    except ConfigurationError as error:
        assert "async" in str(error)
        return
    flow.route(endpoint="work")(lambda: 1)
    flow.run()
    assert ran


def test_url_for_with_a_configured_server_name(make_flow: MakeFlow) -> None:
    flow = make_flow(SERVER_NAME="shop.example", APPLICATION_ROOT="/app")
    flow.route(endpoint="work")(lambda: url_for("work", _external=True))
    flow.app.post("/plain")(lambda: url_for("work", _external=True))
    assert flow.result() == flow.client.post("/plain").text
    with flow.app.app_context():
        assert url_for("asyncroute.get", task_id="x") == "http://shop.example/app/task/x"


def test_trusted_hosts_are_checked_at_the_start(make_flow: MakeFlow) -> None:
    flow = make_flow(TRUSTED_HOSTS=["localhost"])
    flow.route(endpoint="work")(lambda: request.host)
    assert flow.request("POST", "/work", headers={"Host": "evil.example"}).status_code == 400
    assert flow.result() == "localhost"
