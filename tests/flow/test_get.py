"""The get and result operations: every place of an id, every response, and no difference between
unreadable and unknown tasks.
"""

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
from tests.support.flow import IN_MEMORY, Flow, assert_not_cached, loaded, problem

MakeFlow = Callable[..., Flow]


@pytest.fixture
def done(flow: Flow) -> dict[str, Any]:
    """Return a completed task."""
    flow.route(endpoint="work", id_generator=lambda: "done-1")(lambda: {"a": [1, None]})
    return flow.run()


# -- get
# -------------------------------------------------------------------------------------------------------------------


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


def test_a_get_of_a_task_in_any_state_is_200(flow: Flow, gate: threading.Event) -> None:
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


@pytest.mark.covers("A79")
@IN_MEMORY
def test_conditional_headers_with_dates_are_ignored(flow: Flow, done: dict[str, Any]) -> None:
    for name in ("If-Modified-Since", "If-Unmodified-Since", "If-Range", "Date"):
        response = flow.request(
            "GET", "/task/done-1", headers={name: "Fri, 31 Dec 2100 23:59:59 GMT"}
        )
        assert (response.status_code, response.get_json()) == (200, done)


def test_head_is_get_without_a_body(flow: Flow, done: dict[str, Any]) -> None:
    get, head = flow.request("GET", "/task/done-1"), flow.request("HEAD", "/task/done-1")
    assert (head.status_code, head.data) == (200, b"")
    assert head.headers["ETag"] == get.headers["ETag"]


@IN_MEMORY
@pytest.mark.parametrize(
    ("accept", "content_type", "suffix"),
    [
        (None, "application/json", "json"), ("*/*", "application/json", "json"), ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "application/json", "json"),
        ("application/xml", "application/xml; charset=utf-8", "xml"), ("text/xml", "application/xml; charset=utf-8", "xml"),
        ("application/yaml", "application/yaml; charset=utf-8", "yaml"), ("text/yaml;q=0.9, application/json;q=0.5", "application/yaml; charset=utf-8", "yaml"),
    ],
)  # fmt: skip
def test_media_types_and_etags(
    flow: Flow, done: dict[str, Any], accept: str | None, content_type: str, suffix: str
) -> None:
    headers = {} if accept is None else {"Accept": accept}
    response = flow.request("GET", "/task/done-1", headers=headers)
    assert response.content_type == content_type
    assert_not_cached(response)
    etag, is_weak = response.get_etag()
    assert (
        etag is not None
        and etag.endswith(f"-{suffix}")
        and etag.split("-")[0].isdigit()
        and is_weak is False
    )
    for given in (f'"{etag}"', f'W/"{etag}"', f'"x", "{etag}"', "*"):
        found = flow.request("GET", "/task/done-1", headers={**headers, "If-None-Match": given})
        assert (found.status_code, found.data) == (304, b"")
        assert found.headers["ETag"] == f'"{etag}"'
        assert (
            "Content-Type" not in found.headers and found.headers.get("Content-Length", "0") == "0"
        )
        assert_not_cached(found)
    for given in ('"x"', f'"{etag}x"', etag, "nonsense", ""):
        status = flow.request(
            "GET", "/task/done-1", headers={**headers, "If-None-Match": given}
        ).status_code
        assert status in (200, 304) if given == etag else status == 200


def test_etags_of_types_differ_and_change_with_the_task(flow: Flow, gate: threading.Event) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    task = flow.start()
    flow.became(task, "Running")

    def etags() -> set[str]:
        return {
            flow.request(
                "GET", f"/task/{task['Id']}", headers={"Accept": f"application/{kind}"}
            ).headers["ETag"]
            for kind in ("json", "xml", "yaml")
        }

    before = etags()
    assert len(before) == 3
    gate.set()
    flow.ended(task)
    assert len(before | etags()) == 6


def test_xml_and_yaml_have_the_same_content_as_json(flow: Flow, done: dict[str, Any]) -> None:
    response = flow.request("GET", "/task/done-1", headers={"Accept": "application/yaml"})
    assert yaml.safe_load(response.data) == done
    root = ElementTree.fromstring(
        flow.request("GET", "/task/done-1", headers={"Accept": "application/xml"}).data
    )
    assert root.tag == "AsyncRouteTask"
    assert [child.tag for child in root] == list(done)
    result = root.find("Result")
    assert result is not None and result.get("type") == "object"
    assert [
        (item.text, item.get("nil"), item.get("type")) for item in result.findall("a/item")
    ] == [
        ("1", None, "number"),
        (None, "true", None),
    ]


