"""App setup: factories, blueprints, several apps per instance, failed ``init_app``, first use."""

from __future__ import annotations

import functools
import gc
import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, Flask, abort, current_app, request
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from flask_asyncroute import Access, AsyncRoute, ConfigurationError, task_created
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.stores.sql.store import SQLTaskStore
from tests.support.apps import close_app, new_app
from tests.support.databases import engine_of
from tests.support.flow import Flow, problem
from tests.support.waiting import eventually_true

MakeApp = Callable[..., Flask]
MakeFlow = Callable[..., Flow]
MEMORY = {"ASYNCROUTE_STORE": "memory://"}


def test_app_factory_with_a_blueprint_and_a_route(make_app: MakeApp, store_url: str) -> None:
    async_routes = AsyncRoute()
    blueprint = Blueprint("shop", "shop", url_prefix="/shop")

    @blueprint.post("/orders")
    @async_routes.task
    def orders() -> str:
        return current_app.name

    @async_routes.route("/direct", methods=["POST"])
    def direct() -> str:
        return f"direct in {current_app.name}"

    def create_app(name: str) -> Flow:
        app = make_app(name, ASYNCROUTE_STORE=store_url)
        async_routes.init_app(app)
        app.register_blueprint(blueprint)
        return Flow(app, async_routes)

    one, two = create_app("one"), create_app("two")
    for flow, name in ((one, "one"), (two, "two"), (one, "one")):
        assert flow.result("/shop/orders") == name
        assert flow.result("/direct") == f"direct in {name}"
    assert len(one.query()) == 4
    assert len(two.query()) == 2


def test_apps_on_one_store_do_not_see_each_other_s_tasks(
    make_app: MakeApp, tmp_path: Path, hear: Any
) -> None:
    """By default the namespace is the app's name."""
    async_routes = AsyncRoute()

    @async_routes.route("/work", methods=["POST"], id_generator=lambda: "same")
    def work() -> str:
        async_routes.state["name"] = current_app.name
        return str(async_routes.state["name"])

    flows = []
    for name in ("one", "two"):
        app = make_app(name, ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/shared.db")
        async_routes.init_app(app)
        flows.append(Flow(app, async_routes))
    sent_signals = hear(task_created, sender=flows[0].app)
    for flow in flows:
        assert flow.result() == flow.app.name
        assert flow.ids() == ["same"]
    assert len(sent_signals) == 1
    flows[0].purge("same")
    assert flows[0].query() == [] and flows[1].ids() == ["same"]


def shop(app: Flask, report: Callable[[], str], endpoint: str = "report") -> Flow:
    """Return a flow of an app with one async route."""
    async_routes = AsyncRoute(app)
    async_routes.route("/work", methods=["POST"], endpoint=endpoint)(report)
    return Flow(app, async_routes)


def name_of_app() -> str:
    return current_app.name


def test_one_app_in_two_processes_shares_its_tasks(
    make_app: MakeApp, tmp_path: Path, store_url: str, separate_processes: None
) -> None:
    flows = [
        shop(make_app("shop", instance_path=tmp_path, ASYNCROUTE_STORE=store_url), name_of_app)
        for _ in range(2)
    ]
    task = flows[0].run()
    if store_url == "memory://":
        flows[1].get(task, status=404)
    else:
        assert flows[1].get(task)["Result"] == "shop"
        assert flows[1].ids() == [task["Id"]]


@pytest.mark.parametrize("store", ["sqlite", "postgresql", "engine"])
def test_two_apps_of_one_namespace_are_refused(
    make_app: MakeApp, tmp_path: Path, postgresql_url: str, store: str
) -> None:
    """For example, a module calls ``Flask(__name__)`` twice. Each would run the other's tasks."""

    def report_of(name: str) -> Callable[[], str]:
        return lambda: name

    engine = engine_of(postgresql_url)
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "tasks.db")
    first_url, second_url = {
        "sqlite": (f"sqlite:///{tmp_path}/tasks.db", f"sqlite:///{link}"),
        "postgresql": (postgresql_url, f"{postgresql_url}?application_name=second"),
        "engine": (postgresql_url, lambda: engine),
    }[store]
    front = shop(make_app("shop", ASYNCROUTE_STORE=first_url), report_of("front"))
    back = shop(make_app("shop", ASYNCROUTE_STORE=second_url), report_of("back"))
    mounted = Client(DispatcherMiddleware(front.app, {"/back": back.app}))
    assert front.result() == "front"
    assert [back.result() for _ in range(5)] == ["back"] * 5, "the newer app runs all tasks"
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="'shop' and 'shop'.*ASYNCROUTE_NAMESPACE"):
            mounted.post("/work")
        with pytest.raises(ConfigurationError, match="ASYNCROUTE_NAMESPACE"):
            front.async_routes.start(front.app)
        with front.app.app_context(), pytest.raises(ConfigurationError, match="_NAMESPACE"):
            front.async_routes.get("x")
    assert mounted.post("/back/work").status_code == 202
    other = shop(
        make_app("shop", ASYNCROUTE_STORE=second_url, ASYNCROUTE_NAMESPACE="other"),
        report_of("other"),
    )
    assert [other.result() for _ in range(5)] == ["other"] * 5
    close_app(back.app)
    assert front.result() == "front"
    engine.dispose()


