"""The option ``retry`` and ``current_task.retry()``: failed tasks run again."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort, got_request_exception, request, session
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response
from werkzeug.exceptions import HTTPException

from flask_asyncroute import (
    AsyncRoute,
    AsyncRouteTask,
    Callback,
    Retry,
    RetryRequested,
    State,
    current_task,
    signals,
)
from flask_asyncroute.errors import ConfigurationError
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Expect
from flask_asyncroute.testing import fake_task, inline
from flask_asyncroute.workers.shutdown import shut_down
from tests.support.apps import child_app, close_app
from tests.support.event_streams import read
from tests.support.flow import IN_MEMORY, Flow
from tests.support.tasks import new_task
from tests.support.waiting import eventually_true

MakeFlow = Callable[..., Flow]
Eventually = Callable[..., Any]
Hear = Callable[..., list[tuple[str, AsyncRouteTask]]]


def soon(times: int = 2, **options: Any) -> Retry:
    """Return retries without a noticeable delay."""
    return Retry(**{"times": times, "delay": 0.02, "factor": 1, "jitter": 0, **options})


LATER = Retry(times=1, delay=600, jitter=0)
"""A retry that does not begin during a test."""


def waits(flow: Flow, task: dict[str, Any]) -> dict[str, Any]:
    """Return the task when it waits for a retry."""
    found: dict[str, Any] = eventually_true(
        lambda: now if "NextAttemptTime" in (now := flow.get(task)) else None
    )
    return found


class Failing:
    """A view that fails in each attempt until one that succeeds.

    :param options: of its route.
    """

    def __init__(self, flow: Flow, failures: int = 99, **options: Any) -> None:
        self.flow = flow
        self.attempts: list[int] = []

        @flow.route(endpoint="work", **options)
        def work() -> str:
            self.attempts.append(current_task.attempt)
            if current_task.attempt <= failures:
                raise ValueError(f"no {current_task.attempt}")
            return "done"


def test_a_failed_task_runs_again_until_it_completes(flow: Flow, executor: Any) -> None:
    failing = Failing(flow, 2, executor=executor, retry=soon(5))
    task = flow.run()
    assert (task["State"], task["Result"]) == ("Completed", "done")
    assert (task["Attempt"], task["LastError"]) == (3, "ValueError: no 2")
    assert "NextAttemptTime" not in task and "Error" not in task
    assert failing.attempts == [1, 2, 3]


def test_a_task_without_retries_left_fails_with_its_last_error(flow: Flow, executor: Any) -> None:
    failing = Failing(flow, executor=executor, retry=soon(2))
    task = flow.run()
    assert (task["State"], task["Error"], task["Attempt"]) == ("Failed", "ValueError: no 3", 3)
    assert task["LastError"] == "ValueError: no 2"
    assert failing.attempts == [1, 2, 3]


@IN_MEMORY
def test_a_number_of_retries_has_the_default_schedule(flow: Flow) -> None:
    Failing(flow, retry=3)
    task = flow.start()
    waiting = waits(flow, task)
    assert (waiting["Attempt"], waiting["LastError"]) == (2, "ValueError: no 1")
    stored = runtime_of(flow.app).runner.store.get(task["Id"])
    assert stored is not None and stored.retry == Retry().schedule
    assert stored.retries_left == 2
    flow.stop(task)


@IN_MEMORY
def test_a_task_without_the_option_runs_once(flow: Flow) -> None:
    failing = Failing(flow)
    task = flow.run()
    assert task["State"] == "Failed"
    assert not {"Attempt", "LastError", "NextAttemptTime"} & task.keys()
    assert failing.attempts == [1]


def test_the_next_attempt_time_follows_the_schedule(flow: Flow) -> None:
    Failing(flow, retry=Retry(times=3, delay=100, factor=10, max_delay=500, jitter=0))
    began = datetime.fromisoformat(flow.start()["CreationTime"])
    (task,) = flow.query()
    waiting = waits(flow, task)
    delay = datetime.fromisoformat(waiting["NextAttemptTime"]) - began
    assert timedelta(seconds=99) < delay < timedelta(seconds=110)
    assert not {"StartingTime", "ExpireTime", "Progress", "Error"} & waiting.keys()
    flow.stop(task)


def test_the_next_attempt_begins_soon_after_its_time(
    flow: Flow, hear: Hear, eventually: Eventually
) -> None:
    Failing(flow, 2, retry=soon(2, delay=0.3))
    retried = hear(signals.task_retried, sender=flow.app)
    started = hear(signals.task_started, sender=flow.app)
    flow.run()
    eventually(lambda: len(retried) == 2 and len(started) == 3)
    for (_, waiting), (_, running) in zip(retried, started[1:], strict=True):
        assert waiting.start_at_us is not None and running.started_us is not None
        # The clock of a database server can differ slightly.
        assert -100_000 < running.started_us - waiting.start_at_us < 500_000


def test_an_attempt_without_a_delay_begins_soon(flow: Flow, later_executor: Any) -> None:
    """The slot and the thread of the failed attempt are still in use for a moment."""
    failing = Failing(flow, 2, executor=later_executor, max_workers=1, retry=soon(2, delay=0))
    began = time.monotonic()
    assert flow.run()["State"] == "Completed"
    assert time.monotonic() - began < 2
    assert failing.attempts == [1, 2, 3]


@IN_MEMORY
def test_many_retries_that_are_due_at_once_begin_soon(
    flow: Flow, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two workers, a process takes over at most 22 tasks at once."""
    failing = Failing(flow, 1, retry=LATER)
    tasks = [flow.start() for _ in range(150)]
    for task in tasks:
        waits(flow, task)
    store = runtime_of(flow.app).runner.store
    hour_later = store.now_us() + 3_600_000_000
    monkeypatch.setattr(store, "now_us", lambda: hour_later)
    began = time.monotonic()
    eventually(lambda: len(failing.attempts) == 300, 20)
    assert time.monotonic() - began < 2.5


