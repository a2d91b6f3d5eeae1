"""The Python API: get, exists, query, stop, wait, shared state, and helpers for tests."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import (
    AsyncRoute,
    AsyncRouteError,
    AsyncRouteTask,
    ConfigurationError,
    InvalidQuery,
    NoCurrentTask,
    NotCancellable,
    Permission,
    State,
    TaskAborted,
    TaskFinished,
    TaskNotFound,
    current_task,
)
from flask_asyncroute.testing import fake_task, inline
from tests.support.flow import IN_MEMORY, Flow

MakeFlow = Callable[..., Flow]
MakeApp = Callable[..., Flask]


@pytest.fixture
def context(flow: Flow) -> Iterator[AsyncRoute]:
    """Return the extension within an app context."""
    with flow.app.app_context():
        yield flow.async_routes


# -- tasks
# -----------------------------------------------------------------------------------------------------------------


def test_get_returns_a_frozen_record(flow: Flow, context: AsyncRoute) -> None:
    flow.route(permission=Permission(), timeout=50, endpoint="work")(lambda: {"a": [1, None]})
    task = flow.start(headers={"X-User": "anna"})
    record = context.wait(task["Id"], 5)
    assert isinstance(record, AsyncRouteTask)
    assert context.get(task["Id"]) == record
    assert context.exists(task["Id"]) and not context.exists("x") and context.get("x") is None
    assert record.id == task["Id"]
    assert record.state is State.COMPLETED and record.is_completed
    assert (record.user, record.method, record.url) == ("anna", "POST", "http://localhost/work")
    assert record.result == {"a": [1, None]}
    assert record.error is None and record.progress is None and not record.stopping
    times = [record.creation_time, record.starting_time, record.completed_time, record.expire_time]
    assert all(isinstance(moment, datetime) and moment.tzinfo is UTC for moment in times)
    assert record.expire_time == (record.starting_time or datetime.now(UTC)) + timedelta(seconds=50)
    assert record.permission is not None and record.permission.read.users == ("anna",)
    with pytest.raises(AttributeError):
        record.state = State.FAILED  # type: ignore[misc]
    assert record.to_dict() == flow.get(task, headers={"X-User": "anna"})


def test_the_python_api_checks_no_permission(
    flow: Flow, context: AsyncRoute, gate: threading.Event
) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start(headers={"X-User": "anna"})
    flow.get(task, status=404)
    assert context.exists(task["Id"])
    assert [record.id for record in context.query()] == [task["Id"]]
    assert context.stop(task["Id"]).state is State.ABORTED
    gate.set()


def test_the_python_api_needs_an_app_context(make_flow: MakeFlow) -> None:
    async_routes = make_flow().async_routes
    uses: list[Callable[[], Any]] = [
        lambda: async_routes.get("x"), lambda: async_routes.exists("x"), async_routes.query, lambda: async_routes.stop("x"),
        lambda: async_routes.wait("x", 1), lambda: async_routes.state["x"], lambda: async_routes.state.get("x"),
        lambda: async_routes.state.update(x=1), lambda: "x" in async_routes.state, lambda: list(async_routes.state), lambda: len(async_routes.state),
        lambda: async_routes.state.apply("x", len),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(RuntimeError, match="application context"):
            use()


def test_stop_aborts_a_task_or_raises(
    flow: Flow, context: AsyncRoute, begun: threading.Semaphore, gate: threading.Event
) -> None:
    @flow.route("/slow", cancellable=True)
    def slow() -> None:
        begun.release()
        gate.wait(10)

    @flow.route("/not_cancellable", cancellable=False)
    def not_cancellable() -> None:
        begun.release()
        gate.wait(10)

    flow.route("/quick", endpoint="quick")(lambda: 1)
    flow.route("/bad", endpoint="bad")(lambda: 1 / 0)
    with pytest.raises(TaskNotFound, match="no task with this id"):
        context.stop("x")
    for path in ("/quick", "/bad"):
        with pytest.raises(TaskFinished, match="has ended"):
            context.stop(flow.run(path)["Id"])
    running, other = flow.start("/slow"), flow.start("/not_cancellable")
    assert begun.acquire(timeout=5) and begun.acquire(timeout=5)
    with pytest.raises(NotCancellable):
        context.stop(other["Id"])
    stopped = context.stop(running["Id"])
    assert (stopped.state, stopped.stopping, stopped.error) == (
        State.ABORTED,
        True,
        "Aborted by the user",
    )
    assert context.stop(running["Id"]) == stopped
    for error in (TaskNotFound, TaskFinished, NotCancellable, InvalidQuery, ConfigurationError):
        assert issubclass(error, AsyncRouteError)
    assert issubclass(TaskNotFound, LookupError)
    gate.set()


def test_wait_returns_the_finished_task_or_raises(
    flow: Flow, context: AsyncRoute, gate: threading.Event
) -> None:
    @flow.route()
    def work() -> int:
        gate.wait(10)
        return 5

    task = flow.start()
    for timeout in (0, 0.05, timedelta(milliseconds=50)):
        with pytest.raises(TimeoutError, match=f"{task['Id']} has not ended.*(Running|NotStarted)"):
            context.wait(task["Id"], timeout)
    threading.Timer(0.05, gate.set).start()
    assert context.wait(task["Id"], 5).result == 5
    assert context.wait(task["Id"]).result == 5
    assert context.wait(task["Id"], 0).result == 5
    with pytest.raises(TaskNotFound):
        context.wait("x", 5)


@IN_MEMORY
@pytest.mark.parametrize("timeout", [-1, "5", True, math.nan, [], timedelta(seconds=-1)], ids=repr)
def test_wait_with_an_invalid_timeout_raises(context: AsyncRoute, timeout: Any) -> None:
    with pytest.raises((ConfigurationError, ValueError, TypeError), match="timeout"):
        context.wait("x", timeout)


def test_wait_ends_if_the_task_is_stopped(
    flow: Flow, context: AsyncRoute, gate: threading.Event
) -> None:
    @flow.route(max_workers=1)
    def work() -> None:
        gate.wait(10)

    running, waiting = flow.start(), flow.start()
    ended: list[Any] = []

    def wait() -> None:
        with flow.app.app_context():
            ended.append(flow.async_routes.wait(waiting["Id"], 5))

    waiter = threading.Thread(target=wait)
    waiter.start()
    flow.stop(waiting)
    waiter.join(5)
    assert ended[0].state is State.ABORTED
    gate.set()
    context.wait(running["Id"], 5)


def test_several_threads_wait_for_one_task(flow: Flow, gate: threading.Event) -> None:
    @flow.route()
    def work() -> int:
        gate.wait(10)
        return 5

    task = flow.start()
    results: list[Any] = []

    def wait() -> None:
        with flow.app.app_context():
            results.append(flow.async_routes.wait(task["Id"], 5).result)

    waiters = [threading.Thread(target=wait) for _ in range(10)]
    for waiter in waiters:
        waiter.start()
    gate.set()
    for waiter in waiters:
        waiter.join(5)
    assert results == [5] * 10


def test_query_returns_matching_tasks(flow: Flow, context: AsyncRoute) -> None:
    flow.route("/<int:n>", endpoint="work")(lambda n: 1 / n)
    for n in (1, 0, 2):
        context.wait(flow.start(f"/{n}", headers={"X-User": f"u{n}"})["Id"], 5)
    assert [record.user for record in context.query()] == ["u2", "u0", "u1"]
    assert [record.user for record in context.query({})] == ["u2", "u0", "u1"]
    assert [
        record.user for record in context.query({"State": {"op": "EQ", "value": "Failed"}})
    ] == ["u0"]
    assert [
        record.user
        for record in context.query(
            {"State": {"value": State.COMPLETED}, "user": {"op": "ne", "value": "u2"}}
        )
    ] == ["u1"]
    middle = list(context.query())[1].creation_time
    both = {"CreationTime": [{"op": "GE", "value": middle}, {"op": "LE", "value": middle}]}
    assert [record.user for record in context.query(both)] == ["u0"]
    assert (
        list(context.query({"Error": {"op": "LIKE", "value": "zero"}}))[0].error
        == "ZeroDivisionError: division by zero"
    )


def test_a_query_reads_several_pages_after_its_context_has_ended(flow: Flow) -> None:
    flow.route(queue_size=2000, executor="immediate", endpoint="work")(lambda: 1)
    ids = [flow.start()["Id"] for _ in range(450)]
    with flow.app.app_context():
        found = flow.async_routes.query()
    assert [record.id for record in found] == ids[::-1]


def test_a_query_by_keywords_and_values(flow: Flow, context: AsyncRoute) -> None:
    flow.route("/<int:n>", endpoint="work")(lambda n: 1 / n)
    flow.route("/kept", endpoint="kept", cancellable=False)(lambda: 1)
    for path, user in (("/1", "anna"), ("/0", "ben"), ("/2", "anna"), ("/kept", "ben")):
        context.wait(flow.start(path, headers={"X-User": user})["Id"], 5)

    def found(*conditions: Any, **fields: Any) -> list[str]:
        return [
            record.url[len("http://localhost") :] for record in context.query(*conditions, **fields)
        ]

    assert found(State="Failed") == found(State=State.FAILED) == found(state="failed") == ["/0"]
    assert found(User="anna") == found({"User": "anna"}) == ["/2", "/1"]
    assert found(User="ben", State=State.COMPLETED) == ["/kept"]
    assert found(Cancellable=False) == found({"Cancellable": False}) == ["/kept"]
    assert found(IsCompleted=True, User={"op": "NE", "value": "anna"}) == ["/kept", "/0"]
    assert found({"User": "ben"}, Cancellable=True) == ["/0"]
    assert found({"User": {"op": "LIKE", "value": "B*"}}, State="Completed") == ["/kept"]
    assert found(Url=[{"op": "LIKE", "value": "/*"}, {"op": "NE", "value": "http://localhost/0"}]) == [
        "/kept", "/2", "/1",
    ]  # fmt: skip
    assert found(User=["anna", {"op": "LIKE", "value": "a"}]) == ["/2", "/1"]
    failed = next(context.query(State="Failed"))
    assert found(CreationTime=failed.creation_time) == ["/0"]
    naive = failed.creation_time.replace(tzinfo=None)
    assert found(CreationTime=naive) == found(CreationTime=naive.isoformat()) == ["/0"]
    elsewhere = failed.creation_time.astimezone(timezone(timedelta(hours=5)))
    assert found(CreationTime={"op": "GT", "value": elsewhere}) == ["/kept", "/2"]
    assert found() == found(None) == found({}) == ["/kept", "/2", "/0", "/1"]
    assert list(context.query(conditions={"User": "anna"}, State="Failed")) == []


@IN_MEMORY
@pytest.mark.parametrize(
    ("conditions", "fields", "message"),
    [
        ({"State": "Failed"}, {"State": "Failed"}, "'State' is both in the mapping and a keyword argument. Put all .* one list"),
        ({"state": {"value": "Failed"}}, {"STATE": "Failed"}, "'STATE' is both in the mapping and a keyword argument"),
        ({}, {"State": "Failed", "state": "Failed"}, "'state' occurs twice"),
        ({}, {"Colour": "red"}, "'Colour' is not a field. The fields are Id, "),
        ({}, {"State": ["Failed", "Aborted"]}, r"State: .* no task matches two values; call query\(\) once for each value"),
        ({"User": ["anna", "anna"]}, {}, "User: .* no task matches two values"),
        ({}, {"State": []}, "State: the list of conditions is empty; omit the field"),
        ({}, {"State": "Sleeping"}, "State: 'Sleeping' is invalid; use one of NotStarted"),
        ({}, {"Cancellable": "yes"}, "Cancellable: the string 'yes' is invalid; use true or false"),
        ({}, {"Cancellable": 1}, "Cancellable: a number is invalid; use true or false"),
        ({}, {"User": None}, "User: null is invalid; use a string"),
        ({}, {"User": 5}, "User: a number is invalid; use a string"),
        ({}, {"User": {"anna"}}, "User: a Python set is invalid; use a string"),
        ({}, {"User": {"op": "EQ"}}, 'User: a condition must be an object with "value"'),
        ({}, {"CreationTime": "today"}, "CreationTime: 'today' is invalid; use an RFC 3339 time"),
        ([], {}, "A query must be an object of conditions"),
        ("", {"State": "Failed"}, "A query must be an object of conditions"),
    ],
)  # fmt: skip
def test_an_invalid_keyword_or_value_raises_at_the_call(
    context: AsyncRoute, conditions: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidQuery, match=message):
        context.query(conditions, **fields)


@IN_MEMORY
def test_a_value_without_an_object_is_refused_over_http(flow: Flow) -> None:
    response = flow.request("POST", "/tasks/query", json={"State": "Failed"})
    assert response.status_code == 400
    assert 'State: a condition must be an object with "value"' in response.get_json()["detail"]


@IN_MEMORY
@pytest.mark.parametrize(
    "conditions",
    [{"Colour": {"value": 1}}, {"State": ["Failed", "Aborted"]}, {"State": {"op": "IS", "value": "x"}}, {"Progress": {"value": True}}, [1], "x", {5: {"value": 1}},
     {"State": {"value": "Sleeping"}}, {"User": {"value": None}}],
    ids=repr,
)  # fmt: skip
def test_an_invalid_query_raises_at_the_call(context: AsyncRoute, conditions: Any) -> None:
    with pytest.raises(InvalidQuery):
        context.query(conditions)


@pytest.mark.parametrize("task_id", ["", "a/b", "x" * 1000, "\x00", "\ud800", "é"], ids=ascii)
def test_invalid_ids_are_unknown(context: AsyncRoute, task_id: str) -> None:
    assert context.get(task_id) is None
    assert not context.exists(task_id)
    with pytest.raises(TaskNotFound):
        context.stop(task_id)


# -- state
# -----------------------------------------------------------------------------------------------------------------


def test_state_is_a_mapping(context: AsyncRoute) -> None:
    state = context.state
    assert len(state) == 0 and list(state) == [] and dict(state) == {} and "a" not in state
    state["b"] = {"x": [1, None, 1.5, "é\U0001f600"]}
    state["a"] = None
    assert state["b"] == {"x": [1, None, 1.5, "é\U0001f600"]}
    assert state["a"] is None and "a" in state
    assert list(state) == ["a", "b"] and len(state) == 2
    assert dict(state.items()) == {"a": None, "b": {"x": [1, None, 1.5, "é\U0001f600"]}}
    assert (
        state.get("c", 5) == 5
        and state.setdefault("c", 7) == 7
        and state.pop("c") == 7
        and state.pop("c", 8) == 8
    )
    del state["a"]
    assert "a" not in state
    state.update(d=1, e=2)
    assert sorted(state) == ["b", "d", "e"]
    state.clear()
    assert len(state) == 0


@IN_MEMORY
@pytest.mark.parametrize(
    "use",
    [lambda s: s["x"], lambda s: s.__delitem__("x"), lambda s: s.pop("x"), lambda s: s.popitem()],
)
def test_a_missing_key_of_state_raises(context: AsyncRoute, use: Callable[[Any], Any]) -> None:
    with pytest.raises(KeyError):
        use(context.state)


def test_values_of_state_are_copies(context: AsyncRoute) -> None:
    value = [1]
    context.state["a"] = value
    value.append(2)
    context.state["a"].append(3)
    assert context.state["a"] == [1]


def test_requests_and_tasks_share_state(flow: Flow, executor: Any) -> None:
    state = flow.async_routes.state

    @flow.app.get("/set/<int:n>")
    def remember(n: int) -> dict[str, Any]:
        state["from the request"] = n
        return {"from the task": state.get("from the task")}

    @flow.route(executor=executor)
    def work() -> Any:
        state["from the task"] = state["from the request"] + 1
        return state["from the task"]

    flow.client.get("/set/5")
    assert flow.result() == 6
    assert flow.client.get("/set/7").get_json() == {"from the task": 6}


@IN_MEMORY
@pytest.mark.parametrize(
    "key", ["", "x" * 256, 5, None, b"a", "a\x00", "\ud800", ("a",)], ids=ascii
)
def test_invalid_keys_of_state_raise(context: AsyncRoute, key: Any) -> None:
    for use in (
        lambda: context.state.__setitem__(key, 1), lambda: context.state[key], lambda: context.state.__delitem__(key), lambda: context.state.apply(key, len),
    ):  # fmt: skip
        with pytest.raises((AsyncRouteError, KeyError)):
            use()
    assert list(context.state) == []


@pytest.mark.parametrize(
    "value",
    [{1}, b"x", object(), iter([1]), "x" * 1_048_575, lambda: 1],
    ids=lambda value: type(value).__name__,
)
def test_invalid_values_of_state_raise(context: AsyncRoute, value: Any) -> None:
    with pytest.raises((AsyncRouteError, ValueError), match=r"state\['k'\]"):
        context.state["k"] = value
    with pytest.raises((AsyncRouteError, ValueError), match=r"state\['k'\]"):
        context.state.apply("k", lambda _: value)
    assert "k" not in context.state


def test_the_largest_value_of_state(context: AsyncRoute) -> None:
    context.state["x" * 255] = "x" * 1_048_574
    assert len(context.state["x" * 255]) == 1_048_574


def test_apply_changes_a_value(context: AsyncRoute) -> None:
    assert context.state.apply("hits", lambda n: n + 1, default=0) == 1
    assert context.state.apply("hits", lambda n: n + 1, default=0) == 2
    assert context.state["hits"] == 2
    assert context.state.apply("new", lambda value: value) is None
    assert context.state["new"] is None
    with pytest.raises(ZeroDivisionError):
        context.state.apply("hits", lambda n: n / 0)
    assert context.state["hits"] == 2


def test_apply_is_atomic(flow: Flow) -> None:
    def count(times: int = 50) -> None:
        with flow.app.app_context():
            for _ in range(times):
                flow.async_routes.state.apply("hits", lambda n: n + 1, default=0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with flow.app.app_context():
        assert flow.async_routes.state["hits"] == 200


def test_apply_calls_the_function_again_if_the_value_has_changed(context: AsyncRoute) -> None:
    """This includes a value that was removed and set again."""
    calls: list[Any] = []

    def change(value: Any) -> Any:
        calls.append(value)
        if len(calls) == 1:
            del context.state["k"]
            context.state["k"] = "other"
        return [value]

    context.state["k"] = "first"
    assert context.state.apply("k", change) == ["other"]
    assert calls == ["first", "other"]


def test_apps_have_separate_state(make_app: MakeApp, tmp_path: Any) -> None:
    async_routes = AsyncRoute()
    apps = [
        make_app(name, ASYNCROUTE_STORE=f"sqlite:///{tmp_path}/s.db") for name in ("one", "two")
    ]
    for app in apps:
        async_routes.init_app(app)
        with app.app_context():
            assert "k" not in async_routes.state
            async_routes.state["k"] = app.name
    for app in apps:
        with app.app_context():
            assert dict(async_routes.state) == {"k": app.name}


# -- helpers for tests of apps
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(make_app: MakeApp) -> Flow:
    """Return an app as users configure it, with threads and SQLite."""
    app = make_app()
    flow = Flow(app, AsyncRoute(app))

    @flow.route(max_workers=1)
    def work() -> Any:
        return [threading.current_thread() is threading.main_thread(), current_task.id is not None]

    @flow.route("/bad")
    def bad() -> None:
        raise ValueError("bad luck")

    return flow


def test_inline_without_a_block(shop: Flow, tmp_path: Any) -> None:
    inline(shop.app)
    for _ in range(3):
        task = shop.start()
        assert (task["State"], task["Result"]) == ("Completed", [True, True])
    assert shop.start("/bad")["Error"] == "ValueError: bad luck"
    assert len(shop.query()) == 4
    assert not list(tmp_path.glob("**/*.db"))


def test_inline_in_a_block(shop: Flow) -> None:
    with inline(shop.app):
        inside = shop.start()
        assert inside["Result"] == [True, True]
    outside = shop.run()
    assert outside["Result"] == [False, True]
    assert shop.ids() == [outside["Id"]]
    with inline(shop.app):
        assert shop.query() == []
        shop.get(outside, status=404)
        shop.start()
    assert shop.get(outside) == outside


def test_inline_replaces_any_executor(make_flow: MakeFlow, own_pool: Any) -> None:
    flow = make_flow()
    flow.route("/own", executor=own_pool, endpoint="own")(
        lambda: threading.current_thread() is threading.main_thread()
    )
    flow.route("/process", executor="process", endpoint="process")(lambda: 5)
    inline(flow.app)
    assert [flow.start(path)["Result"] for path in ("/own", "/process")] == [True, 5]


def test_inline_in_nested_blocks(shop: Flow) -> None:
    with inline(shop.app):
        shop.start()
        with inline(shop.app):
            assert shop.start()["State"] == "Completed"
        assert shop.start()["State"] == "Completed"
    assert shop.start()["State"] == "NotStarted"


def test_inline_ends_if_its_block_raises(shop: Flow) -> None:
    with pytest.raises(LookupError), inline(shop.app):
        raise LookupError
    assert shop.start()["State"] == "NotStarted"


def test_a_fake_task_runs_a_view() -> None:
    def view() -> str:
        for _ in current_task.track([1, 2, 3, 4], max_progress=80):
            current_task.check()
        current_task.set_progress(90, "nearly")
        assert current_task.sleep(0) is True
        return current_task.id

    with fake_task() as task:
        assert view() == "fake"
        assert task.progress == 90
        assert (task.user, task.stop_requested, task.remaining()) == (None, False, None)
    with pytest.raises(NoCurrentTask):
        view()


def test_a_fake_task_with_a_timeout() -> None:
    with fake_task("mine", "anna", 0.05) as task:
        assert (current_task.id, current_task.user) == ("mine", "anna")
        assert 0 < (current_task.remaining() or 0) <= 0.05
        threading.Event().wait(0.06)
        assert task.stop_requested and task.remaining() == 0
        with pytest.raises(TaskAborted):
            current_task.check()


def test_fake_tasks_nest() -> None:
    with fake_task("a"):
        with fake_task("b"):
            assert current_task.id == "b"
        assert current_task.id == "a"


def test_a_sleep_in_a_fake_task_ends_at_its_timeout() -> None:
    """No background maintenance runs that could wake it."""
    with fake_task(timeout=0.1):
        begun = time.monotonic()
        current_task.sleep(5)
        assert time.monotonic() - begun < 2