def test_a_newer_app_is_served_while_an_older_one_is_still_referenced(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """In a test suite, a task or the traceback of a failed test may still reference an app."""
    kept = []
    for number in range(3):
        app = make_app("shop", ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/tasks.db")
        kept.append(flow := shop(app, lambda number=number: str(number)))  # type: ignore[misc]
        assert flow.result() == str(number)
    assert len(kept) == 3


def test_two_apps_started_at_the_same_time_are_not_both_served(
    make_app: MakeApp, tmp_path: Path
) -> None:
    flows = [
        shop(
            make_app(
                name, ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/tasks.db", ASYNCROUTE_NAMESPACE="shop"
            ),
            name_of_app,
        )
        for name in ("one", "two")
    ]
    barrier = threading.Barrier(2)

    def start(flow: Flow) -> bool:
        barrier.wait(10)
        try:
            for _ in range(2):
                flow.async_routes.start(flow.app)
                barrier.wait(10)
        except (ConfigurationError, threading.BrokenBarrierError):
            barrier.abort()
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(start, flows)) <= 1


def test_the_extension_holds_no_reference_to_its_app() -> None:
    import gc
    import weakref

    async_routes = AsyncRoute()
    app = Flask("gone")
    app.config["ASYNCROUTE_STORE"] = "memory://"
    async_routes.init_app(app)
    reference = weakref.ref(app)
    del app
    gc.collect()
    assert reference() is None


def test_routes_added_before_and_after_init_app(make_app: MakeApp) -> None:
    async_routes = AsyncRoute()
    async_routes.route("/early", methods=["POST"], endpoint="early")(lambda: "early")
    one = make_app("one", **MEMORY)
    async_routes.init_app(one)
    async_routes.route("/late", methods=["POST"], endpoint="late")(lambda: "late")
    two = make_app("two", **MEMORY)
    async_routes.init_app(two)
    async_routes.route("/latest", methods=["POST"], endpoint="latest")(lambda: "latest")
    for app in (one, two):
        flow = Flow(app, async_routes)
        assert [flow.result(f"/{path}") for path in ("early", "late", "latest")] == [
            "early",
            "late",
            "latest",
        ]


def test_route_after_first_use(make_app: MakeApp) -> None:
    """It is added to the apps that are not in use yet. If there are none, an error is raised."""
    async_routes = AsyncRoute()
    one, two = make_app("one", **MEMORY), make_app("two", **MEMORY)
    async_routes.init_app(one)
    async_routes.init_app(two)
    assert one.test_client().get("/tasks").status_code == 200
    async_routes.route("/late", methods=["POST"], endpoint="late")(lambda: "late")
    assert one.test_client().post("/late").status_code == 404
    assert Flow(two, async_routes).result("/late") == "late"
    with pytest.raises(ConfigurationError, match="already in use"):
        async_routes.route("/later", methods=["POST"], endpoint="later")(lambda: "later")
    three = make_app("three", **MEMORY)
    async_routes.init_app(three)
    assert Flow(three, async_routes).result("/late") == "late"
    assert three.test_client().post("/later").status_code == 404, "a refused route is not recorded"


def test_a_view_that_becomes_an_async_route_after_first_use(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.async_routes.task
    def view() -> Any:
        return 1

    flow.app.post("/work")(lambda: view())
    with pytest.raises(ConfigurationError, match="at the app.s first request"):
        flow.client.post("/work")


@pytest.mark.parametrize("is_before", [True, False])
def test_blueprints_registered_before_and_after_init_app(
    make_app: MakeApp, is_before: bool
) -> None:
    app = make_app(**MEMORY)
    async_routes = AsyncRoute()
    outer, inner = (
        Blueprint("outer", "outer", url_prefix="/outer"),
        Blueprint("inner", "inner", url_prefix="/<int:n>"),
    )

    @inner.post("/work")
    @async_routes.task
    def work(n: int) -> Any:
        return [n, request.endpoint, request.blueprints]

    outer.register_blueprint(inner)
    if is_before:
        app.register_blueprint(outer)
    async_routes.init_app(app)
    if not is_before:
        app.register_blueprint(outer)
    app.register_blueprint(outer, name="again", url_prefix="/again")
    flow = Flow(app, async_routes)
    assert flow.result("/outer/5/work") == [5, "outer.inner.work", ["outer.inner", "outer"]]
    assert flow.result("/again/6/work")[1] == "again.inner.work"


def test_initialising_an_app_twice_is_a_configuration_error(make_app: MakeApp) -> None:
    app = make_app(**MEMORY)
    async_routes = AsyncRoute(app)
    with pytest.raises(ConfigurationError, match="already set up for the app 'app'"):
        async_routes.init_app(app)
    with pytest.raises(ConfigurationError, match="already set up for the app 'app'"):
        AsyncRoute(app)
    async_routes.route("/work", methods=["POST"])(lambda: 1)
    assert Flow(app, async_routes).result() == 1


def test_init_app_can_be_repeated_after_a_failure(make_app: MakeApp, store_url: str) -> None:
    async_routes = AsyncRoute()
    async_routes.route("/work", methods=["POST"], endpoint="work")(lambda: 1)
    app = make_app(ASYNCROUTE_STORE=store_url, ASYNCROUTE_TIMEOUT="5")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="ASYNCROUTE_TIMEOUT"):
            async_routes.init_app(app)
        assert not app.extensions and "asyncroute" not in app.blueprints
    app.config["ASYNCROUTE_TIMEOUT"] = 5
    async_routes.init_app(app)
    assert Flow(app, async_routes).result() == 1


def test_init_app_can_be_repeated_after_a_route_failed(make_app: MakeApp) -> None:
    """The app has a route's endpoint already. Once it is removed, each route is registered once."""
    async_routes = AsyncRoute()
    for path in ("one", "two", "three"):
        async_routes.route(f"/{path}", methods=["POST"], endpoint=path)(lambda: request.path)
    app = make_app(**MEMORY)
    app.add_url_rule("/plain", "two", lambda: "plain")
    with pytest.raises((AssertionError, ConfigurationError), match="two"):
        async_routes.init_app(app)
    assert "asyncroute" not in app.extensions
    del app.view_functions["two"]
    async_routes.init_app(app)
    flow = Flow(app, async_routes)
    assert [flow.result(f"/{path}") for path in ("one", "two", "three")] == [
        "/one",
        "/two",
        "/three",
    ]
    assert len([rule for rule in app.url_map.iter_rules() if rule.endpoint == "one"]) == 1
    assert flow.query()


def test_init_app_can_be_repeated_after_the_blueprint_failed(make_app: MakeApp) -> None:
    async_routes = AsyncRoute()
    app = make_app(**MEMORY)
    app.register_blueprint(Blueprint("asyncroute", "other"))
    with pytest.raises((ValueError, ConfigurationError), match="asyncroute"):
        async_routes.init_app(app)
    assert "asyncroute" not in app.extensions
    del app.blueprints["asyncroute"]
    async_routes.init_app(app)
    assert Flow(app, async_routes).query() == []


def test_init_app_after_a_request_is_an_error(make_app: MakeApp) -> None:
    app = make_app(**MEMORY)
    app.get("/")(lambda: "plain")
    app.test_client().get("/")
    with pytest.raises((AssertionError, ConfigurationError), match="first request"):
        AsyncRoute(app)
    assert "asyncroute" not in app.extensions


# -- the operations
# ----------------------------------------------------------------------------------------------------------


def test_rules_and_endpoints_of_the_operations(make_flow: MakeFlow) -> None:
    flow = make_flow()
    rules = {
        (rule.rule, method, rule.endpoint)
        for rule in flow.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}
        if rule.endpoint != "static"
    }
    assert rules == {
        ("/task/<task_id>", "GET", "asyncroute.get"),
        ("/task", "GET", "asyncroute.get"),
        ("/task/<task_id>/result", "GET", "asyncroute.result"),
        ("/task/result", "GET", "asyncroute.result"),
        ("/task/<task_id>/events", "GET", "asyncroute.events"),
        ("/task/events", "GET", "asyncroute.events"),
        ("/tasks/events", "GET", "asyncroute.group_events"),
        ("/task/<task_id>", "DELETE", "asyncroute.stop"),
        ("/task", "DELETE", "asyncroute.stop"),
        ("/task/<task_id>/stop", "POST", "asyncroute.stop_by_form"),
        ("/task/stop", "POST", "asyncroute.stop_by_form"),
        ("/task-pages/<path:filename>", "GET", "asyncroute.asset"),
        ("/tasks", "GET", "asyncroute.query"),
        ("/tasks", "POST", "asyncroute.query"),
        ("/tasks/query", "POST", "asyncroute.query"),
    }
    assert flow.async_routes.blueprint.name == "asyncroute"