@pytest.mark.covers("A55")
def test_strings_survive_yaml(make_flow: MakeFlow) -> None:
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
        found = yaml.safe_load(
            flow.request("GET", path, headers={"Accept": "application/yaml"}).data
        )
        assert (found["Result"] if "/result" not in path else found) == value


def test_awkward_results_in_xml(make_flow: MakeFlow) -> None:
    flow = make_flow()
    flow.route(endpoint="work")(
        lambda: {"a b": 1, "item": 2, "": 3, "<x>": "\x00", "xmlns": "y", "é": [True, None, {}]}
    )
    task = flow.run()
    for path in (f"/task/{task['Id']}", f"/task/{task['Id']}/result"):
        root = ElementTree.fromstring(
            flow.request("GET", path, headers={"Accept": "application/xml"}).data
        )
        result = root if "/result" in path else root.find("Result")
        assert result is not None and result.tag == "Result"
        assert [(child.tag, child.get("name")) for child in result] == [
            ("item", "a b"), ("item", "item"), ("item", ""), ("item", "<x>"), ("item", "xmlns"), ("é", None),
        ]  # fmt: skip
        assert result[3].get("encoding") == "base64"


@IN_MEMORY
@pytest.mark.parametrize(
    "accept",
    ["text/*", "image/png", "application/json;q=0, text/plain", "application/problem+json"],
)
def test_an_unsupported_accept_header_is_406(flow: Flow, done: dict[str, Any], accept: str) -> None:
    for method, path in (
        ("GET", "/task/done-1"),
        ("GET", "/task/done-1/result"),
        ("DELETE", "/task/done-1"),
        ("GET", "/tasks"),
        ("POST", "/tasks"),
    ):
        response = flow.request(
            method, path, headers={"Accept": accept}, json={} if method == "POST" else None
        )
        problem(response, 406, "not-acceptable")


# -- ids
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id_places", "found", "missed"),
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
def test_places_of_an_id(
    make_flow: MakeFlow, id_places: list[str], found: Any, missed: Any
) -> None:
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=id_places, ASYNCROUTE_TASK_ID_NAME="X-Task")
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "ID")(lambda: 5)
    flow.start()
    with flow.app.app_context():
        flow.async_routes.wait("ID", 5)
    for path, headers in found:
        assert flow.request("GET", path, headers=headers).get_json()["Id"] == "ID", (path, headers)
        base, question, query = path.partition("?")
        assert (
            flow.request("GET", f"{base}/result{question}{query}", headers=headers).get_json() == 5
        )
        assert flow.request("DELETE", path, headers=headers).status_code == 410
    for path, headers in missed:
        response = flow.request("GET", path, headers=headers)
        assert response.status_code in (400, 404, 405), (path, headers)
        assert "ID" not in (response.get_json(silent=True) or {}).get("State", "")


@IN_MEMORY
def test_a_missing_id_is_refused(flow: Flow) -> None:
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
@pytest.mark.parametrize(
    "query", ["Id=done-1&Id=done-1", "Id=done-1&id=x", "id=x&ID=done-1", "Id=&Id=done-1"]
)
def test_two_ids_in_the_query_are_refused(flow: Flow, done: dict[str, Any], query: str) -> None:
    for method in ("GET", "DELETE"):
        assert (
            "Id"
            in problem(flow.request(method, f"/task?{query}"), 400, "invalid-request")["detail"]
        )


@pytest.mark.parametrize(
    "headers",
    [
        {"Id": "done-1, x"},
        {"Id": "done-1,done-1"},
        {"Cookie": "Id=x; Id=done-1"},
        {"Cookie": "Id=done-1; id=x"},
    ],
)
def test_two_ids_in_a_header_or_cookie(make_flow: MakeFlow, headers: dict[str, str]) -> None:
    """They are refused, or the first one counts, as for cookies in general."""
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=["header", "cookie"])
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "done-1")(lambda: 5)
    flow.start()
    response = flow.request("GET", "/task", headers=headers)
    assert response.status_code in (400, 404) or headers["Cookie"].startswith("Id=done-1")


