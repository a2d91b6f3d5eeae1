"""The Python client against servers with scripted responses."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, as_completed
from concurrent.futures import wait as wait_for
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from flask_asyncroute.client import (
    AsyncRouteClient,
    ClientError,
    InvalidResponseError,
    NotAuthenticatedError,
    NotFoundError,
    NotPermittedError,
    RefusedError,
    RemoteTask,
    TaskAbortedError,
    TaskExistsError,
    TaskFailedError,
    TooManyRequestsError,
    UnavailableError,
    UnreachableError,
)
from flask_asyncroute.client.follower import Follower
from tests.support.raw_server import RawServer, Serve, drip, response

PROBLEM = "tag:flask-asyncroute.readthedocs.io,2026:"
SECONDS = 10.0
LOCATION = "Location: /task/one"
SOON = "Retry-After: 0"

Start = Callable[..., tuple[AsyncRouteClient, RawServer]]


def document(state: str = "NotStarted", task_id: str = "one", **fields: Any) -> dict[str, Any]:
    return {"Id": task_id, "State": state, "IsCompleted": state != "NotStarted", **fields}


def accepted(**fields: Any) -> bytes:
    return response("202 ACCEPTED", document(**fields), LOCATION, SOON)


@pytest.fixture
def serve() -> Iterator[Start]:
    """Return ``serve(function, **options)``, which returns a client and its server."""
    made: list[tuple[AsyncRouteClient, RawServer]] = []

    def start(function: Serve, **options: Any) -> tuple[AsyncRouteClient, RawServer]:
        server = RawServer(function)
        client = AsyncRouteClient(server.url, **{"retry_for": 5.0, "timeout": 5.0, **options})
        made.append((client, server))
        return made[-1]

    yield start
    for client, server in made:
        client.close()
        with server:
            pass


def answering(*states: dict[str, Any]) -> Serve:
    """Accept each start; answer reads of the task with one state after the other."""
    left = list(states)

    def serve(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            yield accepted()
        else:
            yield response("200 OK", left.pop(0) if len(left) > 1 else left[0], SOON)

    return serve


def test_the_result_of_a_completed_task_is_returned(serve: Start) -> None:
    client, server = serve(answering(document("Running"), document("Completed", Result=[1])))
    task = client.start("PUT", "/work", json={"a": 1})
    assert isinstance(task, RemoteTask) and task.id == "one"
    assert task.result(SECONDS) == [1]
    assert task.exception() is None
    assert task.state == "Completed" and task.done() and not task.cancelled()
    assert task.wait()["Result"] == [1]
    assert server.requests[0] == "PUT /work"
    assert server.requests.count("GET /task/one") == 2


def test_a_task_without_a_result_returns_none(serve: Start) -> None:
    client, _ = serve(answering(document("Completed")))
    assert client.start("PUT", "/work").result(SECONDS) is None


def test_a_failed_task_raises_its_error(serve: Start) -> None:
    client, _ = serve(answering(document("Failed", Error="ValueError: no")))
    task = client.start("PUT", "/work")
    with pytest.raises(TaskFailedError, match="Task one is Failed: ValueError: no") as caught:
        task.result(SECONDS)
    assert caught.value.task["Error"] == "ValueError: no"
    assert task.exception() is caught.value
    assert task.wait()["State"] == "Failed"


def test_a_task_that_times_out_raises_task_aborted_error(serve: Start) -> None:
    client, _ = serve(answering(document("Aborted", Error="Timeout")))
    with pytest.raises(TaskAbortedError, match="Timeout"):
        client.start("PUT", "/work").result(SECONDS)


def test_a_task_that_somebody_else_stops_raises_cancelled_error(serve: Start) -> None:
    client, _ = serve(answering(document("Aborted", Error="Aborted by the user")))
    task = client.start("PUT", "/work")
    assert wait_for([task], SECONDS).done == {task}
    assert task.cancelled()
    with pytest.raises(CancelledError):
        task.result()
    assert task.wait()["State"] == "Aborted"


def test_wait_and_result_raise_timeout_error(serve: Start) -> None:
    client, _ = serve(answering(document("Running")))
    task = client.start("PUT", "/work")
    with pytest.raises(TimeoutError, match="Task one is still"):
        task.wait(0.01)
    with pytest.raises(TimeoutError):
        task.result(0.01)
    assert task.refresh()["State"] == "Running"
    assert task.running() and repr(task) == "<RemoteTask one Running>"


def test_as_completed_and_wait_work(serve: Start) -> None:
    ended = threading.Event()

    def answer(line: str, request: bytes) -> Iterable[bytes]:
        task_id = line.rpartition("/")[2]
        is_end = task_id == "b" or ended.is_set()
        state = document("Completed" if is_end else "Running", task_id, Result=task_id)
        if line.startswith("PUT"):
            yield response("202 ACCEPTED", document("NotStarted", task_id), SOON)
        else:
            yield response("200 OK", state, SOON)

    client, _ = serve(answer)
    tasks = [client.start("PUT", f"/work/{name}") for name in "abc"]
    done = wait_for(tasks, SECONDS, return_when=FIRST_COMPLETED).done
    assert [task.id for task in done] == ["b"]
    ended.set()
    assert sorted(task.result() for task in as_completed(tasks, SECONDS)) == ["a", "b", "c"]


def test_done_callbacks_are_called_once(serve: Start) -> None:
    client, _ = serve(answering(document("Completed", Result=1)))
    called = threading.Event()
    results: list[Any] = []
    task = client.start("PUT", "/work")
    task.add_done_callback(lambda done: (results.append(done.result()), called.set()))
    assert called.wait(SECONDS)
    task.refresh()
    assert results == [1]


def test_progress_functions_get_each_change_once(serve: Start, caplog: Any) -> None:
    states = [
        document("Running", Progress=10.0, ProgressMessage="begin"),
        document("Running", Progress=10.0, ProgressMessage="begin"),
        document("Running", Progress=50.0),
        document("Completed", Progress=100.0),
    ]
    client, _ = serve(answering(*states))
    seen: list[Any] = []

    def broken(*values: Any) -> None:
        raise RuntimeError("on purpose")

    task = client.start("PUT", "/work", on_progress=lambda *values: seen.append(values))
    task.add_progress_callback(broken)
    task.result(SECONDS)
    assert seen == [(task, 10.0, "begin"), (task, 50.0, None), (task, 100.0, None)]
    assert "A progress function of task one raised an exception." in caplog.text
    task.add_progress_callback(lambda *values: seen.append(values))
    assert len(seen) == 4 and task.progress == 100.0


@pytest.mark.parametrize(
    ("status", "slug", "kind"),
    [
        ("401 X", "not-authenticated", NotAuthenticatedError),
        ("403 X", "not-permitted", NotPermittedError),
        ("404 X", "task-not-found", NotFoundError),
        ("409 X", "task-exists", TaskExistsError),
        ("409 X", "something-else", RefusedError),
        ("422 X", "key-reused", RefusedError),
    ],
)
def test_each_refusal_has_its_exception(
    serve: Start, status: str, slug: str, kind: type[RefusedError]
) -> None:
    problem = {"type": PROBLEM + slug, "title": "Title", "detail": "What to do.", "status": 1}
    client, server = serve(lambda *_: [response(status, problem, kind="problem+json")])
    with pytest.raises(RefusedError) as caught:
        client.start("PUT", "/work")
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.type) == (int(status[:3]), PROBLEM + slug)
    assert (error.title, error.detail, error.retry_after) == ("Title", "What to do.", None)
    assert str(error) == f"{status[:3]} Title: What to do."
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "kind"), [("429 X", TooManyRequestsError), ("503 X", UnavailableError)]
)
def test_a_long_retry_after_is_raised_at_once(
    serve: Start, status: str, kind: type[RefusedError]
) -> None:
    client, server = serve(lambda *_: [response(status, b"<p>busy", "Retry-After: 60", kind="x")])
    with pytest.raises(kind) as caught:
        client.start("PUT", "/work")
    assert caught.value.retry_after == 60.0 and caught.value.type == "about:blank"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["429 X", "502 X", "503 X", "504 X", ""])
def test_a_start_is_repeated_with_the_same_key_and_body(serve: Start, status: str) -> None:
    failures = [1, 2]

    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if failures:
            failures.pop()
            # Without a status, the connection breaks.
            return [response(status, {}, SOON)] if status else []
        return [response("200 OK", document("Completed", Result=1))]

    client, server = serve(answer)
    files = {"file": ("a.txt", io.BytesIO(b"content"))}
    assert client.start("PUT", "/work", data={"a": "b"}, files=files).result(0) == 1
    assert len(server.heads) == 3 and len(set(server.heads)) == 1
    assert b"content" in server.heads[0]
    (key,) = [
        line for line in server.heads[0].split(b"\r\n") if line.startswith(b"Idempotency-Key")
    ]
    assert len(key) >= len("Idempotency-Key: ") + 22


def test_a_file_is_rewound_before_it_is_sent_again(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if len(server.requests) == 1:
            return [response("503 X", {}, SOON)]
        return [response("200 OK", document("Completed"))]

    client, server = serve(answer)
    body = io.BytesIO(b"header,content")
    body.seek(7)
    client.start("PUT", "/work", data=body)
    assert [head.partition(b"\r\n\r\n")[2] for head in server.heads] == [b"content"] * 2


def test_a_generator_is_sent_once(serve: Start) -> None:
    client, server = serve(lambda *_: [response("503 X", {}, SOON)])
    with pytest.raises(UnavailableError):
        client.start("PUT", "/work", data=iter([b"a", b"b"]))
    assert len(server.requests) == 1


def test_the_callers_own_idempotency_key_is_kept(serve: Start) -> None:
    client, server = serve(answering(document("Completed")))
    client.start("PUT", "/work", headers={"idempotency-key": "mine"})
    assert server.heads[0].lower().count(b"idempotency-key: ") == 1
    assert b"mine" in server.heads[0]


def test_reads_send_the_etag_and_accept_304(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [accepted()]
        if b'If-None-Match: "2-json"' in request:
            if len(server.requests) > 4:
                return [response("200 OK", document("Completed", Result=1))]
            return [b"HTTP/1.1 304 NOT MODIFIED\r\nConnection: close\r\nRetry-After: 0\r\n\r\n"]
        return [response("200 OK", document("Running"), 'ETag: "2-json"', SOON)]

    client, server = serve(answer)
    assert client.start("PUT", "/work").result(SECONDS) == 1


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        ("200 OK", document("Aborted", Error="Aborted by the user"), True),
        ("200 OK", document("Aborted", Error="Timeout"), False),
        ("410 X", {"type": PROBLEM + "task-finished"}, False),
        ("423 X", {"type": PROBLEM + "not-cancellable"}, False),
    ],
)
def test_cancel_returns_whether_the_task_was_stopped(
    serve: Start, status: str, body: Any, outcome: bool
) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", document(), LOCATION, "Retry-After: 9")]
        if line.startswith("DELETE"):
            return [response(status, body)]
        return [response("200 OK", document("Completed"))]

    client, _ = serve(answer)
    task = client.start("PUT", "/work")
    assert task.cancel() is outcome
    assert task.cancelled() is outcome
    assert task.done() is (status != "423 X")
    assert task.cancel() is outcome


def test_cancel_raises_if_the_caller_may_not_stop_the_task(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("DELETE"):
            return [response("403 X", {"type": PROBLEM + "not-permitted"})]
        return [response("200 OK", document("Running"), "Retry-After: 9")]

    client, _ = serve(answer)
    with pytest.raises(NotPermittedError):
        client.task("one").cancel()


def test_two_requests_for_one_task_return_the_same_object(serve: Start) -> None:
    client, _ = serve(answering(document("Running", Progress=5.0)))
    first = client.start("PUT", "/work")
    seen: list[float] = []
    second = client.task("one", on_progress=lambda task, progress, message: seen.append(progress))
    assert first is second and seen == [5.0]


@pytest.mark.parametrize("task_id", ["", "..", "a/b", "a?b", "a b", "x" * 129])
def test_invalid_ids_are_refused_before_a_request(serve: Start, task_id: str) -> None:
    client, server = serve(answering(document("Completed")))
    with pytest.raises(ValueError, match="is not the id of a task"):
        client.task(task_id)
    assert server.requests == []


def test_a_route_with_its_own_answer_is_found_by_its_location(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [response("202 ACCEPTED", {"job_id": 1}, LOCATION)]
        return [response("200 OK", document("Completed", Result=5))]

    client, _ = serve(answer)
    assert client.start("PUT", "/work").result(SECONDS) == 5


@pytest.mark.parametrize("status", ["201 X", "202 X", "302 X", "303 X", "418 X"])
def test_a_route_with_its_own_answer_and_location_is_found_by_its_link(
    serve: Start, status: str
) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            links = ["Link: </help>; rel=help", 'Link: </task/one>; rel="status"']
            own = document("Completed", "other", Result="not of the task")
            return [response(status, own, "Location: /jobs/1", *links)]
        return [response("200 OK", document("Completed", Result=5))]

    client, server = serve(answer)
    assert client.start("PUT", "/work").result(SECONDS) == 5
    assert server.requests == ["PUT /work", "GET /task/one"]


def test_two_threads_that_find_a_task_get_the_same_object(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def answer(line: str, request: bytes) -> Iterable[bytes]:
        state = document("Completed", Result=1) if ended.is_set() else document("Running")
        return [response("200 OK", {**state, "Progress": 5}, SOON)]

    client, _ = serve(answer)
    # Both threads have looked for the task before one of them follows it.
    monkeypatch.setattr(Follower, "find", lambda *_: None)
    seen: list[RemoteTask] = []
    first = client.task("one")
    second = client.task("one", on_progress=lambda task, *_: seen.append(task))
    assert second is first and first in seen
    ended.set()
    assert first.result(SECONDS) == 1


def test_a_query_reads_all_pages(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if "cursor" in line:
            return [response("200 OK", [document("Running", "c")])]
        page = [document("Running", "a"), document("Running", "b")]
        link = 'Link: </tasks/query?sort=-CreationTime&cursor=x>; rel="next"'
        return [response("200 OK", page, link)]

    client, server = serve(answer)
    since = datetime(2026, 1, 1, tzinfo=UTC)
    conditions = {"CreationTime": {"op": "GE", "value": since}}
    found = client.query(conditions, sort="-CreationTime", State="Running")
    assert [task["Id"] for task in found] == ["a", "b", "c"]
    assert server.requests == [
        "POST /tasks/query?sort=-CreationTime",
        "POST /tasks/query?sort=-CreationTime&cursor=x",
    ]
    body = (
        b'{"CreationTime": {"op": "GE", "value": "2026-01-01T00:00:00+00:00"}, '
        b'"State": {"value": "Running"}}'
    )
    assert [head.partition(b"\r\n\r\n")[2] for head in server.heads] == [body, body]
    with pytest.raises(TypeError, match="use JSON values"):
        list(client.query(State=object()))


def test_the_base_url_and_the_paths_are_prefixes(serve: Start) -> None:
    server = RawServer(lambda *_: [response("200 OK", document("Completed"))])
    with server, AsyncRouteClient(f"{server.url}/app/", task_path="/v1/job") as client:
        client.start("PUT", "/work", params={"a": "b"})
        client.task("one")
    assert server.requests == ["PUT /app/work?a=b", "GET /app/v1/job/one"]


@pytest.mark.parametrize(
    "url", ["", "example.com", "ftp://example.com", "http://a:b@example.com", "http://a/?b"]
)
def test_an_invalid_base_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        AsyncRouteClient(url)


def test_the_session_authenticates_and_stays_open(serve: Start) -> None:
    session = requests.Session()
    session.headers["Authorization"] = "Bearer token"
    client, server = serve(answering(document("Completed")), session=session)
    client.start("PUT", "/work")
    client.close()
    assert b"Authorization: Bearer token" in server.heads[0]
    assert session.get(f"{server.url}/x", timeout=5).status_code == 200
    session.close()


def test_close_ends_the_thread_and_fails_what_is_unfinished(
    serve: Start, eventually: Callable[..., Any]
) -> None:
    client, _ = serve(answering(document("Running")))
    task = client.start("PUT", "/work")
    client.close()
    with pytest.raises(ClientError, match="The client was closed"):
        task.result(0)
    with pytest.raises(ClientError, match="closed"):
        task.wait(0)
    with pytest.raises(ClientError, match="closed"):
        client.start("PUT", "/work")
    assert "asyncroute-client" not in {thread.name for thread in threading.enumerate()}


def test_close_aborts_a_request_in_progress(serve: Start, eventually: Callable[..., Any]) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        return [accepted()] if line.startswith("PUT") else drip(b"x")

    client, server = serve(answer, timeout=60.0)
    client.start("PUT", "/work")
    eventually(lambda: len(server.requests) == 2)
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 4
    assert "asyncroute-client" not in {thread.name for thread in threading.enumerate()}


def test_the_thread_ends_when_nothing_is_followed(
    serve: Start, eventually: Callable[..., Any]
) -> None:
    client, _ = serve(answering(document("Completed")))
    for _ in range(2):
        client.start("PUT", "/work").result(SECONDS)
        eventually(lambda: "asyncroute-client" not in {each.name for each in threading.enumerate()})


def test_an_unfinished_task_does_not_keep_the_interpreter_alive(serve: Start) -> None:
    _, server = serve(answering(document("Running")))
    code = (
        "from flask_asyncroute.client import AsyncRouteClient\n"
        f"AsyncRouteClient({server.url!r}).start('PUT', '/work')\n"
        "print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_a_client_from_before_a_fork_raises_an_error(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = serve(answering(document("Completed")))
    monkeypatch.setattr("os.getpid", lambda: 1)
    with pytest.raises(ClientError, match="Create a client in each process"):
        client.start("PUT", "/work")
    assert server.requests == []


def test_the_package_itself_does_not_import_the_client() -> None:
    code = "import sys, flask_asyncroute; print(*{'requests', 'flask_asyncroute.client'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_a_removed_task_raises_not_found_error(serve: Start) -> None:
    def answer(line: str, request: bytes) -> Iterable[bytes]:
        if line.startswith("PUT"):
            return [accepted()]
        return [response("404 X", {"type": PROBLEM + "task-not-found"})]

    client, _ = serve(answer)
    task = client.start("PUT", "/work")
    with pytest.raises(NotFoundError):
        task.result(SECONDS)
    with pytest.raises(NotFoundError):
        task.wait()


def test_tasks_of_an_unreachable_server_raise_unreachable_error(serve: Start) -> None:
    client, server = serve(answering(document("Running")), retry_for=0.5)
    tasks = [client.start("PUT", "/work"), client.task("one")]
    with server:
        pass
    for task in tasks:
        with pytest.raises(UnreachableError):
            task.result(SECONDS)


def test_an_answer_that_is_no_task_raises_invalid_response_error(serve: Start) -> None:
    client, _ = serve(lambda *_: [response("200 OK", b"<p>Please sign in", kind="xhtml")])
    with pytest.raises(InvalidResponseError, match="is not JSON"):
        client.start("PUT", "/work")


def test_an_error_of_the_callers_session_ends_the_futures(serve: Start) -> None:
    """Such as an authentication that cannot refresh its token."""
    session = requests.Session()
    calls: list[str] = []

    def authenticate(request: requests.PreparedRequest) -> requests.PreparedRequest:
        calls.append(str(request.method))
        if len(calls) == 3:  # after those of the start
            raise RuntimeError("no token")
        return request

    session.auth = authenticate
    client, _ = serve(answering(document("Completed", Result=5)), session=session)
    with pytest.raises(ClientError, match="no token"):
        client.start("PUT", "/work").result(SECONDS)
