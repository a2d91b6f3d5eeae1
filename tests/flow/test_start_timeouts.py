"""The option ``start_timeout``: tasks that wait too long for their first start are aborted."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from flask_asyncroute import AsyncRoute, AsyncRouteTask, Callback, signals
from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.task import State, now_us
from flask_asyncroute.testing import inline
from flask_asyncroute.workers.runner import Runner
from tests.support.event_streams import read
from tests.support.flow import NOT_ON_CELERY, Flow
from tests.support.tasks import new_task

MakeFlow = Callable[..., Flow]
Eventually = Callable[..., Any]
Hear = Callable[..., list[tuple[str, AsyncRouteTask]]]
HOUR_NS = 3_600_000_000_000


class Busy:
    """An app whose two workers are busy until ``gate`` is set. Tasks of ``/work`` wait for them.

    :param options: of the route ``/work``.
    """

    def __init__(
        self, flow: Flow, gate: threading.Event, executor: Any = "thread", **options: Any
    ) -> None:
        self.flow = flow
        self.gate = gate
        self.ran: list[str] = []
        begun = threading.Semaphore(0)
        pool = {"executor": executor, "pool": "p", "max_workers": 2, "queue_size": 1}

        @flow.route("/block", endpoint="block", start_timeout=None, **pool)
        def block() -> None:
            begun.release()
            gate.wait(20)

        @flow.route("/work", endpoint="work", **pool, **options)
        def work() -> None:
            self.ran.append("work")

        self.blocking = [flow.start("/block") for _ in range(2)]
        for _ in self.blocking:
            assert begun.acquire(timeout=5)

    @property
    def runner(self) -> Runner:
        return runtime_of(self.flow.app).runner

    def stored(self, task: dict[str, Any]) -> AsyncRouteTask:
        found = self.runner.store.get(task["Id"])
        assert found is not None
        return found


def assert_expired(task: dict[str, Any]) -> None:
    assert (task["State"], task["Error"]) == ("Aborted", "Expired"), task
    assert "StartingTime" not in task and "Stopping" not in task


@pytest.fixture
def never_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the check every second."""
    monkeypatch.setattr(Lifecycle, "abort_expired", lambda self: None)


@NOT_ON_CELERY
def test_a_task_that_waits_too_long_is_aborted_and_frees_its_slot(
    flow: Flow, later_executor: Any, gate: threading.Event, eventually: Eventually
) -> None:
    busy = Busy(flow, gate, later_executor, start_timeout=0.1)
    task = flow.start()
    flow.start(status=503)
    assert_expired(ended := flow.ended(task))
    eventually(lambda: flow.request("POST", "/work").status_code == 202)
    for blocking in busy.blocking:
        assert flow.get(blocking)["State"] == "Running"
    gate.set()
    for blocking in busy.blocking:
        assert flow.ended(blocking)["State"] == "Completed"
    assert flow.get(task) == ended


def test_a_task_that_starts_in_time_never_expires(
    flow: Flow,
    gate: threading.Event,
    begun: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @flow.route(start_timeout=60)
    def work() -> str:
        begun.release()
        gate.wait(20)
        return "done"

    task = flow.start()
    assert begun.acquire(timeout=5)
    runner = runtime_of(flow.app).runner
    stored = runner.store.get(task["Id"])
    assert stored is not None and stored.start_by_us == stored.created_us + 60_000_000
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + HOUR_NS)
    runner.lifecycle.abort_expired()
    assert flow.get(task)["State"] == "Running"
    gate.set()
    assert flow.ended(task)["Result"] == "done"


def test_an_expired_task_sends_the_signals_and_log_message_of_an_abort(
    flow: Flow,
    gate: threading.Event,
    hear: Hear,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
) -> None:
    Busy(flow, gate, start_timeout=0.1)
    caplog.set_level(logging.INFO, "flask_asyncroute")
    received = hear(*signals.PUBLIC_SIGNALS, sender=flow.app)
    task = flow.start()
    flow.ended(task)
    gate.set()
    # The signals are sent after the commit, which a reader can see earlier.
    eventually(
        lambda: "task-finished" in [name for name, told in received if told.id == task["Id"]]
    )
    of_task = [(name, told) for name, told in received if told.id == task["Id"]]
    assert [name for name, _ in of_task] == ["task-created", "task-aborted", "task-finished"]
    assert of_task[1][1].error == "Expired"
    (line,) = [r.getMessage() for r in caplog.records if task["Id"] in r.getMessage()]
    assert re.fullmatch(
        r"Task \S+ of endpoint work is Aborted after \d\.\d{3} s of waiting\.", line
    )


