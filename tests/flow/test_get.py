"""Get and result: every place an id may be in, every answer there is, and nothing to tell who may not read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
import yaml
from flask import abort
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_asyncroute import current_task
from tests.flow.driving import IN_MEMORY, Flow, assert_not_cached, loaded, problem

MakeFlow = Callable[..., Flow]


@pytest.fixture
def done(flow: Flow) -> dict[str, Any]:
    """Give a completed task."""
    flow.route(endpoint="work", id_generator=lambda: "done-1")(lambda: {"a": [1, None]})
    return flow.run()


# -- get -------------------------------------------------------------------------------------------------------------------


def test_a_task_by_path_and_by_query(flow: Flow, done: dict[str, Any]) -> None:
    for path in (
        "/task/done-1",
        "/task?Id=done-1",
        "/task?id=done-1",
        "/task?ID=done-1",
        "/task?other=5&iD=done-1",
        "/task?Id=done%2D1",
    ):
        response = flow.request("GET", path)
        assert response.status_code == 200
        assert loaded(response) == done
        assert_not_cached(response)
        assert "Retry-After" not in response.headers


def test_every_state_is_data(flow: Flow, gate: threading.Event) -> None:
    @flow.route("/slow", max_workers=1)
    def slow() -> None:
        gate.wait(10)

    flow.route("/bad", endpoint="bad")(lambda: 1 / 0)
    flow.route("/missing", endpoint="missing")(lambda: abort(404))
    running, waiting, stopped = flow.start("/slow"), flow.start("/slow"), flow.start("/slow")
    flow.became(running, "Running")
    flow.stop(stopped)
    for task, state in ((running, "Running"), (waiting, "NotStarted")):
        response = flow.request("GET", f"/task/{task['Id']}")
        assert response.status_code == 200 and response.get_json()["State"] == state
        assert int(response.headers["Retry-After"]) > 0
    assert flow.get(stopped)["State"] == "Aborted"
    assert flow.run("/bad")["State"] == "Failed"
    assert flow.run("/missing")["State"] == "Failed"
    gate.set()
    for task in (running, waiting):
        flow.ended(task)


@IN_MEMORY
def test_a79_times_of_the_client_are_ignored(flow: Flow, done: dict[str, Any]) -> None:
    for name in ("If-Modified-Since", "If-Unmodified-Since", "If-Range", "Date"):
        response = flow.request("GET", "/task/done-1", headers={name: "Fri, 31 Dec 2100 23:59:59 GMT"})
        assert (response.status_code, response.get_json()) == (200, done)


def test_head_is_get_without_a_body(flow: Flow, done: dict[str, Any]) -> None:
    get, head = flow.request("GET", "/task/done-1"), flow.request("HEAD", "/task/done-1")
    assert (head.status_code, head.data) == (200, b"")
    assert head.headers["ETag"] == get.headers["ETag"]


@IN_MEMORY
@pytest.mark.parametrize(
    ("accept", "content_type", "suffix"),
    [
        (None, "application/json", "json"), ("*/*", "application/json", "json"), ("text/html, application/xhtml+xml, */*;q=0.8", "application/json", "json"),
        ("application/xml", "application/xml; charset=utf-8", "xml"), ("text/xml", "application/xml; charset=utf-8", "xml"),
        ("application/yaml", "application/yaml; charset=utf-8", "yaml"), ("text/yaml;q=0.9, application/json;q=0.5", "application/yaml; charset=utf-8", "yaml"),
    ],
)  # fmt: skip
def test_types_and_etags(flow: Flow, done: dict[str, Any], accept: str | None, content_type: str, suffix: str) -> None:
    headers = {} if accept is None else {"Accept": accept}
    response = flow.request("GET", "/task/done-1", headers=headers)
    assert response.content_type == content_type
    assert_not_cached(response)
    etag, is_weak = response.get_etag()
    assert etag is not None and etag.endswith(f"-{suffix}") and etag.split("-")[0].isdigit() and is_weak is False
    for given in (f'"{etag}"', f'W/"{etag}"', f'"x", "{etag}"', "*"):
        found = flow.request("GET", "/task/done-1", headers={**headers, "If-None-Match": given})
        assert (found.status_code, found.data) == (304, b"")
        assert found.headers["ETag"] == f'"{etag}"'
        assert "Content-Type" not in found.headers and found.headers.get("Content-Length", "0") == "0"
        assert_not_cached(found)
    for given in ('"x"', f'"{etag}x"', etag, "nonsense", ""):
        status = flow.request("GET", "/task/done-1", headers={**headers, "If-None-Match": given}).status_code
        assert status in (200, 304) if given == etag else status == 200


def test_etags_of_types_differ_and_change_with_the_task(flow: Flow, gate: threading.Event) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    flow.became(task, "Running")

    def etags() -> set[str]:
        return {
            flow.request("GET", f"/task/{task['Id']}", headers={"Accept": f"application/{kind}"}).headers["ETag"]
            for kind in ("json", "xml", "yaml")
        }

    before = etags()
    assert len(before) == 3
    gate.set()
    flow.ended(task)
    assert len(before | etags()) == 6


def test_xml_and_yaml_hold_the_same(flow: Flow, done: dict[str, Any]) -> None:
    response = flow.request("GET", "/task/done-1", headers={"Accept": "application/yaml"})
    assert yaml.safe_load(response.data) == done
    root = ElementTree.fromstring(flow.request("GET", "/task/done-1", headers={"Accept": "application/xml"}).data)
    assert root.tag == "AsyncRouteTask"
    assert [child.tag for child in root] == list(done)
    result = root.find("Result")
    assert result is not None and result.get("type") == "object"
    assert [(item.text, item.get("nil"), item.get("type")) for item in result.findall("a/item")] == [
        ("1", None, "number"),
        (None, "true", None),
    ]


def test_a55_strings_survive_yaml(make_flow: MakeFlow) -> None:
    value = [
        "no",
        "1e3",
        "!!python/object",
        "2026-01-01",
        "null",
        "~",
        "0x1",
        "0o7",
        "1_000",
        "a: b",
        "- x",
        "",
        " ",
        "\n",
        "é\U0001f600",
        "\x00\x1b\u2028",
    ]
    flow = make_flow()
    flow.route(endpoint="work")(lambda: value)
    task = flow.run()
    for path in (f"/task/{task['Id']}", f"/task/{task['Id']}/result"):
        found = yaml.safe_load(flow.request("GET", path, headers={"Accept": "application/yaml"}).data)
        assert (found["Result"] if "/result" not in path else found) == value


def test_awkward_results_in_xml(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(endpoint="work")(
        lambda: {"a b": 1, "item": 2, "": 3, "<x>": "\x00", "xmlns": "y", "é": [True, None, {}]}
    )
    task = flow.run()
    for path in (f"/task/{task['Id']}", f"/task/{task['Id']}/result"):
        root = ElementTree.fromstring(flow.request("GET", path, headers={"Accept": "application/xml"}).data)
        result = root if "/result" in path else root.find("Result")
        assert result is not None and result.tag == "Result"
        assert [(child.tag, child.get("name")) for child in result] == [
            ("item", "a b"), ("item", "item"), ("item", ""), ("item", "<x>"), ("item", "xmlns"), ("é", None),
        ]  # fmt: skip
        assert result[3].get("encoding") == "base64"


@IN_MEMORY
@pytest.mark.parametrize(
    "accept", ["text/html", "image/png", "application/json;q=0, text/html", "application/problem+json"]
)
def test_nothing_acceptable(flow: Flow, done: dict[str, Any], accept: str) -> None:
    for method, path in (
        ("GET", "/task/done-1"),
        ("GET", "/task/done-1/result"),
        ("DELETE", "/task/done-1"),
        ("GET", "/tasks"),
        ("POST", "/tasks"),
    ):
        response = flow.request(method, path, headers={"Accept": accept}, json={} if method == "POST" else None)
        problem(response, 406, "not-acceptable")


# -- ids -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "found", "missed"),
    [
        (["path"], [("/task/ID", {})], [("/task?Id=ID", {}), ("/task", {"X-Task": "ID"})]),
        (["query"], [("/task?X-Task=ID", {}), ("/task?x-task=ID", {})], [("/task/ID", {}), ("/task", {"X-Task": "ID"})]),
        (["header"], [("/task", {"X-Task": "ID"}), ("/task", {"x-TASK": "ID"})], [("/task/ID", {}), ("/task?X-Task=ID", {}), ("/task", {"Cookie": "X-Task=ID"})]),
        (["cookie"], [("/task", {"Cookie": "X-Task=ID"}), ("/task", {"Cookie": "a=b; x-task=ID"})], [("/task/ID", {}), ("/task", {"X-Task": "ID"})]),
        (["header", "cookie"], [("/task", {"X-Task": "ID", "Cookie": "X-Task=other"}), ("/task", {"Cookie": "X-Task=ID"})], []),
        (["path", "query", "header", "cookie"], [("/task/ID?X-Task=other", {}), ("/task?X-Task=ID", {"X-Task": "other"}), ("/task", {"X-Task": "ID"})], []),
        (["query", "path"], [("/task/other?X-Task=ID", {}), ("/task/ID", {})], []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)  # fmt: skip
def test_where_an_id_may_be(make_flow: MakeFlow, places: list[str], found: Any, missed: Any) -> None:
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=places, ASYNCROUTE_TASK_ID_NAME="X-Task")
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "ID")(lambda: 5)
    flow.start()
    with flow.app.app_context():
        flow.async_routes.wait("ID", 5)
    for path, headers in found:
        assert flow.request("GET", path, headers=headers).get_json()["Id"] == "ID", (path, headers)
        base, question, query = path.partition("?")
        assert flow.request("GET", f"{base}/result{question}{query}", headers=headers).get_json() == 5
        assert flow.request("DELETE", path, headers=headers).status_code == 410
    for path, headers in missed:
        response = flow.request("GET", path, headers=headers)
        assert response.status_code in (400, 404, 405), (path, headers)
        assert "ID" not in (response.get_json(silent=True) or {}).get("State", "")


@IN_MEMORY
def test_no_id_at_all(flow: Flow) -> None:
    for method, path in (
        ("GET", "/task"),
        ("GET", "/task/result"),
        ("DELETE", "/task"),
        ("GET", "/task?other=5"),
        ("GET", "/task?Idx=5"),
    ):
        response = flow.request(method, path)
        if path == "/task/result":
            assert response.status_code in (400, 404)
            continue
        assert "Id" in problem(response, 400, "invalid-request")["detail"]


@IN_MEMORY
@pytest.mark.parametrize("query", ["Id=done-1&Id=done-1", "Id=done-1&id=x", "id=x&ID=done-1", "Id=&Id=done-1"])
def test_an_id_given_twice(flow: Flow, done: dict[str, Any], query: str) -> None:
    for method in ("GET", "DELETE"):
        assert "Id" in problem(flow.request(method, f"/task?{query}"), 400, "invalid-request")["detail"]


@pytest.mark.parametrize(
    "headers",
    [{"Id": "done-1, x"}, {"Id": "done-1,done-1"}, {"Cookie": "Id=x; Id=done-1"}, {"Cookie": "Id=done-1; id=x"}],
)
def test_an_id_given_twice_elsewhere(make_flow: MakeFlow, headers: dict[str, str]) -> None:
    """Never one of two by chance: refused, or the first as cookies are read."""
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=["header", "cookie"])
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "done-1")(lambda: 5)
    flow.start()
    response = flow.request("GET", "/task", headers=headers)
    assert response.status_code in (400, 404) or headers["Cookie"].startswith("Id=done-1")


AWKWARD_IDS = [
    "x" * 100_000, "x" * 129, "a\x00b", "..", ".", "a/b", "a%2fb", "\u200bdone-1", "\u202edone-1", "e\u0301", "done-1 ", " done-1", "done-1\n", "done-1\r\nX: y",
    "DONE-1", "done%2D1", "٣", "../../etc/passwd", "a\\b", "<script>", "'; DROP TABLE", "done-1;x", "done-1,done-1", "\ufeffdone-1", "ｄone-1", "",
]  # fmt: skip


@IN_MEMORY
@pytest.mark.parametrize("task_id", AWKWARD_IDS, ids=lambda value: ascii(value)[:25])
def test_a43_awkward_ids(flow: Flow, done: dict[str, Any], task_id: str) -> None:
    """Unknown, or no such path; nothing is normalised into an id that exists."""
    for method in ("GET", "DELETE"):
        for path in (
            f"/task/{quote(task_id, safe='')}",
            f"/task?Id={quote(task_id, safe='')}",
            f"/task/{quote(task_id, safe='')}/result",
        ):
            response = flow.request(method, path)
            assert response.status_code in (400, 404, 405, 308), (method, path, response.status_code)
            if response.status_code == 404 and response.mimetype == "application/problem+json":
                found = problem(response, 404, "task-not-found")
                assert len(response.data) < 4000
                assert all(character.isprintable() for character in found["Id"])
    assert flow.get(done) == done


@IN_MEMORY
@pytest.mark.parametrize("raw", [b"\xff", b"\xed\xa0\x80", b"done-1\xff", b"\x00", b"%", b"%zz", b"%00", b"%ff"])
def test_a43_awkward_bytes_in_a_path(flow: Flow, done: dict[str, Any], raw: bytes) -> None:
    for method in ("GET", "DELETE"):
        for path in (b"/task/" + raw, b"/task/" + raw + b"/result"):
            environ = EnvironBuilder(method=method, path="/x").get_environ()
            environ["PATH_INFO"] = path.decode("latin-1")
            body, status, headers = run_wsgi_app(flow.app, environ, buffered=True)
            assert status.split()[0] in ("404", "405"), status
            b"".join(body).decode()
    for method in ("GET", "DELETE"):
        environ = EnvironBuilder(method=method, path="/task").get_environ()
        environ["QUERY_STRING"] = "Id=" + raw.decode("latin-1")
        body, status, headers = run_wsgi_app(flow.app, environ, buffered=True)
        assert status.split()[0] in ("404", "400"), status
        b"".join(body).decode()


@pytest.mark.parametrize("place", ["header", "cookie"])
@pytest.mark.parametrize(
    "raw",
    ["../x", "x" * 8192, "\xff", "a b", '"done-1"', "done-1;", "%64one-1", "\xe9"],
    ids=lambda value: ascii(value)[:20],
)
def test_a57_awkward_ids_in_header_and_cookie(make_flow: MakeFlow, place: str, raw: str) -> None:
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=[place])
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "done-1")(lambda: 5)
    flow.start()
    for method in ("GET", "DELETE"):
        given = {"HTTP_ID": raw} if place == "header" else {"HTTP_COOKIE": f"Id={raw}"}
        response = flow.client.open("/task", method=method, environ_overrides=given)
        if place == "cookie" and raw in ('"done-1"', "done-1;"):
            assert response.status_code in (200, 410), "a cookie's own quotes are no part of it"
            continue
        if place == "cookie" and raw == "a b":  # Werkzeug takes it for no cookie at all
            problem(response, 400, "invalid-request")
            continue
        problem(response, 404, "task-not-found")


def test_no_id_reaches_the_store_that_is_none(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    from flask_asyncroute.runtime import runtime_of

    flow.query()
    store = runtime_of(flow.app).runner.store
    asked: list[str] = []
    original = store.get

    def spy(task_id: str) -> Any:
        asked.append(task_id)
        return original(task_id)

    monkeypatch.setattr(store, "get", spy)
    for task_id in AWKWARD_IDS:
        flow.request("GET", f"/task?Id={quote(task_id, safe='')}")
        flow.request("DELETE", f"/task/{quote(task_id, safe='')}")
    assert set(asked) <= {"DONE-1"}
    assert all(task_id.isascii() and task_id.isprintable() for task_id in asked)


# -- result ----------------------------------------------------------------------------------------------------------------


def test_the_result_alone(flow: Flow, gate: threading.Event) -> None:
    flow.route("/value", endpoint="value")(lambda: {"b": [1.5, "é"]})
    flow.route("/nothing", endpoint="nothing")(lambda: None)
    flow.route("/null", endpoint="null")(lambda: float("nan"))
    flow.route("/bad", endpoint="bad")(lambda: 1 / 0)
    flow.route("/gone", endpoint="gone")(lambda: abort(409, "taken"))
    flow.route("/broken", endpoint="broken")(lambda: abort(503))

    @flow.route("/slow")
    def slow() -> None:
        gate.wait(10)

    def result(path: str) -> Any:
        return flow.request("GET", f"/task/{flow.run(path)['Id']}/result")

    response = result("/value")
    assert (response.status_code, response.get_json(), response.content_type) == (
        200,
        {"b": [1.5, "é"]},
        "application/json",
    )
    assert_not_cached(response)
    assert "Retry-After" not in response.headers
    for path in ("/nothing", "/null"):
        response = result(path)
        assert (response.status_code, response.data) == (200, b"null")
    assert "ZeroDivisionError" in problem(result("/bad"), 500, "task-failed")["detail"]
    assert "409 Conflict: taken" in problem(result("/gone"), 409, "task-failed")["detail"]
    problem(result("/broken"), 500, "task-failed")
    task = flow.start("/slow")
    response = flow.request("GET", f"/task/{task['Id']}/result")
    problem(response, 409, "task-unfinished")
    assert int(response.headers["Retry-After"]) > 0
    flow.stop(task)
    response = flow.request("GET", f"/task/{task['Id']}/result")
    assert problem(response, 410, "task-finished")["Id"] == task["Id"]
    assert "Aborted by the user" in response.get_json()["detail"]
    problem(flow.request("GET", "/task/x/result"), 404, "task-not-found")
    gate.set()
    flow.still(task)


@pytest.mark.parametrize("value", ["text", 5, True, [1, [2]], {"item": 1}, None])
def test_results_in_xml_and_yaml(make_flow: MakeFlow, value: Any) -> None:
    flow = make_flow()
    flow.route(endpoint="work")(lambda: value)
    task = flow.run()
    response = flow.request("GET", f"/task/{task['Id']}/result", headers={"Accept": "text/yaml"})
    assert yaml.safe_load(response.data) == value
    root = ElementTree.fromstring(
        flow.request("GET", f"/task/{task['Id']}/result", headers={"Accept": "text/xml"}).data
    )
    assert root.tag == "Result"
    assert (root.get("nil") == "true") is (value is None)


# -- problems --------------------------------------------------------------------------------------------------------------


@IN_MEMORY
def test_a_problem_says_everything_twice(flow: Flow) -> None:
    response = flow.request("GET", "/task/unknown")
    assert loaded(response) == {
        "type": "urn:flask-asyncroute:task-not-found", "title": "Task not found", "status": 404,
        "detail": "There is no task with this id, or it is not yours to read.", "instance": "/task/unknown", "Id": "unknown",
        "Error": "There is no task with this id, or it is not yours to read.",
    }  # fmt: skip
    assert_not_cached(response)


@IN_MEMORY
def test_problems_in_xml_and_yaml(flow: Flow) -> None:
    response = flow.request("GET", "/task/unknown", headers={"Accept": "application/xml"})
    assert (response.status_code, response.content_type) == (404, "application/problem+xml; charset=utf-8")
    root = ElementTree.fromstring(response.data)
    assert (root.tag, root.findtext("status"), root.findtext("Id")) == ("Problem", "404", "unknown")
    response = flow.request("GET", "/task/unknown", headers={"Accept": "application/yaml"})
    assert (response.status_code, response.content_type) == (404, "application/yaml; charset=utf-8")
    assert yaml.safe_load(response.data)["Id"] == "unknown"
    response = flow.request("GET", "/task/unknown", headers={"Accept": "application/problem+json"})
    assert response.status_code in (404, 406) and response.mimetype == "application/problem+json"


@IN_MEMORY
def test_a66_what_a_client_sent_is_escaped_in_answers(flow: Flow) -> None:
    response = flow.request("GET", "/task?Id=a%0D%0ASet-Cookie:%20x%1B%5B31m")
    found = problem(response, 404, "task-not-found")
    assert found["Id"] == "a\\r\\nSet-Cookie: x\\x1b[31m"
    assert "Set-Cookie" not in response.headers


# -- who may not read ------------------------------------------------------------------------------------------------------


def test_i5_unreadable_and_unknown_are_one_and_the_same(flow: Flow, begun: threading.Semaphore) -> None:
    """Byte for byte, on get, result, stop and purge, whatever the task's state and whoever asks."""
    ids = iter([f"id-{number}" for number in range(100)])
    states: dict[str, str] = {}

    @flow.route("/<how>", id_generator=lambda: next(ids), max_workers=10, cancellable=True)
    def work(how: str) -> Any:
        if how == "failed":
            raise ValueError
        if how in ("running", "aborted"):
            begun.release()
            current_task.sleep(10)
        return how

    @flow.route("/fixed", id_generator=lambda: next(ids), cancellable=False)
    def fixed() -> None: ...

    asked = [(method, path, accept) for method, path in (
        ("GET", "/task/{}"), ("GET", "/task?Id={}"), ("GET", "/task/{}/result"), ("DELETE", "/task/{}"), ("DELETE", "/task/{}?purge=true"), ("HEAD", "/task/{}"),
    ) for accept in ("application/json", "application/xml", "application/yaml", "text/html")]  # fmt: skip
    callers: list[dict[str, str]] = [{}, {"X-User": "bert"}, {"X-User": "bert;groups=a;roles=b"}]

    def answers(task_id: str) -> list[Any]:
        found = []
        for method, path, accept in asked:
            for caller in callers:
                response = flow.client.open(
                    path.format(task_id), method=method, headers={**caller, "Accept": accept, "If-None-Match": "*"}
                )
                found.append((response.status_code, sorted(response.headers), response.data))
        return found

    before = {f"id-{number}": answers(f"id-{number}") for number in range(6)}
    owner = {"X-User": "anna"}
    for how in ("completed", "failed", "running", "aborted"):
        states[flow.start(f"/{how}", headers=owner)["Id"]] = how
    states[flow.start("/fixed", headers=owner)["Id"]] = "completed"
    assert begun.acquire(timeout=5) and begun.acquire(timeout=5)
    flow.headers = owner
    flow.stop(next(task_id for task_id, how in states.items() if how == "aborted"))
    for task_id, how in states.items():
        flow.became(task_id, how.capitalize())
    flow.headers = {}
    for task_id in states:
        assert answers(task_id) == before[task_id]
        assert {status for status, _, _ in before[task_id]} == {404, 406}
    flow.headers = owner
    assert len(flow.query()) == 5
    for task_id, how in states.items():
        if how == "running":
            flow.stop(task_id)
