"""Processes that serve requests and leave tasks to workers: ``ASYNCROUTE_RUN_TASKS = False``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import request

from flask_asyncroute import current_task
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.testing import inline
from flask_asyncroute.workers.role import Role
from tests.support.event_streams import opened
from tests.support.flow import Flow, problem

MakeFlow = Callable[..., Flow]
MakePair = Callable[..., tuple[Flow, Flow]]
pytestmark = [
    pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True),
    pytest.mark.usefixtures("separate_processes"),
]


@pytest.fixture
def make_pair(
    make_flow: MakeFlow, store_url: str, tmp_path: Any, gate: threading.Event
) -> MakePair:
    """Return ``make_pair(**config)``, which returns the app of a web server and that of a worker.

    The worker takes no tasks before `begin`.
    """

    def make(**config: Any) -> tuple[Flow, Flow]:
        shared = {"instance_path": tmp_path / "shared", "ASYNCROUTE_STORE": store_url, **config}
        pair = (
            make_flow(ASYNCROUTE_RUN_TASKS=False, **shared),
            # The command ignores the key.
            make_flow(ASYNCROUTE_RUN_TASKS=False, **shared),
        )
        for name, flow in zip(("web", "worker"), pair, strict=True):

            @flow.route(max_workers=1, queue_size=2)
            def work(ran_by: str = name) -> str:
                return ran_by

            @flow.route("/hold", max_workers=1)
            def hold(ran_by: str = name) -> str:
                while not gate.wait(0.01):
                    current_task.check()
                return ran_by

        return pair

    return make


def begin(worker: Flow, *endpoints: str, slots: int | None = None) -> None:
    """Make the process of an app a worker."""
    role = Role(frozenset(endpoints or ("work", "hold")), slots, is_worker=True)
    runtime_of(worker.app).become_worker(role)


def test_tasks_wait_for_a_worker(make_pair: MakePair, eventually: Callable[..., Any]) -> None:
    web, worker = make_pair()
    runtime_of(web.app).become_runner()
    task = web.start()
    runner = runtime_of(web.app).runner
    runner._take_over()
    assert not runner.dispatcher.running
    assert web.get(task)["State"] == "NotStarted"
    begin(worker)
    assert web.ended(task)["Result"] == "worker"


def test_a_worker_runs_later_tasks_too(make_pair: MakePair) -> None:
    web, worker = make_pair()
    begin(worker)
    assert [web.result() for _ in range(3)] == ["worker"] * 3


def test_a_submitted_task_waits_for_a_worker(make_pair: MakePair) -> None:
    web, worker = make_pair()
    runtime_of(web.app).become_runner()
    with web.app.app_context():
        task = web.async_routes.submit("work")
        begin(worker)
        assert web.async_routes.wait(task.id, 10).result == "worker"


def test_the_web_server_stops_and_streams_tasks_of_workers(make_pair: MakePair) -> None:
    web, worker = make_pair()
    begin(worker)
    task = web.start("/hold")
    stream = opened(web.client, f"/task/{task['Id']}/events")
    try:
        web.became(task, "Running")
        assert web.stop(task)["State"] == "Aborted"
        text = "".join(chunk.decode() for chunk in stream.iter_encoded())
    finally:
        stream.close()
    assert '"State":"Running"' in text and '"State":"Aborted"' in text
    assert web.still(task)["Error"] == "Aborted by the user"


def test_the_queue_is_full_when_too_many_tasks_wait_in_the_store(
    make_pair: MakePair, make_flow: MakeFlow, eventually: Callable[..., Any]
) -> None:
    web, worker = make_pair()
    tasks = [web.start() for _ in range(3)]
    document = problem(web.request("POST", "/work"), 503, "queue-full")
    assert "3 tasks are waiting" in document["detail"]
    web.start("/hold")  # another pool
    begin(worker)
    for task in tasks:
        web.ended(task)
    eventually(lambda: web.request("POST", "/work").status_code == 202)


def test_tasks_of_other_web_servers_fill_the_queue_too(make_pair: MakePair) -> None:
    one, two = make_pair()
    for _ in range(3):
        one.start()
    problem(two.request("POST", "/work"), 503, "queue-full")


def test_the_quota_of_a_user_counts_tasks_that_wait_for_a_worker(make_pair: MakePair) -> None:
    web, _ = make_pair(ASYNCROUTE_MAX_TASKS_PER_USER=1)
    web.start("/hold", headers={"X-User": "anna"})
    answer = web.request("POST", "/work", headers={"X-User": "anna"})
    problem(answer, 429, "too-many-tasks")
    web.start(headers={"X-User": "ben"})


def test_immediate_tasks_and_those_of_an_own_executor_run_in_the_web_server(
    make_pair: MakePair, own_pool: ThreadPoolExecutor
) -> None:
    web, _ = make_pair()

    @web.route("/at-once", executor="immediate")
    def at_once() -> str:
        return request.path

    @web.route("/own", executor=own_pool)
    def own() -> str:
        return request.path

    assert [web.result(path) for path in ("/at-once", "/own")] == ["/at-once", "/own"]


def test_each_process_lists_the_endpoints_that_it_runs(
    make_pair: MakePair, own_pool: ThreadPoolExecutor
) -> None:
    web, worker = make_pair()
    for flow in (web, worker):

        @flow.route("/at-once", executor="immediate")
        def at_once() -> None: ...

        @flow.route("/own", executor=own_pool)
        def own() -> None: ...

    begin(worker, "hold")
    runners = [runtime_of(flow.app).runner for flow in (web, worker)]
    for runner in runners:
        runner.enter()
    listed = {row.name: row for row in runners[0].store.workers.listed()}
    rows = [listed[runner.lifecycle.owner] for runner in runners]
    assert [row.endpoints for row in rows] == [{"at_once", "own"}, {"hold"}]
    assert [set(row.views) for row in rows] == [{"work", "hold", "at_once", "own"}] * 2


def test_a_worker_for_some_routes_leaves_the_others(
    make_pair: MakePair, eventually: Callable[..., Any]
) -> None:
    """Also those that its own views submit, in a pool that they share."""
    web, worker = make_pair()
    for flow in (web, worker):

        @flow.route("/first", pool="shared")
        def first(flow: Flow = flow) -> str:
            return flow.async_routes.submit("second").id

        @flow.route("/second", pool="shared")
        def second() -> str:
            return "second"

    begin(worker, "first")
    left = web.result("/first")
    assert web.get(left)["State"] == "NotStarted"
    assert (
        not runtime_of(worker.app)
        .runner.executor_of(runtime_of(worker.app).routes["first"])
        .holds(left)
    )
    begin(web, "second")
    assert web.ended(left)["Result"] == "second"


def test_the_slots_of_a_worker_replace_max_workers(
    make_pair: MakePair, gate: threading.Event
) -> None:
    web, worker = make_pair()
    begin(worker, slots=3)
    tasks = [web.start("/hold") for _ in range(3)]
    for task in tasks:
        web.became(task, "Running")
    gate.set()
    assert [web.ended(task)["State"] for task in tasks] == ["Completed"] * 3


def test_an_app_that_has_already_started_becomes_a_worker(make_pair: MakePair) -> None:
    """Modules can call ``start()`` while they are loaded."""
    web, worker = make_pair()
    worker.async_routes.start(worker.app)
    begin(worker)
    assert web.result() == "worker"


def test_inline_runs_tasks_whatever_the_key_says(make_pair: MakePair) -> None:
    web, _ = make_pair()
    with inline(web.app):
        assert web.start()["Result"] == "web"