UNUSUAL_IDS = [
    "x" * 100_000, "x" * 129, "a\x00b", "..", ".", "a/b", "a%2fb", "\u200bdone-1", "\u202edone-1", "e\u0301", "done-1 ", " done-1", "done-1\n", "done-1\r\nX: y",
    "DONE-1", "done%2D1", "٣", "../../etc/passwd", "a\\b", "<script>", "'; DROP TABLE", "done-1;x", "done-1,done-1", "\ufeffdone-1", "ｄone-1", "",
]  # fmt: skip


@pytest.mark.covers("A43")
@IN_MEMORY
@pytest.mark.parametrize("task_id", UNUSUAL_IDS, ids=lambda value: ascii(value)[:25])
def test_unusual_ids_are_unknown(flow: Flow, done: dict[str, Any], task_id: str) -> None:
    """No id is normalised into an existing one."""
    for method in ("GET", "DELETE"):
        for path in (
            f"/task/{quote(task_id, safe='')}",
            f"/task?Id={quote(task_id, safe='')}",
            f"/task/{quote(task_id, safe='')}/result",
        ):
            response = flow.request(method, path)
            assert response.status_code in (400, 404, 405, 308), (
                method,
                path,
                response.status_code,
            )
            if response.status_code == 404 and response.mimetype == "application/problem+json":
                found = problem(response, 404, "task-not-found")
                assert len(response.data) < 4000
                assert all(character.isprintable() for character in found["Id"])
    assert flow.get(done) == done


@pytest.mark.covers("A43")
@IN_MEMORY
@pytest.mark.parametrize(
    "raw", [b"\xff", b"\xed\xa0\x80", b"done-1\xff", b"\x00", b"%", b"%zz", b"%00", b"%ff"]
)
def test_unusual_bytes_in_a_path(flow: Flow, done: dict[str, Any], raw: bytes) -> None:
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


@pytest.mark.covers("A57")
@pytest.mark.parametrize("place", ["header", "cookie"])
@pytest.mark.parametrize(
    "raw",
    ["../x", "x" * 8192, "\xff", "a b", '"done-1"', "done-1;", "%64one-1", "\xe9"],
    ids=lambda value: ascii(value)[:20],
)
def test_unusual_ids_in_header_and_cookie(make_flow: MakeFlow, place: str, raw: str) -> None:
    flow = make_flow(ASYNCROUTE_TASK_ID_IN=[place])
    flow.client = flow.app.test_client(use_cookies=False)
    flow.route(endpoint="work", id_generator=lambda: "done-1")(lambda: 5)
    flow.start()
    for method in ("GET", "DELETE"):
        given = {"HTTP_ID": raw} if place == "header" else {"HTTP_COOKIE": f"Id={raw}"}
        response = flow.client.open("/task", method=method, environ_overrides=given)
        if place == "cookie" and raw in ('"done-1"', "done-1;"):
            assert response.status_code in (200, 410), (
                "the quotes of a cookie are not part of its value"
            )
            continue
        if place == "cookie" and raw == "a b":  # Werkzeug does not accept it as a cookie.
            problem(response, 400, "invalid-request")
            continue
        problem(response, 404, "task-not-found")


