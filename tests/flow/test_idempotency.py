"""Starts with an ``Idempotency-Key``: a replay gets the existing task and starts none."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, request
from werkzeug.test import TestResponse

from flask_asyncroute import Access, AsyncRoute, Permission, task_created
from flask_asyncroute.errors import KeyTaken
from flask_asyncroute.runtime import runtime_of
from tests.support.apps import close_app, new_app
from tests.support.flow import IN_MEMORY, Flow, identity_of_header, loaded, problem
from tests.support.waiting import eventually_true

MakeFlow = Callable[..., Flow]
ANNA = {"X-User": "anna"}
RANDOM = "AAAAAAAAAAAAAAAAAAAAAQ"  # 16 bytes in base64
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PARTS = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n'


def send(
    flow: Flow, key: str = "key", method: str = "POST", path: str = "/work", **options: Any
) -> TestResponse:
    headers = {"Idempotency-Key": key, **ANNA, **options.pop("headers", {})}
    return flow.request(method, path, headers=headers, **options)


def started(response: TestResponse, status: int = 202) -> str:
    """Check that the request created a task; return its id."""
    assert "Idempotency-Replayed" not in response.headers
    return id_in(response, status)


def replayed(response: TestResponse, status: int = 202) -> str:
    """Check that the request got an existing task; return its id."""
    assert response.headers.getlist("Idempotency-Replayed") == ["true"]
    return id_in(response, status)


def id_in(response: TestResponse, status: int) -> str:
    assert response.status_code == status, response.get_data(as_text=True)[:2000]
    task = loaded(response)
    assert response.headers["Location"] == f"/task/{task['Id']}"
    return str(task["Id"])


def only_task(flow: Flow) -> str:
    (task_id,) = flow.ids("limit=500", headers=ANNA)
    return task_id


# -- replays
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.covers("A75")
def test_a_replay_gets_the_existing_task(
    flow: Flow, gate: threading.Event, hear: Callable[..., list[Any]]
) -> None:
    runs: list[str] = []
    sent_signals = hear(task_created, sender=flow.app)

    @flow.route()
    def work() -> str:
        runs.append("run")
        gate.wait(10)
        return "done"

    first = started(send(flow, json={"a": 1}))
    unfinished = send(flow, json={"a": 1})
    assert replayed(unfinished) == first
    assert 1 <= int(unfinished.headers["Retry-After"]) <= 60
    gate.set()
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == "done"
    finished = send(flow, json={"a": 1})
    assert replayed(finished, 200) == first
    assert loaded(finished)["Result"] == "done"
    assert "Retry-After" not in finished.headers
    assert only_task(flow) == first
    assert (len(runs), len(sent_signals)) == (1, 1)


@pytest.mark.covers("A75")
def test_a_replay_of_a_failed_or_aborted_task_gets_it(
    flow: Flow, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow.route()
    def work() -> None:
        raise ValueError("no")

    @flow.route("/slow")
    def slow() -> None:
        gate.wait(10)

    # Restored after the test, because apps of one name share a logger.
    monkeypatch.setattr(flow.app.logger, "disabled", True)
    flow.headers = ANNA
    failed = flow.ended(started(send(flow)))
    assert loaded(send(flow))["Error"] == failed["Error"]
    slow_id = started(send(flow, path="/slow"))
    flow.stop(slow_id)
    replay = send(flow, path="/slow")
    assert (replayed(replay, 200), loaded(replay)["State"]) == (slow_id, "Aborted")


@pytest.mark.covers("A75")
def test_the_accepted_status_applies_to_replays(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow(ASYNCROUTE_ACCEPTED_STATUS=200)

    @flow.route()
    def work() -> None:
        gate.wait(10)

    assert started(send(flow), 200) == replayed(send(flow), 200)


@pytest.mark.covers("A75")
def test_a_replay_that_waits(flow: Flow, gate: threading.Event) -> None:
    @flow.route()
    def work() -> None:
        gate.wait(10)

    first = started(send(flow, headers={"Prefer": "wait=0"}))
    at_timeout = send(flow, headers={"Prefer": "wait=1"})
    assert at_timeout.headers["Preference-Applied"] == "wait=1"
    assert replayed(at_timeout) == first
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    at_end = send(flow, headers={"Prefer": "wait=10"})
    timer.join()
    assert replayed(at_end, 200) == first
    at_once = send(flow, headers={"Prefer": "wait=10"})
    assert replayed(at_once, 200) == first


@pytest.mark.covers("A75")
@IN_MEMORY
def test_a_first_start_that_waits_is_not_a_replay(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    first = started(send(flow, headers={"Prefer": "wait=10"}), 200)
    assert replayed(send(flow, headers={"Prefer": "wait=10"}), 200) == first


@pytest.mark.covers("A75")
@IN_MEMORY
def test_after_request_functions_see_that_a_response_is_a_replay(
    flow: Flow, gate: threading.Event
) -> None:
    seen: list[str | None] = []

    @flow.app.after_request
    def note(response: Response) -> Response:
        seen.append(response.headers.get("Idempotency-Replayed"))
        return response

    @flow.route()
    def work() -> None:
        gate.wait(10)

    for prefer in ("wait=0", "wait=1", "wait=0"):
        send(flow, headers={"Prefer": prefer})
    assert seen == [None, "true", "true"]


@pytest.mark.covers("A75")
@IN_MEMORY
def test_a_repeated_start_without_a_key_is_not_a_replay(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    assert started(flow.request("POST", "/work")) != started(flow.request("POST", "/work"))


@pytest.mark.covers("A75")
@IN_MEMORY
def test_a_replay_on_an_immediate_route(flow: Flow) -> None:
    @flow.route(executor="immediate")
    def work() -> None: ...

    assert started(send(flow)) == replayed(send(flow), 200)


@pytest.mark.covers("A75")
@IN_MEMORY
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"path": "/work?a=1"}, {"path": "/work?a=2"}),
        ({"path": "/work?a=1&b=2"}, {"path": "/work?b=2&a=1"}),
        ({"data": b"one"}, {"data": b"two"}),
        ({"data": b"x" * 600_000}, {"data": b"x" * 599_999 + b"y"}),
        ({"data": b"one"}, {}),
        ({"method": "PUT"}, {"method": "POST"}),
        ({"path": "/work"}, {"path": "/work/2"}),
        ({"json": [1]}, {"json": [2]}),
    ],
)
def test_a_key_with_another_request_is_refused(
    flow: Flow, first: dict[str, Any], second: dict[str, Any]
) -> None:
    @flow.async_routes.task
    def work(number: int) -> None: ...

    for rule in ("/work/<int:number>", "/work"):
        defaults = None if "<" in rule else {"number": 1}
        flow.app.add_url_rule(rule, "work", work, methods=["PUT", "POST"], defaults=defaults)

    task_id = started(send(flow, **first))
    flow.headers = ANNA
    flow.ended(task_id)
    for _ in range(2):
        reused = send(flow, **second)
        found = problem(reused, 422, "key-reused")
        assert "Idempotency-Key" in found["detail"] and "Id" not in found
        assert "Idempotency-Replayed" not in reused.headers
        assert replayed(send(flow, **first), 200) == task_id
    assert only_task(flow) == task_id


@pytest.mark.covers("A75")
def test_users_routes_and_keys_are_separate(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    @flow.route("/other")
    def other() -> None: ...

    ids = [
        started(send(flow)),
        started(send(flow, headers={"X-User": "ben"})),
        started(send(flow, path="/other")),
        started(send(flow, key="another")),
    ]
    assert len(set(ids)) == 4
    flow.headers = ANNA
    for task_id in (ids[0], ids[2], ids[3]):
        flow.ended(task_id)


@pytest.mark.covers("A75")
@pytest.mark.parametrize("header", ["Cookie", "Authorization"])
def test_an_anonymous_caller_is_identified_by_its_credentials(flow: Flow, header: str) -> None:
    @flow.route()
    def work() -> None: ...

    def sent(value: str) -> str:
        headers = {"Idempotency-Key": "key", header: value}
        response = flow.app.test_client(use_cookies=False).post("/work", headers=headers)
        assert response.status_code in (200, 202)
        return str(loaded(response)["Id"])

    assert sent("a=1") == sent("a=1")
    assert sent("a=1") != sent("a=2")


@pytest.mark.covers("A75")
def test_a_long_key_identifies_a_request_without_credentials(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    @flow.route("/other")
    def other() -> None: ...

    def sent(path: str = "/work", **values: Any) -> TestResponse:
        headers = {"Idempotency-Key": RANDOM, **values.pop("headers", {})}
        return flow.app.test_client(use_cookies=False).post(path, headers=headers, **values)

    first = started(sent())
    flow.ended(first)
    for key in (RANDOM, f'"{RANDOM}"'):
        assert replayed(sent(headers={"Idempotency-Key": key}), 200) == first
    problem(sent(json=1), 422, "key-reused")
    problem(sent("/work?a=1"), 422, "key-reused")
    # The same key of other callers, of another route, and a different key.
    others = [
        started(sent(headers=ANNA)),
        started(sent(headers={"Cookie": "a=1"})),
        started(sent(headers={"Authorization": "Bearer a"})),
        started(sent("/other")),
        started(sent(headers={"Idempotency-Key": "B" + RANDOM[1:]})),
    ]
    assert len({first, *others}) == 6
    assert replayed(sent(), 200) == first
    flow.headers = ANNA
    for task_id in others:
        flow.ended(task_id)
    assert replayed(sent(headers=ANNA), 200) == others[0]


@pytest.mark.covers("A75")
@IN_MEMORY
@pytest.mark.parametrize("key", ["key", RANDOM[1:], f'"{RANDOM[1:]}"', '"' + r"\"" * 21 + '"'])
def test_a_short_key_without_user_and_credentials_is_refused(flow: Flow, key: str) -> None:
    @flow.route()
    def work() -> None: ...

    response = flow.request("POST", "/work", headers={"Idempotency-Key": key})
    found = problem(response, 400, "invalid-request")
    assert "random key of at least 22 characters, such as a UUID" in found["detail"]
    assert "Cookie or Authorization" in found["detail"]
    assert "Idempotency-Replayed" not in response.headers
    assert flow.query() == []


@pytest.mark.covers("A75")
@IN_MEMORY
def test_a_key_is_checked_before_the_permission(flow: Flow) -> None:
    @flow.route(permission=Permission())
    def work() -> None: ...

    for key, status, slug in (("key", 400, "invalid-request"), (RANDOM, 401, "not-authenticated")):
        response = flow.request("POST", "/work", headers={"Idempotency-Key": key})
        problem(response, status, slug)


@pytest.mark.covers("A75")
@IN_MEMORY
@pytest.mark.parametrize("key", ["key", RANDOM, "a, a"])
def test_options_ignores_the_key(flow: Flow, key: str) -> None:
    @flow.app.route("/work", methods=["POST", "OPTIONS"])
    @flow.async_routes.task
    def work() -> None: ...

    for _ in range(2):
        response = flow.request("OPTIONS", "/work", headers={"Idempotency-Key": key})
        assert (response.status_code, response.data) == (200, b"")
        assert "Idempotency-Replayed" not in response.headers
    assert flow.query() == []


@pytest.mark.covers("A75")
@IN_MEMORY
@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, "a, a", '"a", "a"', "caf\xe9"])
def test_an_invalid_key_is_refused(flow: Flow, key: str) -> None:
    @flow.route()
    def work() -> None: ...

    problem(send(flow, key), 400, "invalid-request")
    assert flow.query(headers=ANNA) == []


@pytest.mark.covers("A75")
@IN_MEMORY
def test_two_keys_are_refused(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "a"), ("X-User", "anna")]
    problem(flow.client.post("/work", headers=headers), 400, "invalid-request")


# -- lifetime of a key
# -------------------------------------------------------------------------------------------------


@pytest.mark.covers("A75")
def test_a_key_is_removed_with_its_task(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    flow.headers = ANNA
    first = started(send(flow))
    flow.ended(first)
    flow.purge(first)
    second = started(send(flow, json=1))
    assert second != first
    flow.ended(second)


class RefusingExecutor(Executor):
    """Refuses calls until ``is_willing`` is set."""

    is_willing = False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.is_willing:
            raise RuntimeError("no")
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.covers("A75")
def test_a_start_refused_by_the_executor_releases_its_key(flow: Flow) -> None:
    executor = RefusingExecutor()

    @flow.route(executor=executor)
    def work() -> None: ...

    problem(send(flow, json=1), 503, "queue-full")
    executor.is_willing = True
    first = started(send(flow, json=2))
    assert only_task(flow) == first


@pytest.mark.covers("A75")
@IN_MEMORY
def test_a_refused_start_releases_its_key(flow: Flow) -> None:
    verdicts: list[Any] = [ValueError("no"), Permission(read=Access(groups=("g",)))]

    def permission() -> Any:
        verdict = verdicts.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    @flow.route(permission=permission)
    def work() -> None: ...

    problem(send(flow, json=1), 403, "not-permitted")
    first = started(send(flow, json=2))
    # The permission function is not called for a replay; it would raise an IndexError.
    flow.headers = ANNA
    flow.ended(first)
    assert replayed(send(flow, json=2), 200) == first


# -- requirements of a replay
# -------------------------------------------------------------------------------------------------


@pytest.mark.covers("A75")
def test_a_replay_needs_no_slot_and_no_quota(
    make_flow: MakeFlow, store_url: str, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_TASKS_PER_USER=1)

    @flow.route(max_workers=1, queue_size=0)
    def work() -> None:
        gate.wait(10)

    first = started(send(flow))
    problem(send(flow, "another", headers={"X-User": "ben"}), 503, "queue-full")
    assert replayed(send(flow)) == first


@pytest.mark.covers("A75")
@pytest.mark.parametrize("kind", ["callable", "fixed"])
@pytest.mark.parametrize("size", [1, 600_000])
def test_a_permission_function_can_read_the_body(flow: Flow, kind: str, size: int) -> None:
    read: list[Any] = []

    def permission() -> Permission:
        read.append((request.get_json() or {})["text"])
        return Permission()

    @flow.route(permission=permission if kind == "callable" else Permission())
    def work() -> int:
        return len(request.json["text"])

    document = {"text": "x" * size}
    first = started(send(flow, json=document))
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == size
    assert replayed(send(flow, json=document), 200) == first
    assert [len(text) for text in read] == ([size] if kind == "callable" else [])


@pytest.mark.covers("A75")
@pytest.mark.parametrize("size", [10, 600_000])
def test_a_form_parsed_by_a_permission_function_counts_as_the_same_body(
    flow: Flow, size: int
) -> None:
    def permission() -> Permission:
        assert (request.form["a"], len(request.files["f"].read())) == ("1", size)
        return Permission()

    @flow.route(permission=permission)
    def work() -> Any:
        return [request.form["a"], len(request.files["f"].read())]

    body = (
        PARTS[:-7]
        + b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
        + b"y" * size
        + b"\r\n--b--\r\n"
    )
    first = started(send(flow, data=body, headers=FORM))
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == ["1", size]
    assert replayed(send(flow, data=body, headers=FORM), 200) == first
    problem(send(flow, data=body + b" ", headers=FORM), 422, "key-reused")


@pytest.mark.covers("A75")
@pytest.mark.parametrize("size", [10, 600_000])
def test_a_chunked_body_counts_as_the_same_body(flow: Flow, size: int) -> None:
    def permission() -> Permission:
        assert len(request.get_data()) == size
        return Permission()

    @flow.route(permission=permission)
    def work() -> int:
        return len(request.get_data())

    def chunked(data: bytes) -> TestResponse:
        return send(
            flow, input_stream=io.BytesIO(data), headers={"Transfer-Encoding": "chunked"},
            environ_overrides={"wsgi.input_terminated": True},
        )  # fmt: skip

    first = started(chunked(b"y" * size))
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == size
    assert replayed(chunked(b"y" * size), 200) == first
    assert replayed(send(flow, data=b"y" * size), 200) == first
    problem(chunked(b"y" * (size - 1)), 422, "key-reused")


@pytest.mark.covers("A75")
@pytest.mark.parametrize("size", [10, 300_000])
def test_a_form_parsed_by_a_hook_counts_as_the_same_body(flow: Flow, size: int) -> None:
    """Flask-WTF parses forms, too. The body is then written again, with a random boundary."""
    flow.app.before_request(lambda: None if request.method != "POST" or request.form else None)

    @flow.route()
    def work() -> int:
        return len(request.files["f"].read())

    def form(data: bytes) -> dict[str, Any]:
        return {"a": "1", "f": (io.BytesIO(data), "f.txt")}

    first = started(send(flow, data=form(b"y" * size)))
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == size
    assert replayed(send(flow, data=form(b"y" * size)), 200) == first
    problem(send(flow, data=form(b"z" * size)), 422, "key-reused")


# -- what is stored
# --------------------------------------------------------------------------------------------------


@pytest.mark.covers("A75")
def test_the_key_is_not_stored_or_logged_in_plain_text(
    make_flow: MakeFlow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=f"sqlite:///{tmp_path / 'keys.db'}")

    @flow.route()
    def work() -> bool:
        return "Idempotency-Key" in request.headers

    with caplog.at_level(logging.DEBUG):
        first = started(send(flow, "secret-key-1234", json=1))
        flow.headers = ANNA
        assert flow.ended(first)["Result"] is False
        problem(send(flow, "secret-key-1234", json=2), 422, "key-reused")
    assert "secret-key-1234" not in caplog.text
    runtime_of(flow.app).close()
    assert all(b"secret-key-1234" not in path.read_bytes() for path in tmp_path.glob("keys.db*"))


# -- concurrent starts
# -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def two_flows(
    request: pytest.FixtureRequest, tmp_path: Path, separate_processes: None
) -> Iterator[list[Flow]]:
    """Return two runners of one app on one store, like two processes; one on ``memory://``."""
    kind = request.param
    url = {"memory": "memory://", "sqlite": "sqlite:///keys.db"}.get(
        kind
    ) or request.getfixturevalue("postgresql_url")
    flows = []
    for _ in range(1 if kind == "memory" else 2):
        app: Flask = new_app("app", tmp_path, {"ASYNCROUTE_STORE": url})
        async_routes = AsyncRoute(app)
        async_routes.identity_loader(identity_of_header)
        flows.append(Flow(app, async_routes))
    yield flows
    for flow in flows:
        close_app(flow.app)


