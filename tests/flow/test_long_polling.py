"""Requests that are held until a task has finished or changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, Callback, State, current_task
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.runtime import runtime_of
from tests.support.event_streams import read, told

MakeApp = Callable[..., Flask]
Eventually = Callable[..., Any]
THREADED = {"wsgi.multithread": True}
STORES = ["memory://", "sqlite:///asyncroute.db"]


@pytest.fixture
def gate_of() -> Iterator[Callable[[Flask], threading.Event]]:
    gates: dict[Flask, threading.Event] = {}
    yield lambda app: gates.setdefault(app, threading.Event())
    for gate in gates.values():
        gate.set()


@pytest.fixture
def serve(make_app: MakeApp, gate_of: Callable[[Flask], threading.Event]) -> Callable[..., Flask]:
    def serve(store: str = "memory://", **config: Any) -> Flask:
        app = make_app(ASYNCROUTE_STORE=store, **config)
        async_routes = AsyncRoute(app)
        gate = gate_of(app)

        @async_routes.route("/work", methods=["PUT"], max_workers=8, sse=True)
        def work() -> str:
            gate.wait(20)
            current_task.set_progress(50, "half")
            return "done"

        @async_routes.route("/ignores_stop", methods=["PUT"], interrupt_after=None)
        def ignores_stop() -> None:
            gate.wait(20)

        @async_routes.route(
            "/calls", methods=["PUT"], callback=Callback("http://127.0.0.1:1/nobody/")
        )
        def calls() -> str:
            return "done"

        @async_routes.route("/quick", methods=["PUT"])
        def quick() -> str:
            return "done"

        @async_routes.route("/inside", methods=["PUT"], executor="immediate")
        def inside() -> str:
            return "done"

        return app

    return serve


def start(app: Flask, path: str = "/work", **headers: str) -> Any:
    return app.test_client().put(path, headers=headers, environ_overrides=THREADED)


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def has_waiter(app: Flask) -> bool:
    return bool(runtime_of(app).runner.notifier._waiting)


@pytest.mark.parametrize("store", STORES)
def test_a_get_is_held_until_the_task_has_finished(
    serve: Callable[..., Flask], gate_of: Any, eventually: Eventually, store: str
) -> None:
    app = serve(store)
    task_id = start(app).json["Id"]
    thread, found = in_background(lambda: app.test_client().get(f"/task/{task_id}?wait=20"))
    eventually(lambda: has_waiter(app))
    assert not found
    gate_of(app).set()
    thread.join(5)
    assert found[0].json["State"] == "Completed" and found[0].json["Result"] == "done"
    assert "Retry-After" not in found[0].headers


@pytest.mark.parametrize("store", STORES)
def test_with_if_none_match_a_get_is_held_until_anything_changes(
    serve: Callable[..., Flask], eventually: Eventually, store: str, gate_of: Any
) -> None:
    app = serve(store)
    task_id = start(app).json["Id"]
    client = app.test_client()
    eventually(lambda: client.get(f"/task/{task_id}").json["State"] == "Running")
    seen = client.get(f"/task/{task_id}")
    thread, found = in_background(
        lambda: app.test_client().get(
            f"/task/{task_id}?wait=20", headers={"If-None-Match": seen.headers["ETag"]}
        )
    )
    eventually(lambda: has_waiter(app))
    gate_of(app).set()
    thread.join(5)
    assert found[0].status_code == 200 and found[0].headers["ETag"] != seen.headers["ETag"]


@pytest.mark.parametrize("store", STORES)
def test_with_if_none_match_a_get_is_held_until_the_view_of_an_aborted_task_has_ended(
    serve: Callable[..., Flask], eventually: Eventually, store: str, gate_of: Any
) -> None:
    """The State is already final, but the task still changes."""
    app = serve(store)
    client = app.test_client()
    task_id = start(app, "/ignores_stop").json["Id"]
    eventually(lambda: client.get(f"/task/{task_id}").json["State"] == "Running")
    assert client.delete(f"/task/{task_id}").json["Stopping"]
    seen = {"If-None-Match": client.get(f"/task/{task_id}").headers["ETag"]}
    thread, found = in_background(
        lambda: app.test_client().get(f"/task/{task_id}?wait=20", headers=seen)
    )
    eventually(lambda: has_waiter(app))
    gate_of(app).set()
    thread.join(5)
    assert found[0].status_code == 200 and "Stopping" not in found[0].json
    seen = {"If-None-Match": found[0].headers["ETag"]}
    assert client.get(f"/task/{task_id}?wait=20", headers=seen).status_code == 304, (
        "answered at once, because nothing will change"
    )


def test_with_if_none_match_a_get_is_held_while_a_callback_is_pending(
    serve: Callable[..., Flask], eventually: Eventually
) -> None:
    app = serve()
    client = app.test_client()
    task_id = start(app, "/calls").json["Id"]
    eventually(lambda: client.get(f"/task/{task_id}").json["CallbackInfo"].get("Tentative") == 1)
    answer = client.get(f"/task/{task_id}")
    assert (answer.json["State"], answer.json["CallbackInfo"]["State"]) == ("Completed", "Running")
    began = time.monotonic()
    seen = {"If-None-Match": answer.headers["ETag"]}
    assert client.get(f"/task/{task_id}?wait=0.3", headers=seen).status_code == 304
    assert time.monotonic() - began >= 0.3


def test_a_get_with_an_older_etag_is_answered_at_once(
    serve: Callable[..., Flask], eventually: Eventually
) -> None:
    app = serve()
    task_id = start(app).json["Id"]
    began = time.monotonic()
    answer = app.test_client().get(
        f"/task/{task_id}?wait=20", headers={"If-None-Match": '"999-json"'}
    )
    assert answer.status_code == 200 and time.monotonic() - began < 5


def test_a_get_returns_the_current_task_after_its_wait(
    serve: Callable[..., Flask], eventually: Eventually
) -> None:
    app = serve()
    client = app.test_client()
    task_id = start(app).json["Id"]
    eventually(lambda: client.get(f"/task/{task_id}").json["State"] == "Running")
    began = time.monotonic()
    answer = client.get(f"/task/{task_id}?wait=0.2")
    assert (answer.status_code, answer.json["State"]) == (200, "Running")
    assert 0.2 <= time.monotonic() - began < 5
    assert "Retry-After" in answer.headers
    etag = answer.headers["ETag"]
    assert (
        client.get(f"/task/{task_id}?wait=0.1", headers={"If-None-Match": etag}).status_code == 304
    )


def test_waits_are_limited_by_max_wait(serve: Callable[..., Flask]) -> None:
    app = serve(ASYNCROUTE_MAX_WAIT=0.1)
    began = time.monotonic()
    answer = start(app, Prefer=f"wait={'9' * 400}")
    assert answer.status_code == 202 and answer.headers["Preference-Applied"] == "wait=0"
    for seconds in ("999999999", "9" * 400, f"0.{'9' * 400}"):
        app.test_client().get(f"/task/{answer.json['Id']}?wait={seconds}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "query",
    ["wait=", "wait=a", "wait=-1", "wait=NaN", "wait=1e3", "wait=1&wait=1", "wait=%00", "wait=١"],
)
def test_an_invalid_wait_is_refused(serve: Callable[..., Flask], query: str) -> None:
    app = serve()
    task_id = start(app, "/quick").json["Id"]
    answer = app.test_client().get(f"/task/{task_id}?{query}")
    assert answer.status_code == 400 and "wait" in answer.json["detail"]


@pytest.mark.parametrize("store", STORES)
def test_a_start_may_wait_for_the_end(serve: Callable[..., Flask], store: str) -> None:
    app = serve(store)
    answer = start(app, "/quick", Prefer="wait=10")
    assert (answer.status_code, answer.json["State"], answer.json["Result"]) == (
        200,
        "Completed",
        "done",
    )
    assert answer.headers["Preference-Applied"] == "wait=10"
    assert answer.headers["Location"] == f"/task/{answer.json['Id']}"


@pytest.mark.parametrize(
    "prefer", ["respond-async, wait=10", 'wait="10"', "WAIT = 10; x=y", "foo; bar, wait=10, wait=0"]
)
def test_preferences_are_parsed_as_in_the_rfc(serve: Callable[..., Flask], prefer: str) -> None:
    assert start(serve(), "/quick", Prefer=prefer).status_code == 200


@pytest.mark.parametrize(
    "prefer", ["", "wait", "wait=", "wait=a", "wait=-1", "wait=1.5", "waits=10", "respond-async"]
)
def test_an_invalid_preference_is_ignored(serve: Callable[..., Flask], prefer: str) -> None:
    answer = start(serve(), Prefer=prefer)
    assert answer.status_code == 202 and "Preference-Applied" not in answer.headers


def test_a_start_that_takes_longer_answers_202(serve: Callable[..., Flask]) -> None:
    answer = start(serve(), Prefer="wait=0")
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "wait=0")
    assert "Retry-After" in answer.headers


def test_a_start_of_an_immediate_route_with_a_wait_is_200(serve: Callable[..., Flask]) -> None:
    assert start(serve(), "/inside", Prefer="wait=1").status_code == 200
    assert start(serve(), "/inside").status_code == 202


def test_waits_count_as_streams(
    serve: Callable[..., Flask], gate_of: Any, eventually: Eventually
) -> None:
    app = serve(ASYNCROUTE_MAX_STREAMS=1)
    task_id = start(app).json["Id"]
    thread, found = in_background(lambda: app.test_client().get(f"/task/{task_id}?wait=20"))
    eventually(lambda: has_waiter(app))
    began = time.monotonic()
    assert app.test_client().get(f"/task/{task_id}?wait=20").json["IsCompleted"] is False
    refused = start(app, Prefer="wait=20")
    assert refused.status_code == 202 and "Preference-Applied" not in refused.headers
    assert time.monotonic() - began < 5
    gate_of(app).set()
    thread.join(5)
    assert found[0].json["IsCompleted"] is True
    assert start(app, "/quick", Prefer="wait=10").status_code == 200, "the slot is free again"


def test_a_wait_for_a_removed_task_is_404(
    serve: Callable[..., Flask], eventually: Eventually, gate_of: Any
) -> None:
    app = serve()
    client = app.test_client()
    task_id = start(app).json["Id"]
    thread, found = in_background(
        lambda: app.test_client().get(f"/task/{task_id}?wait=0.5", headers={"If-None-Match": "*"})
    )
    thread.join(5)
    assert found
    runner = runtime_of(app).runner
    gate_of(app).set()
    with app.app_context():
        assert runner.notifier.wait(task_id, lambda task: task.state is State.COMPLETED, 5)
    eventually(lambda: runner.lifecycle.purge(task_id))
    assert client.get(f"/task/{task_id}?wait=1").status_code == 404


@pytest.mark.parametrize("kind", ["wait", "stream"])
@pytest.mark.usefixtures("separate_processes")
def test_other_processes_see_the_end_of_a_task_that_is_purged_after_its_stop(
    serve: Callable[..., Flask],
    gate_of: Any,
    eventually: Eventually,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr("flask_asyncroute.engine.notifier.POLL_SECONDS", 0.2)
    ours, theirs = (serve(f"sqlite:///{tmp_path}/shared.db") for _ in range(2))
    task_id = start(theirs).json["Id"]
    client = theirs.test_client()
    eventually(lambda: client.get(f"/task/{task_id}").json["State"] == "Running")
    reading = {
        "wait": lambda: ours.test_client().get(f"/task/{task_id}?wait=20").json["State"],
        "stream": lambda: told(read(ours.test_client(), f"/task/{task_id}/events"))[-1],
    }
    thread, found = in_background(reading[kind])
    eventually(lambda: runtime_of(ours).runner.notifier._is_polling)
    assert client.delete(f"/task/{task_id}").status_code == 200
    gate_of(theirs).set()
    eventually(lambda: client.delete(f"/task/{task_id}?purge=true").status_code == 204)
    thread.join(10)
    assert found == ["Aborted"]


def test_waits_end_when_the_server_exits(
    serve: Callable[..., Flask], eventually: Eventually
) -> None:
    app = serve()
    task_id = start(app).json["Id"]
    thread, found = in_background(lambda: app.test_client().get(f"/task/{task_id}?wait=20"))
    eventually(lambda: has_waiter(app))
    runtime_of(app).runner.notifier.end_waits()
    thread.join(5)
    assert (found[0].status_code, found[0].json["IsCompleted"]) == (200, False)


def test_a_start_is_answered_if_the_store_fails_during_its_wait(
    serve: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve()
    assert start(app, "/quick").status_code == 202

    def fail(*args: Any) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(runtime_of(app).runner.notifier, "wait", fail)
    answer = start(app, Prefer="wait=5")
    assert answer.status_code == 202 and "Preference-Applied" not in answer.headers
