"""More starts than slots: each start is accepted or refused, and a refused start leaves nothing
behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from flask_asyncroute import Permission, State, current_task
from flask_asyncroute.errors import IdTaken, KeyTaken, StoreUnavailable, TooManyTasks
from flask_asyncroute.runtime import runtime_of
from tests.support.flow import IN_MEMORY, Flow, problem

MakeFlow = Callable[..., Flow]
MAX_WORKERS, QUEUE_SIZE, QUOTA = 2, 8, 4
CLIENTS, EACH = 10, 10
"""Together, ten times as many starts as slots."""


@pytest.mark.covers("A69")
def test_each_start_of_a_flood_is_accepted_or_refused(
    make_flow: MakeFlow, store_url: str, gate: threading.Event, eventually: Callable[..., Any]
) -> None:
    flow = make_flow(
        ASYNCROUTE_STORE=store_url,
        ASYNCROUTE_MAX_TASKS_PER_USER=QUOTA,
        ASYNCROUTE_LIST_ANONYMOUS=True,
    )

    @flow.route(max_workers=MAX_WORKERS, queue_size=QUEUE_SIZE)
    def work() -> None:
        gate.wait(30)

    answers: list[TestResponse] = []

    def flood(number: int) -> None:
        client = flow.app.test_client(use_cookies=False)
        for turn in range(EACH):
            headers = {"X-User": f"user{number % 2}"} if number < 6 else {}
            if number in (0, 7):
                headers |= {"Idempotency-Key": f"{number}-{turn}", "Cookie": f"c={number}"}
            answers.append(
                client.post(
                    "/work", data=b"x" * 300_000 if turn % 5 == 0 else b"x", headers=headers
                )
            )

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    accepted = {answer.get_json()["Id"] for answer in answers if answer.status_code == 202}
    refused = [answer for answer in answers if answer.status_code != 202]
    assert len(answers) == CLIENTS * EACH
    # A start that was then over its quota may have held a slot meanwhile.
    while (response := flow.request("POST", "/work")).status_code == 202:
        accepted.add(response.get_json()["Id"])
    assert len(accepted) == MAX_WORKERS + QUEUE_SIZE
    assert {answer.status_code for answer in refused} <= {429, 503}
    for answer in refused:
        problem(
            answer,
            answer.status_code,
            "queue-full" if answer.status_code == 503 else "too-many-tasks",
        )
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    callers = ({"X-User": "user0"}, {"X-User": "user1"}, {})
    stored = {task_id for headers in callers for task_id in flow.ids("limit=500", headers=headers)}
    assert stored == accepted
    gate.set()
    runner = runtime_of(flow.app).runner
    eventually(lambda: all(executor.free() == MAX_WORKERS for executor in runner.executors))
    with flow.app.app_context():
        assert {flow.async_routes.wait(task_id, 5).state for task_id in accepted} == {
            State.COMPLETED
        }


def test_retry_after_follows_the_duration_of_tasks(
    flow: Flow, begun: threading.Semaphore, gate: threading.Event
) -> None:
    @flow.route(max_workers=2, queue_size=0)
    def work() -> None:
        begun.release()
        gate.wait(10)

    unknown = flow.request("POST", "/work")
    assert unknown.headers["Retry-After"] == "1"
    run_times = runtime_of(flow.app).runner.dispatcher.run_times
    run_times._means_us["work"] = 30_500_000
    queued = flow.request("POST", "/work")
    assert queued.headers["Retry-After"] == "31"
    for _ in range(2):
        assert begun.acquire(timeout=5)
    assert flow.request("GET", queued.headers["Location"]).headers["Retry-After"] in ("30", "31")
    assert flow.request("GET", queued.headers["Location"] + "/result").headers["Retry-After"] in (
        "30",
        "31",
    )
    full = flow.request("POST", "/work")
    assert (full.status_code, full.headers["Retry-After"]) == (503, "16")
    gate.set()
    done = flow.ended(queued.get_json())
    assert "Retry-After" not in flow.request("GET", f"/task/{done['Id']}").headers


@IN_MEMORY
def test_the_mean_duration_is_measured(flow: Flow) -> None:
    @flow.route()
    def work() -> None:
        current_task.sleep(0.05)

    flow.run()
    assert 40_000 < runtime_of(flow.app).runner.dispatcher.run_times._means_us["work"] < 5_000_000


class HoldingExecutor(Executor):
    """Accepts calls without running them, or refuses them."""

    is_willing = True

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.is_willing:
            raise RuntimeError("no")
        return Future()


FAULTS: dict[str, Any] = {
    "none": None,
    "id": IdTaken("x"),
    "quota": TooManyTasks("x"),
    "key": KeyTaken("x"),
    "store": StoreUnavailable("x", retry_after=5),
    "bug": ZeroDivisionError("x"),
    "exit": KeyboardInterrupt(),
}


@pytest.mark.covers("A69")
@IN_MEMORY
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    starts=st.lists(
        st.tuples(
            st.sampled_from(list(FAULTS)), st.booleans(), st.sampled_from(["fine", "permission", "id"]), st.booleans(),
            st.sampled_from([None, "a", "b"]),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_a_failed_start_releases_its_slot(
    make_flow: MakeFlow, store_url: str, starts: list[tuple[str, bool, str, bool, str | None]]
) -> None:
    flow = make_flow()
    executor = HoldingExecutor()
    failing = [""]

    def permission() -> Permission:
        if failing[0] == "permission":
            raise ValueError
        return Permission()

    def new_id() -> str:
        if failing[0] == "id":
            raise ValueError
        return f"id-{len(runtime_of(flow.app).runner.store._tasks)}"

    @flow.route(
        executor=executor, max_workers=100, queue_size=0, permission=permission, id_generator=new_id
    )
    def work() -> None: ...

    flow.app.config["PROPAGATE_EXCEPTIONS"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flask_asyncroute.request.submission.logger.disabled", True)
        patch.setattr(flow.app.logger, "disabled", True)
        flow.request("GET", "/task/x")
        runner = runtime_of(flow.app).runner
        for fault, is_willing, failing[0], has_body, key in starts:
            executor.is_willing = is_willing
            headers = {"X-User": "anna"} | ({} if key is None else {"Idempotency-Key": key})
            body = b"x" * 300_000 if has_body else b""
            add = (
                runner.store.add if FAULTS[fault] is None else mock.Mock(side_effect=FAULTS[fault])
            )
            with mock.patch.object(runner.store, "add", add):
                try:
                    flow.request("POST", "/work", headers=headers, data=body)
                except KeyboardInterrupt:
                    pass
            assert runner.executor_of(runner.routes["work"]).free() == 100 - len(
                flow.ids(headers=headers)
            )
