"""Held requests: contexts, headers, slots and time limits."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http import HTTPStatus
from tempfile import SpooledTemporaryFile
from typing import Any

import pytest
from flask import Flask, Response, has_app_context, request, session
from werkzeug.test import EnvironBuilder, TestResponse

from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.http import waits
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.workers import shutdown
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]
Eventually = Callable[..., Any]
LONG = "wait=20"
SHORT = "wait=0.05"


class Held:
    """An app with one task that runs until ``gate`` is set, and requests that wait for it."""

    def __init__(self, flow: Flow, gate: threading.Event) -> None:
        self.flow = flow
        self.app = flow.app
        self.gate = gate
        self.notifier = lambda: runtime_of(flow.app).runner.notifier
        self.threads: list[threading.Thread] = []

    def start(self, path: str = "/work") -> str:
        return f"/task/{self.flow.start(path)['Id']}"

    def call(self, path: str, method: str = "GET", **given: Any) -> Iterator[TestResponse]:
        """Send a request from another thread; return an iterator that waits for the response."""
        answers: list[TestResponse] = []
        environ = {"wsgi.multithread": True}
        client = self.app.test_client()

        def send() -> None:
            answers.append(client.open(path, method=method, environ_overrides=environ, **given))

        thread = threading.Thread(target=send)
        self.threads.append(thread)
        thread.start()

        def answer() -> Iterator[TestResponse]:
            thread.join(10)
            yield from answers

        return answer()

    def slots(self) -> int:
        return runtime_of(self.app).runner.stream_slots._value

    def has_waiter(self) -> bool:
        return bool(self.notifier()._waiting)


@pytest.fixture
def make_held(make_flow: MakeFlow) -> Iterator[Callable[..., Held]]:
    gate = threading.Event()
    made: list[Held] = []

    def make(prepare: Callable[[Flow], Any] = lambda flow: None, **config: Any) -> Held:
        flow = make_flow(SECRET_KEY="s", ASYNCROUTE_MAX_STREAMS=4, **config)
        prepare(flow)

        @flow.route(max_workers=4)
        def work() -> str:
            gate.wait(20)
            return "done"

        @flow.route("/quick")
        def quick() -> str:
            return "done"

        held = Held(flow, gate)
        made.append(held)
        return held

    yield make
    gate.set()
    for held in made:
        for thread in held.threads:
            thread.join(10)


@pytest.mark.parametrize("kind", ["get", "start"])
def test_the_app_tears_down_before_the_wait(
    make_held: Callable[..., Held], eventually: Eventually, kind: str
) -> None:
    ended = threading.Semaphore(0)

    def prepare(flow: Flow) -> None:
        flow.app.teardown_request(lambda error: ended.release())
        flow.app.teardown_appcontext(lambda error: ended.release())

    held = make_held(prepare)
    path = held.start()
    assert ended.acquire(timeout=5) and ended.acquire(timeout=5)
    if kind == "get":
        answer = held.call(f"{path}?{LONG}")
    else:
        answer = held.call("/work", "POST", headers={"Prefer": LONG})
    assert ended.acquire(timeout=5) and ended.acquire(timeout=5)
    eventually(held.has_waiter)
    held.gate.set()
    assert next(answer).json["State"] == "Completed"


def test_waits_hold_no_database_connection(
    make_held: Callable[..., Held], eventually: Eventually
) -> None:
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    db = flask_sqlalchemy.SQLAlchemy()

    def prepare(flow: Flow) -> None:
        flow.app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///people.db"
        flow.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "pool_size": 1, "max_overflow": 0, "pool_timeout": 5,
        }  # fmt: skip
        db.init_app(flow.app)
        flow.async_routes.identity_loader(
            lambda: {"id": db.session.scalar(db.text("SELECT 'ann'"))}
        )

    held = make_held(prepare)
    path = held.start()
    answers = [held.call(f"{path}?{LONG}") for _ in range(3)]
    answers.append(held.call("/work", "POST", headers={"Prefer": LONG}))
    eventually(lambda: held.slots() == 0)
    with held.app.app_context():
        assert db.engine.pool.checkedout() == 0
    assert held.flow.client.get(path).status_code == HTTPStatus.OK
    held.gate.set()
    assert [next(answer).json["User"] for answer in answers] == ["ann"] * 4
    with held.app.app_context():
        db.engine.dispose()


def test_after_request_functions_see_a_stream_and_their_headers_are_sent(
    make_held: Callable[..., Held],
) -> None:
    seen: list[Any] = []

    def prepare(flow: Flow) -> None:
        @flow.app.before_request
        def visit() -> None:
            session["visits"] = session.get("visits", 0) + 1

        @flow.app.after_request
        def add(response: Response) -> Response:
            seen.append((response.status_code, response.is_streamed, response.headers.get("ETag")))
            response.headers["Access-Control-Allow-Origin"] = "*"
            response.headers["Cache-Control"] = "private, no-store"
            response.vary.add("Origin")
            return response

    held = make_held(prepare)
    path = held.start()
    seen.clear()
    answer = next(held.call(f"{path}?{SHORT}"))
    assert seen == [(200, True, None)]
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Cache-Control"] == "private, no-store"
    assert answer.headers["Vary"] == "Accept, Authorization, Cookie, Origin"
    assert "session=" in answer.headers["Set-Cookie"]
    assert answer.headers["ETag"].endswith('-json"')
    assert answer.content_length == len(answer.data)
    started = next(held.call("/work", "POST", headers={"Prefer": "wait=1"}))
    assert seen[1] == (202, True, None)
    assert started.headers["Location"] == f"/task/{started.json['Id']}"
    assert started.headers["Preference-Applied"] == "wait=1"


def test_a_request_that_needs_no_wait_is_not_streamed(make_held: Callable[..., Held]) -> None:
    streamed: list[bool] = []

    def prepare(flow: Flow) -> None:
        @flow.app.after_request
        def add(response: Response) -> Response:
            streamed.append(response.is_streamed)
            return response

    held = make_held(prepare)
    finished = f"/task/{held.flow.run('/quick')['Id']}"
    running = held.start()
    streamed.clear()
    for url in (f"{finished}?{LONG}", f"{running}?wait=0"):
        assert next(held.call(url)).headers["ETag"]
    for _ in range(4):
        assert runtime_of(held.app).runner.stream_slots.acquire(blocking=False)
    assert next(held.call(f"{running}?{LONG}")).headers["ETag"]
    assert streamed == [False] * 3
    runtime_of(held.app).runner.stream_slots.release(4)


def test_an_unchanged_task_is_answered_with_304(make_held: Callable[..., Held]) -> None:
    held = make_held()
    path = held.start()
    etag = next(held.call(f"{path}?{SHORT}")).headers["ETag"]
    answer = next(held.call(f"{path}?{SHORT}", headers={"If-None-Match": etag}))
    assert (answer.status_code, answer.data) == (304, b"")
    assert answer.headers["ETag"] == etag and "Content-Length" not in answer.headers


def test_head_has_the_headers_of_get(make_held: Callable[..., Held]) -> None:
    held = make_held()
    path = held.start()
    answer = next(held.call(f"{path}?{SHORT}"))
    head = next(held.call(f"{path}?{SHORT}", "HEAD"))
    assert head.data == b"" and head.status_code == 200
    assert dict(head.headers) == dict(answer.headers)


@pytest.mark.parametrize("accept", ["application/json", "application/xml"])
def test_404_if_the_task_is_removed_during_the_wait(
    make_held: Callable[..., Held], eventually: Eventually, accept: str
) -> None:
    held = make_held()
    path = held.start()
    task_id = path.removeprefix("/task/")
    runner = runtime_of(held.app).runner
    # Its start would wake the waiter with a record, and hide the wake-up below.
    eventually(
        lambda: (run := runner.dispatcher.running.get(task_id)) is not None and run[0].epoch > 0
    )
    answer = held.call(f"{path}?{LONG}", headers={"Accept": accept})
    eventually(held.has_waiter)
    (waiter,) = held.notifier()._waiting[task_id]
    eventually(waiter._changed.locked)  # from now on it keeps a wake-up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.store, "get", lambda task_id: None)
        waiter.set()
        found = next(answer)
    assert found.status_code == 404
    assert found.mimetype == accept.replace("application/", "application/problem+")
    assert found.content_length == len(found.data)
    assert held.slots() == 4


def test_503_if_the_store_fails_during_the_wait(
    make_held: Callable[..., Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make_held()
    path = held.start()

    def fail(*args: Any) -> Any:
        raise StoreUnavailable("away", retry_after=7)

    monkeypatch.setattr(held.notifier(), "wait", fail)
    found = next(held.call(f"{path}?{LONG}"))
    assert (found.status_code, found.mimetype) == (503, "application/problem+json")
    assert found.json["instance"] == path and found.headers["Retry-After"] == "7"
    assert held.slots() == 4


def test_a_start_whose_wait_fails_returns_its_task(
    make_held: Callable[..., Held],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For instance, the process cannot start another thread."""
    held = make_held()
    held.start("/quick")

    def fail(*args: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(held.notifier(), "wait", fail)
    found = next(held.call("/work", "POST", headers={"Prefer": LONG}))
    assert (found.status_code, found.json["State"] in ("NotStarted", "Running")) == (202, True)
    assert found.headers["Location"] and "Preference-Applied" not in found.headers
    assert held.slots() == 4
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert found.json["Id"] in record.getMessage() and record.exc_info


def test_an_app_may_have_its_own_response_class(make_held: Callable[..., Held]) -> None:
    class OwnResponse(Response):
        default_mimetype = "text/plain"

    seen: list[type] = []

    def prepare(flow: Flow) -> None:
        flow.app.response_class = OwnResponse

        @flow.app.after_request
        def add(response: Response) -> Response:
            seen.append(type(response))
            return response

    held = make_held(prepare)
    path = held.start()
    answer = next(held.call(f"{path}?{SHORT}"))
    assert answer.json["Id"] and answer.headers["ETag"]
    etag = {"If-None-Match": answer.headers["ETag"]}
    assert next(held.call(f"{path}?{SHORT}", headers=etag)).status_code == 304
    assert all(issubclass(each, OwnResponse) for each in seen)


def compress(response: Response) -> Response:
    """Compress each piece of a body; send an empty piece first."""
    pieces = response.response

    def compressed() -> Iterator[bytes]:
        yield b""
        for piece in pieces:
            assert isinstance(piece, bytes)
            yield gzip.compress(piece)

    response.response = compressed()
    response.headers["Content-Encoding"] = "gzip"
    response.headers.pop("Content-Length", None)
    return response


def test_a_compressor_compresses_the_final_response(make_held: Callable[..., Held]) -> None:
    held = make_held(lambda flow: flow.app.after_request(compress))
    path = json.loads(gzip.decompress(held.flow.client.post("/work").data))["Id"]
    answer = next(held.call(f"/task/{path}?{SHORT}"))
    assert json.loads(gzip.decompress(answer.data))["Id"] == path
    assert "Content-Length" not in answer.headers
    etag = answer.headers["ETag"]
    assert etag.startswith("W/"), "a strong ETag would stand for the uncompressed bytes"
    unchanged = next(held.call(f"/task/{path}?{SHORT}", headers={"If-None-Match": etag}))
    assert (unchanged.status_code, unchanged.data) == (304, b"")


def test_compressors_that_check_content_encoding_skip_a_wait(
    make_held: Callable[..., Held],
) -> None:
    """Flask-Compress would hold the request context until the end of the wait."""

    def prepare(flow: Flow) -> None:
        @flow.app.after_request
        def compress_unless_encoded(response: Response) -> Response:
            is_encoded = "Content-Encoding" in response.headers
            return response if is_encoded else compress(response)

    held = make_held(prepare)
    path = "/task/" + json.loads(gzip.decompress(held.flow.client.post("/work").data))["Id"]
    answer = next(held.call(f"{path}?{SHORT}"))
    assert answer.json["Id"] and answer.content_length == len(answer.data)
    assert "Content-Encoding" not in answer.headers
    assert not answer.headers["ETag"].startswith("W/")


def test_an_after_request_function_may_read_the_response(make_held: Callable[..., Held]) -> None:
    read: list[Any] = []

    def prepare(flow: Flow) -> None:
        @flow.app.after_request
        def add(response: Response) -> Response:
            read.append(response.get_json())
            return response

    held = make_held(prepare)
    path = held.start()
    answer = next(held.call(f"{path}?{SHORT}"))
    assert read[-1] == answer.json and answer.content_length == len(answer.data)
    assert answer.headers["ETag"]


def test_an_after_request_function_may_replace_the_response(make_held: Callable[..., Held]) -> None:
    def prepare(flow: Flow) -> None:
        @flow.app.after_request
        def replace(response: Response) -> Response:
            if request.method == "GET":
                response.status_code = 299
                response.data = b"own"
            return response

    held = make_held(prepare)
    answer = next(held.call(f"{held.start()}?{LONG}"))
    assert (answer.status_code, answer.data, answer.content_length) == (299, b"own", 3)
    assert held.slots() == 4


def call_app(app: Flask, path: str, **overrides: Any) -> tuple[Any, list[str]]:
    """Call an app as a server does; return the iterable and the list of statuses it will send."""
    statuses: list[str] = []
    environ = EnvironBuilder(path, environ_overrides=overrides).get_environ()
    body = app(environ, lambda status, headers, exc_info=None: statuses.append(status))  # type: ignore[arg-type,return-value]
    return body, statuses


def test_no_slot_is_used_before_the_server_sends(make_held: Callable[..., Held]) -> None:
    held = make_held()
    path = held.start()
    body, statuses = call_app(held.app, f"{path}?wait=0.2")
    assert statuses == [] and held.slots() == 4 and not has_app_context()
    pieces = list(body)
    assert statuses == ["200 OK"] and json.loads(b"".join(pieces))["Id"]
    body.close()
    assert held.slots() == 4


def test_a_client_that_disconnects_before_the_wait_uses_no_slot(
    make_held: Callable[..., Held],
) -> None:
    held = make_held()
    body, statuses = call_app(held.app, f"{held.start()}?{LONG}")
    body.close()
    assert statuses == [] and held.slots() == 4 and not held.has_waiter()


def test_a_wait_without_a_free_slot_is_answered_at_once(
    make_held: Callable[..., Held],
) -> None:
    held = make_held()
    body, statuses = call_app(held.app, f"{held.start()}?{LONG}", **{"wsgi.multithread": True})
    slots = runtime_of(held.app).runner.stream_slots
    for _ in range(4):
        assert slots.acquire(blocking=False)
    assert json.loads(b"".join(body))["State"] and statuses == ["200 OK"]
    body.close()
    slots.release(4)


def test_a_failing_after_request_function_leaks_no_slot(make_held: Callable[..., Held]) -> None:
    def prepare(flow: Flow) -> None:
        @flow.app.after_request
        def fail(response: Response) -> Response:
            if "fail" in request.args:
                raise ValueError("on purpose")
            return response

    held = make_held(prepare)
    path = held.start()
    held.app.config["PROPAGATE_EXCEPTIONS"] = False
    assert next(held.call(f"{path}?{LONG}&fail=1")).status_code == 500
    assert held.slots() == 4


def test_an_unexpected_error_of_a_wait_is_logged(
    make_held: Callable[..., Held],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = make_held()
    path = held.start()

    def wait(*arguments: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(held.notifier(), "wait", wait)
    body, _ = call_app(held.app, f"{path}?{LONG}")
    with pytest.raises(ZeroDivisionError):
        list(body)
    assert f"waited for task {path.rpartition('/')[2]} failed with status 500." in caplog.text
    assert "ZeroDivisionError: on purpose" in caplog.text


def test_a_server_that_reads_the_status_before_the_body_gets_it(
    make_held: Callable[..., Held],
) -> None:
    """Granian sends headers before it asks for the first piece."""
    held = make_held()
    path = held.start()
    body, statuses = call_app(held.app, f"{path}?{SHORT}", SERVER_SOFTWARE="Granian")
    assert statuses == ["200 OK"] and json.loads(b"".join(body))["Id"]


@pytest.mark.parametrize("kind", ["get", "start", "stream"])
def test_a_server_without_threads_holds_requests_only_briefly(
    make_held: Callable[..., Held], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(waits, "BLOCKING_SECONDS", 0.2)
    held = make_held()
    path = held.start()
    single_threaded = {"wsgi.multithread": False}
    client = held.app.test_client()
    if kind == "start":
        answer = client.post(
            "/work", headers={"Prefer": "wait=20"}, environ_overrides=single_threaded
        )
        assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "wait=0")
    elif kind == "get":
        answer = client.get(f"{path}?wait=20", environ_overrides=single_threaded)
        assert answer.json["State"] in ("NotStarted", "Running")
    else:
        answer = client.get(f"{path}/events", environ_overrides=single_threaded)
        assert answer.data.endswith(b"retry: 1000\n\n")


def gevent_input(monkeypatch: pytest.MonkeyPatch, is_patched: bool) -> object:
    monkey = types.ModuleType("gevent.monkey")
    monkey.is_module_patched = lambda name: is_patched  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    return type("Input", (), {"__module__": "gevent.pywsgi"})()


def test_the_longest_wait_depends_on_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits.longest({}, 20) == waits.longest({"wsgi.multithread": True}, 20) == 20
    assert waits.longest({"wsgi.multithread": False}, 20) == 5
    assert waits.longest({"wsgi.multithread": False}, 1) == 1
    for is_patched, seconds in ((True, 20), (False, 5)):
        body = gevent_input(monkeypatch, is_patched)
        assert waits.longest({"wsgi.multithread": False, "wsgi.input": body}, 20) == seconds
    monkeypatch.setattr(shutdown, "restart_gunicorn_timeout", lambda: 3.0)
    assert waits.longest({"wsgi.multithread": False}, 20) == 2
    assert waits.longest({"wsgi.multithread": True}, 20) == 20


@pytest.mark.parametrize("is_loaded", [True, False])
def test_one_warning_if_asgiref_runs_all_requests_in_one_thread(
    make_held: Callable[..., Held],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_loaded: bool,
) -> None:
    if is_loaded:
        monkeypatch.setitem(sys.modules, "asgiref.wsgi", types.ModuleType("asgiref.wsgi"))
    held = make_held()
    for _ in range(2):
        with SpooledTemporaryFile() as body:
            overrides = {"wsgi.input": body, "wsgi.multithread": True}
            assert waits.longest(overrides, 20) == (5 if is_loaded else 20)
            held.app.test_client().post("/quick", environ_overrides=overrides)
    records = [record for record in caplog.records if "a2wsgi" in record.getMessage()]
    assert len(records) == is_loaded
