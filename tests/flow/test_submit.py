"""Tasks that the app's own code starts: ``async_routes.submit``."""

from __future__ import annotations

import functools
import io
import logging
import math
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, current_app, g, request, session, url_for

from flask_asyncroute import (
    Access,
    AsyncRoute,
    BodyTooLarge,
    Callback,
    CallbackRefused,
    CannotStart,
    ConfigurationError,
    Permission,
    QueueFull,
    ShuttingDown,
    TooManyTasks,
    current_task,
    task_aborted,
    task_completed,
    task_created,
    task_started,
)
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.testing import inline
from tests.support.flow import IN_MEMORY, Flow

MakeFlow = Callable[..., Flow]
Eventually = Callable[..., Any]
LATE_US = 10_000_000
"""Allowed delay of a start, because the machine can be busy."""


def submit(flow: Flow, endpoint: str = "work", *values: Any, **options: Any) -> Any:
    """Start a task outside a request, in a process that takes tasks."""
    flow.async_routes.start(flow.app)
    with flow.app.app_context():
        return flow.async_routes.submit(endpoint, *values, **options)


def ended(flow: Flow, task: Any) -> Any:
    with flow.app.app_context():
        return flow.async_routes.wait(task.id, 20)


def result(flow: Flow, *values: Any, **options: Any) -> Any:
    task = ended(flow, submit(flow, "work", *values, **options))
    assert task.state == "Completed", task.error
    return task.result


def test_the_view_sees_a_request_that_the_parameters_describe(flow: Flow) -> None:
    @flow.route("/reports/<int:year>/<path:name>", methods=["PUT"])
    def work(year: int, name: str) -> Any:
        return {
            "method": request.method, "url": request.url, "args": request.args.to_dict(False),
            "json": request.json, "header": request.headers["X-Kind"], "year": year, "name": name,
            "view_args": request.view_args, "endpoint": request.endpoint,
            "url_for": url_for("work", year=1, name="n"), "session": dict(session),
            "app": current_app.name, "cookies": request.cookies,
        }  # fmt: skip

    assert result(
        flow, {"year": 2026, "name": "a b/ü"}, query={"q": ["x", "ä&"]}, json={"n": [1, None]},
        headers={"X-Kind": "nightly", "Cookie": "c=1"},
    ) == {
        "method": "PUT",
        "url": "http://localhost/reports/2026/a%20b/ü?q=x&q=ä%26",
        "args": {"q": ["x", "ä&"]},
        "json": {"n": [1, None]},
        "header": "nightly",
        "year": 2026,
        "name": "a b/ü",
        "view_args": {"year": 2026, "name": "a b/ü"},
        "endpoint": "work",
        "url_for": "/reports/1/n",
        "session": {},
        "app": "app",
        "cookies": {"c": "1"},
    }  # fmt: skip


@IN_MEMORY
@pytest.mark.parametrize("name", ["a b", "ü?#%", "%2F", "a/b", "x%20y", "<&\"'>", "\U0001f600"])
def test_url_variables_can_have_any_characters(flow: Flow, name: str) -> None:
    @flow.route("/r/<path:name>")
    def work(name: str) -> Any:
        return name

    assert result(flow, {"name": name}) == name


