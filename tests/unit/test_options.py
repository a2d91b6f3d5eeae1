"""The options of a route: defaults, valid values, and errors that name the option."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import (
    Access,
    AsyncRoute,
    Callback,
    ConfigurationError,
    Permission,
    Sse,
    config,
    options,
)
from flask_asyncroute.retries import Retry
from flask_asyncroute.routes import Route
from flask_asyncroute.runtime import runtime_of
from tests.support.labels import label

MakeApp = Callable[..., Flask]


class Duck(Executor):
    pass


def some_function() -> None:
    """A function of the app."""


async def some_async_function() -> None:
    """A function that needs an event loop."""


NOT_BOOLEANS: list[Any] = [None, 0, 1, "True", "False", "", [], 1.0]
NOT_WHOLE: list[Any] = [None, "5", 1.5, 1.0, True, math.nan, [], -1]
NOT_SECONDS = [
    "5",
    True,
    False,
    [],
    math.nan,
    math.inf,
    -math.inf,
    -0.1,
    timedelta(seconds=-1),
    101 * 365 * 86400,
    10**400,
    b"1",
]
NOT_NAMES = ["a\0", "\ud800", "", 5, [], True, "x" * 256, b"x"]
NOT_MAPPINGS = [None, [], "x", 5, [("a", 1)]]

BAD: dict[str, list[Any]] = {
    "timeout": [*NOT_SECONDS, 0, 0.0, timedelta(0), timedelta(seconds=-1), -2, "-1", 1e-9],
    "start_timeout": [*NOT_SECONDS, 0, 0.0, timedelta(0), -1, "-1", 1e-9],
    "cancellable": NOT_BOOLEANS,
    "executor": [None, "Thread", "threads", "", 5, ThreadPoolExecutor, object(), ["thread"]],
    "min_workers": ["1", 1.5, True, -1],
    "max_workers": [*NOT_WHOLE, 0],
    "queue_size": NOT_WHOLE,
    "interrupt_after": NOT_SECONDS,
    "id_generator": [None, "uuid4", 5, str, int],
    "permission": [Access(), "anna", {"Read": {}}, Permission, 5, True],
    "callback": ["http://example.com", True, False, {}, Callback],
    "sse": ["True", "False", None, 1, 0, {}, Sse, "group"],
    "response_types": [
        "application/json",
        [],
        (),
        None,
        ["text/html"],
        ["application/json"] * 2,
        [5],
        {"application/json"},
    ],
    "retention": [None, *NOT_SECONDS],
    "retry": [None, True, -1, 1.5, "3", Retry, {"times": 3}, 1_000_001],
    "unique": ["key", 1, Retry],
    "celery": [*NOT_MAPPINGS, {"queues": "x"}, {"queue": ""}, {"priority": "high"}],
    "validate": ["check", 1, True, Retry, some_async_function],
    "respond": ["answer", 1, True, Retry, some_async_function],
    "on_loss": [None, "Abort", "", True, ["abort"], "restart "],
    "pool": NOT_NAMES,
    "arguments": [*NOT_MAPPINGS, {5: 1}, {"a b": 1}, {"class": 1}, {"": 1}, {"1a": 1}, {None: 1}],
    "name": NOT_NAMES,
    "decorators": [None, some_function, "x", [5], {some_function}],
}

GOOD: dict[str, list[tuple[Any, Any]]] = {
    "timeout": [
        (5, 5_000_000),
        (0.5, 500_000),
        (timedelta(minutes=1), 60_000_000),
        (-1, None),
        (-1.0, None),
        (None, None),
    ],
    "start_timeout": [
        (5, 5_000_000),
        (0.5, 500_000),
        (timedelta(minutes=1), 60_000_000),
        (None, None),
    ],
    "cancellable": [(True, True), (False, False)],
    "executor": [(name, name) for name in ("thread", "immediate", "process")],
    "min_workers": [(0, 0), (2, 2), (None, None)],
    "max_workers": [(1, 1), (1000, 1000)],
    "queue_size": [(0, 0), (10, 10)],
    "interrupt_after": [(0, 0.0), (2.5, 2.5), (timedelta(seconds=1), 1.0), (None, None)],
    "id_generator": [(some_function, some_function)],
    "permission": [(Permission(), Permission()), (some_function, some_function), (None, None)],
    "callback": [(Callback(), Callback()), (None, None)],
    "sse": [(True, Sse()), (False, None), (Sse(group="g"), Sse(group="g"))],
    "response_types": [
        (["application/yaml", "application/xml"], ("application/yaml", "application/xml"))
    ],
    "retention": [(0, 0), (1.5, 1_500_000), (timedelta(days=1), 86_400_000_000)],
    "retry": [(0, None), (Retry(times=0), None), (3, Retry(times=3)), (Retry(2), Retry(times=2))],
    "unique": [(None, False), (False, False), (True, True), (some_function, some_function)],
    "celery": [({}, {}), ({"queue": "slow", "priority": 3}, {"queue": "slow", "priority": 3})],
    "validate": [(None, None), (some_function, some_function)],
    "respond": [(None, None), (some_function, some_function)],
    "on_loss": [("abort", "abort"), ("restart", "restart")],
    "pool": [("p", "p"), ("x" * 255, "x" * 255), (None, None)],
    "arguments": [({"a": 1}, {"a": 1}), ({}, {})],
    "name": [("report", "report"), (None, None)],
    "decorators": [([some_function], (some_function,)), ((), ())],
}


def resolved(app: Flask, **arguments: Any) -> options.RouteOptions:
    return options.resolve(options.checked(arguments), config.read(app).defaults, "The route")


def test_every_option_is_tested_here() -> None:
    assert set(BAD) == set(GOOD) == {*options.DEFAULTED, *options.OWN}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=label,
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"\b{name}=") as refused:
        options.checked({name: value})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, *pair) for name, pairs in GOOD.items() for pair in pairs],
    ids=label,
)
def test_a_good_value_is_accepted(name: str, value: Any, expected: Any) -> None:
    assert options.checked({name: value}) == {name: expected}


def test_an_executor_object_is_accepted_unless_it_is_a_process_pool() -> None:
    duck = Duck()
    assert options.checked({"executor": duck}) == {"executor": duck}
    with pytest.raises(ConfigurationError, match='executor=.*"process"'):
        options.checked({"executor": ProcessPoolExecutor.__new__(ProcessPoolExecutor)})


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigurationError, match=r"'time_out'.*timeout"):
        options.checked({"time_out": 5})


def test_defaults(make_app: MakeApp) -> None:
    made = resolved(make_app())
    assert made.timeout == 36_000 * 1_000_000
    assert made.start_timeout is None
    assert made.cancellable is True
    assert made.executor == "thread"
    assert (made.min_workers, made.max_workers, made.queue_size) == (1, 2, 1000)
    assert made.interrupt_after == 1.0
    assert made.permission is None and made.callback is None
    assert made.sse == Sse(group=None, send_result=False)
    assert made.response_types == ("application/json",)
    assert made.retention == 24 * 3600 * 1_000_000
    assert made.on_loss == "abort"
    assert made.pool is None and made.name is None
    assert dict(made.arguments) == {}
    assert len({made.id_generator() for _ in range(100)}) == 100


@pytest.mark.parametrize("value", [0, -1, timedelta(0)])
def test_the_error_about_a_start_timeout_names_the_remedy(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"start_timeout=… must be .*None for no limit"):
        options.checked({"start_timeout": value})


@pytest.mark.parametrize(
    ("executor", "expected"), [("thread", 5_000_000), ("immediate", None), (Duck(), 5_000_000)]
)
def test_a_start_timeout_has_no_effect_if_no_task_waits(
    make_app: MakeApp, executor: Any, expected: int | None
) -> None:
    assert resolved(make_app(), executor=executor, start_timeout=5).start_timeout == expected
    assert resolved(make_app(ASYNCROUTE_START_TIMEOUT=5), executor=executor).start_timeout == (
        expected
    )


def test_none_overrides_the_start_timeout_of_the_app(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_START_TIMEOUT=timedelta(seconds=5))
    assert resolved(app).start_timeout == 5_000_000
    assert resolved(app, start_timeout=7).start_timeout == 7_000_000
    assert resolved(app, start_timeout=None).start_timeout is None


@pytest.mark.covers("A22")
def test_default_ids_are_random_uuids(make_app: MakeApp) -> None:
    made = resolved(make_app()).id_generator()
    assert len(made) == 36
    assert made[14] == "4", "UUID version 4"


def test_an_option_of_the_route_overrides_that_of_the_app(make_app: MakeApp) -> None:
    app = make_app(
        ASYNCROUTE_TIMEOUT=5,
        ASYNCROUTE_CANCELLABLE=False,
        ASYNCROUTE_SSE=False,
        ASYNCROUTE_MAX_WORKERS=7,
    )
    by_app = resolved(app)
    assert (by_app.timeout, by_app.cancellable, by_app.sse, by_app.max_workers) == (
        5_000_000,
        False,
        None,
        7,
    )
    by_route = resolved(app, timeout=None, cancellable=True, sse=True, max_workers=8)
    assert (by_route.timeout, by_route.cancellable, by_route.sse, by_route.max_workers) == (
        None,
        True,
        Sse(),
        8,
    )


@pytest.mark.parametrize(("executor", "minimum"), [("thread", 1), ("process", 0), ("immediate", 1)])
def test_the_default_min_workers_depends_on_the_executor(
    make_app: MakeApp, executor: str, minimum: int
) -> None:
    assert resolved(make_app(), executor=executor).min_workers == minimum
    assert resolved(make_app(), executor=executor, max_workers=1).min_workers == minimum
    assert resolved(make_app(), executor=executor, min_workers=2).min_workers == 2


def test_min_workers_over_max_workers_is_refused(make_app: MakeApp) -> None:
    with pytest.raises(ConfigurationError, match="The route: min_workers=3 .* max_workers=2"):
        resolved(make_app(), min_workers=3)
    with pytest.raises(ConfigurationError, match="min_workers"):
        resolved(make_app(ASYNCROUTE_MIN_WORKERS=2), max_workers=1)


def test_arguments_are_copied_and_read_only() -> None:
    arguments = {"a": 1}
    expected = options.checked({"arguments": arguments})["arguments"]
    arguments["a"] = 2
    assert expected["a"] == 1
    with pytest.raises(TypeError):
        expected["a"] = 3


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ({"url": ""}, "url="), ({"url": None}, "url="), ({"url": 5}, "url="), ({"url": "x" * 2049}, "url="),
        ({"method": None}, "method="), ({"content_type": b"x"}, "content_type="),
        ({"headers": None}, "headers="), ({"headers": [("a", "b")]}, "headers="), ({"headers": {"": "x"}}, "headers="),
        ({"headers": {"X": 5}}, "'X'"), ({"headers": {5: "x"}}, "headers="), ({"send_result": "False"}, "send_result="),
        ({"send_result": 1}, "send_result="), ({"event_name": ""}, "event_name="), ({"event_name": 5}, "event_name="),
    ],
)  # fmt: skip
def test_a_bad_callback_is_refused_by_name(arguments: dict[str, Any], label: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Callback\(.*{label}|{label}.*Callback\("):
        Callback(**arguments)


def test_callback_defaults() -> None:
    made = Callback()
    assert (made.url, made.method, made.content_type) == (
        "$request.body#/callbackUrl",
        "POST",
        "application/json",
    )
    assert (dict(made.headers), made.send_result, made.event_name) == ({}, False, None)


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ({"group": ""}, "group="),
        ({"group": 5}, "group="),
        ({"send_result": "False"}, "send_result="),
        ({"send_result": 0}, "send"),
    ],
)
def test_a_bad_sse_is_refused_by_name(arguments: dict[str, Any], label: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Sse\({label}"):
        Sse(**arguments)


@pytest.mark.parametrize(
    "name", ["executor", "min_workers", "max_workers", "queue_size", "interrupt_after"]
)
def test_routes_of_one_pool_must_have_the_same_options(make_app: MakeApp, name: str) -> None:
    others = {
        "executor": "immediate",
        "min_workers": 2,
        "max_workers": 3,
        "queue_size": 5,
        "interrupt_after": None,
    }
    app = make_app()
    async_routes = AsyncRoute(app)

    def one() -> None: ...

    def two() -> None: ...

    async_routes.route("/one", pool="shared")(one)
    async_routes.route("/two", pool="shared", **{name: others[name]})(two)
    with pytest.raises(ConfigurationError, match=rf"'one' and 'two'.*'shared'.*{name}"):
        async_routes.start(app)


def test_only_routes_with_the_same_pool_name_share_an_executor(make_app: MakeApp) -> None:
    app = make_app()
    async_routes = AsyncRoute(app)
    for name, arguments in {
        "a": {"pool": "p"},
        "b": {"pool": "p"},
        "c": {},
        "d": {"pool": "endpoint c"},
    }.items():

        def view() -> None: ...

        async_routes.route(f"/{name}", endpoint=name, **arguments)(view)
    async_routes.start(app)
    runtime = runtime_of(app)
    executors = {name: runtime.runner.executor_of(runtime.routes[name]) for name in "abcd"}
    assert isinstance(runtime.routes["a"], Route)
    assert executors["a"] is executors["b"]
    assert len({id(executors[name]) for name in "acd"}) == 3, (
        "a pool name cannot match the pool of a route without a name"
    )
