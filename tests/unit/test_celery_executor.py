"""The executor for Celery, without a broker: its options and configuration errors, and a broker
that is down, does not answer, or answers late.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from flask import Flask

pytest.importorskip("celery")

from celery import Celery
from celery.signals import before_task_publish
from kombu import Exchange, Queue

from flask_asyncroute import AsyncRoute, ConfigurationError, current_task, task_created
from flask_asyncroute import testing as asyncroute_testing
from flask_asyncroute.executors import celery as module
from flask_asyncroute.executors import registry
from flask_asyncroute.executors.celery_app import is_local
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.signals import task_removed, task_started
from flask_asyncroute.task import now_us
from tests.support.brokers import new_celery
from tests.support.flow import problem

NOWHERE = "redis://127.0.0.1:1/0"
"""A port without a server."""
REFUSED_SECONDS = 5.0

MakeApp = Callable[..., Flask]
QUEUES = [Queue("topics", Exchange("topics", type="topic"), routing_key="film.#")]
celery_of_module = new_celery(NOWHERE)
not_celery = object()


def new_routes(app: Flask, **options: Any) -> AsyncRoute:
    async_routes = AsyncRoute(app)

    @async_routes.route("/work", methods=["POST"], executor="celery", **options)
    def work() -> str:
        return current_task.id

    return async_routes


class Clock:
    """A manual clock in place of the module's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def listener() -> socket.socket:
    """Return a server that accepts connections and never answers."""
    return socket.create_server(("127.0.0.1", 0), backlog=50)


def url_of(server: socket.socket) -> str:
    return f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.fixture
def hanging_broker() -> Iterator[str]:
    """Return the URL of a Redis server that accepts connections and never answers."""
    with listener() as server:
        yield url_of(server)


def down(make_app: MakeApp, broker: str, **config: Any) -> Flask:
    """Return an app whose broker is down."""
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db", **config)
    app.extensions["celery"] = new_celery(broker)
    app.extensions["tests.async_routes"] = new_routes(app, on_loss="restart")
    return app


@pytest.mark.parametrize("broker", [NOWHERE, "amqp://127.0.0.1:1//"])
def test_a_start_is_refused_if_the_broker_is_down(
    make_app: MakeApp, hear: Callable[..., Any], broker: str
) -> None:
    app = down(make_app, broker)
    heard = hear(task_created, task_removed, task_started)
    client = app.test_client()
    began = time.monotonic()
    document = problem(client.post("/work"), 503, "broker-unavailable")
    assert time.monotonic() - began < REFUSED_SECONDS
    assert "message broker" in document["detail"]
    assert client.post("/work").headers["Retry-After"] == "5"
    assert runtime_of(app).store.waiting({"work": 9}, 2**60) == []
    names = [name for name, _ in heard]
    assert names == ["task-created", "task-removed"] * 2
    assert heard[0][1].id == heard[1][1]


def test_a_start_is_refused_in_time_if_the_broker_does_not_answer(
    make_app: MakeApp, hanging_broker: str
) -> None:
    client = down(make_app, hanging_broker).test_client()
    began = time.monotonic()
    problem(client.post("/work"), 503, "broker-unavailable")
    assert time.monotonic() - began < REFUSED_SECONDS
    began = time.monotonic()
    problem(client.post("/work"), 503, "broker-unavailable")
    assert time.monotonic() - began < 0.5, "no more threads wait for a broker that does not answer"


