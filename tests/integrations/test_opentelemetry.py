"""OpenTelemetry: the spans of requests end with them, and a task joins the trace of its request."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import request
from opentelemetry import trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flask_asyncroute import current_task
from tests.support.event_streams import read, told
from tests.support.flow import Flow, path_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def traced_flow(flow: Flow, provider: TracerProvider) -> Flow:
    FlaskInstrumentor().instrument_app(flow.app, tracer_provider=provider)
    return flow


@pytest.fixture
def logged_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns what OpenTelemetry has logged."""
    caplog.set_level(logging.DEBUG, "opentelemetry")
    return lambda: [
        record.getMessage() for record in caplog.records if record.name.startswith("opentelemetry")
    ]


def names(exporter: InMemorySpanExporter) -> list[str]:
    return [span.name for span in exporter.get_finished_spans()]


@pytest.mark.parametrize("executor", ["thread", "immediate"])
def test_the_spans_of_requests_end_with_them(
    traced_flow: Flow,
    exporter: InMemorySpanExporter,
    logged_warnings: Callable[[], list[str]],
    executor: str,
) -> None:
    flow = traced_flow
    spans = []

    @flow.route(executor=executor)
    def work() -> str:
        spans.append(trace.get_current_span())
        return "done"

    task = flow.request("POST", "/work", headers={"Prefer": "wait=5"}).get_json()
    path = path_of(task)
    assert flow.request("GET", f"{path}?wait=1").status_code == 200
    etag = flow.request("GET", path).headers["ETag"]
    assert flow.request("GET", path, headers={"If-None-Match": etag}).status_code == 304
    assert told(read(flow.client, f"{path}/events"))[-1] == "Completed"
    flow.stop(task, status=410)
    assert names(exporter) == [
        "POST /work",
        *["GET /task/<task_id>"] * 3,
        "GET /task/<task_id>/events",
        "DELETE /task/<task_id>",
    ]
    assert not trace.get_current_span().get_span_context().is_valid
    assert [span.get_span_context().is_valid for span in spans] == [False], "not the request's"
    assert logged_warnings() == []


def test_the_span_of_a_stream_ends_before_the_stream(
    traced_flow: Flow,
    exporter: InMemorySpanExporter,
    begun: threading.Semaphore,
    gate: threading.Event,
    logged_warnings: Callable[[], list[str]],
) -> None:
    @traced_flow.route()
    def work() -> None:
        begun.release()
        gate.wait(10)

    task = traced_flow.start()
    assert begun.acquire(timeout=5)
    response = traced_flow.client.get(f"{path_of(task)}/events", buffered=False)
    assert next(response.iter_encoded())
    assert names(exporter) == ["POST /work", "GET /task/<task_id>/events"]
    gate.set()
    assert b"Completed" in b"".join(response.iter_encoded())
    response.close()
    assert logged_warnings() == []


def test_a_view_with_a_span_in_the_trace_of_its_client(
    traced_flow: Flow, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """As on the page on extensions. The rebuilt request has the header that the client sent."""
    tracer = provider.get_tracer(__name__)

    def traced(view: Any) -> Any:
        @functools.wraps(view)
        def wrapper(**arguments: Any) -> Any:
            name, parent = f"task {request.endpoint}", extract(request.headers)
            with tracer.start_as_current_span(name, parent) as span:
                span.set_attribute("task.id", current_task.id)
                return view(**arguments)

        return wrapper

    @traced_flow.app.post("/work")
    @traced_flow.async_routes.task
    @traced
    def work() -> None:
        with tracer.start_as_current_span("query"):
            raise LookupError("no such report")

    task = traced_flow.ended(traced_flow.start(headers=TRACEPARENT))
    assert task["Error"] == "LookupError: no such report"
    spans = {span.name: span for span in exporter.get_finished_spans()}

    def trace_id(span: ReadableSpan) -> str:
        assert span.context is not None
        return format(span.context.trace_id, "032x")

    for name in ("POST /work", "task work", "query"):
        assert trace_id(spans[name]) == TRACE
    outer, inner = spans["task work"], spans["query"]
    assert inner.parent == outer.context
    assert outer.attributes == {"task.id": task["Id"]} and not outer.status.is_ok
    assert outer.events[0].attributes["exception.type"] == "LookupError"  # type: ignore[index]
