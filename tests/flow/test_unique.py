"""The option ``unique``: while a task with a key is unfinished, other starts get this task."""

from __future__ import annotations

import enum
import io
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from flask import abort, g, request
from sqlalchemy import text
from werkzeug.test import TestResponse

from flask_asyncroute import Access, Permission, Retry, current_task, task_created
from flask_asyncroute.runtime import runtime_of
from tests.flow.test_idempotency import RANDOM, RefusingExecutor
from tests.support.databases import engine_of
from tests.support.flow import IN_MEMORY, Flow, loaded, problem
from tests.support.waiting import eventually_true

MakeFlow = Callable[..., Flow]
ANNA, BEN = {"X-User": "anna"}, {"X-User": "ben"}
ON_POSTGRESQL = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


def send(flow: Flow, path: str = "/work", **options: Any) -> TestResponse:
    """Start a task with a client that has no cookies."""
    headers = {**flow.headers, **options.pop("headers", {})}
    return flow.app.test_client(use_cookies=False).post(path, headers=headers, **options)


def id_in(response: TestResponse, status: int = 202) -> str:
    assert response.status_code == status, response.get_data(as_text=True)[:2000]
    assert "Idempotency-Replayed" not in response.headers
    task = loaded(response)
    assert response.headers["Location"] == f"/task/{task['Id']}"
    return str(task["Id"])


def refused(response: TestResponse) -> None:
    """Check that the response is the problem ``task-exists``, which has no id."""
    found = problem(response, 409, "task-exists")
    assert "Id" not in found and "Location" not in response.headers
    assert 1 <= int(response.headers["Retry-After"]) <= 60


# -- one unfinished task per key


def test_a_second_start_gets_the_unfinished_task(
    flow: Flow, later_executor: Any, gate: threading.Event, hear: Callable[..., list[Any]]
) -> None:
    runs: list[str] = []
    created = hear(task_created, sender=flow.app)

    @flow.route(executor=later_executor, unique=True)
    def work() -> str:
        runs.append(current_task.id)
        gate.wait(10)
        return "done"

    flow.headers = ANNA
    first = id_in(send(flow))
    flow.became(first, "Running")
    again = send(flow, json={"another": "body"})
    assert id_in(again) == first
    assert loaded(again)["State"] == "Running"
    assert 1 <= int(again.headers["Retry-After"]) <= 60
    gate.set()
    assert flow.ended(first)["Result"] == "done"
    second = id_in(send(flow))
    assert second != first
    flow.ended(second)
    assert runs == [first, second]
    eventually_true(lambda: len(created) == 2)


def test_concurrent_starts_create_one_task(flow: Flow, gate: threading.Event) -> None:
    clicks = 8
    barrier = threading.Barrier(clicks)

    def key() -> str:
        barrier.wait(10)
        return "key"

    @flow.route(unique=key)
    def work() -> None:
        gate.wait(10)

    with ThreadPoolExecutor(clicks) as clients:
        answers = list(clients.map(lambda _: send(flow, headers=ANNA), range(clicks)))
    assert len({id_in(answer) for answer in answers}) == 1
    assert len(flow.ids(headers=ANNA)) == 1