@IN_MEMORY
def test_a_coroutine_runs_again(flow: Flow) -> None:
    @flow.route(retry=soon())
    async def work() -> int:
        await asyncio.sleep(0)
        if current_task.attempt == 1:
            raise ValueError
        if current_task.attempt == 2:
            current_task.retry()
        return current_task.attempt

    assert flow.result() == 3


@IN_MEMORY
@pytest.mark.parametrize("kind", [LookupError, (OSError, KeyError)])
def test_only_the_exceptions_of_on_are_retried(flow: Flow, kind: Any) -> None:
    attempts: list[int] = []

    @flow.route(retry=soon(on=kind))
    def work() -> None:
        attempts.append(current_task.attempt)
        raise KeyError("x") if current_task.attempt == 1 else ValueError("y")

    assert flow.error() == "ValueError: y"
    assert attempts == [1, 2]


@IN_MEMORY
@pytest.mark.parametrize(
    "status, is_retried",
    [
        (400, False), (404, False), (409, False), (422, False), (499, False),
        (408, True), (425, True), (429, True), (500, True), (503, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_response", [False, True])
def test_client_errors_are_not_retried_except_temporary_ones(
    flow: Flow, status: int, is_retried: bool, is_response: bool
) -> None:
    class Error(HTTPException):
        code = status

    @flow.route(retry=soon(1))
    def work() -> None:
        if is_response:
            abort(Response(status=status))
        raise Error

    task = flow.run()
    assert (task["State"], task["Attempt"]) == ("Failed", 2 if is_retried else 1)
    assert ("LastError" in task) is is_retried


@IN_MEMORY
def test_on_also_applies_to_http_exceptions(flow: Flow) -> None:
    @flow.route(retry=soon(1, on=KeyError))
    def work() -> None:
        abort(503)

    assert flow.run()["Attempt"] == 1


@IN_MEMORY
@pytest.mark.parametrize("result", [{1, 2}, b"bytes", Response("x"), "x" * 2_000_000])
def test_a_result_that_cannot_be_stored_is_not_retried(flow: Flow, result: Any) -> None:
    flow.route(retry=soon(on=BaseException))(lambda: result)
    task = flow.run()
    assert (task["State"], task["Attempt"]) == ("Failed", 1)


@IN_MEMORY
def test_a_timeout_is_not_retried(flow: Flow) -> None:
    attempts: list[int] = []

    @flow.route(retry=soon(on=BaseException), timeout=0.1)
    def work() -> None:
        attempts.append(current_task.attempt)
        current_task.sleep(20)
        raise ValueError("after the timeout")

    task = flow.run()
    assert (task["State"], task["Error"], attempts) == ("Aborted", "Timeout", [1])


def test_each_attempt_has_the_full_timeout(flow: Flow) -> None:
    remaining: list[float] = []

    @flow.route(retry=soon(), timeout=0.5)
    def work() -> None:
        remaining.append(current_task.remaining() or 0)
        if current_task.attempt < 3:
            current_task.sleep(0.3)
            raise ValueError

    task = flow.run()
    assert (task["State"], task["Attempt"]) == ("Completed", 3)
    assert min(remaining) > 0.3
    expires = datetime.fromisoformat(task["ExpireTime"])
    assert expires - datetime.fromisoformat(task["StartingTime"]) == timedelta(seconds=0.5)


def test_a_stop_is_not_retried(flow: Flow, begun: threading.Semaphore) -> None:
    attempts: list[int] = []

    @flow.route(retry=soon(on=BaseException))
    def work() -> None:
        attempts.append(current_task.attempt)
        begun.release()
        current_task.sleep(20)
        raise ValueError("after the stop")

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    ended = flow.still(task)
    assert (ended["State"], ended["Error"]) == ("Aborted", "Aborted by the user")
    assert attempts == [1]


def test_a_stop_ends_a_task_that_waits_for_a_retry(
    flow: Flow, later_executor: Any, hear: Hear, eventually: Eventually
) -> None:
    failing = Failing(flow, executor=later_executor, retry=LATER)
    ends = hear(signals.task_finished, sender=flow.app)
    task = flow.start()
    waits(flow, task)
    stopped = flow.stop(task)
    assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
    assert (stopped["Attempt"], stopped["LastError"]) == (2, "ValueError: no 1")
    assert "NextAttemptTime" not in stopped and "Stopping" not in stopped
    eventually(lambda: [ended.id for _, ended in ends] == [task["Id"]])
    assert failing.attempts == [1]


def test_the_retry_of_an_immediate_route_waits_inside_the_request(flow: Flow) -> None:
    Failing(flow, 1, executor="immediate", retry=soon(1, delay=0.3))
    began = time.monotonic()
    task = flow.start()
    assert time.monotonic() - began >= 0.3
    assert (task["State"], task["Attempt"]) == ("Completed", 2)


def test_a_stop_ends_the_request_of_an_immediate_route(flow: Flow, eventually: Eventually) -> None:
    failing = Failing(flow, executor="immediate", retry=LATER)
    answers: list[dict[str, Any]] = []
    client = Flow(flow.app, flow.async_routes)
    thread = threading.Thread(target=lambda: answers.append(client.start()))
    thread.start()
    listed: list[Any] = eventually(
        lambda: [
            task for task in flow.query() if task["State"] == "NotStarted" and failing.attempts
        ]
    )
    flow.stop(eventually(lambda: listed)[0])
    thread.join(10)
    assert [task["State"] for task in answers] == ["Aborted"]


def test_inline_tasks_run_again_without_a_delay(make_flow: MakeFlow) -> None:
    flow = make_flow()
    failing = Failing(flow, 2, retry=Retry(times=2, delay=600))
    inline(flow.app)
    task = flow.start()
    assert (task["State"], task["Result"]) == ("Completed", "done")
    assert failing.attempts == [1, 2, 3]


# --- current_task.retry()


def test_a_view_can_end_its_attempt(
    flow: Flow, executor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @flow.route(retry=soon(on=KeyError), executor=executor)
    def work() -> int:
        try:
            if current_task.attempt == 1:
                current_task.retry(reason="the printer is busy")
            if current_task.attempt == 2:
                current_task.retry()
        except Exception:
            pytest.fail("RetryRequested is not an Exception")
        return current_task.attempt

    task = flow.run()
    assert (task["Result"], task["LastError"]) == (3, "RetryRequested")
    records = [each for each in caplog.records if each.name == flow.app.logger.name]
    assert [each.getMessage() for each in records] == [
        f"Attempt {attempt} of task {task['Id']} ended with current_task.retry(reason={reason}); "
        "the task runs again."
        for attempt, reason in ((1, "'the printer is busy'"), (2, "''"))
    ]
    assert all(not each.exc_info and each.__dict__["task_id"] == task["Id"] for each in records)


def test_after_replaces_the_delay(flow: Flow) -> None:
    @flow.route(retry=LATER)
    def work() -> int:
        if current_task.attempt == 1:
            current_task.retry(after=timedelta(seconds=0.02), reason="busy")
        return current_task.attempt

    task = flow.run()
    assert (task["Result"], task["LastError"]) == (2, "RetryRequested: busy")


@IN_MEMORY
def test_a_view_without_retries_left_fails(flow: Flow) -> None:
    @flow.route("/none", endpoint="none")
    def none() -> None:
        current_task.retry(after=0, reason="busy")

    @flow.route(retry=soon(1))
    def work() -> None:
        current_task.retry(reason="busy")

    assert flow.error("/none") == "RetryRequested: busy"
    task = flow.run()
    assert (task["State"], task["Error"], task["Attempt"]) == ("Failed", "RetryRequested: busy", 2)


@pytest.mark.parametrize("after", [-1, "1", float("nan"), float("inf"), True])
def test_an_invalid_delay_is_refused(after: Any) -> None:
    with fake_task() as task, pytest.raises(ConfigurationError, match="after"):
        task.retry(after=after)


def test_a_reason_must_be_a_string() -> None:
    with fake_task() as task, pytest.raises(TypeError, match="must be a string, not int"):
        task.retry(reason=5)  # type: ignore[arg-type]


def test_a_fake_task_is_in_its_first_attempt() -> None:
    with fake_task() as task:
        assert task.attempt == 1
        with pytest.raises(RetryRequested, match="busy") as caught:
            task.retry(after=2, reason="busy")
    assert caught.value.after == 2


# --- What a task keeps, and what each attempt gets


def test_each_attempt_gets_the_request(make_flow: MakeFlow, store_url: str) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url)
    data = os.urandom(400_000)
    seen: list[Any] = []

    @flow.app.before_request
    def log_in() -> None:
        session["name"] = "anna"

    @flow.route("/work/<int:number>", retry=soon(), arguments={"fixed": 7})
    def work(number: int, fixed: int) -> None:
        file = request.files["file"]
        session["name"] += "!"
        seen.append(
            (number, fixed, session["name"], request.form["field"], file.filename, file.read())
        )
        if current_task.attempt < 3:
            raise ValueError

    form = {"field": "value", "file": (io.BytesIO(data), "photo.jpg")}
    task = flow.run("/work/5", data=form)
    assert task["State"] == "Completed"
    assert seen == [(5, 7, "anna!", "value", "photo.jpg", data)] * 3


def test_progress_begins_again_in_each_attempt(flow: Flow, eventually: Eventually) -> None:
    shown: list[float] = []

    @flow.route(retry=soon(1))
    def work() -> None:
        shown.append(current_task.progress)
        current_task.set_progress(60, "most of it")
        if current_task.attempt == 1:
            raise ValueError
        abort(404)

    task = flow.run()
    assert shown == [0, 0]
    assert (task["Progress"], task["ProgressMessage"]) == (60, "most of it")


def test_a_waiting_task_shows_no_progress(flow: Flow) -> None:
    @flow.route(retry=LATER)
    def work() -> None:
        current_task.set_progress(60, "most of it")
        raise ValueError

    task = flow.start()
    waiting = waits(flow, task)
    assert not {"Progress", "ProgressMessage"} & waiting.keys()
    flow.stop(task)


def test_a_stream_goes_on_over_all_attempts(flow: Flow) -> None:
    @flow.route(retry=soon())
    def work() -> str:
        current_task.send_event({"n": current_task.attempt}, "tick")
        if current_task.attempt < 3:
            raise ValueError(f"no {current_task.attempt}")
        return "done"

    task = flow.start()
    told = read(flow.client, f"/task/{task['Id']}/events")
    assert [each.data["n"] for each in told if each.name == "tick"] == [1, 2, 3]
    assert (told[-1].name, told[-1].short) == ("task.completed", "Completed")
    # A client that connects later gets the events of all attempts.
    told = read(flow.client, f"/task/{task['Id']}/events")
    assert told[-1].short == "Completed"
    ids = [each.id for each in told if each.id]
    assert len(ids) == len(set(ids))


def test_a_resumed_stream_contains_the_states_of_all_attempts(flow: Flow) -> None:
    @flow.route(retry=soon())
    def work() -> None:
        current_task.send_event({"n": current_task.attempt}, "tick")
        if current_task.attempt < 3:
            raise ValueError(f"no {current_task.attempt}")

    path = f"/task/{flow.run()['Id']}/events"
    first = next(each for each in read(flow.client, path) if each.name == "tick")
    told = read(flow.client, path, first.id)
    shown = [
        (each.short, each.data.get("Attempt"), each.data.get("LastError"))
        for each in told
        if each.name != "tick"
    ]
    assert shown == [
        ("NotStarted", 2, "ValueError: no 1"),
        ("Running", 2, "ValueError: no 1"),
        ("NotStarted", 3, "ValueError: no 2"),
        ("Running", 3, "ValueError: no 2"),
        ("Completed", 3, "ValueError: no 2"),
    ]


def test_a_wait_lasts_until_the_last_attempt(flow: Flow) -> None:
    Failing(flow, 2, retry=soon())
    task = flow.get(f"{flow.start()['Id']}?wait=10")
    assert (task["State"], task["Attempt"]) == ("Completed", 3)


def test_a_callback_is_sent_once_at_the_end(
    make_flow: MakeFlow, store_url: str, httpserver: HTTPServer, eventually: Eventually
) -> None:
    received: list[Any] = []

    def record(current: Request) -> Response:
        received.append(current.get_json())
        return Response(status=200)

    httpserver.expect_request("/hook").respond_with_handler(record)
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["localhost"])
    Failing(flow, 2, retry=soon(), callback=Callback())
    task = flow.run(json={"callbackUrl": httpserver.url_for("/hook")})
    eventually(lambda: flow.get(task)["CallbackInfo"]["State"] == "Completed", 10)
    assert [(each["Id"], each["State"]) for each in received] == [(task["Id"], "Completed")]


def test_the_unique_key_is_held_between_attempts(flow: Flow) -> None:
    flow.headers = {"X-User": "anna"}
    Failing(flow, retry=LATER, unique=True)
    task = flow.start()
    waits(flow, task)
    assert flow.start()["Id"] == task["Id"]
    flow.stop(task)
    other = flow.start()
    assert other["Id"] != task["Id"]
    waits(flow, other)
    flow.stop(other)


def test_an_idempotency_key_returns_a_task_that_waits_for_a_retry(flow: Flow) -> None:
    headers = {"X-User": "anna", "Idempotency-Key": "k"}
    failing = Failing(flow, retry=LATER)
    task = flow.start(headers=headers)
    flow.headers = {"X-User": "anna"}
    waits(flow, task)
    again = flow.start(headers=headers)
    assert (again["Id"], again["State"]) == (task["Id"], "NotStarted")
    assert failing.attempts == [1]
    flow.stop(task)


def test_the_start_timeout_limits_only_the_wait_for_the_first_attempt(
    flow: Flow, eventually: Eventually
) -> None:
    Failing(flow, 1, start_timeout=0.4, retry=soon(1, delay=0.8))
    task = flow.run()
    assert (task["State"], task["Attempt"]) == ("Completed", 2)


# --- Logs and signals


def test_failed_attempts_are_logged_and_only_the_last_exception_is_sent(
    flow: Flow, executor: Any, hear: Hear, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    sent: list[BaseException] = []

    def receive(app: Flask, exception: BaseException, **extra: Any) -> None:
        sent.append(exception)

    Failing(flow, executor=executor, retry=soon())
    received = hear(*signals.PUBLIC_SIGNALS, sender=flow.app)
    with got_request_exception.connected_to(receive, sender=flow.app):
        task = flow.run()
        eventually(lambda: "task-finished" in [name for name, _ in received])
    records = [each for each in caplog.records if task["Id"] in each.getMessage()]
    warnings = [each for each in records if each.levelno == logging.WARNING]
    assert [each.getMessage() for each in warnings] == [
        f"Attempt {number} of task {task['Id']} failed; the task runs again." for number in (1, 2)
    ]
    assert all(each.exc_info and each.__dict__["task_id"] == task["Id"] for each in warnings)
    assert [str(error) for error in sent] == ["no 3"]
    assert len([each for each in records if each.levelno == logging.ERROR]) == 1
    names = [name for name, _ in received if name != "task-progressed"]
    again = ["task-started", "task-retried"]
    assert names == ["task-created", *again, *again, "task-started", "task-failed", "task-finished"]
    first = next(task for name, task in received if name == "task-retried")
    assert (first.state, first.attempt, first.last_error) == (
        State.NOT_STARTED, 2, "ValueError: no 1",
    )  # fmt: skip
    assert first.next_attempt_time is not None


def test_hidden_errors_are_hidden_in_every_attempt(make_flow: MakeFlow, store_url: str) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_EXPOSE_ERRORS=False)

    @flow.route(retry=soon())
    def work() -> None:
        if current_task.attempt == 1:
            raise ValueError("secret")
        current_task.retry(reason="secret")

    task = flow.start()
    ended = flow.ended(task)
    assert (ended["Error"], ended["LastError"]) == ("RetryRequested", "RetryRequested")
    assert "secret" not in str(read(flow.client, f"/task/{task['Id']}/events"))


# --- Restarts, other releases, and shutdowns


def test_the_stored_schedule_applies_and_on_is_that_of_the_present_route(
    make_app: Callable[..., Flask], store_url: str, tmp_path: Any
) -> None:
    if store_url == "memory://":
        pytest.skip("Its tasks do not survive a restart.")

    def release(**options: Any) -> tuple[Flow, Failing]:
        app = make_app(instance_path=tmp_path / "shared", ASYNCROUTE_STORE=store_url)
        flow = Flow(app, AsyncRoute(app))
        return flow, Failing(flow, **options)

    first, _ = release(retry=soon(2, delay=1, on=ValueError))
    tasks = [first.start() for _ in range(2)]
    for task in tasks:
        waits(first, task)
    runtime_of(first.app).close()
    # The next release has no retries, so every Exception counts.
    second, _ = release()
    runtime_of(second.app).become_runner()
    ended = second.ended(tasks[0])
    assert (ended["State"], ended["Attempt"]) == ("Failed", 3)
    assert second.ended(tasks[1])["Attempt"] == 3


def test_the_present_on_decides_about_a_stored_task(
    make_app: Callable[..., Flask], tmp_path: Any
) -> None:
    flows = []
    for kind in (ValueError, KeyError):
        app = make_app(instance_path=tmp_path / "shared")
        flow = Flow(app, AsyncRoute(app))
        Failing(flow, retry=soon(9, delay=0.5, on=kind))
        flows.append(flow)
    first, second = flows
    task = first.start()
    first.became(task, "NotStarted")
    waiting = waits(first, task)
    assert waiting["State"] == "NotStarted"
    runtime_of(first.app).close()
    runtime_of(second.app).become_runner()
    ended = second.ended(task)
    assert ended["State"] == "Failed" and ended["Attempt"] <= 3


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_loss_uses_no_retry(flow: Flow, gate: threading.Event) -> None:
    attempts: list[int] = []

    @flow.route(endpoint="work", retry=soon(1), on_loss="restart")
    def work() -> None:
        attempts.append(current_task.attempt)
        raise ValueError(f"no {current_task.attempt}")

    flow.route("/block", endpoint="block", max_workers=1, pool="p")(lambda: gate.wait(10))
    runner = runtime_of(flow.app).runner
    task = flow.start()
    ended = flow.ended(task)
    assert attempts == [1, 2] and ended["Attempt"] == 2
    # A worker that dies in the first attempt.
    stored = runner.store.get(task["Id"])
    assert stored is not None
    lost = new_task("lost", retry_json=stored.retry_json, on_loss="restart", endpoint="other")
    runner.store.add(lost, b"{}", None, ())
    for restarts in (1, 2):
        claim = runner.lifecycle.claim("lost")
        assert claim is not None
        assert (claim.task.attempt, claim.task.retries_left) == (1, 1)
        again = runner.lifecycle.recover(claim.task)
        assert again is not None
        assert (again.state, again.attempt, again.restarts) == (State.NOT_STARTED, 1, restarts)
        assert again.start_at_us is None
    claim = runner.lifecycle.claim("lost")
    assert claim is not None
    ended_lost = runner.lifecycle.recover(claim.task)
    assert ended_lost is not None and ended_lost.error == "Worker lost"


@pytest.mark.covers("F46")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize("on_loss", ["abort", "restart"])
def test_a_failure_that_was_not_stored_before_the_worker_died_follows_on_loss(
    flow: Flow, on_loss: str, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    failing = Failing(flow, retry=soon(1), on_loss=on_loss)
    runner = runtime_of(flow.app).runner
    written: list[Any] = []
    # The worker dies before it writes the failure.
    with monkeypatch.context() as patched:
        patched.setattr(runner.lifecycle, "retry", lambda *given: written.append(given))
        task = flow.start()
        eventually(lambda: written and not runner.dispatcher.running)
    stored = runner.store.get(task["Id"])
    assert stored is not None and stored.state is State.RUNNING
    runner.lifecycle.recover(stored)
    ended = flow.ended(task)
    if on_loss == "abort":
        assert (ended["State"], ended["Error"]) == ("Aborted", "Worker lost")
        assert failing.attempts == [1]
    else:
        assert (ended["State"], ended["Error"]) == ("Failed", "ValueError: no 2")
        assert failing.attempts == [1, 1, 2]


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_retry_waits_over_a_shutdown(flow: Flow) -> None:
    failing = Failing(flow, 1, retry=soon(1, delay=1))
    task = flow.start()
    waiting = waits(flow, task)
    runner = runtime_of(flow.app).runner
    shut_down({runner: 1.0})
    stored = runner.store.get(task["Id"])
    assert stored is not None and stored.state is State.NOT_STARTED
    runtime_of(flow.app).close()
    runtime_of(flow.app).become_runner()
    ended = flow.ended(task)
    assert (ended["State"], failing.attempts) == ("Completed", [1, 2])
    late = datetime.fromisoformat(ended["StartingTime"]) - datetime.fromisoformat(
        waiting["NextAttemptTime"]
    )
    assert timedelta(seconds=-0.1) < late < timedelta(seconds=2)


@pytest.mark.parametrize("executor", ["own", "immediate"], indirect=True)
def test_a_shutdown_aborts_retries_that_only_this_process_can_run(
    flow: Flow, executor: Any, eventually: Eventually
) -> None:
    failing = Failing(flow, executor=executor, retry=LATER)
    client = Flow(flow.app, flow.async_routes)
    thread = threading.Thread(target=client.start)
    thread.start()
    runner = runtime_of(flow.app).runner
    (task,) = eventually(
        lambda: [
            each for each in flow.query() if failing.attempts and each["State"] == "NotStarted"
        ]
    )
    eventually(lambda: not runner.dispatcher.running)
    shut_down({runner: 1.0})
    thread.join(10)
    ended = flow.ended(task)
    assert (ended["State"], ended["Error"]) == ("Aborted", "Server shutdown")


def test_a_shutdown_during_an_attempt_uses_no_retry(flow: Flow, begun: threading.Semaphore) -> None:
    @flow.route(retry=soon(on=BaseException))
    def work() -> None:
        begun.release()
        current_task.sleep(20)
        raise ValueError("because of the shutdown")

    task = flow.start()
    assert begun.acquire(timeout=5)
    shut_down({runtime_of(flow.app).runner: 0.0})
    ended = flow.ended(task)
    assert (ended["State"], ended["Error"], ended["Attempt"]) == ("Aborted", "Server shutdown", 1)


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_retry_of_a_task_that_another_process_has_ended_changes_nothing(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    @flow.route(retry=soon())
    def work() -> None:
        begun.release()
        gate.wait(10)
        raise ValueError

    task = flow.start()
    assert begun.acquire(timeout=5)
    store = runtime_of(flow.app).runner.store
    end = {"state": State.ABORTED, "completed_us": 1, "error": "x", "stopping": True}
    assert store.update(task["Id"], Expect((State.RUNNING,)), end) is not None
    gate.set()
    assert flow.still(task)["Error"] == "x"


# --- Child processes


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Flow]:
    app = child_app.create_app(
        ASYNCROUTE_STORE="sqlite:///asyncroute.db", TESTING=True, instance_path=str(tmp_path)
    )
    yield Flow(app, app.extensions["child_app"])
    close_app(app)
    child_app.disconnect_receivers(app)


@pytest.mark.parametrize(
    "how, last_error",
    [
        ("raise", "ValueError: no"),
        ("die", "Process died: SIGKILL"),
        ("exit", "Process died: exit code 3"),
        ("retry", "RetryRequested: busy"),
    ],
)
def test_a_task_in_a_child_process_runs_again(
    children: Flow, how: str, last_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = os.urandom(300_000)
    task = children.run(f"/retried/{how}", data=data)
    assert (task["State"], task["LastError"]) == ("Completed", last_error)
    assert (task["Attempt"], task["Result"]) == (2, [2, len(data)])
    errors = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert errors == []


def test_a_child_process_that_always_dies_fails_its_task(
    children: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    task = children.run("/retried/always")
    assert (task["State"], task["Attempt"]) == ("Failed", 2)
    assert task["Error"] == "Process died: SIGKILL"
    died = [each.levelno for each in caplog.records if "died" in each.getMessage()]
    assert died == [logging.WARNING, logging.ERROR]