@IN_MEMORY
def test_a_form_with_files_is_sent(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        file = request.files["f"]
        return [request.form["n"], file.filename, file.mimetype, file.read().decode()]

    data = {"n": "ü", "f": (io.BytesIO(b"a,b"), "t.csv", "text/csv")}
    assert result(flow, data=data) == ["ü", "t.csv", "text/csv", "a,b"]


@IN_MEMORY
@pytest.mark.parametrize("data", ["ü", "ü".encode(), io.BytesIO("ü".encode())])
def test_a_body_can_be_a_string_bytes_or_a_file(flow: Flow, data: Any) -> None:
    @flow.route()
    def work() -> Any:
        return [request.get_data(as_text=True), request.content_type]

    assert result(flow, data=data, headers={"Content-Type": "text/plain"}) == ["ü", "text/plain"]


def test_a_large_body_is_stored_with_the_task(flow: Flow) -> None:
    @flow.route()
    def work() -> Any:
        return len(request.get_data())

    assert result(flow, data=b"x" * 700_000) == 700_000


def test_the_host_scheme_and_root_come_from_the_configuration(make_flow: MakeFlow) -> None:
    flow = make_flow(
        SERVER_NAME="example.com:8443", APPLICATION_ROOT="/shop", PREFERRED_URL_SCHEME="https"
    )

    @flow.route("/r/<name>")
    def work(name: str) -> Any:
        return [request.url, request.script_root, url_for("work", name="x", _external=True)]

    url = "https://example.com:8443/shop/r/a"
    assert result(flow, {"name": "a"}) == [url, "/shop", "https://example.com:8443/shop/r/x"]
    task = submit(flow, "work", {"name": "b"})
    assert (task.url, task.method) == ("https://example.com:8443/shop/r/b", "POST")


def test_the_rule_that_fits_the_values_is_used(make_flow: MakeFlow) -> None:
    flow = make_flow()

    def work(year: int | None) -> Any:
        return [request.path, year]

    app = flow.app
    app.add_url_rule("/of/<int:year>", "other", flow.async_routes.task(work), methods=["PUT"])
    app.add_url_rule("/all", "other", defaults={"year": None}, methods=["POST"])
    flow.async_routes.start(app)
    with app.app_context():
        task = flow.async_routes.submit("other", {"year": 5})
        assert flow.async_routes.wait(task.id, 20).result == ["/of/5", 5]
        task = flow.async_routes.submit("other", method="POST")
        assert flow.async_routes.wait(task.id, 20).result == ["/all", None]


@IN_MEMORY
def test_url_processors_run_and_leave_the_callers_g_alone(flow: Flow) -> None:
    @flow.app.url_value_preprocessor
    def take_language(endpoint: str | None, values: dict[str, Any] | None) -> None:
        g.language = (values or {}).pop("language", None)

    @flow.route("/<language>/work/<int:n>")
    def work(n: int) -> Any:
        return [g.language, n]

    flow.async_routes.start(flow.app)
    with flow.app.app_context():
        g.language = "en"
        task = flow.async_routes.submit("work", {"language": "de", "n": 5})
        assert g.language == "en"
        assert flow.async_routes.wait(task.id, 20).result == ["de", 5]


def test_hooks_the_loader_and_permission_functions_do_not_run(make_flow: MakeFlow) -> None:
    flow = make_flow()
    called = []

    def note(name: str) -> Any:
        called.append(name)

    @flow.route(permission=lambda: note("permission"), decorators=[_decorator(called)])
    def work() -> Any:
        return current_task.user

    app = flow.app
    for hook in (app.before_request, app.teardown_request, app.teardown_appcontext):
        hook(lambda *error: note("hook"))
    app.after_request(lambda response: note("hook") or response)
    flow.async_routes.identity_loader(lambda: note("loader"))
    flow.async_routes.start(app)
    with app.app_context():
        task = flow.async_routes.submit("work", user=5)
        assert called == []
        assert flow.async_routes.wait(task.id, 20).result == "5"


def _decorator(called: list[str]) -> Any:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def call(**arguments: Any) -> Any:
            called.append("decorator")
            return function(**arguments)

        return call

    return decorate


@IN_MEMORY
@pytest.mark.parametrize(
    ("user", "name"),
    [
        ("anna", "anna"),
        (7, "7"),
        (uuid.UUID(int=5), str(uuid.UUID(int=5))),
        (Decimal("1.5"), "1.5"),
        ({"id": 8, "groups": ["g"]}, "8"),
        (SimpleNamespace(id="ben", groups=()), "ben"),
        (None, None),
    ],
)
def test_the_user_owns_the_task(flow: Flow, user: Any, name: str | None) -> None:
    @flow.route()
    def work() -> Any:
        return current_task.user

    task = submit(flow, user=user)
    assert task.user == name
    assert ended(flow, task).result == name


@IN_MEMORY
@pytest.mark.parametrize("user", ["", b"x", True, {}, SimpleNamespace(id=None), "x" * 256, "a\0"])
def test_an_invalid_user_is_refused(flow: Flow, user: Any) -> None:
    @flow.route()
    def work() -> None: ...

    with pytest.raises(ValueError, match="user id"):
        submit(flow, user=user)
    with pytest.raises(CannotStart, match="groups"):
        submit(flow, user={"id": 1, "groups": 5})


@pytest.mark.covers("A25")
def test_a_permission_without_an_owner_is_not_anonymous(
    make_flow: MakeFlow, store_url: str
) -> None:
    """In debug and testing mode, lists contain anonymous tasks."""
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_ADMINS=Access(roles=("admin",)))

    @flow.route(permission=Permission(read=Access(groups=("g",)), write=Access(users=("wanda",))))
    def work() -> Any:
        return 1

    task = submit(flow)
    assert ended(flow, task).user is None
    for name, get, stop in (
        (None, 404, 404), ("ben", 404, 404), ("ben; groups=g", 200, 403), ("wanda", 200, 410),
        ("root; roles=admin", 200, 410),
    ):  # fmt: skip
        flow.headers = {} if name is None else {"X-User": name}
        document = flow.get(task.id, status=get)
        flow.stop(task.id, status=stop)
        assert flow.ids() == ([task.id] if get == 200 else [])
        assert flow.ids("State=Completed") == ([task.id] if get == 200 else [])
        assert flow.ids("State=Running") == []
    assert "User" not in document
    assert document["Permission"]["Read"]["Groups"] == ["g"]
    assert document["Permission"]["Write"]["Users"] == ["wanda"]