def test_a_broker_that_does_not_answer_delays_no_other_background_work(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maintenance recovers tasks, sends callbacks and starts retries of the other routes."""
    monkeypatch.setattr(module, "RESPONSE_SECONDS", 60.0)
    with listener() as server:
        app = down(make_app, url_of(server))
        async_routes = app.extensions["tests.async_routes"]
        async_routes.start(app)
        with app.app_context():
            task = async_routes.submit("work", start_at=0.05)
        server.settimeout(10)
        connection, _ = server.accept()  # a thread now waits for the broker
        with connection:
            runner = runtime_of(app).runner
            assert runner.maintenance.call(lambda: None).wait(10)
            claim = runner.store.claim(task.id, "dead worker", now_us())
            assert claim is not None
            recover = partial(runner.lifecycle.recover, claim.task)
            assert runner.maintenance.call(recover).wait(10)
            found = runner.store.get(task.id)
            assert found is not None and (found.state, found.restarts) == ("NotStarted", 1)
            server.close()  # otherwise the thread would wait until the broker responds


def test_calls_without_a_response_are_forgotten(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    """A connection can block for hours although the broker has been restarted."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "RESPONSE_SECONDS", 0.5)
    connected: list[socket.socket] = []
    with listener() as server, ExitStack() as stack:
        client = down(make_app, url_of(server)).test_client()
        server.settimeout(0.01)

        def has_new_connection() -> bool:
            with suppress(TimeoutError):
                connected.append(stack.enter_context(server.accept()[0]))
                return True
            return False

        problem(client.post("/work"), 503, "broker-unavailable")
        eventually(has_new_connection)
        for seconds in (module.RESPONSE_SECONDS, module.FORGET_SECONDS - 1):
            clock.now = 1000 + seconds
            problem(client.post("/work"), 503, "broker-unavailable")
            assert not has_new_connection()
        clock.now = 1000 + module.FORGET_SECONDS
        problem(client.post("/work"), 503, "broker-unavailable")
        eventually(has_new_connection)


def test_a_start_whose_broker_is_down_can_be_repeated_with_its_key(make_app: MakeApp) -> None:
    app = down(make_app, NOWHERE)
    headers = {"Idempotency-Key": "0123456789abcdef0123456789abcdef"}
    for _ in range(2):
        problem(app.test_client().post("/work", headers=headers), 503, "broker-unavailable")


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        (None, "no Celery app.*ASYNCROUTE_CELERY"),
        ("no_such_module:celery", "no_such_module.*cannot be imported"),
        (f"{__name__}:not_celery", "must be a Celery app.*object"),
    ],
)
def test_an_app_without_a_celery_app(make_app: MakeApp, setting: Any, error: str) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db", ASYNCROUTE_CELERY=setting)
    async_routes = new_routes(app)
    with pytest.raises(ConfigurationError, match=error):
        async_routes.start(app)