@pytest.mark.parametrize("operations", [["get"], ["stop", "query"], ["query"]])
def test_only_configured_operations_are_served(make_flow: MakeFlow, operations: list[str]) -> None:
    flow = make_flow(ASYNCROUTE_OPERATIONS=operations)
    flow.route()(lambda: 1)
    task = flow.start()
    with flow.app.app_context():
        flow.async_routes.wait(task["Id"], 5)
    served = {
        "get": flow.request("GET", f"/task/{task['Id']}").status_code == 200,
        "stop": flow.request("DELETE", f"/task/{task['Id']}").status_code == 410,
        "query": flow.request("GET", "/tasks").status_code == 200,
    }
    assert served == {name: name in operations for name in served}
    assert (flow.request("GET", f"/task/{task['Id']}/result").status_code == 200) is (
        "get" in operations
    )


def test_configured_paths_of_operations(make_flow: MakeFlow) -> None:
    flow = make_flow(
        ASYNCROUTE_URL_PREFIX="/api", ASYNCROUTE_TASK_PATH="/job", ASYNCROUTE_TASKS_PATH="/jobs"
    )
    flow.route()(lambda: 1)
    response = flow.request("POST", "/work")
    assert response.headers["Location"].startswith("/api/job/")
    assert flow.request("GET", response.headers["Location"]).status_code == 200
    assert len(flow.request("GET", "/api/jobs").get_json()) == 1
    assert len(flow.request("POST", "/api/jobs/query", json={}).get_json()) == 1
    for path in ("/tasks", "/jobs", "/task/x", "/api/tasks"):
        assert flow.request("GET", path).status_code == 404


