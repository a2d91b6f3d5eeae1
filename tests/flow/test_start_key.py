"""Starts with an ``Idempotency-Key``: a repeat gets the task that there is, and starts none (A75)."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from werkzeug.test import TestResponse

from flask_asyncroute import Access, AsyncRoute, Permission, task_created
from flask_asyncroute.errors import KeyTaken
from flask_asyncroute.runtime import runtime_of
from tests.conftest import close_app, eventually_true, new_app
from tests.flow.conftest import identity_of_header
from tests.flow.driving import IN_MEMORY, Flow, loaded, problem

MakeFlow = Callable[..., Flow]
ANNA = {"X-User": "anna"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PARTS = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n'


def send(flow: Flow, key: str = "key", method: str = "POST", path: str = "/work", **given: Any) -> TestResponse:
    headers = {"Idempotency-Key": key, **ANNA, **given.pop("headers", {})}
    return flow.request(method, path, headers=headers, **given)


def started(response: TestResponse, status: int = 202) -> str:
    assert response.status_code == status, response.get_data(as_text=True)[:2000]
    task = loaded(response)
    assert response.headers["Location"] == f"/task/{task['Id']}"
    return str(task["Id"])


def only_task(flow: Flow) -> str:
    (task_id,) = flow.ids("limit=500", headers=ANNA)
    return task_id


# -- repeats -------------------------------------------------------------------------------------------------------------


def test_a75_a_repeat_gets_the_task_and_runs_nothing(
    flow: Flow, gate: threading.Event, hear: Callable[..., list[Any]]
) -> None:
    runs: list[str] = []
    heard = hear(task_created, sender=flow.app)

    @flow.route()
    def work() -> str:
        runs.append("run")
        gate.wait(10)
        return "done"

    first = started(send(flow, json={"a": 1}))
    unfinished = send(flow, json={"a": 1})
    assert started(unfinished) == first
    assert 1 <= int(unfinished.headers["Retry-After"]) <= 60
    gate.set()
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == "done"
    finished = send(flow, json={"a": 1})
    assert started(finished, 200) == first
    assert loaded(finished)["Result"] == "done"
    assert "Retry-After" not in finished.headers
    assert only_task(flow) == first
    assert (len(runs), len(heard)) == (1, 1)


def test_a75_a_repeat_of_a_failed_or_aborted_task_gets_that(flow: Flow, gate: threading.Event) -> None:
    @flow.route()
    def work() -> None:
        raise ValueError("no")

    @flow.route("/slow")
    def slow() -> None:
        gate.wait(10)

    flow.app.logger.disabled = True
    flow.headers = ANNA
    failed = flow.ended(started(send(flow)))
    assert loaded(send(flow))["Error"] == failed["Error"]
    slow_id = started(send(flow, path="/slow"))
    flow.stop(slow_id)
    repeat = send(flow, path="/slow")
    assert (started(repeat, 200), loaded(repeat)["State"]) == (slow_id, "Aborted")


def test_a75_the_accepted_status_is_that_of_repeats_too(make_flow: MakeFlow, gate: threading.Event) -> None:
    flow = make_flow(ASYNCROUTE_ACCEPTED_STATUS=200)

    @flow.route()
    def work() -> None:
        gate.wait(10)

    assert started(send(flow), 200) == started(send(flow), 200)


@IN_MEMORY
def test_a75_immediate_routes_too(flow: Flow) -> None:
    @flow.route(executor="immediate")
    def work() -> None: ...

    assert started(send(flow)) == started(send(flow), 200)


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
def test_a75_a_key_stands_for_one_request(flow: Flow, first: dict[str, Any], second: dict[str, Any]) -> None:
    @flow.async_routes.task
    def work(number: int) -> None: ...

    for rule in ("/work/<int:number>", "/work"):
        defaults = None if "<" in rule else {"number": 1}
        flow.app.add_url_rule(rule, "work", work, methods=["PUT", "POST"], defaults=defaults)

    task_id = started(send(flow, **first))
    flow.headers = ANNA
    flow.ended(task_id)
    for _ in range(2):
        found = problem(send(flow, **second), 422, "key-reused")
        assert "Idempotency-Key" in found["detail"] and "Id" not in found
        assert started(send(flow, **first), 200) == task_id
    assert only_task(flow) == task_id


def test_a75_another_user_another_route_another_key_are_separate(flow: Flow) -> None:
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


@pytest.mark.parametrize("header", ["Cookie", "Authorization"])
def test_a75_an_unknown_caller_is_known_by_what_it_sends(flow: Flow, header: str) -> None:
    @flow.route()
    def work() -> None: ...

    def sent(value: str) -> str:
        headers = {"Idempotency-Key": "key", header: value}
        response = flow.app.test_client(use_cookies=False).post("/work", headers=headers)
        assert response.status_code in (200, 202)
        return str(loaded(response)["Id"])

    assert sent("a=1") == sent("a=1")
    assert sent("a=1") != sent("a=2")


@IN_MEMORY
def test_a75_nobody_is_refused(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    problem(flow.request("POST", "/work", headers={"Idempotency-Key": "key"}), 400, "invalid-request")
    assert flow.query() == []


@IN_MEMORY
@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, "a, a", '"a", "a"', "caf\xe9"])
def test_a75_what_is_no_key_is_refused(flow: Flow, key: str) -> None:
    @flow.route()
    def work() -> None: ...

    problem(send(flow, key), 400, "invalid-request")
    assert flow.query(headers=ANNA) == []


@IN_MEMORY
def test_a75_given_twice_is_refused(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "a"), ("X-User", "anna")]
    problem(flow.client.post("/work", headers=headers), 400, "invalid-request")


# -- how long it is kept -------------------------------------------------------------------------------------------------


def test_a75_a_key_goes_with_its_task(flow: Flow) -> None:
    @flow.route()
    def work() -> None: ...

    flow.headers = ANNA
    first = started(send(flow))
    flow.ended(first)
    flow.purge(first)
    second = started(send(flow, json=1))
    assert second != first
    flow.ended(second)


class Refusing(Executor):
    """Takes nothing until it is told to."""

    is_willing = False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.is_willing:
            raise RuntimeError("no")
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        future.set_result(fn(*args, **kwargs))
        return future


def test_a75_a_start_that_was_withdrawn_takes_its_key_with_it(flow: Flow) -> None:
    executor = Refusing()

    @flow.route(executor=executor)
    def work() -> None: ...

    problem(send(flow, json=1), 503, "queue-full")
    executor.is_willing = True
    first = started(send(flow, json=2))
    assert only_task(flow) == first


@IN_MEMORY
def test_a75_a_refusal_keeps_no_key(flow: Flow) -> None:
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
    # A repeat is not asked for permission again: there is none left to give.
    flow.headers = ANNA
    flow.ended(first)
    assert started(send(flow, json=2), 200) == first


# -- what a repeat needs -------------------------------------------------------------------------------------------------


def test_a75_a_repeat_needs_no_place_and_no_quota(make_flow: MakeFlow, store_url: str, gate: threading.Event) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_TASKS_PER_USER=1)

    @flow.route(max_workers=1, queue_size=0)
    def work() -> None:
        gate.wait(10)

    first = started(send(flow))
    problem(send(flow, "another", headers={"X-User": "ben"}), 503, "queue-full")
    assert started(send(flow)) == first


@pytest.mark.parametrize("kind", ["callable", "fixed"])
@pytest.mark.parametrize("size", [1, 600_000])
def test_a75_a_permission_function_reads_the_body_as_ever(flow: Flow, kind: str, size: int) -> None:
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
    assert started(send(flow, json=document), 200) == first
    assert [len(text) for text in read] == ([size] if kind == "callable" else [])


@pytest.mark.parametrize("size", [10, 600_000])
def test_a75_a_form_that_a_permission_function_parsed_is_the_same_form(flow: Flow, size: int) -> None:
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
    assert started(send(flow, data=body, headers=FORM), 200) == first
    problem(send(flow, data=body + b" ", headers=FORM), 422, "key-reused")


@pytest.mark.parametrize("size", [10, 600_000])
def test_a75_a_chunked_body_is_the_same_body(flow: Flow, size: int) -> None:
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
    assert started(chunked(b"y" * size), 200) == first
    assert started(send(flow, data=b"y" * size), 200) == first
    problem(chunked(b"y" * (size - 1)), 422, "key-reused")


@pytest.mark.parametrize("size", [10, 300_000])
def test_a75_a_form_that_the_app_has_parsed_before_is_the_same_form(flow: Flow, size: int) -> None:
    """As Flask-WTF does; the body is then written anew, with a boundary of chance."""
    flow.app.before_request(lambda: None if request.method != "POST" or request.form else None)

    @flow.route()
    def work() -> int:
        return len(request.files["f"].read())

    def form(data: bytes) -> dict[str, Any]:
        return {"a": "1", "f": (io.BytesIO(data), "f.txt")}

    first = started(send(flow, data=form(b"y" * size)))
    flow.headers = ANNA
    assert flow.ended(first)["Result"] == size
    assert started(send(flow, data=form(b"y" * size)), 200) == first
    problem(send(flow, data=form(b"z" * size)), 422, "key-reused")


# -- what is kept of it --------------------------------------------------------------------------------------------------


def test_a75_the_key_is_nowhere_in_plain(make_flow: MakeFlow, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


# -- at once -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def two_flows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Flow]]:
    """Give two runners of one app on one store, as two processes have them; on memory there is but one."""
    kind = request.param
    url = {"memory": "memory://", "sqlite": "sqlite:///keys.db"}.get(kind) or request.getfixturevalue("postgresql_url")
    flows = []
    for _ in range(1 if kind == "memory" else 2):
        app: Flask = new_app("app", tmp_path, {"ASYNCROUTE_STORE": url})
        async_routes = AsyncRoute(app)
        async_routes.identity_loader(identity_of_header)
        flows.append(Flow(app, async_routes))
    yield flows
    for flow in flows:
        close_app(flow.app)


def test_a75_sixteen_at_once_make_one_task_and_one_run(two_flows: list[Flow], gate: threading.Event) -> None:
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        gate.wait(10)

    for flow in two_flows:
        flow.route(max_workers=1, queue_size=20)(work)
    for turn in range(5):
        answers = sixteen_at_once(two_flows, f"key{turn}")
        assert [answer.status_code for answer in answers] == [202] * 16
        assert len({answer.get_json()["Id"] for answer in answers}) == 1
    flow = two_flows[0]
    flow.headers = ANNA
    gate.set()
    ids = flow.ids()
    assert len(ids) == 5
    for task_id in ids:
        flow.ended(task_id)
    assert len(runs) == 5
    # Those that lost have given back their places.
    executors = [executor for flow in two_flows for executor in runtime_of(flow.app).runner.executors]
    eventually_true(lambda: all(executor.free() == 1 for executor in executors))


def sixteen_at_once(flows: list[Flow], key: str) -> list[TestResponse]:
    """Send as many starts with one key, on threads of their own, to each runner in turn."""
    barrier = threading.Barrier(16)
    answers: list[TestResponse] = []

    def start(flow: Flow) -> None:
        barrier.wait(10)
        answers.append(flow.app.test_client().post("/work", json=1, headers={"Idempotency-Key": key, **ANNA}))

    threads = [threading.Thread(target=start, args=(flows[number % len(flows)],)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return answers


@IN_MEMORY
def test_a75_the_winner_of_a_race_may_be_withdrawn(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    @flow.route()
    def work() -> None: ...

    flow.query()
    store = runtime_of(flow.app).runner.store
    with monkeypatch.context() as patch:
        patch.setattr(store, "add", refusing)
        assert send(flow).headers["Retry-After"] == "1"
        problem(send(flow), 503, "queue-full")
    first = started(send(flow))
    flow.headers = ANNA
    flow.ended(first)


def refusing(*given: Any) -> None:
    raise KeyTaken("x")


@IN_MEMORY
def test_a75_the_last_place_may_be_taken_by_the_same_start(
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
    assert [started(send(flow))] == firsts
