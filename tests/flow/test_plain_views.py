"""Plain views that stop, purge and check tasks: error responses, permissions, and the same errors
in tasks and scripts.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, got_request_exception
from werkzeug.exceptions import HTTPException, NotFound

from flask_asyncroute import (
    Access,
    AsyncRoute,
    AsyncRouteError,
    AsyncRouteTask,
    CannotStart,
    NotCancellable,
    Permission,
    State,
    TaskFinished,
    TaskNotFound,
    TaskUnfinished,
)
from tests.support.flow import IN_MEMORY, Flow, problem

MakeFlow = Callable[..., Flow]
MakeApp = Callable[..., Flask]

ERRORS = [(TaskNotFound, 404), (TaskUnfinished, 409), (TaskFinished, 410), (NotCancellable, 423)]
BY_STATUS = pytest.mark.parametrize(("error", "status"), ERRORS)


@pytest.fixture
def views(flow: Flow, gate: threading.Event) -> Flow:
    """Return an app with plain views that stop and purge tasks and catch no errors."""

    @flow.app.get("/stop/<task_id>")
    def stop_task(task_id: str) -> dict[str, Any]:
        return flow.async_routes.stop(task_id).to_dict()

    @flow.app.get("/purge/<task_id>")
    def purge_task(task_id: str) -> dict[str, Any]:
        flow.async_routes.purge(task_id)
        return {}

    @flow.route("/quick")
    def quick() -> int:
        return 1

    @flow.route("/slow", interrupt_after=None)
    def slow() -> None:
        gate.wait(10)

    @flow.route("/kept", cancellable=False)
    def kept() -> None:
        gate.wait(10)

    return flow


def refused_urls(flow: Flow) -> dict[str, int]:
    """Return the paths of requests that are refused, with the status of each."""
    quick, slow, kept = flow.run("/quick"), flow.start("/slow"), flow.start("/kept")
    return {
        "/stop/unknown": 404,
        f"/stop/{quick['Id']}": 410,
        f"/stop/{kept['Id']}": 423,
        "/purge/unknown": 404,
        f"/purge/{slow['Id']}": 409,
    }


def test_a_plain_view_may_let_the_errors_through(views: Flow) -> None:
    for path, status in refused_urls(views).items():
        response = views.request("GET", path)
        assert (response.status_code, response.mimetype) == (status, "text/html")
        assert f"<title>{status} " in response.text
        assert response.headers.get("Retry-After") == ("1" if status == 409 else None)


def test_error_handlers_of_the_app_receive_the_errors(views: Flow) -> None:
    def answer(error: HTTPException) -> tuple[dict[str, Any], int]:
        assert isinstance(error, AsyncRouteError)
        assert error.code is not None
        return {"handled": error.code, "message": error.description, "name": error.name}, error.code

    for status in (404, 409, 410, 423):
        views.app.register_error_handler(status, answer)
    for path, status in refused_urls(views).items():
        response = views.request("GET", path)
        assert (response.status_code, response.get_json()["handled"]) == (status, status)
        assert response.get_json()["message"]
    missing = views.request("GET", "/stop/unknown").get_json()
    assert missing["message"] == "There is no task with this id, or you may not read it."
    assert missing["name"] == "Not Found"


@IN_MEMORY
@pytest.mark.parametrize(
    "registered", [TaskNotFound, NotFound, AsyncRouteError, LookupError, HTTPException]
)
def test_an_error_handler_for_a_class_receives_the_error(
    views: Flow, registered: type[Exception]
) -> None:
    views.app.register_error_handler(registered, lambda error: ("mine", 418))
    response = views.request("GET", "/purge/unknown")
    assert (response.status_code, response.text) == (418, "mine")


@IN_MEMORY
def test_an_error_in_a_plain_view_is_not_logged(
    views: Flow, caplog: pytest.LogCaptureFixture, listen: Any
) -> None:
    reported: list[BaseException] = []
    listen(
        lambda app, exception, **extra: reported.append(exception),
        got_request_exception,
        sender=views.app,
    )
    assert views.request("GET", "/stop/unknown").status_code == 404
    assert reported == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_operations_answer_with_problems_despite_error_handlers(
    views: Flow, gate: threading.Event
) -> None:
    for status in (404, 409, 410, 423):
        views.app.register_error_handler(status, lambda error: ("mine", 418))
    quick, slow, kept = views.run("/quick"), views.start("/slow"), views.start("/kept")
    for task_id, query, status, slug in (
        ("unknown", "", 404, "task-not-found"),
        (quick["Id"], "", 410, "task-finished"),
        (kept["Id"], "", 423, "not-cancellable"),
        (slow["Id"], "?purge=true", 409, "task-unfinished"),
    ):
        response = views.request("DELETE", f"/task/{task_id}{query}")
        document = problem(response, status, slug)
        assert document.keys() == {
            "type", "title", "status", "detail", "instance", "Id", "Error",
        }  # fmt: skip
        assert document["title"] == slug.replace("-", " ").capitalize()
        assert document["Id"] == task_id
        assert document["Error"] == document["detail"]
        assert response.headers.get("Retry-After") == ("1" if status == 409 else None)


@BY_STATUS
def test_the_errors_are_http_exceptions(error: type[Any], status: int) -> None:
    assert issubclass(error, HTTPException) and issubclass(error, AsyncRouteError)
    assert (error.code, error.status) == (status, status)
    raised = error("What is <wrong>.", task_id="one", retry_after=3)
    assert str(raised) == raised.detail == raised.description == "What is <wrong>."
    assert repr(raised) == f"{error.__name__}('What is <wrong>.')"
    response = raised.get_response()
    assert (response.status_code, response.headers["Retry-After"]) == (status, "3")
    assert "What is &lt;wrong&gt;." in response.get_data(as_text=True)
    copy = pickle.loads(pickle.dumps(raised))
    assert (copy.detail, copy.task_id, copy.retry_after) == ("What is <wrong>.", "one", 3)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda routes, ids: routes.stop("unknown"), "TaskNotFound: There is no task with this id"),
        (lambda routes, ids: routes.stop(ids["/quick"]), "TaskFinished: The task has ended"),
        (lambda routes, ids: routes.stop(ids["/kept"]), "NotCancellable: This task cannot be"),
        (lambda routes, ids: routes.purge(ids["/slow"]), "TaskUnfinished: The task cannot be"),
    ],
    ids=["unknown", "finished", "not_cancellable", "unfinished"],
)
@IN_MEMORY
def test_in_a_task_the_errors_are_ordinary_exceptions(
    views: Flow,
    executor: Any,
    caplog: pytest.LogCaptureFixture,
    listen: Any,
    call: Any,
    error: str,
) -> None:
    reported: list[BaseException] = []
    listen(
        lambda app, exception, **extra: reported.append(exception),
        got_request_exception,
        sender=views.app,
    )
    ids: dict[str, str] = {}

    @views.route("/work", executor=executor)
    def work() -> None:
        call(views.async_routes, ids)

    ids["/quick"] = views.run("/quick")["Id"]
    ids |= {path: views.start(path)["Id"] for path in ("/slow", "/kept")}
    task = views.run()
    assert task["State"] == "Failed" and task["Error"].startswith(error)
    assert [type(one).__name__ for one in reported] == [error.partition(":")[0]]
    messages = [record.getMessage() for record in caplog.records if record.exc_info]
    assert messages == [f"The view of task {task['Id']} raised an exception."]
    assert views.request("GET", f"/task/{task['Id']}/result").status_code == 500


def test_expose_errors_hides_the_message_of_the_errors(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_EXPOSE_ERRORS=False)

    @flow.route()
    def work() -> None:
        flow.async_routes.stop("unknown")

    assert flow.error() == "TaskNotFound"


# -- purge
# ------------------------------------------------------------------------------------------------


def test_purge_removes_a_finished_task(views: Flow) -> None:
    task = views.run("/quick")
    with views.app.app_context():
        assert views.async_routes.exists(task["Id"])
        views.async_routes.purge(task["Id"])
        assert not views.async_routes.exists(task["Id"])
        with pytest.raises(TaskNotFound, match="no task with this id") as caught:
            views.async_routes.purge(task["Id"])
    assert caught.value.task_id == task["Id"]
    views.get(task, status=404)


def test_purge_of_an_unfinished_task_raises(views: Flow, gate: threading.Event) -> None:
    task = views.start("/slow")
    views.became(task, "Running")
    with views.app.app_context():
        with pytest.raises(TaskUnfinished, match="its State is Running; stop it first"):
            views.async_routes.purge(task["Id"])
        views.stop(task)
        with pytest.raises(TaskUnfinished, match="its code is still running"):
            views.async_routes.purge(task["Id"])
        gate.set()
        views.still(task)
        views.async_routes.purge(task["Id"])
    views.get(task, status=404)


def test_purge_checks_no_permission(views: Flow) -> None:
    task_id = views.start("/quick", headers={"X-User": "anna"})["Id"]
    with views.app.app_context():
        views.async_routes.wait(task_id, 10)
        views.purge(task_id, status=404)
        views.async_routes.purge(task_id)
        assert not views.async_routes.exists(task_id)


@pytest.mark.parametrize("task_id", ["", "a/b", "x" * 1000, "\x00", "\ud800", "é"], ids=ascii)
@IN_MEMORY
def test_purge_of_an_invalid_id_raises_task_not_found(flow: Flow, task_id: str) -> None:
    with flow.app.app_context(), pytest.raises(TaskNotFound):
        flow.async_routes.purge(task_id)


def own_threads() -> set[threading.Thread]:
    """Return the threads of the package."""
    return {each for each in threading.enumerate() if each.name.startswith("asyncroute")}


def test_a_script_purges_tasks_of_another_process(
    make_app: MakeApp, tmp_path: Any, separate_processes: None
) -> None:
    """A script needs only an app context. It starts no thread."""
    server = make_app("app", instance_path=tmp_path)
    flow = Flow(server, AsyncRoute(server))
    flow.route()(lambda: 1)
    task = flow.run()
    script = make_app("app", instance_path=tmp_path)
    async_routes = AsyncRoute(script)
    before = own_threads()
    with script.app_context():
        for record in async_routes.query(State="Completed"):
            async_routes.purge(record.id)
    assert own_threads() <= before
    flow.get(task, status=404)


def test_purge_needs_an_app_context(make_flow: MakeFlow) -> None:
    with pytest.raises(RuntimeError, match="application context"):
        make_flow().async_routes.purge("x")


# -- may_read and may_write
# ------------------------------------------------------------------------------------------------

SHARED = Permission(read=Access(groups=("readers",)), write=Access(roles=("writers",)))


@pytest.fixture
def checked(make_flow: MakeFlow, store_url: str) -> Flow:
    """Return an app with a plain view that returns what the caller may do with a task."""
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_ADMINS=Access(roles=("admin",)))

    @flow.app.get("/rights/<task_id>")
    def rights(task_id: str) -> list[bool]:
        task = flow.async_routes.get(task_id)
        assert task is not None
        return [flow.async_routes.may_read(task), flow.async_routes.may_write(task)]

    flow.route("/shared", permission=SHARED, endpoint="shared")(lambda: 1)
    flow.route("/owned", endpoint="owned")(lambda: 1)
    return flow


CALLERS = [None, "anna", "ben", "ben;groups=readers", "ben;roles=writers", "ben;roles=admin"]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("path", ["/shared", "/owned", "anonymous"])
def test_may_read_and_may_write_agree_with_the_operations(
    checked: Flow, path: str, caller: str | None
) -> None:
    headers = {} if caller is None else {"X-User": caller}
    owner = {} if path == "anonymous" else {"X-User": "anna"}
    url = "/owned" if path == "anonymous" else path
    task_id = checked.start(url, headers=owner)["Id"]
    with checked.app.app_context():
        checked.async_routes.wait(task_id, 10)
    response = checked.request("GET", f"/rights/{task_id}", headers=headers)
    get = checked.request("GET", f"/task/{task_id}", headers=headers).status_code
    stop = checked.request("DELETE", f"/task/{task_id}", headers=headers).status_code
    assert response.get_json() == [get == 200, stop == 410]
    if path == "anonymous" or caller in ("anna", "ben;roles=admin"):
        assert response.get_json() == [True, True]
    elif caller in (None, "ben"):
        assert response.get_json() == [False, False]


def test_without_a_request_the_caller_is_anonymous(checked: Flow) -> None:
    owned = checked.start("/owned", headers={"X-User": "anna"})["Id"]
    anonymous = checked.start("/owned")["Id"]
    with checked.app.app_context():
        for task_id, may in ((owned, False), (anonymous, True)):
            task = checked.async_routes.wait(task_id, 10)
            assert checked.async_routes.may_read(task) is may
            assert checked.async_routes.may_write(task) is may


def test_a_view_filters_a_query_by_permission(checked: Flow) -> None:
    @checked.app.get("/mine")
    def mine() -> list[str]:
        tasks = checked.async_routes.query()
        return [task.id for task in tasks if checked.async_routes.may_read(task)]

    ids = [checked.start("/owned", headers={"X-User": user})["Id"] for user in ("anna", "ben")]
    for user, task_id in zip(("anna", "ben"), ids, strict=True):
        response = checked.request("GET", "/mine", headers={"X-User": user})
        assert response.get_json() == [task_id]


def test_in_a_task_the_caller_is_that_of_the_rebuilt_request(checked: Flow) -> None:
    @checked.route("/check/<task_id>")
    def check(task_id: str) -> list[bool]:
        task = checked.async_routes.get(task_id)
        assert task is not None
        return [checked.async_routes.may_read(task), checked.async_routes.may_write(task)]

    owned = checked.start("/owned", headers={"X-User": "anna"})["Id"]
    for user, expected in (("anna", [True, True]), ("ben", [False, False])):
        started = checked.start(f"/check/{owned}", headers={"X-User": user})
        with checked.app.app_context():
            assert checked.async_routes.wait(started["Id"], 10).result == expected


def test_an_app_without_identities_has_only_anonymous_callers(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    flow = Flow(app, async_routes)
    flow.route()(lambda: 1)
    task_id = flow.run()["Id"]
    with app.test_request_context():
        task = async_routes.get(task_id)
        assert task is not None and task.user is None
        assert async_routes.may_read(task) and async_routes.may_write(task)


@pytest.mark.parametrize(("task", "given"), [("an-id", "a str"), ({"Id": "x"}, "a dict")], ids=repr)
@IN_MEMORY
def test_may_read_and_may_write_take_only_a_record(flow: Flow, task: Any, given: str) -> None:
    with flow.app.test_request_context():
        for name in ("may_read", "may_write"):
            with pytest.raises(TypeError, match=rf"^{name}\(\) takes the record.*not {given}\."):
                getattr(flow.async_routes, name)(task)


@IN_MEMORY
def test_an_unknown_task_may_not_be_read_but_the_caller_is_identified(flow: Flow) -> None:
    """So an unknown id takes as long as the id of another user."""
    calls: list[str] = []

    @flow.async_routes.identity_loader
    def load() -> dict[str, str]:
        calls.append("loaded")
        return {"id": "anna"}

    with flow.app.test_request_context():
        assert flow.async_routes.may_read(None) is False
        assert flow.async_routes.may_write(None) is False
    assert len(calls) == 2


def test_invalid_groups_of_the_caller_raise_cannot_start(
    make_app: MakeApp, make_task: Callable[..., AsyncRouteTask]
) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    async_routes = AsyncRoute(app)
    async_routes.identity_loader(lambda: {"id": "anna", "groups": [b"x"]})
    with app.test_request_context(), pytest.raises(CannotStart, match="groups"):
        async_routes.may_read(make_task(user="anna"))


def test_may_read_needs_an_app_context(
    make_flow: MakeFlow, make_task: Callable[..., AsyncRouteTask]
) -> None:
    async_routes = make_flow().async_routes
    for check in (async_routes.may_read, async_routes.may_write):
        with pytest.raises(RuntimeError, match="application context"):
            check(make_task(state=State.RUNNING))