def test_waits_and_streams_end_with_an_expired_task(flow: Flow, gate: threading.Event) -> None:
    Busy(flow, gate, start_timeout=0.1)
    task = flow.start()
    told = read(flow.client, f"/task/{task['Id']}/events")
    assert (told[0].short, told[-1].short) == ("NotStarted", "Aborted")
    assert told[-1].data["Error"] == "Expired"
    assert_expired(flow.get(f"{flow.start()['Id']}?wait=10"))
    gate.set()


def test_an_expired_task_sends_its_callback(
    make_flow: MakeFlow,
    store_url: str,
    gate: threading.Event,
    httpserver: HTTPServer,
    eventually: Eventually,
) -> None:
    received: list[Any] = []

    def record(current: Request) -> Response:
        received.append(current.get_json())
        return Response(status=200)

    httpserver.expect_request("/hook").respond_with_handler(record)
    flow = make_flow(
        ASYNCROUTE_STORE=store_url, ASYNCROUTE_CALLBACK_ALLOWED_HOSTS=["localhost", "127.0.0.1"]
    )
    Busy(flow, gate, start_timeout=0.1, callback=Callback())
    task = flow.start(json={"callbackUrl": httpserver.url_for("/hook")})
    eventually(lambda: received, 10)
    assert (received[0]["Id"], received[0]["State"]) == (task["Id"], "Aborted")
    assert received[0]["Error"] == "Expired"
    gate.set()


def test_a_task_expires_in_a_process_that_has_run_no_task(
    flow: Flow, own_pool: ThreadPoolExecutor, gate: threading.Event
) -> None:
    """The threads of the app's own Executor do other work."""
    for _ in range(2):
        own_pool.submit(gate.wait, 20)
    ran: list[int] = []
    flow.route(executor=own_pool, start_timeout=0.1)(lambda: ran.append(1))
    assert_expired(flow.ended(flow.start()))
    gate.set()
    own_pool.shutdown(wait=True)
    assert ran == []


@pytest.mark.usefixtures("never_checked")
def test_a_late_start_of_a_bound_task_aborts_it(
    flow: Flow, own_pool: ThreadPoolExecutor, gate: threading.Event, eventually: Eventually
) -> None:
    busy = Busy(flow, gate, own_pool, start_timeout=0.001)
    task = flow.start()
    stored = busy.stored(task)
    eventually(lambda: now_us() > (stored.start_by_us or 0))
    gate.set()
    assert_expired(flow.ended(task))
    assert busy.ran == []


