"""Sentry: an exception of a task is one event, with its traceback and nothing of other tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import brotli
import pytest
import sentry_sdk
from flask import abort, request
from pytest_httpserver import HTTPServer
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.flask import FlaskIntegration
from sentry_sdk.transport import Transport

from flask_asyncroute import current_task
from tests.integrations.apps import reporting
from tests.support.apps import close_app
from tests.support.flow import Flow
from tests.support.waiting import eventually_true


class MemoryTransport(Transport):
    """Keeps the events instead of sending them."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event() or envelope.get_transaction_event()
        if event is not None:
            self.events.append(event)


@pytest.fixture(scope="module")
def transport() -> Iterator[MemoryTransport]:
    """Start Sentry for this module. Its connections to Flask's signals remain."""
    memory_transport = MemoryTransport()
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=memory_transport,
        traces_sample_rate=1.0,
        integrations=[FlaskIntegration()],
    )
    yield memory_transport
    sentry_sdk.get_client().close()
    sentry_sdk.init()


@pytest.fixture
def errors(transport: MemoryTransport) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that returns the errors reported in this test."""
    transport.events.clear()
    return lambda: [event for event in transport.events if event.get("exception")]


def test_an_exception_is_reported_once_with_its_traceback(
    flow: Flow, errors: Callable[[], list[dict[str, Any]]]
) -> None:
    @flow.route()
    def work() -> None:
        raise LookupError("no such report")

    task = flow.run()
    (event,) = errors()
    (value,) = event["exception"]["values"]
    assert (value["type"], value["value"]) == ("LookupError", "no such report")
    assert value["stacktrace"]["frames"][-1]["function"] == "work"
    assert event["extra"]["task_id"] == task["Id"]
    assert "request" not in event and "user" not in event


def test_a_before_task_function_adds_what_the_request_would_show(
    flow: Flow, errors: Callable[[], list[dict[str, Any]]]
) -> None:
    @flow.async_routes.before_task
    def describe_task() -> None:
        scope = sentry_sdk.get_isolation_scope()
        scope.set_transaction_name(request.endpoint or "")
        scope.set_tag("task", current_task.id)
        scope.set_user({"id": current_task.user})

    flow.async_routes.identity_loader(lambda: {"id": "ann"})

    @flow.route()
    def work() -> None:
        raise LookupError("no such report")

    task = flow.run()
    (event,) = errors()
    assert event["transaction"] == "work"
    assert event["user"] == {"id": "ann"} and event["tags"]["task"] == task["Id"]


def test_aborts_and_stops_are_not_reported_and_invalid_results_are(
    flow: Flow,
    transport: MemoryTransport,
    errors: Callable[[], list[Any]],
    begun: threading.Semaphore,
) -> None:
    @flow.route("/abort")
    def aborting() -> None:
        abort(404)

    @flow.route("/stop", interrupt_after=0)
    def stopping() -> None:
        begun.release()
        current_task.sleep(30)
        current_task.check()

    @flow.route("/set")
    def a_set() -> Any:
        return {1}

    flow.error("/abort")
    task = flow.start("/stop")
    assert begun.acquire(timeout=5)
    flow.stop(task)
    flow.still(task)
    reported = [event for event in transport.events if event.get("level") == "error"]
    assert reported == errors() == []
    flow.error("/set")
    (event,) = [event for event in transport.events if event.get("level") == "error"]
    assert "cannot be stored" in event["logentry"]["formatted"]


@pytest.mark.parametrize("executor", ["thread", "immediate"])
def test_a_task_has_a_scope_of_its_own(
    flow: Flow, errors: Callable[[], list[dict[str, Any]]], executor: str
) -> None:
    """Threads of the pool outlive the request in which they were started."""

    @flow.app.before_request
    def tag_request() -> None:
        sentry_sdk.set_tag("by", request.headers.get("X-User", "nobody"))

    @flow.route("/<name>", executor=executor, max_workers=1)
    def work(name: str) -> None:
        sentry_sdk.set_tag(name, "set")
        sentry_sdk.add_breadcrumb(message=name)
        raise LookupError(name)

    for name in ("first", "second"):
        flow.error(f"/{name}", headers={"X-User": name})
    for name, event in zip(("first", "second"), errors(), strict=True):
        assert event["tags"] == {name: "set"} and "request" not in event
        assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == [name]


def test_the_transaction_of_a_start_ends_with_its_request(
    flow: Flow, transport: MemoryTransport, errors: Callable[[], list[Any]], gate: threading.Event
) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    assert [event["transaction"] for event in transport.events] == ["work"]
    gate.set()
    flow.ended(task)
    later = {event["transaction"] for event in transport.events[1:]}
    assert later == {"asyncroute.get"} and errors() == []


def test_a_child_process_reports_its_exception_before_it_exits(
    tmp_path: Path, httpserver: HTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    httpserver.expect_request("/api/1/envelope/").respond_with_data("{}")
    app = reporting.create_app(str(tmp_path))
    dsn = f"http://key@127.0.0.1:{httpserver.port}/1"
    app.config["ASYNCROUTE_APP"] = f"{reporting.__name__}:create_app({str(tmp_path)!r}, {dsn!r})"
    flow = Flow(app, app.extensions["async_routes"])
    task = flow.ended(flow.start(), 30)
    assert task["Error"] == "LookupError: no such report"
    received = eventually_true(lambda: httpserver.log, 10)
    close_app(app)
    events = [
        event
        for sent, _ in received
        if (event := Envelope.deserialize(brotli.decompress(sent.get_data())).get_event())
    ]
    (event,) = events
    assert event["exception"]["values"][0]["value"] == "no such report"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
