"""Starts of tasks: the 202 response, its headers and fields, and refusals, which store nothing."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from flask import request

from flask_asyncroute import Access, Permission, TaskNotFound
from tests.support.flow import IN_MEMORY, Flow, assert_not_cached, loaded, problem
from tests.support.labels import label

MakeFlow = Callable[..., Flow]

ALWAYS = [
    "Id",
    "AsyncRouteId",
    "State",
    "IsCompleted",
    "Cancellable",
    "CreationTime",
    "Url",
    "Method",
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def test_a_start_answers_202_with_the_task(
    flow: Flow, executor: Any, gate: threading.Event
) -> None:
    gate.set()

    @flow.route("/auth/asyncUsing", methods=["PUT"], executor=executor)
    def work() -> Any:
        return {"InnerValue": 1}

    began = datetime.now(UTC) - timedelta(milliseconds=1)
    response = flow.request("PUT", "/auth/asyncUsing?secret=1")
    assert response.status_code == 202
    assert response.content_type == "application/json"
    assert_not_cached(response)
    task = loaded(response)
    assert set(ALWAYS) <= set(task)
    assert UUID4.fullmatch(task["Id"])
    assert task["AsyncRouteId"] == "[Put]/auth/asyncUsing"
    assert task["Cancellable"] is True
    assert TIME.fullmatch(task["CreationTime"])
    assert began <= datetime.fromisoformat(task["CreationTime"]) <= datetime.now(UTC)
    assert (task["Url"], task["Method"]) == ("http://localhost/auth/asyncUsing", "PUT")
    assert response.headers["Location"] == f"/task/{task['Id']}"
    assert task["Sse"] == {
        "Group": "/auth/asyncUsing",
        "Url": f"/task/{task['Id']}/events",
        "SendResult": False,
    }
    if executor == "immediate":
        assert (task["State"], task["IsCompleted"]) == ("Completed", True)
        assert task["Result"] == {"InnerValue": 1}
        assert "Retry-After" not in response.headers
    else:
        assert list(task) == [*ALWAYS, "Sse"], "fields that do not apply are omitted"
        assert (task["State"], task["IsCompleted"]) == ("NotStarted", False)
        assert int(response.headers["Retry-After"]) > 0
    ended = flow.ended(task)
    assert ended["CreationTime"] <= ended["StartingTime"] <= ended["CompletedTime"], (
        "the times are in order"
    )
    timeout = datetime.fromisoformat(ended["ExpireTime"]) - datetime.fromisoformat(
        ended["StartingTime"]
    )
    assert timeout == timedelta(seconds=36000)


@pytest.mark.parametrize("executor_name", ["thread", "immediate"])
def test_a_task_is_stored_before_the_response_is_sent(flow: Flow, executor_name: str) -> None:
    @flow.route(executor=executor_name)
    def work() -> None: ...

    for _ in range(20):
        assert flow.get(flow.start())["Id"]


def test_the_accepted_status_of_the_configuration(make_flow: MakeFlow, store_url: str) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_ACCEPTED_STATUS=200)

    @flow.route()
    def work() -> None: ...

    response = flow.request("POST", "/work")
    assert response.status_code == 200
    assert response.headers["Location"] == f"/task/{loaded(response)['Id']}"


def test_a_name_replaces_method_and_rule_in_the_route_id(flow: Flow) -> None:
    @flow.route("/a/<int:n>", methods=["POST", "PATCH"])
    def plain(n: int) -> None: ...

    @flow.route("/b", name="report")
    def named() -> None: ...

    assert flow.start("/a/1")["AsyncRouteId"] == "[Post]/a/<int:n>"
    assert flow.start("/a/1", "PATCH")["AsyncRouteId"] == "[Patch]/a/<int:n>"
    assert flow.start("/b")["AsyncRouteId"] == "report"


@pytest.mark.parametrize(
    ("config", "base_url", "location"),
    [
        ({}, "http://localhost/", "/task/x1"),
        ({}, "http://localhost/app", "/app/task/x1"),
        ({}, "https://shop.example:8443/a/b", "/a/b/task/x1"),
        ({"ASYNCROUTE_URL_PREFIX": "/api/v1"}, "http://localhost/", "/api/v1/task/x1"),
        ({"ASYNCROUTE_URL_PREFIX": "/api", "ASYNCROUTE_TASK_PATH": "/job"}, "http://localhost/app", "/app/api/job/x1"),
        ({"ASYNCROUTE_TASK_ID_IN": ["query"]}, "http://localhost/app", "/app/task?Id=x1"),
        ({"ASYNCROUTE_TASK_ID_IN": ["query", "path"]}, "http://localhost/", "/task/x1"),
        ({"ASYNCROUTE_TASK_ID_IN": ["query"], "ASYNCROUTE_TASK_ID_NAME": "Task-Id"}, "http://localhost/", "/task?Task-Id=x1"),
        ({"ASYNCROUTE_TASK_ID_IN": ["header"]}, "http://localhost/", "/task"),
    ],
)  # fmt: skip
def test_location_is_path_absolute(
    make_flow: MakeFlow, config: dict[str, Any], base_url: str, location: str
) -> None:
    flow = make_flow(**config)

    @flow.route(id_generator=lambda: "x1")
    def work() -> None: ...

    response = flow.request("POST", "/work", base_url=base_url)
    assert response.headers["Location"] == location
    if "header" not in config.get("ASYNCROUTE_TASK_ID_IN", ()):
        path = location.removeprefix(
            base_url.partition("//")[2].partition("/")[1]
            + base_url.partition("//")[2].partition("/")[2]
        )
        found = flow.request("GET", "/" + path.lstrip("/"), base_url=base_url)
        assert loaded(found)["Id"] == "x1"


def test_location_under_a_mount_point_that_is_not_ascii(make_flow: MakeFlow) -> None:
    """Headers are Latin-1. A server would fail to send anything else."""
    flow = make_flow()

    @flow.route(id_generator=lambda: "x1")
    def work() -> None: ...

    mount = "/Bücher €/x".encode().decode("latin-1")
    response = flow.request("POST", "/work", environ_overrides={"SCRIPT_NAME": mount})
    assert response.headers["Location"] == "/B%C3%BCcher%20%E2%82%AC/x/task/x1"


@pytest.mark.covers("A76")
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:81", "a@evil.example", "user:secret@evil.example"]
)
def test_a_forged_host_is_not_in_a_link(make_flow: MakeFlow, host: str) -> None:
    flow = make_flow()

    @flow.route()
    def work() -> None: ...

    response = flow.request("POST", "/work", headers={"Host": host})
    if response.status_code == 202:
        assert response.headers["Location"].startswith("/task/")
        assert "secret" not in loaded(response)["Url"] and "@" not in loaded(response)["Url"]
    else:
        assert response.status_code == 400
    flow.start()
    response = flow.request("GET", "/tasks?limit=1", headers={"Host": host})
    if response.status_code == 200 and "Link" in response.headers:
        assert response.headers["Link"].startswith("</tasks?")


@IN_MEMORY
@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("/a/x?token=secret", "http://localhost/a/x"),
        ("/a/x?", "http://localhost/a/x"),
        ("/a/%C3%A9%20%22%3C", "http://localhost/a/%C3%A9%20%22%3C"),
        ("/a/x%3Fy%23z", "http://localhost/a/x%3Fy%23z"),
        ("/a/%2525", "http://localhost/a/%2525"),
        ("/a/a;b=c,d", "http://localhost/a/a;b=c,d"),
    ],
)
def test_url_has_no_query(flow: Flow, path: str, url: str) -> None:
    @flow.route("/a/<path:x>")
    def work(x: str) -> None: ...

    assert flow.start(path)["Url"] == url


@IN_MEMORY
def test_url_has_no_userinfo(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    assert flow.start(auth=("anna", "secret"))["Url"] == "http://localhost/work"


@IN_MEMORY
def test_url_behind_script_name_and_scheme(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    assert (
        flow.start(base_url="https://shop.example:8443/app")["Url"]
        == "https://shop.example:8443/app/work"
    )


@IN_MEMORY
def test_url_of_a_long_path_is_shortened(flow: Flow) -> None:
    @flow.route("/a/<path:x>")
    def work(x: str) -> None: ...

    assert len(flow.start(f"/a/{'x' * 50_000}")["Url"]) == 2048


# -- methods
# -----------------------------------------------------------------------------------------------------------


@IN_MEMORY
@pytest.mark.parametrize("methods", [["GET"], ["GET", "POST"], ["HEAD", "PUT"]])
def test_head_never_starts_a_task(flow: Flow, methods: list[str]) -> None:
    ran = []

    @flow.route(methods=methods)
    def work() -> None:
        ran.append(1)

    response = flow.request("HEAD", "/work")
    assert response.status_code == 405
    allowed = {method.strip() for method in response.headers["Allow"].split(",")}
    assert allowed == {*methods, "OPTIONS"} - {"HEAD"}
    assert_not_cached(response)
    assert flow.query() == [] and not ran


@IN_MEMORY
def test_a_get_route_starts_with_get(flow: Flow) -> None:
    @flow.route(methods=["GET"])
    def work() -> int:
        return 1

    assert flow.result("/work", "GET") == 1


@IN_MEMORY
def test_options_starts_nothing(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    assert flow.request("OPTIONS", "/work").status_code == 200
    assert flow.query() == []


@pytest.mark.covers("A58")
@IN_MEMORY
@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
def test_a_method_cannot_be_overridden(flow: Flow, header: str) -> None:
    @flow.route()
    def work() -> Any:
        return request.method

    task = flow.run(headers={header: "DELETE"}, data={"_method": "DELETE"})
    assert (task["Method"], task["Result"]) == ("POST", "POST")
    assert (
        flow.request("POST", f"/task/{task['Id']}", headers={header: "DELETE"}).status_code == 405
    )


# -- negotiation
# -----------------------------------------------------------------------------------------------------------


@IN_MEMORY
@pytest.mark.parametrize("accept", ["text/*", "image/*", "application/json;q=0", "application/xml"])
def test_an_unsupported_accept_header_starts_nothing(flow: Flow, accept: str) -> None:
    @flow.route()
    def work() -> None: ...

    response = flow.request("POST", "/work", headers={"Accept": accept})
    if accept == "application/xml":
        assert response.status_code == 406 and response.mimetype == "application/problem+xml"
    else:
        assert "application/json" in problem(response, 406, "not-acceptable")["detail"]
    assert flow.query() == []


def test_the_response_has_the_accepted_media_type(flow: Flow) -> None:
    @flow.route(response_types=["application/yaml", "application/xml"])
    def work() -> None: ...

    def start(accept: str | None) -> Any:
        response = flow.request(
            "POST", "/work", headers={} if accept is None else {"Accept": accept}
        )
        assert response.status_code == 202
        return response

    for accept in (
        None,
        "*/*",
        "text/yaml",
        "application/x-yaml",
        "application/json;q=0.9, */*;q=0.1",
    ):
        response = start(accept)
        assert response.content_type == "application/yaml; charset=utf-8"
        assert yaml.safe_load(response.data)["State"] == "NotStarted"
    response = start("application/yaml;q=0.5, text/xml")
    assert response.content_type == "application/xml; charset=utf-8"
    root = ElementTree.fromstring(response.data)
    assert root.tag == "AsyncRouteTask"
    assert root.findtext("State") == "NotStarted"
    assert root.findtext("IsCompleted") == "false"
    assert_not_cached(response)


# -- permission
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.covers("A77")
def test_a_route_with_a_permission_refuses_anonymous_callers(flow: Flow) -> None:
    @flow.route(permission=Permission())
    def fixed() -> None: ...

    @flow.route("/function", permission=lambda: Permission())
    def by_function() -> None: ...

    for path in ("/work", "/function"):
        response = flow.request("POST", path)
        problem(response, 401, "not-authenticated")
        assert "WWW-Authenticate" in response.headers
        flow.start(path, headers={"X-User": "anna"})
    flow.headers = {"X-User": "anna"}
    assert len(flow.query()) == 2


def find_nothing() -> Permission:
    raise TaskNotFound("There is no task with this secret id.", task_id="secret")


def fail() -> Permission:
    raise RuntimeError("secret")


@pytest.mark.covers("A77")
@IN_MEMORY
@pytest.mark.parametrize(
    "function",
    [
        fail, lambda: None, lambda: True, lambda: "anna", lambda: Access(users=["anna"]), lambda: {"Read": {}}, lambda: Permission,
        lambda: request.args["missing"], lambda: 1 / 0, lambda: find_nothing(),
    ],
    ids=[
        "raises", "None", "True", "string", "Access", "mapping", "class", "bad key", "zero", "no task",
    ],
)  # fmt: skip
def test_a_permission_function_that_returns_no_permission_refuses_the_start(
    flow: Flow, function: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    @flow.route(permission=function)
    def work() -> None:
        ran.append(1)

    flow.headers = {"X-User": "anna"}
    found = problem(flow.request("POST", "/work"), 403, "not-permitted")
    assert "secret" not in found["detail"]
    assert "permission function" in caplog.text
    assert flow.query() == [] and not ran


@pytest.mark.covers("A77")
def test_the_permission_function_is_not_called_for_anonymous_callers(flow: Flow) -> None:
    calls = []

    @flow.route(permission=lambda: calls.append(1))
    def work() -> None: ...

    problem(flow.request("POST", "/work"), 401, "not-authenticated")
    assert not calls


def test_a_permission_function_runs_in_the_request(flow: Flow) -> None:
    @flow.route(permission=lambda: Permission(read=Access(users=[request.args["reader"]])))
    def work() -> None: ...

    task = flow.start("/work?reader=bert", headers={"X-User": "anna"})
    assert task["Permission"]["Read"]["Users"] == ["anna", "bert"]
    assert task["Permission"]["Write"]["Users"] == ["anna"]


def test_a_permission_is_shown_with_the_owner_in_both_users(flow: Flow) -> None:
    permission = Permission(
        read=Access(["b"], ["g"], ["r"], ["s"]), write=Access(groups=["w"], users=["anna"])
    )

    @flow.route(permission=permission)
    def work() -> None: ...

    @flow.route("/plain")
    def plain() -> None: ...

    task = flow.start(headers={"X-User": "anna"})
    assert task["User"] == "anna"
    assert task["Permission"] == {
        "Read": {"Users": ["anna", "b"], "Groups": ["g"], "Roles": ["r"], "Scopes": ["s"]},
        "Write": {"Users": ["anna"], "Groups": ["w"], "Roles": [], "Scopes": []},
    }
    nobody: dict[str, list[str]] = {"Groups": [], "Roles": [], "Scopes": []}
    task = flow.start("/plain", headers={"X-User": "anna"})
    assert task["Permission"] == {
        "Read": {"Users": ["anna"], **nobody},
        "Write": {"Users": ["anna"], **nobody},
    }
    assert not {"User", "Permission"} & set(flow.start("/plain"))


def test_an_app_wide_permission(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_PERMISSION=Permission(read=Access(groups=["staff"])))

    @flow.route()
    def work() -> None: ...

    @flow.route("/free", permission=None)
    def free() -> None: ...

    problem(flow.request("POST", "/work"), 401, "not-authenticated")
    flow.start("/free")
    assert flow.start(headers={"X-User": "anna"})["Permission"]["Read"]["Groups"] == ["staff"]


# -- identity
# ------------------------------------------------------------------------------------------------------------


class Person:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    ("identity", "user"),
    [
        (None, None),
        ({"id": "anna"}, "anna"),
        ({"id": 7}, "7"),
        ({"id": 0}, "0"),
        (Person(id="anna"), "anna"),
        (Person(id=7, groups=("a",), roles={"b"}, scopes=None), "7"),
        ({"id": "x" * 255}, "x" * 255),
        ({"id": "é\U0001f600 \n"}, "é\U0001f600 \n"),
    ],
    ids=label,
)
def test_valid_identities(flow: Flow, identity: Any, user: str | None) -> None:
    flow.async_routes.identity_loader(lambda: identity)

    @flow.route()
    def work() -> None: ...

    task = flow.start()
    assert task.get("User") == user
    flow.ended(task)
    assert flow.ids() == [task["Id"]]


@IN_MEMORY
@pytest.mark.parametrize(
    "identity",
    [
        {},
        {"id": None},
        {"id": ""},
        {"id": "x" * 256},
        Person(),
        {"id": "anna", "groups": [None]},
        "anna",
        7,
    ],
    ids=["empty", "None", "blank", "long", "object", "groups", "text", "number"],
)
def test_an_invalid_identity_starts_nothing(flow: Flow, identity: Any) -> None:
    flow.async_routes.identity_loader(lambda: identity)

    @flow.route()
    def work() -> None: ...

    problem(flow.request("POST", "/work"), 500, "cannot-start")
    flow.async_routes.identity_loader(lambda: None)
    assert flow.query() == []


@pytest.mark.parametrize("kind", ["groups", "roles", "scopes"])
@pytest.mark.parametrize("names", [5, True, {"a": 1}.items], ids=label)
def test_groups_roles_and_scopes_of_an_identity_must_be_names(
    make_flow: MakeFlow, kind: str, names: Any
) -> None:
    """The response names the invalid field."""
    flow = make_flow()
    flow.async_routes.identity_loader(lambda: {"id": "anna", kind: names})

    @flow.route()
    def work() -> None: ...

    assert kind in problem(flow.request("POST", "/work"), 500, "cannot-start")["detail"]


@pytest.mark.parametrize("name", ["\ud800", "a\x00b"])
def test_a_user_id_that_no_store_can_hold(flow: Flow, name: str) -> None:
    """A JSON token may contain one half of a surrogate pair."""
    flow.async_routes.identity_loader(lambda: {"id": name})

    @flow.route()
    def work() -> None: ...

    response = flow.request("POST", "/work")
    assert response.status_code in (202, 500)
    if response.status_code == 500:
        problem(response, 500, "cannot-start")
    response = flow.request("GET", "/tasks")
    assert response.status_code in (200, 500)
    loaded(response)


def test_the_user_id_field_of_the_configuration(make_flow: MakeFlow) -> None:
    flow = make_flow(ASYNCROUTE_USER_ID_FIELD="sub")
    flow.async_routes.identity_loader(lambda: {"id": "wrong", "sub": "right"})

    @flow.route()
    def work() -> None: ...

    assert flow.start()["User"] == "right"


@IN_MEMORY
def test_an_identity_loader_may_abort(flow: Flow) -> None:
    from flask import abort

    flow.async_routes.identity_loader(lambda: abort(401))

    @flow.route()
    def work() -> None: ...

    assert flow.request("POST", "/work").status_code == 401


# -- ids
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", ["a", "x" * 128, "A.b_c~d-9", "...", ".a", "-", "~"])
def test_valid_ids_of_an_id_generator(flow: Flow, good: str) -> None:
    @flow.route(id_generator=lambda: good)
    def work() -> int:
        return 1

    assert flow.start()["Id"] == good
    assert flow.ended(good)["Result"] == 1


@IN_MEMORY
@pytest.mark.parametrize(
    "bad",
    [
        "",
        ".",
        "..",
        "x" * 129,
        "a b",
        "a/b",
        "a%b",
        "é",
        "a\n",
        "a\x00",
        "<b>",
        "a:b",
        "\ud800",
        None,
        5,
        b"a",
        ["a"],
        object(),
    ],
    ids=label,
)
def test_an_invalid_id_starts_nothing(
    flow: Flow, bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @flow.route(id_generator=lambda: bad)
    def work() -> None:
        raise AssertionError("started")

    found = problem(flow.request("POST", "/work"), 500, "cannot-start")
    assert "id generator" in found["detail"]
    assert "id generator" in caplog.text and "\n" not in caplog.messages[-1]
    assert flow.query() == []


@IN_MEMORY
def test_an_id_generator_that_raises_starts_nothing(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    def generate() -> str:
        raise LookupError("secret")

    @flow.route(id_generator=generate)
    def work() -> None: ...

    found = problem(flow.request("POST", "/work"), 500, "cannot-start")
    assert "secret" not in found["detail"] and "secret" in caplog.text
    assert flow.query() == []


def test_a_taken_id_is_generated_again_up_to_three_times(flow: Flow) -> None:
    ids: Iterator[str] = iter([])
    calls = itertools.count()

    def generate() -> str:
        next(calls)
        return next(ids)

    @flow.route(id_generator=generate)
    def work() -> None: ...

    ids = iter(["a"])
    flow.ended(flow.start())
    ids = iter(["a", "a", "a", "b"])
    assert flow.start()["Id"] == "b"
    flow.ended("b")
    ids = iter(["a", "b", "b", "a", "never"])
    problem(flow.request("POST", "/work"), 500, "cannot-start")
    assert next(ids) == "never"
    assert sorted(flow.ids()) == ["a", "b"]


def test_an_app_wide_id_generator(make_flow: MakeFlow) -> None:
    ids = map(str, itertools.count(1))
    flow = make_flow(ASYNCROUTE_ID_GENERATOR=lambda: next(ids))

    @flow.route()
    def work() -> None: ...

    assert [flow.start()["Id"] for _ in range(3)] == ["1", "2", "3"]


# -- slots
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.covers("A69")
@pytest.mark.parametrize("executor_name", ["thread", "own"])
def test_a_full_queue_refuses_a_start_and_stores_nothing(
    flow: Flow, gate: threading.Event, executor_name: str, own_pool: ThreadPoolExecutor
) -> None:
    ran = []

    @flow.route(
        max_workers=2, queue_size=3, executor=own_pool if executor_name == "own" else "thread"
    )
    def work(**given: Any) -> None:
        ran.append(1)
        gate.wait(10)

    accepted = [flow.start()["Id"] for _ in range(5)]
    for _ in range(20):
        response = flow.request("POST", "/work", data={"f": "x" * 1000})
        problem(response, 503, "queue-full")
        assert int(response.headers["Retry-After"]) > 0
    assert sorted(flow.ids()) == sorted(accepted)
    gate.set()
    for task_id in accepted:
        flow.ended(task_id)
    assert len(ran) == 5
    assert flow.run()["State"] == "Completed", "slots are released"


@pytest.mark.covers("A69")
def test_a_queue_of_size_zero(flow: Flow, gate: threading.Event) -> None:
    @flow.route(max_workers=1, queue_size=0)
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    problem(flow.request("POST", "/work"), 503, "queue-full")
    gate.set()
    flow.ended(task)


@pytest.mark.covers("A69")
def test_concurrent_starts_do_not_exceed_the_queue(flow: Flow, gate: threading.Event) -> None:
    @flow.route(max_workers=1, queue_size=5)
    def work() -> None:
        gate.wait(10)

    answers: list[int] = []

    def many() -> None:
        client = flow.app.test_client()
        answers.extend(client.post("/work").status_code for _ in range(10))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(answers)) == [202, 503]
    assert answers.count(202) == len(flow.query()) == 6
    gate.set()
    for task_id in flow.ids():
        flow.ended(task_id)


def test_a_failed_start_releases_its_slot(flow: Flow) -> None:
    bad = True

    @flow.route(max_workers=1, queue_size=0, id_generator=lambda: "" if bad else "good")
    def work() -> None: ...

    for _ in range(5):
        flow.start(status=500)
    bad = False
    flow.start()


def test_routes_of_one_pool_share_its_slots(flow: Flow, gate: threading.Event) -> None:
    @flow.route("/a", pool="p", max_workers=1, queue_size=1)
    def a() -> None:
        gate.wait(10)

    @flow.route("/b", pool="p", max_workers=1, queue_size=1)
    def b() -> None:
        gate.wait(10)

    @flow.route("/c", max_workers=1, queue_size=1)
    def c() -> None: ...

    tasks = [flow.start("/a"), flow.start("/b")]
    problem(flow.request("POST", "/a"), 503, "queue-full")
    problem(flow.request("POST", "/b"), 503, "queue-full")
    assert flow.run("/c")["State"] == "Completed"
    gate.set()
    for task in tasks:
        flow.ended(task)


def test_a_start_on_an_executor_that_was_shut_down_is_refused(flow: Flow) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()

    @flow.route(executor=pool)
    def work() -> None: ...

    problem(flow.request("POST", "/work"), 503, "queue-full")
    assert flow.query() == []


def test_a_start_on_an_executor_that_raises_stores_nothing(flow: Flow) -> None:
    """A task that no process will run must not stay NotStarted."""

    class Broken(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            raise OSError("no connection")

    @flow.route(executor=Broken())
    def work() -> None: ...

    flow.app.config["PROPAGATE_EXCEPTIONS"] = False
    assert flow.request("POST", "/work").status_code in (500, 503)
    assert flow.query() == []


def test_an_id_of_a_string_subclass_is_converted(flow: Flow) -> None:
    """Otherwise the encoder of the response would refuse it after the task was stored."""

    class Kind(str):
        pass

    flow.route(endpoint="work", id_generator=lambda: Kind("a-1"))(lambda: 1)
    assert flow.run()["Id"] == "a-1"


@pytest.mark.parametrize("host", ["e vil<x>", ""])
def test_url_is_absolute_with_an_invalid_host_header(flow: Flow, host: str) -> None:
    flow.route(endpoint="work")(lambda: 1)
    task = flow.start(environ_overrides={"HTTP_HOST": host})
    assert re.fullmatch(r"http://[^/]+/work", task["Url"])
