"""Outcomes of tasks: valid and invalid results, exceptions, asynchronous views."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any

import flask
import pytest
from flask import Response, abort, got_request_exception, jsonify, make_response
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import Conflict, HTTPException, NotFound

from flask_asyncroute import TaskAborted, current_task, task_failed
from tests.support.flow import Flow, problem
from tests.support.waiting import eventually_true

MakeFlow = Callable[..., Flow]


def add_route(flow: Flow, make: Callable[[], Any], **options: Any) -> None:
    """Add a route that returns the return value of ``make``."""
    flow.route(endpoint="work", **options)(lambda: make())


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: Any


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        (None, None), (True, True), (0, 0), (-5, -5), (1.5, 1.5), ("", ""), ("é\U0001f600\x00\n", "é\U0001f600\x00\n"), ([], []), ({}, {}),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        (math.nan, None), ([math.inf, -math.inf, {"x": math.nan}], [None, None, {"x": None}]),
        (datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), "2026-01-02T03:04:05.000006Z"),
        (datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2))), "2026-01-02T00:00:00+02:00"),
        (date(2026, 1, 2), "2026-01-02"), (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"), (Decimal("1.10"), "1.10"), (Colour.RED, "red"),
        (Point(1, Point(2, None)), {"x": 1, "y": {"x": 2, "y": None}}), (dict([(1, "a"), (True, "b")]), {"1": "b"}), ("a\ud800b", "a\ufffdb"), ([(1, 2)], [[1, 2]]),
        (10**30, 10**30), ("x" * 1_000_000, "x" * 1_000_000),
    ],
    ids=lambda value: ascii(value)[:25],
)  # fmt: skip
def test_results_are_encoded_as_json(make_flow: MakeFlow, value: Any, wire: Any) -> None:
    flow = make_flow()
    add_route(flow, lambda: value)
    task = flow.run()
    assert task["State"] == "Completed"
    if value is None:
        assert "Result" not in task
    else:
        assert task["Result"] == wire
    assert flow.request("GET", f"/task/{task['Id']}/result").get_json() == wire


def test_a_result_is_the_same_after_storage(flow: Flow) -> None:
    value = {"é": [1.5, None, "\U0001f600\x00", 2**70], "large": "x" * 500_000}
    add_route(flow, lambda: value)
    assert flow.result() == value


def test_the_json_provider_of_the_app_encodes_results(flow: Flow) -> None:
    class Money:
        amount = 5

    class Provider(DefaultJSONProvider):
        @staticmethod
        def default(value: Any) -> Any:
            if isinstance(value, Money):
                return {"amount": value.amount}
            return DefaultJSONProvider.default(value)

    flow.app.json = Provider(flow.app)
    add_route(flow, lambda: [Money(), datetime(2026, 1, 2)])
    assert flow.result() == [{"amount": 5}, "2026-01-02T00:00:00Z"]


def cyclic() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


def deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    return value


class BrokenDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("secret")


async def coroutine() -> int:
    return 1


@pytest.mark.covers("F11", "A68")
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: {1, 2}, "a set.*list"),
        (lambda: {"a": [{1}]}, "a set at .*list"),
        (lambda: frozenset(), "frozenset.*list"),
        (lambda: b"x", "bytes.*text"),
        (lambda: {"a": bytearray(b"x")}, "bytearray"),
        (lambda: memoryview(b"x"), "memoryview"),
        (lambda: object(), "object.*data"),
        (cyclic, "contains itself"),
        (deep, "nested"),
        (lambda: io.StringIO("x"), "open file"),
        (lambda: threading.Lock(), "lock"),
        (lambda: 10**5000, "digits"),
        (lambda: "x" * 1_048_577, "ASYNCROUTE_MAX_RESULT"),
        (lambda: ["xxxxxxxxxx"] * 200_000, "ASYNCROUTE_MAX_RESULT"),
        (lambda: {(1, 2): 3}, "key"),
        (lambda: BrokenDict(a=1), "RuntimeError|cannot be read"),
        (lambda: lambda: 1, "function"),
        (lambda: dict, "type"),
        (lambda: iter([1]), "list"),
        (lambda: map(str, [1]), "list"),
        (lambda: open("/dev/null"), "open file"),
    ],
)
def test_results_that_cannot_be_stored(
    make_flow: MakeFlow, make: Callable[[], Any], advice: str
) -> None:
    """The task fails. The Error gives advice and contains no repr of the value."""
    import re

    flow = make_flow()
    results: list[Any] = []

    def work() -> Any:
        results.append(make())
        return results[0]

    flow.route()(work)
    error = flow.error()
    assert re.search(advice, error), error
    assert error.startswith("ResultError: ")
    assert len(error) < 600 and "0x" not in error and "secret" not in error
    if hasattr(results[0], "close"):
        results[0].close()


@pytest.mark.covers("A68")
def test_a_result_over_max_result_fails_the_task(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_MAX_RESULT=100)
    add_route(flow, lambda: "x" * int(flask.request.args["n"]))
    assert flow.result("/work?n=98") == "x" * 98
    assert "ASYNCROUTE_MAX_RESULT (100 bytes)" in flow.error("/work?n=99")


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.covers("F12")
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: Response("x"), "response.*return only the data.*decorator.*above task"),
        (lambda: jsonify(a=1), "response.*return only the data"),
        (lambda: {"a": Response("x")}, "response.*"),
        (lambda: ({"a": 1}, 201), "tuple.*only the data"),
        (lambda: ({"a": 1}, 201, {"X": "y"}), "tuple.*decorator.*above task"),
        (lambda: (), "tuple"),
        (lambda: flask.redirect("/x"), "response"),
        (lambda: Response(generator()), "response"),
        (generator, r"generator.*list\(…\)"),
        (lambda: {"rows": generator()}, "generator.*rows.*list"),
        (lambda: async_generator(), "async_generator"),
        (lambda: Conflict("x"), "response.*abort"),
        (lambda: flask.send_file(io.BytesIO(b"x"), "text/plain"), "response"),
    ],
)
def test_responses_and_generators_as_result_fail_the_task(
    make_flow: MakeFlow, make: Callable[[], Any], advice: str
) -> None:
    import re

    flow = make_flow()
    add_route(flow, make)
    error = flow.error()
    assert re.search(advice, error), error
    assert "<" not in error and "0x" not in error


@pytest.mark.covers("F12")
def test_a_generator_view_fails_the_task(flow: Flow, executor: Any) -> None:
    ran = []

    @flow.route(executor=executor)
    def work() -> Iterator[int]:
        ran.append(1)
        yield 1

    assert "return list(…)" in flow.error()
    assert not ran


@pytest.mark.covers("F12")
def test_a_coroutine_inside_a_result_fails_the_task(make_flow: MakeFlow) -> None:
    flow = make_flow()
    add_route(flow, lambda: {"a": coroutine()})
    assert "await it" in flow.error()


# -- exceptions
# ------------------------------------------------------------------------------------------------------------


def test_an_exception_fails_the_task(flow: Flow, executor: Any) -> None:
    @flow.route(executor=executor)
    def work() -> None:
        raise ValueError("bad luck")

    task = flow.run()
    assert (task["State"], task["Error"], task["IsCompleted"]) == (
        "Failed",
        "ValueError: bad luck",
        True,
    )
    assert "Result" not in task and "Stopping" not in task
    found = problem(flow.request("GET", f"/task/{task['Id']}/result"), 500, "task-failed")
    assert "ValueError: bad luck" in found["detail"] and found["Id"] == task["Id"]


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("secret")


class ExitingText(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Long(Exception):
    def __str__(self) -> str:
        return "x" * 10_000_000


class NumberText(Exception):
    def __str__(self) -> Any:  # type: ignore[override]
        return 5


class SurrogateText(Exception):
    def __str__(self) -> str:
        return "a\ud800\x00b"


def recursion() -> Any:
    return recursion()


def raise_(error: BaseException) -> Any:
    raise error


@pytest.mark.covers("F09", "A72", "A73")
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: raise_(BrokenText()), "BrokenText: (its message could not be read)"),
        (lambda: raise_(ExitingText()), "ExitingText: (its message could not be read)"),
        (lambda: raise_(NumberText()), "NumberText: (its message could not be read)"),
        (lambda: raise_(Long()), "Long: " + "x" * 1994),
        (lambda: raise_(SurrogateText()), "SurrogateText: a\ufffd\ufffdb"),
        (lambda: raise_(ValueError()), "ValueError"),
        (lambda: raise_(ValueError("a", 1)), "ValueError: ('a', 1)"),
        (lambda: raise_(KeyError("x")), "KeyError: 'x'"),
        (lambda: raise_(ValueError("two\r\nlines \x1b[31m")), "ValueError: two\r\nlines \x1b[31m"),
        (lambda: raise_(MemoryError()), "MemoryError"),
        (lambda: raise_(SystemExit(3)), "SystemExit: 3"),
        (lambda: raise_(KeyboardInterrupt()), "KeyboardInterrupt"),
        (lambda: raise_(GeneratorExit()), "GeneratorExit"),
        (lambda: raise_(BaseException("x")), "BaseException: x"),
        (lambda: raise_(StopIteration(5)), "StopIteration: 5"),
        (lambda: raise_(TaskAborted("by itself")), "TaskAborted: by itself"),
        (lambda: raise_(asyncio.CancelledError()), "CancelledError"),
        (
            lambda: raise_(ExceptionGroup("several", [ValueError("a")])),
            "ExceptionGroup: several (1 sub-exception)",
        ),
        (recursion, "RecursionError: maximum recursion depth exceeded"),
        (lambda: "x" * (1 << 62), "MemoryError"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_messages_of_exceptions(make_flow: MakeFlow, make: Callable[[], Any], error: str) -> None:
    """Each task gets an outcome without a traceback, and the pool runs further tasks."""
    flow = make_flow()
    add_route(flow, make, max_workers=1)
    returned = flow.error()
    assert returned.startswith(error) and len(returned) <= 2000
    assert "Traceback" not in returned and "secret" not in returned and ".py" not in returned
    assert flow.error().startswith(error), "the next task runs"


def with_data(status: int, /, **data: Any) -> Any:
    """Abort with ``data``, as Flask-RESTX, Flask-RESTful and webargs do."""
    try:
        abort(status)
    except HTTPException as error:
        error.data = data  # type: ignore[attr-defined]
        raise


def raise_with(data: object) -> Any:
    """Raise an error whose ``data`` is set by the app itself and must not be shown."""
    error = Conflict()
    error.data = data  # type: ignore[attr-defined]
    raise error


class UnreadableDescription(HTTPException):
    code = 409

    def __init__(self) -> None:
        super().__init__()

        class Text:
            def __str__(self) -> str:
                raise RuntimeError("secret")

        self.description = Text()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "error", "status"),
    [
        (lambda: abort(404), "404 Not Found: The requested URL was not found on the server. ", 404),
        (lambda: abort(404, "no such report"), "404 Not Found: no such report", 404),
        (lambda: abort(409, description=""), "409 Conflict", 409),
        (lambda: abort(418), "418 I'm a teapot: ", 418),
        (lambda: abort(401), "401 Unauthorized: ", 401),
        (lambda: abort(429), "429 Too Many Requests: ", 429),
        (lambda: abort(500, "broken"), "500 Internal Server Error: broken", 500),
        (lambda: abort(503), "503 Service Unavailable: ", 500),
        (lambda: abort(302), "LookupError: no exception for 302", 500),
        (lambda: abort(Response("x", 403)), "403 Forbidden: x", 403),
        (lambda: abort(make_response({"message": "busy"}, 409)), "409 Conflict: busy", 409),
        (lambda: abort(Response(generator(), 403)), "403 Forbidden", 403),
        (lambda: raise_(Conflict("own", response=Response("other", 409))), "409 Conflict: own", 409),
        (lambda: with_data(409, message="busy"), "409 Conflict: busy", 409),
        (lambda: with_data(422, messages={"json": {0: ["Missing é."]}}, schema=object()),
         '422 Unprocessable Entity: {"json": {"0": ["Missing é."]}}', 422),
        (lambda: with_data(422, message="bad", errors=["a", "b"]),
         '422 Unprocessable Entity: bad; ["a", "b"]', 422),
        (lambda: with_data(404, code="X1"), "404 Not Found: The requested URL was not found", 404),
        (lambda: raise_with(object()), "409 Conflict: A conflict happened", 409),
        (lambda: raise_(HTTPException("odd")), "500 ", 500),
        (lambda: raise_(UnreadableDescription()), "", 0),
        (lambda: flask.request.args["missing"], "400 Bad Request: ", 400),
    ],
)  # fmt: skip
def test_http_exceptions_keep_their_code(
    make_flow: MakeFlow, make: Callable[[], Any], error: str, status: int
) -> None:
    flow = make_flow()

    add_route(flow, make)
    assert flow.error().startswith(error)
    task_id = flow.ids()[0]
    response = flow.request("GET", f"/task/{task_id}/result")
    assert response.status_code == status or not status
    problem(response, response.status_code, "task-failed")


def test_expose_errors_off_shows_only_the_type(make_flow: MakeFlow, store_url: str) -> None:
    """It applies when the error is stored, whatever the configuration is later."""
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_EXPOSE_ERRORS=False)
    errors: list[Callable[[], Any]] = [
        lambda: raise_(ValueError("password=secret")),
        lambda: abort(404, "shown"),
        lambda: {1},
    ]
    add_route(flow, lambda: errors.pop(0)())
    errors_sent: list[str | None] = []

    def receive(sender: Any, task: Any, **extra: Any) -> None:
        errors_sent.append(task.error)

    with task_failed.connected_to(receive):
        assert [flow.error(), flow.error(), flow.error()] == [
            "ValueError",
            "404 Not Found: shown",
            "ResultError",
        ]
        eventually_true(lambda: len(errors_sent) == 3)  # the signal follows the commit
    assert errors_sent == ["ValueError", "404 Not Found: shown", "ResultError"]
    for task in flow.query():
        response = flow.request("GET", f"/task/{task['Id']}/result")
        assert "secret" not in response.get_data(as_text=True)


def test_an_exception_is_logged_once_with_its_task(
    flow: Flow, executor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @flow.route(executor=executor)
    def work() -> None:
        raise ValueError("bad luck")

    task = flow.run()
    records = [
        record for record in caplog.records if getattr(record, "task_id", None) == task["Id"]
    ]
    assert len(records) == 1
    assert records[0].levelno == logging.ERROR
    assert records[0].exc_info is not None and records[0].exc_info[0] is ValueError
    assert records[0].exc_text is None or "bad luck" in records[0].exc_text
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_got_request_exception_is_sent_once_in_the_request(flow: Flow, executor: Any) -> None:
    calls: list[Any] = []

    def receive(sender: Flow, exception: BaseException, **extra: Any) -> None:
        calls.append((sender, exception, current_task.id, flask.request.path))

    @flow.route(executor=executor)
    def work() -> None:
        raise ValueError("bad luck")

    with got_request_exception.connected_to(receive, flow.app):
        task = flow.run()
    [(sender, exception, task_id, path)] = calls
    assert sender is flow.app and isinstance(exception, ValueError)
    assert (task_id, path) == (task["Id"], "/work")


def test_a_failing_receiver_does_not_change_the_error(
    make_flow: MakeFlow,
) -> None:
    flow = make_flow()

    def receive(sender: Flow, **extra: Any) -> None:
        raise RuntimeError("in the receiver")

    @flow.route()
    def work() -> None:
        raise ValueError("of the view")

    with got_request_exception.connected_to(receive, flow.app):
        assert flow.error() == "ValueError: of the view"


def test_system_exit_is_reported_like_an_exception(
    flow: Flow, executor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    exceptions: list[BaseException] = []

    def receive(sender: Flow, exception: BaseException, **extra: Any) -> None:
        exceptions.append(exception)

    @flow.route(executor=executor)
    def work() -> None:
        raise SystemExit(3)

    with got_request_exception.connected_to(receive, flow.app):
        task = flow.run()
    assert task["Error"] == "SystemExit: 3"
    assert [type(error) for error in exceptions] == [SystemExit]
    assert (
        len([record for record in caplog.records if getattr(record, "task_id", None) == task["Id"]])
        == 1
    )


def test_a_result_that_cannot_be_stored_is_logged(
    make_flow: MakeFlow, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    flow.route()(lambda: {1, 2})
    task = flow.run()
    [record] = [
        record for record in caplog.records if getattr(record, "task_id", None) == task["Id"]
    ]
    assert record.levelno == logging.ERROR and record.exc_info is None
    assert task["Error"].removeprefix("ResultError: ") in record.getMessage()


def test_an_abort_is_not_reported_as_an_exception(
    make_flow: MakeFlow, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a plain view, it is a response and not a failure."""
    flow = make_flow()
    calls = []

    def receive(sender: Flow, **extra: Any) -> None:
        calls.append(1)

    flow.route()(lambda: abort(404))
    with got_request_exception.connected_to(receive, flow.app):
        flow.error()
    assert not calls and not [
        record for record in caplog.records if record.levelno >= logging.ERROR
    ]


