"""The quota of unfinished tasks per user, over all processes: ``ASYNCROUTE_MAX_TASKS_PER_USER``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute import AsyncRoute
from flask_asyncroute.runtime import runtime_of
from tests.support.apps import close_app, new_app
from tests.support.flow import Flow, identity_of_header, problem
from tests.support.waiting import eventually_true

MakeFlow = Callable[..., Flow]
ANNA, BEN = {"X-User": "anna"}, {"X-User": "ben"}


@pytest.fixture
def flow(make_flow: MakeFlow, store_url: str, gate: threading.Event) -> Flow:
    """Return an app whose users may have two unfinished tasks, with a view that waits."""
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_TASKS_PER_USER=2)

    @flow.route(max_workers=1, queue_size=5)
    def work() -> None:
        gate.wait(10)

    return flow


def refused(flow: Flow, **given: Any) -> dict[str, Any]:
    response = flow.request("POST", "/work", **given)
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    return problem(response, 429, "too-many-tasks")


@pytest.mark.covers("A70")
def test_a_user_over_the_quota_is_refused_and_others_are_served(flow: Flow) -> None:
    flow.app.config["ASYNCROUTE_LIST_ANONYMOUS"] = True
    for _ in range(2):
        flow.start(headers=ANNA)
    assert "2 unfinished tasks" in refused(flow, headers=ANNA)["detail"]
    assert len(flow.ids(headers=ANNA)) == 2
    flow.start(headers=BEN)
    for _ in range(3):
        flow.start()


@pytest.mark.covers("A70")
def test_a_start_over_the_quota_takes_no_slot(flow: Flow) -> None:
    for _ in range(2):
        flow.start(headers=ANNA)
    for _ in range(10):
        refused(flow, headers=ANNA)
    for _ in range(4):
        flow.start()
    problem(flow.request("POST", "/work"), 503, "queue-full")


@pytest.mark.covers("A70")
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}], ids=["plain", "with a key"])
def test_the_quota_is_checked_before_the_queue(flow: Flow, headers: dict[str, str]) -> None:
    waiting = [flow.start(headers=ANNA)["Id"] for _ in range(2)][1]
    for _ in range(4):
        flow.start()
    refused(flow, headers={**ANNA, **headers})
    problem(flow.request("POST", "/work", headers={**BEN, **headers}), 503, "queue-full")
    problem(flow.request("POST", "/work"), 503, "queue-full")
    flow.stop(waiting, headers=ANNA)
    flow.start()
    problem(flow.request("POST", "/work", headers={**ANNA, **headers}), 503, "queue-full")


@pytest.mark.covers("A70")
def test_a_finished_task_does_not_count(flow: Flow, gate: threading.Event) -> None:
    ids = [flow.start(headers=ANNA)["Id"] for _ in range(2)]
    flow.headers = ANNA
    flow.stop(ids[1])
    ids[1] = flow.start()["Id"]
    refused(flow)
    gate.set()
    for task_id in ids:
        flow.ended(task_id)
    flow.ended(flow.start())


@pytest.mark.covers("A70")
def test_a_start_with_a_large_body_over_the_quota_is_refused(
    flow: Flow, gate: threading.Event
) -> None:
    flow.headers = ANNA
    ids = [flow.start(data=b"x" * 600_000)["Id"] for _ in range(2)]
    refused(flow, data=b"x" * 600_000)
    refused(flow, headers={"Idempotency-Key": "k"}, data=b"x" * 600_000)
    gate.set()
    for task_id in ids:  # so that no run reads its body from a store that is deleted
        flow.ended(task_id)


@pytest.mark.covers("A70")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_quota_holds_over_processes(
    request: pytest.FixtureRequest, tmp_path: Any, gate: threading.Event, kind: str,
    separate_processes: None,
) -> None:  # fmt: skip
    """Two runners on one store, like two processes, start concurrently."""
    url = "sqlite:///quota.db" if kind == "sqlite" else request.getfixturevalue("postgresql_url")
    config = {"ASYNCROUTE_STORE": url, "ASYNCROUTE_MAX_TASKS_PER_USER": 3}
    flows = []
    try:
        for _ in range(2):
            app = new_app("app", tmp_path, config)
            async_routes = AsyncRoute(app)
            async_routes.identity_loader(identity_of_header)
            flows.append(Flow(app, async_routes))
            flows[-1].route(max_workers=1)(waiting_view(gate))
        barrier = threading.Barrier(12)
        answers: list[int] = []

        def start(flow: Flow) -> None:
            barrier.wait(10)
            answers.append(flow.app.test_client().post("/work", headers=ANNA).status_code)

        threads = [
            threading.Thread(target=start, args=(flows[number % 2],)) for number in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(answers) == [202] * 3 + [429] * 9
        flows[0].headers = ANNA
        gate.set()
        for task_id in flows[0].ids():
            flows[0].ended(task_id)
        for flow in flows:
            executors = runtime_of(flow.app).runner.executors
            eventually_true(
                lambda executors=executors: all(executor.free() == 1 for executor in executors)
            )
    finally:
        for flow in flows:
            close_app(flow.app)


def waiting_view(gate: threading.Event) -> Callable[[], None]:
    def work() -> None:
        gate.wait(10)

    return work