def test_decorators_of_the_app_guard_every_operation(make_flow: MakeFlow) -> None:
    order: list[str] = []

    def guard(function: Any) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            order.append("guard")
            if request.headers.get("X-User") is None:
                abort(403)
            return function(*args, **kwargs)

        return guarded

    def outer(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            order.append("outer")
            return function(*args, **kwargs)

        return wrapped

    flow = make_flow(decorators=[guard, outer])
    flow.route()(lambda: 1)
    task = flow.start()
    for method, path in (
        ("GET", f"/task/{task['Id']}"), ("GET", f"/task?Id={task['Id']}"), ("GET", f"/task/{task['Id']}/result"), ("DELETE", f"/task/{task['Id']}"),
        ("GET", "/tasks"), ("POST", "/tasks"), ("POST", "/tasks/query"),
    ):  # fmt: skip
        order.clear()
        assert flow.request(method, path).status_code == 403
        assert order == ["outer", "guard"]
    flow.headers = {"X-User": "anna"}
    assert flow.ended(task)["State"] == "Completed"


@pytest.mark.parametrize(
    ("rule", "methods", "operation"),
    [
        ("/task/<id>", ["GET"], "get"),
        ("/task/<int:number>", ["GET", "POST"], "get"),
        ("/task/<x>", ["DELETE"], "stop"),
        ("/task", ["GET"], "get"),
        ("/task/", ["DELETE"], "stop"),
        ("/tasks", ["GET"], "query"),
        ("/tasks", ["POST"], "query"),
        ("/tasks/query", ["POST"], "query"),
        ("/task/<x>/result", ["GET"], "result"),
    ],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_a_rule_of_the_app_that_conflicts_with_an_operation_is_an_error(
    make_app: MakeApp, rule: str, methods: list[str], operation: str, is_before: bool
) -> None:
    app = make_app(**MEMORY)
    async_routes = AsyncRoute()
    if not is_before:
        async_routes.init_app(app)
    app.add_url_rule(rule, "mine", lambda **given: "mine", methods=methods)
    if is_before:
        async_routes.init_app(app)
    for _ in range(2):
        with pytest.raises(
            ConfigurationError, match=rf"'mine'.*asyncroute\.{operation}.*ASYNCROUTE_URL_PREFIX"
        ):
            app.test_client().get("/whatever")
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_URL_PREFIX"):
        async_routes.start(app)


def test_an_async_route_that_conflicts_with_an_operation_is_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route("/tasks", endpoint="mine")(lambda: 1)
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_URL_PREFIX"):
        flow.client.post("/tasks")


@pytest.mark.parametrize(
    ("rule", "methods"),
    [
        ("/task/<id>", ["PUT", "POST"]), ("/task", ["POST"]), ("/tasks", ["DELETE"]), ("/tasks/query", ["GET"]), ("/tasks/<x>", ["GET"]),
        ("/<x>", ["GET"]), ("/<path:x>", ["GET", "POST", "DELETE"]), ("/task/<a>-<b>", ["POST"]), ("/task/special", ["GET"]), ("/taskś", ["GET"]),
        ("/task/<x>/other", ["GET"]), ("/task/<a>/<b>/result", ["GET"]),
    ],
)  # fmt: skip
def test_similar_rules_of_the_app_do_not_conflict(
    make_flow: MakeFlow, rule: str, methods: list[str]
) -> None:
    flow = make_flow()
    flow.app.add_url_rule(rule, "mine", lambda **given: "mine", methods=methods)
    flow.route()(lambda: 1)
    assert flow.result() == 1
    assert len(flow.query()) == 1


def test_a_url_prefix_resolves_a_conflict(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_URL_PREFIX="/async")
    flow.app.get("/tasks")(lambda: "mine")
    assert flow.request("GET", "/tasks").text == "mine"
    assert flow.request("GET", "/async/tasks").get_json() == []


def test_operations_that_conflict_with_each_other_are_an_error(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_TASK_PATH="/api", ASYNCROUTE_TASKS_PATH="/api/result")
    with pytest.raises(
        ConfigurationError, match="ASYNCROUTE_TASK_PATH and ASYNCROUTE_TASKS_PATH.*GET /api/result"
    ):
        flow.client.get("/api/result")


def test_a_start_has_no_location_without_the_get_operation(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_OPERATIONS=("stop", "query"))
    flow.route()(lambda: 1)
    response = flow.request("POST", "/work")
    assert response.status_code == 202 and "Location" not in response.headers


# -- first use
# -----------------------------------------------------------------------------------------------------------------


def test_configuration_is_read_again_at_first_use_and_frozen(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route()(lambda: 1)
    flow.app.config["ASYNCROUTE_ACCEPTED_STATUS"] = 200
    assert flow.request("POST", "/work").status_code == 200
    flow.app.config["ASYNCROUTE_ACCEPTED_STATUS"] = 202
    assert flow.request("POST", "/work").status_code == 200
    flow.app.config["ASYNCROUTE_ACCEPTED_STATUS"] = "nonsense"
    assert flow.request("POST", "/work").status_code == 200


def test_invalid_configuration_set_after_init_app_fails_each_use(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route()(lambda: 1)
    flow.app.get("/plain", endpoint="plain")(lambda: "plain")
    flow.app.config["ASYNCROUTE_CANCELLABLE"] = "False"
    for _ in range(2):
        for path in ("/plain", "/tasks", "/nowhere"):
            with pytest.raises(ConfigurationError, match="ASYNCROUTE_CANCELLABLE"):
                flow.client.get(path)
        with flow.app.app_context():
            with pytest.raises(ConfigurationError, match="ASYNCROUTE_CANCELLABLE"):
                flow.async_routes.exists("x")
            with pytest.raises(ConfigurationError, match="ASYNCROUTE_CANCELLABLE"):
                flow.async_routes.state["x"] = 1
    flow.app.config["PROPAGATE_EXCEPTIONS"] = False
    assert flow.client.get("/plain").status_code == 500
    flow.app.config["ASYNCROUTE_CANCELLABLE"] = False
    assert flow.client.get("/plain").text == "plain"
    assert flow.start()["Cancellable"] is False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("URL_PREFIX", "/x"),
        ("TASK_PATH", "/x"),
        ("TASKS_PATH", "/x"),
        ("OPERATIONS", ["get"]),
        ("TASK_ID_IN", ["query"]),
    ],
)
def test_url_settings_cannot_change_after_init_app(
    make_flow: MakeFlow, key: str, value: Any
) -> None:
    flow = make_flow()
    flow.app.config[f"ASYNCROUTE_{key}"] = value
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"_{key}"):
            flow.client.get("/tasks")


def test_first_use_outside_a_request(flow: Flow) -> None:
    flow.route()(lambda: 1)
    with flow.app.app_context():
        assert flow.async_routes.get("x") is None
    with pytest.raises(ConfigurationError, match="already in use"):
        flow.route("/late", endpoint="late")(lambda: 1)
    assert flow.result() == 1


def test_start_may_be_called_twice(flow: Flow) -> None:
    flow.route()(lambda: 1)
    flow.async_routes.start(flow.app)
    flow.async_routes.start(flow.app)
    assert flow.result() == 1


def test_no_threads_and_no_files_before_first_use(flow: Flow) -> None:
    import threading

    flow.route()(lambda: 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncroute")]
    assert not list(Path(flow.app.instance_path).glob("*"))


def test_the_store_is_created_in_the_instance_folder(make_app: MakeApp) -> None:
    app = make_app()
    flow = Flow(app, AsyncRoute(app))
    flow.route()(lambda: 1)
    assert flow.result() == 1
    path = Path(app.instance_path) / "asyncroute.db"
    assert path.stat().st_mode & 0o777 == 0o600


def test_configuration_from_prefixed_env(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "STORE": "memory://",
        "ACCEPTED_STATUS": 200,
        "URL_PREFIX": "/api",
        "TASK_ID_IN": ["query"],
        "CANCELLABLE": False,
        "TIMEOUT": 2.5,
    }
    for name, value in values.items():
        monkeypatch.setenv(
            f"FLASK_ASYNCROUTE_{name}", value if isinstance(value, str) else json.dumps(value)
        )
    app = make_app()
    app.config.from_prefixed_env()
    async_routes = AsyncRoute(app)
    async_routes.route("/work", methods=["POST"])(lambda: 1)
    response = app.test_client().post("/work")
    assert response.status_code == 200
    assert response.headers["Location"].startswith("/api/task?Id=")
    assert response.get_json()["Cancellable"] is False


def test_admins_must_be_an_access_object(make_app: MakeApp) -> None:
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_ADMINS"):
        AsyncRoute(make_app(**MEMORY, ASYNCROUTE_ADMINS={"Roles": ["admin"]}))
    AsyncRoute(make_app(**MEMORY, ASYNCROUTE_ADMINS=Access(roles=("admin",))))


def test_503_while_the_store_cannot_be_opened(
    make_app: MakeApp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the configuration key. Requests succeed once the store can be opened."""
    blocker = tmp_path / "folder"
    blocker.write_text("a file, not a folder")
    app = make_app(ASYNCROUTE_STORE=f"sqlite:///{blocker}/tasks.db")
    flow = Flow(app, AsyncRoute(app))
    flow.route()(lambda: 1)
    for method, path in (
        ("POST", "/work"),
        ("GET", "/task/x"),
        ("DELETE", "/task/x"),
        ("GET", "/tasks"),
    ):
        response = flow.request(method, path)
        problem(response, 503, "store-unavailable")
        assert int(response.headers["Retry-After"]) > 0
    assert "ASYNCROUTE_STORE" in caplog.text
    blocker.unlink()
    assert flow.result() == 1


@pytest.mark.parametrize("processes", [False, True])
def test_a_memory_store_in_several_processes_is_logged_as_a_warning(
    make_app: MakeApp, processes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(**MEMORY)
    AsyncRoute(app)
    for _ in range(2):
        app.test_client().get("/tasks", environ_overrides={"wsgi.multiprocess": processes})
    warnings = [record for record in caplog.records if "memory://" in record.getMessage()]
    assert len(warnings) == (1 if processes else 0)


def test_apps_mounted_by_dispatcher_middleware(make_app: MakeApp) -> None:
    flows = []
    for name in ("one", "two"):
        app = make_app(name, **MEMORY)
        async_routes = AsyncRoute(app)
        async_routes.route("/work", methods=["POST"])(lambda: current_app.name)
        flows.append(Flow(app, async_routes))
    client = Client(DispatcherMiddleware(flows[0].app, {"/two": flows[1].app}))
    for mount, name in (("", "one"), ("/two", "two")):
        response = client.post(f"{mount}/work")
        assert response.headers["Location"].startswith(f"{mount}/task/")
        assert response.get_json()["Url"] == f"http://localhost{mount}/work"
        found = client.get(response.headers["Location"])
        assert found.status_code == 200 and found.get_json()["Url"].endswith("/work")
        assert flows[name == "two"].ended(response.get_json()["Id"])["Result"] == name


def test_error_handlers_of_the_app_do_not_replace_problem_responses(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.app.register_error_handler(404, lambda error: ("teapot", 418))
    flow.app.register_error_handler(Exception, lambda error: ("teapot", 418))
    assert flow.request("GET", "/nowhere").status_code == 418
    problem(flow.request("GET", "/task/x"), 404, "task-not-found")
    problem(flow.request("GET", "/tasks?limit=0"), 400, "invalid-query")


@pytest.mark.parametrize("executor", ["thread", "immediate"])
def test_garbage_collection_of_an_app_ends_its_threads_and_connections(
    tmp_path: Path, store_url: str, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a test suite that creates an app per test would accumulate threads."""
    closed: list[str] = []
    for store in (MemoryTaskStore, SQLTaskStore):
        monkeypatch.setattr(
            store, "close", lambda self, close=store.close: (close(self), closed.append(store_url))
        )
    before = set(threading.enumerate())

    def use_one() -> weakref.ref[Flask]:
        app = new_app("dropped", tmp_path, {"ASYNCROUTE_STORE": store_url})
        flow = Flow(app, AsyncRoute(app))
        flow.route(executor=executor)(lambda: 1)
        assert flow.result() == 1
        with app.app_context():
            flow.async_routes.wait(flow.start()["Id"], 5)
        return weakref.ref(app)

    dropped = use_one()
    assert any(
        thread.name.startswith("asyncroute") for thread in set(threading.enumerate()) - before
    )
    eventually_true(lambda: gc.collect() and dropped() is None)
    eventually_true(
        lambda: (
            not any(t.name.startswith("asyncroute") for t in set(threading.enumerate()) - before)
        )
    )
    eventually_true(lambda: closed == [store_url])


def test_an_app_is_kept_alive_while_its_task_runs(tmp_path: Path, gate: threading.Event) -> None:
    app = new_app("dropped", tmp_path, {"ASYNCROUTE_STORE": "memory://"})
    flow = Flow(app, AsyncRoute(app))
    ended = threading.Event()

    @flow.route()
    def work() -> None:
        gate.wait(10)
        assert current_app.name == "dropped"
        ended.set()

    flow.became(flow.start(), "Running")
    reference = weakref.ref(app)
    del app, flow, work
    gc.collect()
    gate.set()
    assert ended.wait(5)
    eventually_true(lambda: gc.collect() and reference() is None)