@pytest.mark.parametrize("value", [5, ["redis://"], object()])
def test_other_values_are_refused_by_init_app(make_app: MakeApp, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_CELERY"):
        AsyncRoute(make_app(ASYNCROUTE_CELERY=value))


@pytest.mark.parametrize("setting", [celery_of_module, f"{__name__}:celery_of_module"])
def test_the_celery_app_can_be_named(make_app: MakeApp, setting: Any) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db", ASYNCROUTE_CELERY=setting)
    app.extensions["celery"] = new_celery("redis://10.0.0.1/0")
    new_routes(app).start(app)
    assert runtime_of(app).celery is celery_of_module


def test_settings_create_a_celery_app_that_workers_can_import(make_app: MakeApp) -> None:
    app = make_app(
        ASYNCROUTE_STORE="sqlite:///asyncroute.db", ASYNCROUTE_CELERY={"broker_url": NOWHERE}
    )
    new_routes(app).start(app)
    celery = app.extensions["celery"]
    assert isinstance(celery, Celery) and celery.conf.broker_url == NOWHERE
    assert runtime_of(app).celery is celery


def test_settings_do_not_replace_another_celery_app(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_CELERY={"broker_url": NOWHERE})
    app.extensions["celery"] = new_celery(NOWHERE)
    with pytest.raises(ConfigurationError, match="Remove one of them"):
        AsyncRoute(app)


def test_eager_mode_is_a_configuration_error(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    async_routes = new_routes(app)
    app.extensions["celery"] = new_celery(NOWHERE, task_always_eager=True)
    with pytest.raises(ConfigurationError, match=re.escape("testing.inline()")):
        async_routes.start(app)


def test_workers_cannot_read_a_memory_store(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    app.extensions["celery"] = new_celery(NOWHERE)
    async_routes = new_routes(app)
    with pytest.raises(ConfigurationError, match="memory://"):
        async_routes.start(app)


@pytest.mark.parametrize(
    ("broker", "expected"),
    [
        ("redis://127.0.0.1:6379/5", True), ("redis://localhost/0", True), ("redis://[::1]/0", True),
        ("redis+socket:///tmp/redis", True), ("amqp://", True), ("memory://", True),
        ("redis://10.0.0.1/0", False), ("amqp://guest@rabbit.example//", False),
        ("redis://localhost/0;redis://10.0.0.1/0", False),
    ],
)  # fmt: skip
def test_a_file_store_needs_a_local_broker(make_app: MakeApp, broker: str, expected: bool) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    app.extensions["celery"] = new_celery(broker)
    assert is_local(app.extensions["celery"]) is expected
    async_routes = new_routes(app)
    if expected:
        async_routes.start(app)
    else:
        with pytest.raises(ConfigurationError, match="broker is on another machine"):
            async_routes.start(app)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("fast", "mapping"),
        ({"que": "fast"}, "'que'"),
        ({"queue": 5}, "'queue' of"),
        ({"priority": -1}, "'priority' of"),
        ({"priority": "high"}, "'priority' of"),
        ({"routing_key": ""}, "'routing_key' of"),
    ],
)
def test_invalid_celery_options(make_app: MakeApp, value: Any, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        new_routes(make_app(), celery=value)


def test_routes_of_a_pool_have_the_same_celery_options(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    app.extensions["celery"] = new_celery(NOWHERE)
    async_routes = new_routes(app, pool="shared", celery={"queue": "a"})
    async_routes.route("/other", executor="celery", pool="shared", celery={"queue": "b"})(noop)
    with pytest.raises(ConfigurationError, match="celery"):
        async_routes.start(app)


@pytest.mark.parametrize(
    ("settings", "options", "queue", "priority"),
    [
        ({}, {}, "default", None),
        ({}, {"queue": "films", "priority": 7}, "films", 7),
        ({"task_routes": {module.TASK_NAME: {"queue": "routed"}}}, {}, "routed", None),
        ({"task_routes": {module.TASK_NAME: {"queue": "routed"}}}, {"queue": "films"}, "films", None),
        ({"task_queues": QUEUES}, {"queue": "topics", "routing_key": "film.short"}, "topics", None),
    ],
)  # fmt: skip
def test_messages_are_sent_as_the_options_say(
    make_app: MakeApp, settings: Any, options: Any, queue: str, priority: int | None
) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    name = f"default-{uuid4().hex}"
    celery = app.extensions["celery"] = new_celery("memory://", name, **settings)
    new_routes(app, celery=options)
    sent: list[Any] = []

    def on_publish(sender: str, body: Any, routing_key: str, properties: Any, **more: Any) -> None:
        sent.append(
            (sender, body[0], properties["correlation_id"], routing_key, properties.get("priority"))
        )

    before_task_publish.connect(on_publish, weak=False)
    try:
        task_id = app.test_client().post("/work").json["Id"]
    finally:
        before_task_publish.disconnect(on_publish)
    queue = name if queue == "default" else queue
    key = options.get("routing_key", queue)
    assert sent == [(module.TASK_NAME, (task_id,), task_id, key, priority)]
    runner = runtime_of(app).runner
    executor: Any = runner.executor_of(runner.routes["work"])
    assert executor.queue_name() == queue
    assert executor.waiting_messages() == 1
    with celery.connection_for_read() as connection:
        connection.default_channel.queue_purge(queue)


def test_the_quota_of_a_user_counts_tasks_that_wait_for_a_worker(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db", ASYNCROUTE_MAX_TASKS_PER_USER=2)
    app.extensions["celery"] = new_celery("memory://", f"quota-{uuid4().hex}")
    new_routes(app).identity_loader(lambda: {"id": "anna"})
    client = app.test_client()
    assert [client.post("/work").status_code for _ in range(3)] == [202, 202, 429]


class FakeRequest:
    """Stands in for a message that Celery's worker runs."""

    def __init__(self, id: str, worker_pid: int) -> None:
        self.id = id
        self.worker_pid = worker_pid
        self.ended: list[tuple[Any, str]] = []

    def terminate(self, pool: Any, signal: str) -> None:
        self.ended.append((pool, signal))


def test_a_kill_finds_the_process_among_doubled_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [FakeRequest("task", 5), FakeRequest("task", 6), FakeRequest("other", 7)]
    monkeypatch.setattr("celery.worker.state.active_requests", set(requests))
    state = SimpleNamespace(consumer=SimpleNamespace(pool="pool"))
    module._kill(state, "task", 6)
    assert [request.ended for request in requests] == [[], [("pool", "SIGKILL")], []]
    module._kill(state, "task", 7)
    module._kill(state, "other", 5)
    assert [len(request.ended) for request in requests] == [0, 1, 0]


def test_inline_needs_no_broker(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="sqlite:///asyncroute.db")
    new_routes(app)
    with asyncroute_testing.inline(app):
        task = app.test_client().post("/work").json
    assert task["State"] == "Completed" and task["Result"] == task["Id"]


def test_a_route_needs_celery_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=re.escape("flask-asyncroute[celery]")):
        registry.checked("executor", "celery")


def test_celery_is_imported_only_if_a_route_needs_it() -> None:
    code = """
import sys
from flask import Flask
from flask_asyncroute import AsyncRoute
app = Flask("app")
routes = AsyncRoute(app)
routes.route("/work")(lambda: None)
routes.start(app)
assert not {"celery", "kombu", "billiard"} & sys.modules.keys()
"""
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environ, timeout=60)
    assert done.returncode == 0


def noop() -> None: ...
