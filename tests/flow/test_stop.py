"""Stop and purge: responses, order of the checks, and permissions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import abort

from flask_asyncroute import Access, Permission
from tests.support.flow import IN_MEMORY, Flow, assert_not_cached, loaded, problem

MakeFlow = Callable[..., Flow]

READERS = Permission(read=Access(groups=["readers"]), write=Access(groups=["writers"]))


@pytest.fixture
def tasks(flow: Flow, begun: threading.Semaphore, gate: threading.Event) -> dict[str, str]:
    """Return the ids of tasks of anna in each state, by name."""

    def add(name: str, view: Any, **options: Any) -> None:
        flow.route(f"/{name}", endpoint=name, permission=READERS, interrupt_after=None, **options)(
            view
        )

    def slow() -> str:
        begun.release()
        gate.wait(10)
        return "late"

    add("completed", lambda: 1)
    add("failed", lambda: abort(404))
    add("running", slow)
    add("fixed", slow, cancellable=False)
    add("aborted", slow, pool="one", max_workers=1)
    add("stopping", slow)
    flow.headers = {"X-User": "anna"}
    flow.start("/running")
    flow.start("/fixed")
    flow.start("/stopping")
    blocker = flow.start("/aborted")
    for _ in range(4):
        assert begun.acquire(timeout=5)
    found = {"aborted": flow.start("/aborted")["Id"], "blocker": blocker["Id"]}
    flow.stop(found["aborted"])
    flow.ended(flow.start("/completed"))
    flow.ended(flow.start("/failed"))
    for task in flow.query():
        name = task["AsyncRouteId"].partition("/")[2]
        found.setdefault(name, task["Id"])
    flow.stop(found["stopping"])
    flow.headers = {}
    return found


def test_the_order_of_the_checks(flow: Flow, tasks: dict[str, str], gate: threading.Event) -> None:
    def status(name: str, user: str | None, query: str = "") -> int:
        headers = {} if user is None else {"X-User": user}
        return flow.request("DELETE", f"/task/{tasks[name]}{query}", headers=headers).status_code

    for name in tasks:
        for nobody in (None, "bert", "bert;groups=Readers,writer;roles=readers;scopes=writers"):
            assert status(name, nobody) == 404
            assert status(name, nobody, "?purge=true") == 404
        assert status(name, "bert;groups=readers") == 403
        assert status(name, "bert;groups=readers", "?purge=true") == 403
    for writer in ("anna", "bert;groups=writers"):
        assert status("completed", writer) == status("failed", writer) == 410
        assert status("aborted", writer) == 200
        assert status("stopping", writer) == 200
        assert status("fixed", writer) == 423
        for name in ("running", "fixed", "stopping", "blocker"):
            assert status(name, writer, "?purge=true") == 409
    flow.headers = {"X-User": "anna"}
    assert flow.get(tasks["running"])["State"] == "Running"
    assert status("running", "bert;groups=writers") == 200
    assert flow.get(tasks["running"])["State"] == "Aborted"
    for name in ("completed", "failed", "aborted"):
        assert status(name, "bert;groups=writers", "?purge=true") == 204
        assert status(name, "anna") == 404
    gate.set()
    for name in ("running", "stopping"):
        flow.still(tasks[name])
        assert status(name, "anna", "?purge=true") == 204
    assert flow.ended(tasks["fixed"])["Result"] == "late"


def test_responses_to_a_stop(flow: Flow, gate: threading.Event) -> None:
    flow.route("/quick", endpoint="quick")(lambda: 1)
    flow.route("/fixed", endpoint="fixed", cancellable=False)(lambda: gate.wait(10) and None)
    flow.route("/slow", endpoint="slow")(lambda: gate.wait(10) and None)
    done, fixed, slow = flow.run("/quick"), flow.start("/fixed"), flow.start("/slow")
    found = problem(flow.request("DELETE", f"/task/{done['Id']}"), 410, "task-finished")
    assert found["Id"] == done["Id"] and "Completed" in found["detail"]
    assert (
        problem(flow.request("DELETE", f"/task/{fixed['Id']}"), 423, "not-cancellable")["Id"]
        == fixed["Id"]
    )
    response = flow.request("DELETE", f"/task?Id={slow['Id']}")
    assert response.status_code == 200
    assert loaded(response)["State"] == "Aborted"
    assert_not_cached(response)
    for headers in ({"Accept": "application/xml"}, {"Accept": "text/yaml"}):
        response = flow.request("DELETE", f"/task/{slow['Id']}", headers=headers)
        assert response.status_code == 200 and b"Aborted" in response.data
    gate.set()
    flow.ended(fixed)


@pytest.mark.parametrize(
    "accept", ["application/json", "application/xml", "application/yaml", "*/*"]
)
def test_a_purge_is_answered_204_without_a_body(flow: Flow, accept: str) -> None:
    flow.route(endpoint="work")(lambda: 1)
    for query in ("purge=true", "purge=True", "purge=TRUE"):
        task = flow.run()
        response = flow.request("DELETE", f"/task/{task['Id']}?{query}", headers={"Accept": accept})
        assert (response.status_code, response.data) == (204, b"")
        assert_not_cached(response)
        flow.get(task, status=404)
        problem(flow.request("DELETE", f"/task/{task['Id']}?{query}"), 404, "task-not-found")
    assert flow.query() == []


def test_a_purge_by_query(flow: Flow) -> None:
    flow.route(endpoint="work")(lambda: 1)
    task = flow.run()
    assert flow.request("DELETE", f"/task?purge=true&Id={task['Id']}").status_code == 204


@IN_MEMORY
@pytest.mark.parametrize(
    "query",
    [
        "purge=",
        "purge=1",
        "purge=yes",
        "purge=true&purge=true",
        "purge=true&purge=false",
        "purge",
        "purge=tru%C3%A9",
        "purge=%00",
    ],
)
def test_an_invalid_purge_parameter_is_refused(
    flow: Flow, gate: threading.Event, query: str
) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    assert (
        "purge"
        in problem(flow.request("DELETE", f"/task/{task['Id']}?{query}"), 400, "invalid-request")[
            "detail"
        ]
    )
    assert flow.get(task)["State"] in ("NotStarted", "Running")
    gate.set()
    flow.ended(task)
    flow.request("DELETE", f"/task/{task['Id']}?{query}")
    assert flow.get(task)["State"] == "Completed"


def test_purge_false_is_a_stop(flow: Flow, gate: threading.Event) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    assert (
        flow.request("DELETE", f"/task/{task['Id']}?purge=false").get_json()["State"] == "Aborted"
    )
    gate.set()
    flow.still(task)


def test_a_purge_of_an_unfinished_task_is_refused(flow: Flow, gate: threading.Event) -> None:
    @flow.route(max_workers=1)
    def work() -> None:
        gate.wait(10)

    running, waiting = flow.start(), flow.start()
    flow.became(running, "Running")
    for task, state in ((running, "Running"), (waiting, "NotStarted")):
        response = flow.purge(task, status=409)
        found = problem(response, 409, "task-unfinished")
        assert state in found["detail"] and found["Id"] == task["Id"]
        assert int(response.headers["Retry-After"]) > 0
    gate.set()
    for task in (running, waiting):
        flow.ended(task)
        flow.purge(task)


def test_a_purged_id_can_be_used_again(flow: Flow) -> None:
    flow.route(endpoint="work", id_generator=lambda: "one")(lambda: 1)
    for _ in range(3):
        flow.run()
        flow.purge("one")


def test_a_stop_by_another_user_keeps_owner_and_permission(
    flow: Flow, gate: threading.Event
) -> None:
    flow.route(endpoint="work", permission=READERS)(lambda: gate.wait(10) and None)
    task = flow.start(headers={"X-User": "anna"})
    stopped = flow.stop(task, headers={"X-User": "bert;groups=writers"})
    assert stopped["User"] == "anna" and stopped["Permission"] == task["Permission"]
    gate.set()


@IN_MEMORY
def test_other_methods_on_operations_are_refused(flow: Flow) -> None:
    for method in ("PUT", "POST", "PATCH"):
        assert flow.request(method, "/task/x").status_code == 405
        assert flow.request(method, "/task/x/result").status_code == 405
    assert flow.request("DELETE", "/tasks").status_code == 405
    assert flow.request("GET", "/tasks/query").status_code in (404, 405)
    assert flow.request("DELETE", "/task/x/result").status_code == 405