@IN_MEMORY
def test_a_start_on_an_immediate_route_gets_the_task_of_another_request(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(executor="immediate", unique=True)
    def work() -> None:
        gate.wait(10)

    flow.headers = ANNA
    with ThreadPoolExecutor(1) as other:
        first = other.submit(send, flow)
        eventually_true(lambda: flow.query("State=Running"))
        again = send(flow)
        assert loaded(again)["State"] == "Running"
        gate.set()
        assert id_in(first.result(10)) == id_in(again)


# -- the end of a task releases its key


@pytest.mark.parametrize("how", ["failed", "stopped", "timed out", "stopped before its start"])
def test_the_key_is_released_however_the_task_ends(
    flow: Flow, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    timeout = 0.1 if how == "timed out" else 60

    @flow.route(unique=lambda: "key", timeout=timeout, max_workers=1, pool="one")
    def work() -> None:
        if how == "failed":
            raise ValueError("no")
        current_task.sleep(0 if gate.is_set() else 60)

    @flow.route("/block", max_workers=1, pool="one")
    def block() -> None:
        gate.wait(10)

    monkeypatch.setattr(flow.app.logger, "disabled", True)
    flow.headers = ANNA
    if how == "stopped before its start":
        flow.became(flow.start("/block"), "Running")
    first = id_in(send(flow))
    if how.startswith("stopped"):
        if how == "stopped":
            flow.became(first, "Running")
        flow.stop(first)
    flow.ended(first)
    gate.set()
    second = id_in(send(flow))
    assert second != first
    flow.still(second)


@IN_MEMORY
def test_an_aborted_task_releases_its_key_while_its_code_still_runs(
    flow: Flow, gate: threading.Event
) -> None:
    begun = threading.Semaphore(0)

    @flow.route(unique=True, max_workers=2, interrupt_after=None)
    def work() -> None:
        begun.release()
        gate.wait(10)

    flow.headers = ANNA
    first = id_in(send(flow))
    assert begun.acquire(timeout=5)
    assert flow.stop(first)["Stopping"] is True
    assert id_in(send(flow)) != first
    assert begun.acquire(timeout=5), "both run"
    assert flow.get(first)["Stopping"] is True


def test_a_task_that_waits_for_a_retry_holds_its_key(flow: Flow) -> None:
    @flow.route(unique=True, retry=Retry(1, delay=timedelta(hours=1)))
    def work() -> None:
        raise ValueError("no")

    flow.headers = ANNA
    first = id_in(send(flow))
    eventually_true(lambda: flow.get(first).get("Attempt") == 2)
    again = send(flow)
    assert (id_in(again), loaded(again)["State"]) == (first, "NotStarted")
    flow.stop(first)
    second = id_in(send(flow))
    assert second != first
    eventually_true(lambda: flow.get(second).get("Attempt") == 2)
    flow.stop(second)


def test_a_start_that_the_executor_rejects_releases_its_key(flow: Flow) -> None:
    executor = RefusingExecutor()

    @flow.route(executor=executor, unique=True)
    def work() -> None: ...

    problem(send(flow, headers=ANNA), 503, "queue-full")
    executor.is_willing = True
    task_id = id_in(send(flow, headers=ANNA))
    assert flow.ids(headers=ANNA) == [task_id]


@IN_MEMORY
def test_a_start_that_the_queue_rejects_leaves_no_key(flow: Flow, gate: threading.Event) -> None:
    @flow.route(unique=lambda: request.args["key"], max_workers=1, queue_size=0)
    def work() -> None:
        gate.wait(10)

    flow.headers = ANNA
    first = id_in(send(flow, "/work?key=1"))
    problem(send(flow, "/work?key=2"), 503, "queue-full")
    gate.set()
    flow.ended(first)
    second = eventually_true(
        lambda: answer if (answer := send(flow, "/work?key=2")).status_code == 202 else None
    )
    flow.ended(id_in(second))


# -- keys


def test_the_url_variables_are_the_key_of_true(flow: Flow, gate: threading.Event) -> None:
    @flow.route("/work/<int:number>/<name>", unique=True)
    def work(number: int, name: str) -> None:
        gate.wait(10)

    @flow.route("/other/<int:number>/<name>", unique=True)
    def other(number: int, name: str) -> None:
        gate.wait(10)

    flow.headers = ANNA
    paths = ["/work/1/a", "/work/2/a", "/work/1/b", "/work/1/1", "/other/1/a"]
    ids = [id_in(send(flow, path)) for path in paths]
    assert len(set(ids)) == 5
    assert [id_in(send(flow, path)) for path in paths] == ids
    assert id_in(send(flow, "/work/01/a?q=1", json=1)) == ids[0]


@IN_MEMORY
def test_url_variables_that_a_hook_removes_are_part_of_the_key(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.app.url_value_preprocessor
    def take_tenant(endpoint: str | None, values: dict[str, Any] | None) -> None:
        g.tenant = (values or {}).pop("tenant", None)

    @flow.route("/<tenant>/work", unique=True)
    def work() -> None:
        gate.wait(10)

    flow.headers = ANNA
    first = id_in(send(flow, "/a/work"))
    assert id_in(send(flow, "/b/work")) != first
    assert id_in(send(flow, "/a/work")) == first


@pytest.mark.parametrize("size", [10, 600_000])
@pytest.mark.parametrize("is_form", [False, True])
def test_a_function_can_read_the_body(
    flow: Flow, gate: threading.Event, size: int, is_form: bool
) -> None:
    flow.app.config["MAX_FORM_MEMORY_SIZE"] = 1_000_000

    def key() -> str:
        return str(request.form["key"] if is_form else request.get_json()["key"])

    @flow.route(unique=key)
    def work() -> int:
        gate.wait(10)
        return len(request.form["text"] if is_form else request.get_json()["text"])

    def body(number: int) -> dict[str, Any]:
        return {"data" if is_form else "json": {"key": f"{number}", "text": "x" * size}}

    flow.headers = ANNA
    ids = [id_in(send(flow, **body(number))) for number in (1, 2, 1, 2)]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]
    gate.set()
    assert [flow.ended(task_id)["Result"] for task_id in ids[:2]] == [size, size]


@IN_MEMORY
def test_a_function_that_returns_none_starts_each_task(flow: Flow, gate: threading.Event) -> None:
    @flow.route(unique=lambda: None)
    def work() -> None:
        gate.wait(10)

    assert id_in(send(flow)) != id_in(send(flow))


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.covers("A81")
@pytest.mark.parametrize(
    "key",
    ["", "x" * 1_000_000, "\x00", "\ud800", 0, 2**70, Colour.RED, uuid.uuid4()],
    ids=["empty", "1 MB", "NUL", "surrogate", "zero", "large", "Enum", "UUID"],
)
def test_valid_keys(flow: Flow, gate: threading.Event, key: Any) -> None:
    keys = [key, key, "another"]

    @flow.route(unique=lambda: keys.pop(0))
    def work() -> None:
        gate.wait(10)

    flow.headers = ANNA
    ids = [id_in(send(flow)) for _ in range(3)]
    assert ids[0] == ids[1] != ids[2]


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.covers("A81")
@pytest.mark.parametrize(
    "bad",
    [ValueError("no"), b"key", ["key"], ("key",), {}, True, False, 1.5, object(), Broken()],
    ids=lambda value: type(value).__name__,
)
@IN_MEMORY
def test_a_function_without_a_valid_key_is_a_logged_500(
    flow: Flow, caplog: pytest.LogCaptureFixture, bad: Any
) -> None:
    keys = [bad, bad, "key"]

    def key() -> Any:
        found = keys.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    @flow.route(unique=key, max_workers=1, queue_size=0)
    def work() -> None: ...

    flow.headers = ANNA
    for _ in range(2):
        found = problem(send(flow, data=b"x" * 600_000), 500, "cannot-start")
        assert "unique key" in found["detail"]
    assert caplog.text.count("The unique function of endpoint work raised an exception") == 2
    assert flow.query() == []
    assert flow.ids() == []
    flow.ended(id_in(send(flow)))


@pytest.mark.covers("A81")
@IN_MEMORY
def test_an_http_error_of_the_function_is_a_logged_500(
    flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the errors about tasks, which a plain view may let through."""
    functions: dict[str, Callable[[], Any]] = {
        "abort": lambda: abort(404),
        "stop": lambda: flow.async_routes.stop("unknown"),
        "json": lambda: request.get_json()["key"],
    }

    @flow.route("/work/<name>", unique=lambda: functions[request.view_args["name"]]())  # type: ignore[index]
    def work(name: str) -> None: ...

    for name in functions:
        problem(
            send(flow, f"/work/{name}", data=b"{", content_type="application/json"),
            500,
            "cannot-start",
        )
    assert caplog.text.count("The unique function of endpoint work raised an exception") == 3
    assert flow.query() == []


@IN_MEMORY
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": RANDOM}], ids=["", "with a key"])
def test_a_function_that_reads_a_form_over_the_limits_of_the_app_gets_413(
    flow: Flow, headers: dict[str, str]
) -> None:
    def key() -> str:
        request.max_form_memory_size = 100
        return request.form["key"]

    @flow.route(unique=key)
    def work() -> None: ...

    form = {"key": "x" * 1000, "file": (io.BytesIO(b"data"), "f")}  # a multipart form
    problem(send(flow, data=form, headers=headers), 413, "body-too-large")
    assert flow.query() == []


@IN_MEMORY
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET"])
def test_requests_that_start_no_task_do_not_call_the_function(flow: Flow, method: str) -> None:
    calls: list[str] = []

    @flow.route(unique=lambda: calls.append("call"), methods=["POST", "GET"])
    def work() -> None: ...

    flow.request(method, "/work")
    assert calls == (["call"] if method == "GET" else [])


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_the_key_is_neither_shown_nor_stored_in_plain_text(
    flow: Flow, gate: threading.Event, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    @flow.route(unique=lambda: "secret-key-1234")
    def work() -> None:
        gate.wait(10)

    with caplog.at_level(logging.DEBUG):
        answers = [send(flow, headers=ANNA), send(flow, headers=BEN)]
    assert not any(b"secret-key" in answer.data for answer in answers)
    assert b"nique" not in answers[0].data
    assert "secret-key" not in caplog.text
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("asyncroute.db*"))
    assert b"secret-key" not in stored


# -- callers


@pytest.mark.parametrize(
    ("second", "is_same"),
    [
        ("anna", True),
        ("ben", False),
        ("ben; groups=readers", True),
        ("ben; groups=writers", True),
        ("root", True),
        (None, False),
    ],
)
def test_only_a_caller_that_may_read_the_task_gets_it(
    make_flow: MakeFlow, store_url: str, gate: threading.Event, second: str | None, is_same: bool
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_ADMINS=Access(users=("root",)))
    permission = Permission(read=Access(groups=("readers",)), write=Access(groups=("writers",)))
    options = {} if second is None else {"permission": permission}

    @flow.route(unique=True, **options)
    def work() -> None:
        gate.wait(10)

    first = id_in(send(flow, headers=ANNA))
    for _ in range(2):
        answer = send(flow, headers={} if second is None else {"X-User": second})
        if is_same:
            assert id_in(answer) == first
        else:
            refused(answer)
    gate.set()
    flow.headers = ANNA
    flow.ended(first)
    flow.headers = {} if second is None else {"X-User": second}
    assert id_in(send(flow)) != first


def test_without_credentials_a_second_start_is_refused(flow: Flow, gate: threading.Event) -> None:
    @flow.route(unique=True)
    def work() -> None:
        gate.wait(10)

    first = id_in(send(flow))
    refused(send(flow))
    refused(send(flow, headers=ANNA))
    gate.set()
    flow.ended(first)
    id_in(send(flow))


@pytest.mark.parametrize("header", ["Cookie", "Authorization"])
def test_anonymous_callers_have_the_keys_of_their_credentials(
    flow: Flow, gate: threading.Event, header: str
) -> None:
    @flow.route(unique=True)
    def work() -> None:
        gate.wait(10)

    first, second = ({header: value} for value in ("a=1", "a=2"))
    one, two = id_in(send(flow, headers=first)), id_in(send(flow, headers=second))
    assert one != two
    assert id_in(send(flow, headers=first)) == one
    assert id_in(send(flow, headers=second)) == two
    assert id_in(send(flow)) not in (one, two)
    refused(send(flow, headers={**ANNA, **first}))


def test_an_admin_gets_the_task_of_a_caller_without_credentials(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_ADMINS=Access(users=("root",)))

    @flow.route(unique=True)
    def work() -> None:
        gate.wait(10)

    first = id_in(send(flow))
    assert id_in(send(flow, headers={"X-User": "root"})) == first


# -- the order of checks


def test_an_idempotency_key_is_checked_before_the_unique_key(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(unique=lambda: "key")
    def work() -> None:
        if request.json == 1:
            return
        gate.wait(10)

    def with_key(key: str, document: int) -> TestResponse:
        return send(flow, json=document, headers={**ANNA, "Idempotency-Key": key})

    first = id_in(with_key("a", 1))
    flow.headers = ANNA
    flow.ended(first)
    second = id_in(with_key("b", 2))
    replay = with_key("a", 1)
    assert (replay.status_code, loaded(replay)["Id"]) == (200, first)
    assert replay.headers["Idempotency-Replayed"] == "true"
    replay = with_key("b", 2)
    assert (replay.status_code, loaded(replay)["Id"]) == (202, second)
    assert replay.headers["Idempotency-Replayed"] == "true"
    problem(with_key("a", 2), 422, "key-reused")
    # This start gets the unfinished task, but its own key starts no task.
    assert id_in(with_key("c", 3)) == second
    gate.set()
    flow.ended(second)
    third = id_in(with_key("c", 3))
    assert third not in (first, second)
    flow.ended(third)


@pytest.mark.covers("A75")
@pytest.mark.parametrize("headers", [ANNA, {}], ids=["user", "no credentials"])
def test_a_concurrent_request_with_the_same_idempotency_key_is_a_replay(
    flow: Flow, gate: threading.Event, headers: dict[str, str]
) -> None:
    """Both requests find no task with the Idempotency-Key. Then one of them creates it."""
    barrier = threading.Barrier(2)

    def key() -> str:
        barrier.wait(10)
        return "key"

    @flow.route(unique=key)
    def work() -> None:
        gate.wait(10)

    sent = {**headers, "Idempotency-Key": RANDOM}
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda _: send(flow, headers=sent), range(2)))
    assert [answer.status_code for answer in answers] == [202, 202]
    assert len({loaded(answer)["Id"] for answer in answers}) == 1
    replayed = [answer.headers.get("Idempotency-Replayed") for answer in answers]
    assert sorted(replayed, key=str) == [None, "true"]


@IN_MEMORY
def test_the_permission_is_checked_before_the_unique_key(flow: Flow) -> None:
    calls: list[str] = []

    @flow.route(unique=lambda: calls.append("call"), permission=Permission())
    def work() -> None: ...

    @flow.route("/broken", unique=lambda: calls.append("call"), permission=lambda: None)
    def broken() -> None: ...

    problem(send(flow), 401, "not-authenticated")
    problem(send(flow, "/broken", headers=ANNA), 403, "not-permitted")
    assert calls == []


def test_the_unique_key_is_checked_before_quota_and_queue(
    make_flow: MakeFlow, store_url: str, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_STORE=store_url, ASYNCROUTE_MAX_TASKS_PER_USER=1)

    @flow.route(unique=lambda: request.args["key"], max_workers=1, queue_size=0)
    def work() -> None:
        gate.wait(10)

    @flow.route("/other", unique=lambda: request.args["key"])
    def other() -> None: ...

    first = id_in(send(flow, "/work?key=1", headers=ANNA))
    assert id_in(send(flow, "/work?key=1", headers=ANNA)) == first
    refused(send(flow, "/work?key=1", headers=BEN))
    problem(send(flow, "/other?key=1", headers=ANNA), 429, "too-many-tasks")
    problem(send(flow, "/work?key=2", headers=BEN), 503, "queue-full")


# -- other features


def test_a_second_start_can_wait_for_the_end_of_the_unfinished_task(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(unique=True)
    def work() -> str:
        gate.wait(10)
        return "done"

    flow.headers = ANNA
    first = id_in(send(flow))
    unfinished = send(flow, headers={"Prefer": "wait=1"})
    assert id_in(unfinished) == first
    assert unfinished.headers["Preference-Applied"] == "wait=1"
    timer = threading.Timer(0.3, gate.set)
    timer.start()
    at_end = send(flow, headers={"Prefer": "wait=10"})
    timer.join()
    assert (id_in(at_end, 200), loaded(at_end)["Result"]) == (first, "done")


def test_the_default_of_the_app_applies_to_each_route(
    make_flow: MakeFlow, gate: threading.Event
) -> None:
    flow = make_flow(ASYNCROUTE_UNIQUE=True)

    @flow.route()
    def work() -> None:
        gate.wait(10)

    @flow.route("/free", unique=False)
    def free() -> None:
        gate.wait(10)

    flow.headers = ANNA
    assert id_in(send(flow)) == id_in(send(flow))
    assert id_in(send(flow, "/free")) != id_in(send(flow, "/free"))


# -- keys that change at once


def test_a_key_that_is_released_after_the_lookup_starts_a_new_task(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """The lookup finds no task, the insert finds one, and the next lookup finds none again."""
    lookups: list[Any] = []

    @flow.route(unique=True)
    def work() -> None:
        gate.wait(10)

    flow.headers = ANNA
    first = id_in(send(flow))
    store = runtime_of(flow.app).runner.store
    lookup = store.started_with

    def started_with(name: str) -> Any:
        lookups.append(None)
        if len(lookups) == 1:
            return None
        flow.stop(first)
        return lookup(name)

    monkeypatch.setattr(store, "started_with", started_with)
    assert id_in(send(flow)) != first
    assert len(lookups) == 2


@IN_MEMORY
def test_a_key_that_is_always_taken_by_another_is_a_503(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    @flow.route(unique=True, max_workers=1, queue_size=1)
    def work() -> None:
        gate.wait(10)

    flow.headers = ANNA
    first = id_in(send(flow))
    store = runtime_of(flow.app).runner.store
    with monkeypatch.context() as patch:
        patch.setattr(store, "started_with", lambda name: None)
        answer = send(flow)
    problem(answer, 503, "queue-full")
    assert answer.headers["Retry-After"] == "1"
    assert id_in(send(flow)) == first
    gate.set()
    flow.ended(first)


# -- open transactions of others (PostgreSQL)


@ON_POSTGRESQL
def test_a_start_waits_at_most_five_seconds_for_an_open_transaction(
    flow: Flow, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile it delays no other start or end of a task."""

    @flow.route("/work/<name>", unique=True)
    def work(name: str) -> None: ...

    @flow.route("/plain")
    def plain() -> None: ...

    flow.headers = ANNA
    runner = runtime_of(flow.app).runner
    hold = text(
        "INSERT INTO asyncroute_keys (namespace, name, fingerprint, task_id) "
        "SELECT key, :name, '', 'task-of-the-app' FROM asyncroute_namespaces WHERE name = 'app'"
    )
    flow.ended(id_in(send(flow, "/work/first")))
    names: list[str] = []
    lookup = runner.store.started_with
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.store, "started_with", lambda name: names.append(name) or lookup(name))
        flow.ended(id_in(send(flow, "/work/held")))
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND datname = current_database()"
    )
    with (
        engine_of(postgresql_url).connect() as app,
        engine_of(postgresql_url).connect() as observer,
        ThreadPoolExecutor(2) as clients,
    ):
        held = app.execute(hold, {"name": names[-1]})
        assert held.rowcount == 1
        waiting = [clients.submit(timed, send, flow, "/work/held") for _ in range(2)]
        eventually_true(lambda: (observer.rollback(), observer.scalar(waits) == 2)[1])
        for number in range(2):
            for path in ("/plain", f"/work/{number}"):
                seconds, answer = timed(send, flow, path)
                assert seconds < 4
                flow.ended(id_in(answer), 4)
        assert not any(start.done() for start in waiting)
        for start in waiting:
            seconds, answer = start.result(15)
            problem(answer, 503, "store-unavailable")
            assert answer.headers["Retry-After"] == "5"
            assert 4.5 < seconds < 10
        app.rollback()
    assert "cannot be used" not in caplog.text
    flow.ended(id_in(send(flow, "/work/held")))


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.monotonic()
    result = call(*arguments)
    return time.monotonic() - began, result