class Translated:
    """A text in the language of the request, like a lazy string of Flask-Babel."""

    def __str__(self) -> str:
        return {"de": "nicht gefunden"}[flask.request.headers["Accept-Language"]]


@pytest.mark.parametrize("kind", ["abort", "raise"])
def test_the_message_of_an_exception_is_read_in_the_request(make_flow: MakeFlow, kind: str) -> None:
    flow = make_flow()
    errors = {"abort": NotFound(Translated()), "raise": LookupError(Translated())}  # type: ignore[arg-type]
    flow.route()(lambda: raise_(errors[kind]))
    wanted = {"abort": "404 Not Found: nicht gefunden", "raise": "LookupError: nicht gefunden"}
    assert flow.error(headers={"Accept-Language": "de"}) == wanted[kind]


def test_error_handlers_of_the_app_do_not_run(make_flow: MakeFlow) -> None:
    """They create responses, but the start has already been answered."""
    flow = make_flow()
    ran = []
    flow.app.register_error_handler(ValueError, lambda error: ran.append(1) or "handled")
    flow.route()(lambda: raise_(ValueError("x")))
    assert flow.error() == "ValueError: x"
    assert not ran


@pytest.mark.parametrize("teardown", ["teardown_request", "teardown_appcontext"])
@pytest.mark.parametrize("broken", [ValueError("in teardown"), SystemExit(3)], ids=repr)
def test_a_failing_teardown_function_is_logged_and_does_not_change_the_outcome(
    make_flow: MakeFlow, teardown: str, broken: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow()
    errors: list[BaseException | None] = []

    def teardown_function(error: BaseException | None) -> None:
        if hasattr(flask.g, "ran"):
            errors.append(error)
            raise broken

    getattr(flow.app, teardown)(teardown_function)

    def work() -> dict[str, int]:
        flask.g.ran = True
        if "fail" in flask.request.args:
            flask.abort(404, "no such report")
        return {"important": 1}

    flow.route(max_workers=1)(work)
    for _ in range(2):
        task = flow.run()
        assert (task["State"], task["Result"]) == ("Completed", {"important": 1})
    told = [
        record for record in caplog.records if record.name == "flask_asyncroute" and record.exc_info
    ]
    assert (
        told[0].getMessage()
        == f"A teardown function raised an exception after task {told[0].task_id}, "
        "whose outcome is unchanged."
    )  # type: ignore[attr-defined]
    failed = flow.run("/work?fail")
    assert failed["Error"] == "404 Not Found: no such report"
    assert flow.request("GET", f"/task/{failed['Id']}/result").status_code == 404
    assert [type(error).__name__ for error in errors] == ["NoneType", "NoneType", "NotFound"]


def test_a_failing_log_handler_does_not_change_the_error(make_flow: MakeFlow) -> None:
    flow = make_flow()

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("in the handler")

    flow.route(max_workers=1)(lambda: raise_(ValueError("of the view")))
    handler = Broken()
    flow.app.logger.addHandler(handler)
    try:
        assert flow.error() == "ValueError: of the view"
    finally:
        flow.app.logger.removeHandler(handler)
    assert flow.error() == "ValueError: of the view"


# -- async views
# -------------------------------------------------------------------------------------------------------------


def test_an_async_view(flow: Flow, executor: Any) -> None:
    @flow.route(executor=executor)
    async def work() -> Any:
        await asyncio.sleep(0)
        current_task.progress = 50
        results = await asyncio.gather(
            *(asyncio.to_thread(lambda: flask.request.path) for _ in range(3))
        )
        return [flask.request.args["x"], current_task.id, results]

    task = flow.run("/work?x=1")
    assert task["Result"] == ["1", task["Id"], ["/work"] * 3]


def test_an_async_view_with_a_decorator_that_is_not_async(flow: Flow) -> None:
    import functools

    def plain(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(**given: Any) -> Any:
            return function(**given)

        return wrapped

    @flow.route()
    @plain
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    assert flow.result() == "done"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: raise_(ValueError("x")), "ValueError: x"),
        (lambda: abort(404, "x"), "404 Not Found: x"),
        (lambda: raise_(asyncio.CancelledError()), "CancelledError"),
        (lambda: raise_(SystemExit(1)), "SystemExit: 1"),
        (lambda: raise_(KeyboardInterrupt()), "KeyboardInterrupt"),
        (lambda: {1}, "ResultError: "),
        (lambda: coroutine(), "ResultError: "),
    ],
)
def test_exceptions_and_invalid_results_of_async_views(
    make_flow: MakeFlow, make: Callable[[], Any], error: str
) -> None:
    flow = make_flow()

    @flow.route(max_workers=1)
    async def work() -> Any:
        await asyncio.sleep(0)
        return make()

    assert flow.error().startswith(error)
    assert flow.error().startswith(error)