@pytest.mark.usefixtures("never_checked")
def test_a_late_start_is_refused_until_the_check_aborts_the_task(
    flow: Flow, gate: threading.Event, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(flow, gate, start_timeout=0.001)
    task = flow.start()
    stored = busy.stored(task)
    eventually(lambda: now_us() > (stored.start_by_us or 0))
    gate.set()
    (executor,) = busy.runner.executors
    eventually(lambda: not executor.holds(task["Id"]))
    assert flow.get(task)["State"] == "NotStarted"
    monkeypatch.undo()
    busy.runner.lifecycle.abort_expired()
    assert_expired(flow.get(task))
    assert busy.ran == []


@pytest.mark.usefixtures("separate_processes")
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_task_that_another_process_aborts_frees_its_slot(
    make_app: Callable[..., Flask],
    store_url: str,
    gate: threading.Event,
    eventually: Eventually,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flows = []
    for _ in range(2):
        app = make_app(instance_path=tmp_path / "shared", ASYNCROUTE_STORE=store_url)
        flows.append(Flow(app, AsyncRoute(app)))
    holder, other = flows
    busy = Busy(holder, gate, start_timeout=0.1)
    (job,) = (
        job
        for job in busy.runner.maintenance._jobs
        if job.work == busy.runner.lifecycle.abort_expired
    )
    monkeypatch.setattr(job, "work", lambda: None)
    task = holder.start()
    stored = busy.stored(task)
    (executor,) = busy.runner.executors
    assert executor.holds(task["Id"])
    eventually(lambda: now_us() > (stored.start_by_us or 0))
    runtime_of(other.app).runner.lifecycle.abort_expired()
    assert_expired(holder.get(task))
    eventually(lambda: not executor.holds(task["Id"]))
    assert holder.start()["State"] == "NotStarted"
    gate.set()


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_tasks_that_waited_too_long_before_a_restart_expire_soon(
    make_flow: MakeFlow, store_url: str, eventually: Eventually
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url)
    ran: list[int] = []
    flow.route(endpoint="work")(lambda: ran.append(1))
    runner = runtime_of(flow.app).runner
    for number in range(20):
        created = now_us() - 60_000_000
        task = new_task(f"t{number}", created_us=created, start_by_us=created + 1_000_000)
        runner.store.add(task, b"{}", None, ())
    runtime_of(flow.app).close()
    began = time.monotonic()
    runtime_of(flow.app).become_runner()
    eventually(lambda: {task["State"] for task in flow.query()} == {"Aborted"}, 10)
    assert time.monotonic() - began < 5
    assert {task["Error"] for task in flow.query()} == {"Expired"}
    assert ran == []


@pytest.mark.parametrize("is_inline", [True, False])
def test_a_task_that_never_waits_does_not_expire(make_flow: MakeFlow, is_inline: bool) -> None:
    flow = make_flow()
    flow.route(executor="thread" if is_inline else "immediate", start_timeout=0.000001)(lambda: 1)
    if is_inline:
        inline(flow.app)
    assert flow.start()["Result"] == 1


def test_the_start_timeout_of_the_configuration(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow(ASYNCROUTE_START_TIMEOUT=timedelta(seconds=0.1))
    Busy(flow, gate)
    assert_expired(flow.ended(flow.start()))
    gate.set()


def test_none_overrides_the_start_timeout_of_the_configuration(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_START_TIMEOUT=0.1)
    busy = Busy(flow, gate, start_timeout=None)
    task = flow.start()
    assert busy.stored(task).start_by_us is None
    busy.runner.lifecycle.abort_expired()
    gate.set()
    assert flow.ended(task)["State"] == "Completed"


def test_a_task_does_not_expire_early_if_the_clock_is_set_back(
    flow: Flow, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(flow, gate, start_timeout=0.1)
    real = time.time_ns
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: real() + HOUR_NS)
        task = flow.start()
        assert busy.stored(task).state is State.NOT_STARTED
        patched.setattr(time, "time_ns", real)
        busy.runner.lifecycle.abort_expired()
        assert flow.get(task)["State"] == "NotStarted"
        gate.set()
        assert flow.ended(task)["State"] == "Completed"


def test_a_restarted_task_may_wait_longer(flow: Flow, gate: threading.Event) -> None:
    """Only the wait for the first start is limited."""
    busy = Busy(flow, gate, start_timeout=600, on_loss="restart")
    task = flow.start()
    claim = busy.runner.lifecycle.claim(task["Id"])
    assert claim is not None
    assert busy.runner.lifecycle.recover(claim.task) is not None
    stored = busy.stored(task)
    assert (stored.state, stored.start_by_us) == (State.NOT_STARTED, None)
    gate.set()
    assert flow.ended(task)["State"] == "Completed"
    assert busy.ran == ["work"]


def test_a_store_that_answers_late_starts_no_view(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim compares the limit with the time at which it began."""
    ran: list[str] = []

    @flow.route("/late", endpoint="late", start_timeout=0.2)
    def late() -> None:
        ran.append("late")

    store = runtime_of(flow.app).runner.store
    claim = store.claim

    def slow(task_id: str, owner: str, began_us: int) -> Any:
        task = store.get(task_id)
        assert task is not None and task.start_by_us is not None
        found = claim(task_id, owner, began_us)
        while now_us() <= task.start_by_us:
            time.sleep(0.01)
        return found

    monkeypatch.setattr(store, "claim", slow)
    assert_expired(flow.ended(flow.start("/late")))
    assert not ran