@pytest.mark.covers("A75")
def test_sixteen_concurrent_starts_create_one_task_and_one_run(
    two_flows: list[Flow], gate: threading.Event
) -> None:
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        gate.wait(10)

    for flow in two_flows:
        flow.route(max_workers=1, queue_size=20)(work)
    for number in range(5):
        answers = sixteen_starts(two_flows, f"key{number}")
        assert [answer.status_code for answer in answers] == [202] * 16
        assert len({answer.get_json()["Id"] for answer in answers}) == 1
        replays = [answer.headers.get("Idempotency-Replayed") for answer in answers]
        assert sorted(replays, key=str) == [None] + ["true"] * 15
    flow = two_flows[0]
    flow.headers = ANNA
    gate.set()
    ids = flow.ids()
    assert len(ids) == 5
    for task_id in ids:
        flow.ended(task_id)
    assert len(runs) == 5
    # The starts that lost have released their slots.
    executors = [
        executor for flow in two_flows for executor in runtime_of(flow.app).runner.executors
    ]
    eventually_true(lambda: all(executor.free() == 1 for executor in executors))


def sixteen_starts(flows: list[Flow], key: str) -> list[TestResponse]:
    """Send 16 concurrent starts with one key, to each runner in turn."""
    barrier = threading.Barrier(16)
    answers: list[TestResponse] = []

    def start(flow: Flow) -> None:
        barrier.wait(10)
        answers.append(
            flow.app.test_client().post("/work", json=1, headers={"Idempotency-Key": key, **ANNA})
        )

    threads = [
        threading.Thread(target=start, args=(flows[number % len(flows)],)) for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return answers


@pytest.mark.covers("A75")
@IN_MEMORY
def test_a_start_that_loses_to_a_withdrawn_start_is_refused(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow.route()
    def work() -> None: ...

    flow.query()
    store = runtime_of(flow.app).runner.store
    with monkeypatch.context() as patch:
        patch.setattr(store, "add", raise_key_taken)
        assert send(flow).headers["Retry-After"] == "1"
        problem(send(flow), 503, "queue-full")
    first = started(send(flow))
    flow.headers = ANNA
    flow.ended(first)


def raise_key_taken(*given: Any) -> None:
    raise KeyTaken("x")


@pytest.mark.covers("A75")
@IN_MEMORY
def test_the_last_slot_may_be_taken_by_the_same_start(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    @flow.route(max_workers=1, queue_size=0)
    def work() -> None:
        gate.wait(10)

    flow.query()
    runner = runtime_of(flow.app).runner
    executor = runner.executor_of(runner.routes["work"])
    reserve = executor.reserve
    firsts: list[str] = []

    def reserve_after_another() -> None:
        monkeypatch.setattr(executor, "reserve", reserve)
        other = flow.app.test_client().post("/work", headers={"Idempotency-Key": "key", **ANNA})
        firsts.append(started(other))
        reserve()

    monkeypatch.setattr(executor, "reserve", reserve_after_another)
    assert [replayed(send(flow))] == firsts