def test_an_invalid_id_does_not_reach_the_store(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flask_asyncroute.runtime import runtime_of

    flow.query()
    store = runtime_of(flow.app).runner.store
    requested_ids: list[str] = []
    original = store.get

    def spy(task_id: str) -> Any:
        requested_ids.append(task_id)
        return original(task_id)

    monkeypatch.setattr(store, "get", spy)
    for task_id in UNUSUAL_IDS:
        flow.request("GET", f"/task?Id={quote(task_id, safe='')}")
        flow.request("DELETE", f"/task/{quote(task_id, safe='')}")
    assert set(requested_ids) <= {"DONE-1"}
    assert all(task_id.isascii() and task_id.isprintable() for task_id in requested_ids)


# -- result
# ----------------------------------------------------------------------------------------------------------------


def test_the_result_operation_returns_the_result_alone(flow: Flow, gate: threading.Event) -> None:
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
        assert (response.status_code, response.data) == (200, b"null\n")
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


# -- problems
# --------------------------------------------------------------------------------------------------------------


@IN_MEMORY
def test_a_problem_repeats_detail_as_error(flow: Flow) -> None:
    response = flow.request("GET", "/task/unknown")
    assert loaded(response) == {
        "type": "tag:flask-asyncroute.readthedocs.io,2026:task-not-found", "title": "Task not found", "status": 404,
        "detail": "There is no task with this id, or you may not read it.", "instance": "/task/unknown", "Id": "unknown",
        "Error": "There is no task with this id, or you may not read it.",
    }  # fmt: skip
    assert_not_cached(response)


@IN_MEMORY
def test_problems_in_xml_and_yaml(flow: Flow) -> None:
    response = flow.request("GET", "/task/unknown", headers={"Accept": "application/xml"})
    assert (response.status_code, response.content_type) == (
        404,
        "application/problem+xml; charset=utf-8",
    )
    root = ElementTree.fromstring(response.data)
    assert (root.tag, root.findtext("status"), root.findtext("Id")) == ("Problem", "404", "unknown")
    response = flow.request("GET", "/task/unknown", headers={"Accept": "application/yaml"})
    assert (response.status_code, response.content_type) == (404, "application/yaml; charset=utf-8")
    assert yaml.safe_load(response.data)["Id"] == "unknown"
    response = flow.request("GET", "/task/unknown", headers={"Accept": "application/problem+json"})
    assert response.status_code in (404, 406) and response.mimetype == "application/problem+json"


@pytest.mark.covers("A66")
@IN_MEMORY
def test_an_id_is_escaped_in_a_problem(flow: Flow) -> None:
    response = flow.request("GET", "/task?Id=a%0D%0ASet-Cookie:%20x%1B%5B31m")
    found = problem(response, 404, "task-not-found")
    assert found["Id"] == "a\\r\\nSet-Cookie: x\\x1b[31m"
    assert "Set-Cookie" not in response.headers


# -- unreadable tasks
# ------------------------------------------------------------------------------------------------------


@pytest.mark.covers("I5")
def test_an_unreadable_task_is_answered_like_an_unknown_one(
    flow: Flow, begun: threading.Semaphore
) -> None:
    """Responses are equal byte for byte, for each operation, state and caller."""
    ids = iter([f"id-{number}" for number in range(100)])
    states: dict[str, str] = {}

    @flow.route("/<outcome>", id_generator=lambda: next(ids), max_workers=10, cancellable=True)
    def work(outcome: str) -> Any:
        if outcome == "failed":
            raise ValueError
        if outcome in ("running", "aborted"):
            begun.release()
            current_task.sleep(10)
        return outcome

    @flow.route("/fixed", id_generator=lambda: next(ids), cancellable=False)
    def fixed() -> None: ...

    requests = [(method, path, accept) for method, path in (
        ("GET", "/task/{}"), ("GET", "/task?Id={}"), ("GET", "/task/{}/result"), ("DELETE", "/task/{}"), ("DELETE", "/task/{}?purge=true"), ("HEAD", "/task/{}"),
    ) for accept in ("application/json", "application/xml", "application/yaml", "text/html", "image/png")]  # fmt: skip
    callers: list[dict[str, str]] = [{}, {"X-User": "bert"}, {"X-User": "bert;groups=a;roles=b"}]

    def answers(task_id: str) -> list[Any]:
        found = []
        for method, path, accept in requests:
            for caller in callers:
                response = flow.client.open(
                    path.format(task_id),
                    method=method,
                    headers={**caller, "Accept": accept, "If-None-Match": "*"},
                )
                found.append((response.status_code, sorted(response.headers), response.data))
        return found

    before = {f"id-{number}": answers(f"id-{number}") for number in range(6)}
    owner = {"X-User": "anna"}
    for outcome in ("completed", "failed", "running", "aborted"):
        states[flow.start(f"/{outcome}", headers=owner)["Id"]] = outcome
    states[flow.start("/fixed", headers=owner)["Id"]] = "completed"
    assert begun.acquire(timeout=5) and begun.acquire(timeout=5)
    flow.headers = owner
    flow.stop(next(task_id for task_id, outcome in states.items() if outcome == "aborted"))
    for task_id, outcome in states.items():
        flow.became(task_id, outcome.capitalize())
    flow.headers = {}
    for task_id in states:
        assert answers(task_id) == before[task_id]
        assert {status for status, _, _ in before[task_id]} == {404, 406}
    flow.headers = owner
    assert len(flow.query()) == 5
    for task_id, outcome in states.items():
        if outcome == "running":
            flow.stop(task_id)