def test_a_permission_and_a_user(flow: Flow) -> None:
    @flow.route(permission=Permission(read=Access(groups=("g",))))
    def work() -> None: ...

    task = submit(flow, user="anna")
    flow.start(status=401)
    for name, status in (("anna", 200), ("ben; groups=g", 200), ("ben", 404), (None, 404)):
        flow.headers = {} if name is None else {"X-User": name}
        flow.get(task.id, status=status)
        assert flow.ids() == ([task.id] if status == 200 else [])


def test_a_task_with_neither_user_nor_permission_is_anonymous(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    task = submit(flow)
    assert "Permission" not in flow.get(task.id)
    assert flow.ids() == [task.id]


def test_the_events_of_an_owner_less_task_follow_its_permission(flow: Flow) -> None:
    @flow.route(permission=Permission(read=Access(groups=("g",))))
    def work() -> None: ...

    task = submit(flow)
    ended(flow, task)
    assert flow.request("GET", f"/task/{task.id}/events").status_code == 404
    flow.headers = {"X-User": "ben; groups=g"}
    body = flow.request("GET", f"/task/{task.id}/events").get_data(as_text=True)
    assert "task.completed" in body


def test_the_quota_of_a_user_counts(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow(ASYNCROUTE_MAX_TASKS_PER_USER=1)

    @flow.route()
    def work() -> None:
        gate.wait(20)

    submit(flow, user="anna")
    with pytest.raises(TooManyTasks):
        submit(flow, user="anna")
    submit(flow)
    submit(flow, user="ben")


def test_a_unique_task_is_returned_again(flow: Flow, gate: threading.Event) -> None:
    @flow.route("/work/<int:n>", unique=True)
    def work(n: int) -> None:
        gate.wait(20)

    first = submit(flow, "work", {"n": 1})
    assert submit(flow, "work", {"n": 1}, user="anna").id == first.id
    assert submit(flow, "work", {"n": 2}).id != first.id
    gate.set()
    ended(flow, first)
    assert submit(flow, "work", {"n": 1}).id != first.id


def test_a_unique_function_is_called_in_the_built_request(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(unique=lambda: request.json["k"])
    def work() -> Any:
        gate.wait(20)
        return request.json

    first = submit(flow, json={"k": "a"})
    assert submit(flow, json={"k": "a", "more": 1}).id == first.id
    gate.set()
    assert ended(flow, first).result == {"k": "a"}


@pytest.mark.covers("A25")
@IN_MEMORY
def test_a_client_does_not_learn_the_id_of_an_owner_less_task_with_a_permission(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(unique=True, permission=Permission(read=Access(groups=("g",))))
    def work() -> None:
        gate.wait(20)

    task = submit(flow)
    assert "Id" not in flow.start(status=409, headers={"X-User": "ben"})
    assert flow.start(headers={"X-User": "ben; groups=g"})["Id"] == task.id


@pytest.mark.parametrize(
    "delay",
    [0.8, timedelta(seconds=0.8), lambda: datetime.now(UTC) + timedelta(seconds=0.8)],
)
def test_a_task_does_not_begin_before_its_start_time(flow: Flow, delay: Any) -> None:
    @flow.route(start_timeout=30)
    def work() -> None: ...

    assert ended(flow, submit(flow)).state == "Completed"  # the store is open now
    task = submit(flow, start_at=delay() if callable(delay) else delay)
    assert task.start_at_us is not None and task.start_by_us == task.start_at_us + 30_000_000
    done = ended(flow, task)
    assert task.start_at_us <= done.started_us <= task.start_at_us + LATE_US
    assert done.next_attempt_time is None


def test_a_start_time_in_the_past_is_now(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    assert ended(flow, submit(flow, start_at=datetime(2000, 1, 1, tzinfo=UTC))).state == "Completed"


def test_a_task_can_be_stopped_before_its_start_time(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    task = submit(flow, start_at=3600)
    assert flow.stop(task.id)["State"] == "Aborted"


def test_an_own_executor_waits_for_the_start_time(make_flow: MakeFlow, own_pool: Any) -> None:
    flow = make_flow()

    @flow.route(executor=own_pool)
    def work() -> None: ...

    task = submit(flow, start_at=0.2)
    assert ended(flow, task).started_us >= task.start_at_us


def test_an_immediate_task_has_no_start_time(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route(executor="immediate")
    def work() -> Any:
        return 1

    assert submit(flow).result == 1
    with pytest.raises(ConfigurationError, match="start_at"):
        submit(flow, start_at=5)


@IN_MEMORY
@pytest.mark.parametrize(
    ("start_at", "error"),
    [
        (datetime(2030, 1, 1), ValueError), (-1, ValueError), (timedelta(-1), ValueError),
        (math.nan, ValueError), (math.inf, ValueError), ("5", TypeError), (True, TypeError),
    ],
)  # fmt: skip
def test_an_invalid_start_time_is_refused(
    flow: Flow, start_at: Any, error: type[Exception]
) -> None:
    @flow.route()
    def work() -> None: ...

    with pytest.raises(error, match="start_at"):
        submit(flow, start_at=start_at)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("nothing",), {}, ConfigurationError, "no async route.*'several'"),
        (("plain",), {}, ConfigurationError, "no async route"),
        (("asyncroute.get",), {"values": {"task_id": "x"}}, ConfigurationError, "no async route"),
        (("several",), {}, ValueError, "GET, PUT"),
        (("several",), {"method": "POST"}, ValueError, "no method POST.*GET, PUT"),
        (("several",), {"method": "HEAD"}, ValueError, "no method HEAD"),
        (("work",), {}, ValueError, "URL cannot be built.*year"),
        (("work", {"year": "x"}), {}, ValueError, "URL cannot be built"),
        (("work", {"year": -1}), {}, ConfigurationError, "does not route"),
        (("work", {"year": 1, "month": 2}), {}, ValueError, "no variable 'month'.*year"),
        (("work", {"year": 1}), {"json": 1, "data": b"x"}, TypeError, "not both"),
        (("work", {"year": 1}), {"json": {1, 2}}, TypeError, "json cannot be encoded"),
        (("work", {"year": 1}), {"data": b"x" * 1001}, BodyTooLarge, "ASYNCROUTE_MAX_BODY"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_and_stores_nothing(
    make_flow: MakeFlow, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    flow = make_flow(ASYNCROUTE_MAX_BODY=1000)
    flow.app.add_url_rule("/plain", "plain", lambda: "")

    @flow.route("/several", methods=["GET", "PUT"])
    def several() -> None: ...

    @flow.route("/work/<int:year>")
    def work(year: int) -> None: ...

    with pytest.raises(error, match=f"(?s){message}"):
        submit(flow, *arguments, **options)
    with flow.app.app_context():
        assert list(flow.async_routes.query()) == []


def test_a_host_that_the_app_does_not_trust_is_refused(make_flow: MakeFlow) -> None:
    flow = make_flow(TRUSTED_HOSTS=["example.com"])

    @flow.route()
    def work() -> None: ...

    with pytest.raises(ConfigurationError, match="TRUSTED_HOSTS"):
        submit(flow)


def test_a_url_of_another_endpoint_is_refused(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.app.add_url_rule("/work/all", "all", lambda: "", methods=["POST"])

    @flow.route("/work/<name>")
    def work(name: str) -> None: ...

    with pytest.raises(ConfigurationError, match="'all'"):
        submit(flow, "work", {"name": "all"})


def test_submit_needs_an_app_context(make_flow: MakeFlow) -> None:
    with pytest.raises(RuntimeError, match="application context"):
        make_flow().async_routes.submit("work")


def test_a_full_queue_refuses_and_stores_nothing(
    flow: Flow, gate: threading.Event, eventually: Eventually
) -> None:
    @flow.route(max_workers=1, queue_size=1)
    def work() -> None:
        gate.wait(20)

    first, second = submit(flow), submit(flow)
    with pytest.raises(QueueFull) as caught:
        submit(flow)
    assert caught.value.status == 503 and caught.value.retry_after
    assert submit(flow, start_at=60).state == "NotStarted", "it takes no slot yet"
    with flow.app.app_context():
        assert len(list(flow.async_routes.query())) == 3
    gate.set()
    assert ended(flow, first).state == ended(flow, second).state == "Completed"


@IN_MEMORY
def test_a_process_that_shuts_down_starts_nothing(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    submit(flow)
    runtime_of(flow.app).runner.dispatcher.is_closing = True
    for options in ({}, {"start_at": 60}):
        with pytest.raises(ShuttingDown):
            submit(flow, **options)


@pytest.mark.parametrize("options", [{}, {"start_at": 0.01}], ids=["at-once", "later"])
def test_a_task_submitted_during_a_shutdown_is_left_to_other_processes(
    make_flow: MakeFlow, options: dict[str, float]
) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")

    @flow.route()
    def work() -> None: ...

    @flow.route("/at-once", executor="immediate")
    def immediate() -> None: ...

    ended(flow, submit(flow))
    dispatcher = runtime_of(flow.app).runner.dispatcher
    dispatcher.is_closing = True
    task = submit(flow, **options)
    assert task.state == "NotStarted" and task.owner is None
    assert not dispatcher.executor_of(dispatcher.routes["work"]).holds(task.id)
    with pytest.raises(ShuttingDown):
        submit(flow, "immediate")
    dispatcher.is_closing = False  # as in another process
    assert ended(flow, task).state == "Completed"


def test_a_running_task_can_submit_another_during_a_shutdown(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")

    has_begun = threading.Event()

    @flow.route()
    def work() -> str:
        has_begun.set()
        gate.wait(20)
        return flow.async_routes.submit("other").id

    @flow.route("/other")
    def other() -> None: ...

    task = submit(flow)
    assert has_begun.wait(20)
    dispatcher = runtime_of(flow.app).runner.dispatcher
    dispatcher.is_closing = True
    gate.set()
    first = ended(flow, task)
    assert first.state == "Completed", first.error
    dispatcher.is_closing = False
    with flow.app.app_context():
        assert flow.async_routes.wait(first.result, 20).state == "Completed"


def test_the_signals_of_a_submitted_task(
    flow: Flow, hear: Callable[..., Any], eventually: Eventually
) -> None:
    @flow.route()
    def work() -> None: ...

    received = hear(task_created, task_started, task_completed, sender=flow.app)
    task = submit(flow)
    eventually(lambda: len(received) == 3)
    assert [(name, one.id) for name, one in received] == [
        ("task-created", task.id), ("task-started", task.id), ("task-completed", task.id),
    ]  # fmt: skip


def test_a_callback_can_read_the_built_request(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["localhost"])

    @flow.route(callback=Callback())
    def work() -> None: ...

    task = submit(flow, json={"callbackUrl": "http://localhost:9/x"}, start_at=60)
    assert task.callback is not None and task.callback.url == "http://localhost:9/x"
    assert submit(flow, start_at=60).callback is None
    with pytest.raises(CallbackRefused):
        submit(flow, json={"callbackUrl": "http://10.0.0.1/"})


def test_a_task_passes_its_callback_depth_on(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route("/outer")
    def outer() -> Any:
        return flow.async_routes.submit("inner", headers={"X-A": "b"}).id

    @flow.route("/inner")
    def inner() -> Any:
        return [request.headers.get("Asyncroute-Depth"), request.headers["X-A"]]

    @flow.app.post("/plain")
    def plain() -> Any:
        return flow.async_routes.submit("inner", headers={"X-A": "b"}).id

    for headers, depth in (({"Asyncroute-Depth": "2"}, "2"), ({}, None)):
        inner_id = flow.result("/outer", headers=headers)
        assert flow.ended(inner_id)["Result"] == [depth, "b"]
    found = flow.request("POST", "/plain", headers={"Asyncroute-Depth": "2"})
    assert flow.ended(found.get_data(as_text=True))["Result"] == [None, "b"]


def test_a_task_submits_another_and_waits_for_it(flow: Flow) -> None:
    @flow.route("/outer/<int:n>")
    def outer(n: int) -> Any:
        request.get_data()
        task = flow.async_routes.submit("inner", {"n": n + 1}, user=current_task.user)
        return [flow.async_routes.wait(task.id, 20).result, request.path, current_task.id]

    @flow.route("/inner/<int:n>")
    def inner(n: int) -> Any:
        return [n, request.path, current_task.user]

    flow.headers = {"X-User": "anna"}
    task = flow.run("/outer/1")
    assert task["Result"] == [[2, "/inner/2", "anna"], "/outer/1", task["Id"]]


def test_a_plain_view_submits_a_task(flow: Flow) -> None:
    @flow.route("/work")
    def work() -> Any:
        return [request.path, request.args.get("a")]

    @flow.app.get("/plain")
    def plain() -> Any:
        g.name, session["key"] = "mine", 1
        task = flow.async_routes.submit("work", query="a=1")
        assert (g.name, session["key"], request.path) == ("mine", 1, "/plain")
        return task.id

    found = flow.request("GET", "/plain")
    assert flow.ended(found.get_data(as_text=True))["Result"] == ["/work", "1"]


def test_a_process_that_is_no_runner_only_stores_the_task(
    make_flow: MakeFlow, postgresql_url: str, tmp_path: Any, eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for store in ("sqlite:///asyncroute.db", postgresql_url):
        flow = make_flow(ASYNCROUTE_STORE=store)

        @flow.route(queue_size=0, max_workers=1)
        def work() -> Any:
            return 1

        with flow.app.app_context():
            tasks = [flow.async_routes.submit("work") for _ in range(3)]
            runner = runtime_of(flow.app).runner
            assert runner.executors == [] and not runner.maintenance.is_running
            assert [task.state for task in flow.async_routes.query()] == ["NotStarted"] * 3
        flow.async_routes.start(flow.app)
        assert [ended(flow, task).state for task in tasks] == ["Completed"] * 3


def test_bound_tasks_run_in_a_process_that_is_no_runner(
    make_flow: MakeFlow, own_pool: ThreadPoolExecutor
) -> None:
    flow = make_flow(ASYNCROUTE_STORE="sqlite:///asyncroute.db")

    @flow.route("/own", executor=own_pool)
    def own() -> Any:
        return 1

    @flow.route("/at-once", executor="immediate")
    def at_once() -> Any:
        return 2

    with flow.app.app_context():
        assert flow.async_routes.wait(flow.async_routes.submit("own").id, 20).result == 1
        assert flow.async_routes.submit("at_once").result == 2


def test_inline_runs_the_task_at_once_and_ignores_its_start_time(make_app: Any) -> None:
    app = make_app()
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["POST"])
    def work() -> Any:
        return request.json

    with inline(app), app.app_context():
        task = async_routes.submit("work", json=[1], start_at=3600)
        assert (task.state, task.result) == ("Completed", [1])


@IN_MEMORY
def test_a_receiver_can_submit_the_next_task(
    flow: Flow, listen: Callable[..., None], eventually: Eventually
) -> None:
    @flow.route("/first")
    def first() -> None: ...

    @flow.route("/second/<task_id>")
    def second(task_id: str) -> Any:
        return task_id

    started = []

    def chain(app: Flask, task: Any, **extra: Any) -> None:
        if task.endpoint == "first":
            started.append(flow.async_routes.submit("second", {"task_id": task.id}))

    listen(chain, task_completed, sender=flow.app)
    task = submit(flow, "first")
    eventually(lambda: started)
    assert ended(flow, started[0]).result == task.id


@IN_MEMORY
def test_a_stop_ends_a_submitted_task(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore, hear: Callable[..., Any],
    eventually: Eventually, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    @flow.route()
    def work() -> None:
        begun.release()
        current_task.sleep(20)

    caplog.set_level(logging.ERROR)
    received = hear(task_aborted, sender=flow.app)
    task = submit(flow)
    assert begun.acquire(timeout=20)
    with flow.app.app_context():
        assert flow.async_routes.stop(task.id).state == "Aborted"
    eventually(lambda: received)
