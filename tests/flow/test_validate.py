"""The option ``validate``: check the input in the request, before anything is stored."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import abort, jsonify, request
from werkzeug.exceptions import HTTPException, UnprocessableEntity

from flask_asyncroute import Access, Permission
from tests.support.flow import IN_MEMORY, Flow, problem

MakeFlow = Callable[..., Flow]


@IN_MEMORY
def test_validate_gets_the_arguments_of_the_view(flow: Flow) -> None:
    seen: list[dict[str, Any]] = []

    @flow.route(
        "/report/<int:year>", arguments={"kind": "pdf"}, validate=lambda **v: seen.append(v)
    )
    def report(year: int, kind: str) -> None: ...

    flow.start("/report/2026")
    assert seen == [{"year": 2026, "kind": "pdf"}]


def test_an_http_exception_goes_through_the_error_handlers_of_the_app(flow: Flow) -> None:
    def check() -> None:
        if request.json["year"] > 2026:
            abort(422, "That year is in the future.")
        if request.json["year"] < 0:
            abort(jsonify(own="answer"))

    @flow.app.errorhandler(422)
    def unprocessable(error: UnprocessableEntity) -> Any:
        return {"handled": error.description}, 422

    @flow.route(validate=check)
    def work() -> Any:
        return request.json

    response = flow.request("POST", "/work", json={"year": 3000})
    assert (response.status_code, response.get_json()) == (
        422,
        {"handled": "That year is in the future."},
    )
    assert flow.request("POST", "/work", json={"year": -1}).get_json() == {"own": "answer"}
    assert flow.ids() == []
    assert flow.result(json={"year": 2026}) == {"year": 2026}


@pytest.mark.covers("A81")
@IN_MEMORY
def test_another_exception_is_logged_as_500_and_stores_nothing(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    flow.app.config["PROPAGATE_EXCEPTIONS"] = False

    def check() -> None:
        if "bad" in request.args:
            raise KeyError("an error in the app")

    @flow.route(validate=check, queue_size=1, max_workers=1)
    def work() -> int:
        return 1

    for _ in range(5):  # more than the queue holds
        assert flow.request("POST", "/work?bad=1").status_code == 500
    assert "an error in the app" in caplog.text
    assert flow.ids() == []
    assert flow.result() == 1


@pytest.mark.parametrize("size", [5, 300_000], ids=["small", "spooled"])
@pytest.mark.parametrize("kind", ["form", "json", "files", "data", "nothing"])
def test_validate_reads_the_body_and_the_task_still_gets_it(
    make_flow: MakeFlow, size: int, kind: str
) -> None:
    flow = make_flow()
    text = "x" * size

    def read() -> int:
        if kind == "form":
            return len(request.form["text"])
        if kind == "json":
            return len(request.json["text"])
        if kind == "files":
            return len(request.files["text"].read())
        return len(request.get_data()) if kind == "data" else size

    seen: list[int] = []
    flow.route(endpoint="work", validate=lambda: seen.append(read()))(read)
    body: dict[str, Any] = {
        "form": {"data": {"text": text}},
        "json": {"json": {"text": text}},
        "files": {"data": {"text": (io.BytesIO(text.encode()), "a.txt")}},
    }.get(kind, {"data": text})
    assert flow.result(**body) == size
    assert seen == [size]


@IN_MEMORY
def test_the_result_of_validate_is_ignored(flow: Flow) -> None:
    results = iter([None, False, 0, "x" * 1_000_000, [], b"x", {"a": 1}])
    flow.route(validate=lambda: next(results))(lambda: "ran")
    for _ in range(7):
        assert flow.result() == "ran"


def test_validate_is_not_called_for_replays(flow: Flow) -> None:
    calls: list[int] = []
    flow.route(endpoint="work", validate=lambda: calls.append(1))(lambda: None)
    headers = {"Idempotency-Key": "k" * 30}
    first = flow.start(headers=headers)["Id"]
    flow.ended(first)
    second = flow.start(headers=headers, status=200)["Id"]
    assert (first, calls) == (second, [1])


def test_a_refusal_stores_no_idempotency_key(flow: Flow) -> None:
    flow.route(validate=lambda: abort(400) if "bad" in request.args else None)(lambda: None)
    headers = {"Idempotency-Key": "k" * 30}
    assert flow.request("POST", "/work?bad=1", headers=headers).status_code == 400
    flow.start(headers=headers)


@pytest.mark.covers("A81")
def test_the_checks_run_in_the_documented_order(make_flow: MakeFlow, gate: threading.Event) -> None:
    """Idempotency-Key, permission, validate, unique, quota."""
    flow = make_flow(ASYNCROUTE_MAX_TASKS_PER_USER=1)
    called: list[str] = []

    def permission() -> Permission:
        called.append("permission")
        return Permission() if "permission" not in request.args else None  # type: ignore[return-value]

    def validate() -> None:
        called.append("validate")
        if "validate" in request.args:
            abort(422)

    def unique() -> str | None:
        called.append("unique")
        return request.args.get("unique")

    flow.route(permission=permission, validate=validate, unique=unique)(
        lambda: gate.wait() and None
    )
    flow.headers = {"X-User": "anna"}
    flow.start("/work?unique=a")
    called.clear()

    def status(query: str, key: str | None = None) -> int:
        headers = {} if key is None else {"Idempotency-Key": key}
        return flow.request("POST", f"/work?{query}", headers=headers).status_code

    assert status("permission=1&validate=1", "bad key, with a comma") == 400
    assert called == []
    assert status("permission=1&validate=1") == 403
    assert called == ["permission"]
    assert status("validate=1&unique=a") == 422
    assert called == ["permission", "permission", "validate"]
    assert status("unique=a") == 202
    assert status("unique=b") == 429


@IN_MEMORY
def test_an_error_of_the_extension_keeps_its_answer(flow: Flow) -> None:
    flow.route(validate=lambda: flow.async_routes.stop("missing"))(lambda: None)
    problem(flow.request("POST", "/work"), 404, "task-not-found")


@IN_MEMORY
def test_validate_is_called_on_an_immediate_route(flow: Flow) -> None:
    flow.route(executor="immediate", validate=lambda: abort(422))(lambda: None)
    assert flow.request("POST", "/work").status_code == 422
    assert flow.ids() == []


@IN_MEMORY
def test_validate_knows_the_user(flow: Flow) -> None:
    def check() -> None:
        if request.headers.get("X-User") != "anna":
            raise Forbidden()

    class Forbidden(HTTPException):
        code = 403

    flow.route(validate=check, permission=Permission(read=Access(users=["bert"])))(lambda: None)
    assert flow.request("POST", "/work", headers={"X-User": "bert"}).status_code == 403
    flow.start(headers={"X-User": "anna"})


def test_validate_can_refuse_with_413(flow: Flow) -> None:
    """The description tells it from a body over a limit of the app."""
    flow.route(validate=lambda: abort(413, "At most 100 rows."))(lambda: None)
    response = flow.request("POST", "/work")
    assert response.status_code == 413
    assert "At most 100 rows." in response.get_data(as_text=True)