def test_an_async_generator_view_fails_the_task(make_flow: MakeFlow) -> None:
    flow = make_flow()

    @flow.route()
    async def work() -> AsyncIterator[int]:
        yield 1

    assert "async_generator" in flow.error()


def test_a_stop_cancels_an_async_view_at_once(flow: Flow) -> None:
    """It does not wait for ``interrupt_after``; the view may be asleep."""
    ended: list[float] = []
    begun = threading.Event()

    @flow.route(interrupt_after=None)
    async def work() -> None:
        try:
            begun.set()
            await asyncio.sleep(30)
        finally:
            ended.append(time.monotonic())

    task = flow.start()
    assert begun.wait(5)
    stopped = time.monotonic()
    assert flow.stop(task)["State"] == "Aborted"
    assert flow.still(task)["Error"] == "Aborted by the user"
    assert ended[0] - stopped < 0.5


def test_an_async_view_that_catches_its_cancellation(flow: Flow) -> None:
    begun, may_end = threading.Event(), threading.Event()

    @flow.route()
    async def work() -> str:
        begun.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.to_thread(may_end.wait, 10)
        return "late"

    task = flow.start()
    assert begun.wait(5)
    flow.stop(task)
    found = flow.get(task)
    assert (found["State"], found["Stopping"]) == ("Aborted", True)
    may_end.set()
    found = flow.still(task)
    assert found["State"] == "Aborted" and "Result" not in found


def test_an_async_view_times_out(flow: Flow) -> None:
    @flow.route(timeout=0.2)
    async def work() -> None:
        await asyncio.sleep(30)

    task = flow.run()
    assert (task["State"], task["Error"]) == ("Aborted", "Timeout")
    flow.still(task)
