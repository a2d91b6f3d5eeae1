"""Event streams over HTTP: events, resumption, permissions, slots and ends."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from flask import Flask, abort, request

from flask_asyncroute import Access, AsyncRoute, Permission, Sse, State, current_task
from flask_asyncroute.engine.notifier import Subscriber
from flask_asyncroute.http import streams, waits
from flask_asyncroute.http.sse_format import EventIds
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Expect
from tests.support.event_streams import Message, messages, opened, read, told

MakeApp = Callable[..., Flask]
Eventually = Callable[..., Any]
FIRST_ID = re.compile(rb"id: (\S{32})\n\n")
"""The first block of a group's stream."""


class Served:
    """An app whose views run until ``gate`` is set."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.async_routes = AsyncRoute(app)
        self.gate = threading.Event()
        self.client = app.test_client()

        @self.async_routes.identity_loader
        def identify() -> Any:
            name = request.headers.get("X-User")
            return (
                None
                if name is None
                else {"id": name, "roles": request.headers.get("X-Roles", "").split()}
            )

        @self.async_routes.route("/work/<int:count>", methods=["PUT"], max_workers=8)
        def work(count: int) -> str:
            for number in range(count):
                current_task.send_event({"n": number}, "step")
            self.gate.wait(20)
            current_task.send_event("bye")
            return "done"

        @self.async_routes.route("/large/<int:count>", methods=["PUT"])
        def large(count: int) -> None:
            for number in range(count):
                current_task.send_event({"n": number, "filling": "x" * 20_000}, "step")

        @self.async_routes.route("/full", methods=["PUT"], sse=Sse(group="full", send_result=True))
        def full() -> list[int]:
            return [1, 2]

        @self.async_routes.route("/huge", methods=["PUT"], sse=Sse(send_result=True))
        def huge() -> str:
            return "x" * 600_000

        @self.async_routes.route("/fails", methods=["PUT"])
        def fails() -> None:
            raise ValueError("broken")

        @self.async_routes.route("/quiet", methods=["PUT"], sse=False)
        def quiet() -> None:
            self.gate.wait(20)

        @self.async_routes.route(
            "/owned",
            methods=["PUT"],
            permission=Permission(read=Access(roles=("reader",))),
            max_workers=8,
        )
        def owned() -> None:
            self.gate.wait(20)

    def start(self, path: str, **headers: str) -> str:
        answer = self.client.put(path, headers=headers)
        assert answer.status_code == 202, answer.text
        self.last = answer.json
        return str(answer.json["Id"])

    def end(self, task_id: str) -> None:
        self.gate.set()
        with self.app.app_context():
            self.async_routes.wait(task_id, 10)

    def running(self, task_id: str) -> None:
        with self.app.app_context():
            runtime_of(self.app).runner.notifier.wait(
                task_id, lambda task: task.state is State.RUNNING, 10
            )


@pytest.fixture(params=["memory://", "sqlite:///asyncroute.db"])
def served(request: pytest.FixtureRequest, make_app: MakeApp) -> Iterator[Served]:
    made = Served(
        make_app(ASYNCROUTE_STORE=request.param, ASYNCROUTE_ADMINS=Access(roles=("admin",)))
    )
    yield made
    made.gate.set()


def test_a_stream_sends_all_events_to_the_end(served: Served) -> None:
    task_id = served.start("/work/3")
    stream = messages(opened(served.client, f"/task/{task_id}/events").iter_encoded())
    first = next(stream)
    assert (first.name, first.id, first.data["Id"]) == ("task.state", None, task_id)
    found: list[Message] = []
    while len([m for m in found if m.name == "step"]) < 3:
        found.append(next(stream))
    served.gate.set()
    found += stream
    steps = [m for m in found if m.name == "step"]
    assert [m.data for m in steps] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [m.name for m in found[-2:]] == ["message", "task.completed"]
    assert found[-1].data["State"] == "Completed" and "Result" not in found[-1].data
    ids = [m.id for m in found if m.name != "task.progress"]
    assert None not in ids and len(set(ids)) == len(ids)


def test_a_stream_of_a_finished_task_sends_all_events(served: Served) -> None:
    task_id = served.start("/work/2")
    served.end(task_id)
    found = read(served.client, f"/task/{task_id}/events")
    assert told(found) == ["Completed", "step", "step", "message", "Completed"]
    assert [m.name for m in found] == ["task.state", "step", "step", "message", "task.completed"]
    for number in range(1, 4):
        assert told(read(served.client, f"/task/{task_id}/events", found[number].id)) == told(
            found[number + 1 :]
        )
    answer = opened(served.client, f"/task/{task_id}/events", found[-1].id)
    assert (answer.status_code, answer.data) == (204, b"")


def test_send_result_adds_the_result_to_the_last_event(served: Served) -> None:
    task_id = served.start("/full")
    assert served.last["Sse"] == {
        "Group": "full",
        "Url": f"/task/{task_id}/events",
        "SendResult": True,
    }
    served.end(task_id)
    first, *_, last = read(served.client, f"/task/{task_id}/events")
    assert last.data["Result"] == [1, 2] and "Result" not in first.data


def test_a_failed_task_ends_with_task_completed(served: Served) -> None:
    task_id = served.start("/fails")
    served.end(task_id)
    last = read(served.client, f"/task/{task_id}/events")[-1]
    assert (last.name, last.data["State"], last.data["Error"]) == (
        "task.completed",
        "Failed",
        "ValueError: broken",
    )


def test_a_resumed_stream_sends_each_later_event_once(
    served: Served, eventually: Eventually
) -> None:
    """The order is the same wherever the stream was cut."""
    task_id = served.start("/work/30")
    store = runtime_of(served.app).runner.store
    eventually(lambda: len(store.events(0, 100, task_id).events) == 32)
    served.end(task_id)
    whole = told(m for m in read(served.client, f"/task/{task_id}/events", None))[1:]
    last_id = EventIds(store.secret()).seal(store.events(0, 1, task_id).events[0].change, task_id)
    found: list[Message] = []
    while True:
        answer = opened(served.client, f"/task/{task_id}/events", last_id)
        if answer.status_code == 204:
            break
        stream = messages(answer.iter_encoded())
        for _ in range(7):
            message = next(stream, None)
            if message is not None:
                found.append(message)
                last_id = message.id
        answer.close()
    assert told(found) == ["Running", *whole]


@pytest.mark.covers("A63")
@pytest.mark.parametrize(
    "last_id", ["", "0", "-1", "9" * 40, "é", "A" * 32, "A" * 31 + "=", "x" * 5000]
)
def test_an_unknown_last_event_id_is_ignored(served: Served, last_id: str) -> None:
    task_id = served.start("/work/1")
    served.end(task_id)
    whole = told(read(served.client, f"/task/{task_id}/events"))
    assert told(read(served.client, f"/task/{task_id}/events", last_id)) == whole


@pytest.mark.covers("A63")
def test_a_last_event_id_of_another_task_is_ignored(served: Served) -> None:
    ids = [served.start("/work/1") for _ in range(2)]
    for task_id in ids:
        served.end(task_id)
    other = read(served.client, f"/task/{ids[1]}/events")
    assert len(read(served.client, f"/task/{ids[0]}/events", other[-1].id)) == len(other)


@pytest.mark.covers("A63")
def test_a_last_event_id_from_an_earlier_store_is_ignored(served: Served) -> None:
    task_id = served.start("/work/1")
    served.end(task_id)
    ahead = EventIds(runtime_of(served.app).runner.store.secret()).seal(10**9, task_id)
    assert told(read(served.client, f"/task/{task_id}/events", ahead))[0] == "Completed"


def test_a_group_stream_sends_only_new_events(served: Served) -> None:
    before = served.start("/full")
    served.end(before)
    answer = opened(served.client, "/tasks/events?group=full")
    stream = messages(answer.iter_encoded())
    chunks = answer.iter_encoded()
    assert FIRST_ID.fullmatch(next(chunks)), "an id, and no event"
    task_id = served.start("/full")
    found: list[Message] = []
    for message in messages(chunks):
        found.append(message)
        if message.name == "task.completed":
            break
    assert told(found) == ["NotStarted", "Running", "Completed"]
    assert {m.data["Id"] for m in found} == {task_id} and found[-1].data["Result"] == [1, 2]
    answer.close()
    del stream
    again = opened(served.client, "/tasks/events", found[0].id)
    rest = messages(again.iter_encoded())
    assert told([next(rest), next(rest)]) == ["Running", "Completed"]
    again.close()


@pytest.mark.parametrize("has_slot", [True, False])
def test_a_group_stream_can_be_resumed_before_its_first_event(
    served: Served, has_slot: bool
) -> None:
    """With a slot, the client disconnects. Without one, the stream ends after its first id."""
    if not has_slot:
        runtime_of(served.app).runner.stream_slots._value = 0
    answer = opened(served.client, "/tasks/events?group=full")
    first = FIRST_ID.fullmatch(next(answer.iter_encoded()))
    answer.close()
    runtime_of(served.app).runner.stream_slots._value = 2
    task_id = served.start("/full")
    served.end(task_id)
    assert first is not None
    again = opened(served.client, "/tasks/events?group=full", first[1].decode())
    rest = messages(again.iter_encoded())
    assert told(next(rest) for _ in range(3)) == ["NotStarted", "Running", "Completed"]
    again.close()


def test_the_default_group_is_the_rule(served: Served) -> None:
    task_id = served.start("/work/0")
    assert served.last["Sse"] == {
        "Group": "/work/<int:count>",
        "Url": f"/task/{task_id}/events",
        "SendResult": False,
    }


def test_a_stream_of_an_empty_group_sends_only_heartbeats(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    answer = opened(served.client, "/tasks/events?group=nobody")
    chunks = answer.iter_encoded()
    served.end(served.start("/full"))
    assert FIRST_ID.fullmatch(next(chunks))
    assert [next(chunks) for _ in range(3)] == [b":\n\n"] * 3
    answer.close()


@pytest.mark.parametrize("query", ["group=a&group=b", "group=", "group=%00", "group=" + "x" * 256])
def test_an_invalid_group_is_refused(served: Served, query: str) -> None:
    answer = served.client.get(f"/tasks/events?{query}")
    assert answer.status_code == 400, query


def test_tasks_of_routes_without_sse_have_no_events(served: Served) -> None:
    task_id = served.start("/quiet")
    assert "Sse" not in served.last
    assert served.client.get(f"/task/{task_id}/events").status_code == 404
    store = runtime_of(served.app).runner.store
    served.end(task_id)
    assert not store.events(0, 100).events


def test_an_unreadable_task_is_answered_like_an_unknown_one(served: Served) -> None:
    task_id = served.start("/owned", **{"X-User": "ann"})
    for headers in ({"X-User": "bob"}, {}):
        theirs = served.client.get(f"/task/{task_id}/events", headers=headers)
        unknown = served.client.get(f"/task/{'0' * len(task_id)}/events", headers=headers)
        assert theirs.status_code == unknown.status_code == 404
        assert theirs.data.replace(task_id.encode(), b"") == unknown.data.replace(
            b"0" * len(task_id), b""
        )
    for headers in (
        {"X-User": "ann"},
        {"X-User": "cat", "X-Roles": "reader"},
        {"X-User": "dan", "X-Roles": "admin"},
    ):
        answer = opened(served.client, f"/task/{task_id}/events", **headers)
        assert answer.status_code == 200, headers
        answer.close()


def test_a_group_stream_has_only_tasks_that_its_caller_may_list(served: Served) -> None:
    seen: dict[str, set[str]] = {}
    callers = {
        "ann": {"X-User": "ann"},
        "bob": {"X-User": "bob"},
        "reader": {"X-User": "cat", "X-Roles": "reader"},
        "admin": {"X-User": "dan", "X-Roles": "admin"},
        "nobody": {},
    }
    runtime_of(served.app).runner.stream_slots = threading.BoundedSemaphore(len(callers))
    open_streams = {
        name: opened(served.client, "/tasks/events", **headers) for name, headers in callers.items()
    }
    chunks = {name: answer.iter_encoded() for name, answer in open_streams.items()}
    for stream in chunks.values():
        next(stream)
    of_ann = served.start("/owned", **{"X-User": "ann"})
    of_nobody = served.start("/full")
    for task_id in (of_ann, of_nobody):
        served.end(task_id)
    for name, answer in open_streams.items():
        seen[name] = {m.data["Id"] for m in messages([next(chunks[name])])}
        answer.close()
    assert seen == {
        "ann": {of_ann, of_nobody},
        "bob": {of_nobody},
        "reader": {of_ann, of_nobody},
        "admin": {of_ann, of_nobody},
        "nobody": {of_nobody},
    }


@pytest.mark.covers("A63")
def test_a_stream_checks_its_caller_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_AGAIN_SECONDS", 0.05)
    allowed = {"ann": True}

    @served.async_routes.identity_loader
    def identify() -> Any:
        assert request.path.startswith(("/task/", "/owned")) and request.headers["X-Kept"] == "yes"
        return {"id": "ann"} if allowed["ann"] else None

    headers = {"X-Kept": "yes"}
    task_id = served.start("/owned", **headers)
    answer = opened(served.client, f"/task/{task_id}/events", **headers)
    chunks = answer.iter_encoded()
    next(chunks)
    allowed["ann"] = False
    assert b"completed" not in b"".join(chunks), "the stream ends before the task"
    answer.close()
    assert served.client.get(f"/task/{task_id}/events", headers=headers).status_code == 404


def test_a_stream_sends_heartbeats_and_ends_at_its_maximum_age(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.2)
    served = Served(make_app(ASYNCROUTE_STREAM_AGE=1))
    task_id = served.start("/work/0")
    served.running(task_id)
    data = opened(served.client, f"/task/{task_id}/events").data
    assert data.startswith(b"event: task.state\n") and data.endswith(b"retry: 1000\n\n")
    assert 2 <= data.count(b":\n\n") <= 5
    served.gate.set()


def test_streams_of_servers_without_threads_are_short(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "BLOCKING_SECONDS", 0.2)
    served = Served(make_app())
    task_id = served.start("/work/0")
    answer = served.client.get(
        f"/task/{task_id}/events", environ_overrides={"wsgi.multithread": False}
    )
    assert answer.data.endswith(b"retry: 1000\n\n")
    served.gate.set()


def test_a_stream_over_the_limit_sends_the_current_state_and_ends(make_app: MakeApp) -> None:
    served = Served(make_app(ASYNCROUTE_MAX_STREAMS=1))
    task_id = served.start("/work/1")
    held = opened(served.client, f"/task/{task_id}/events")
    next(iter(held.iter_encoded()))
    for path in (f"/task/{task_id}/events", "/tasks/events"):
        answer = served.client.get(path)
        assert answer.status_code == 200 and answer.data.endswith(b"retry: 3000\n\n"), path
    current = list(messages([served.client.get(f"/task/{task_id}/events").data]))
    assert [(m.name, m.id) for m in current] == [("task.state", None)]
    served.end(task_id)
    assert told(read(served.client, f"/task/{task_id}/events"))[-1] == "Completed", (
        "all events of a finished task are sent"
    )
    held.close()
    again = served.start("/full")
    assert told(read(served.client, f"/task/{again}/events"))[-1] == "Completed", (
        "the slot is free again"
    )


def test_a_stream_that_is_closed_unread_releases_its_slot(served: Served) -> None:
    task_id = served.start("/work/0")
    for _ in range(5):
        opened(served.client, f"/task/{task_id}/events").close()
    assert runtime_of(served.app).runner.stream_slots._value == 2


def test_head_of_a_stream_uses_no_slot(served: Served) -> None:
    task_id = served.start("/work/0")
    for path in (f"/task/{task_id}/events", "/tasks/events"):
        answer = served.client.head(path)
        assert (answer.status_code, answer.content_type, answer.data) == (
            200,
            "text/event-stream",
            b"",
        )
    assert runtime_of(served.app).runner.stream_slots._value == 2


@pytest.mark.parametrize(
    ("accept", "status"), [("application/json", 406), ("*/*", 200), ("text/*", 200)]
)
def test_events_are_negotiated(served: Served, accept: str, status: int) -> None:
    task_id = served.start("/full")
    served.end(task_id)
    assert (
        served.client.get(f"/task/{task_id}/events", headers={"Accept": accept}).status_code
        == status
    )


def test_headers_of_streams(served: Served) -> None:
    task_id = served.start("/full")
    served.end(task_id)
    headers = served.client.get(f"/task/{task_id}/events").headers
    assert headers["Content-Type"] == "text/event-stream"
    assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
    assert headers["Vary"] == "Accept, Authorization, Cookie"


def test_no_streams_without_the_events_operation(make_app: MakeApp) -> None:
    served = Served(make_app(ASYNCROUTE_OPERATIONS=("get",)))
    task_id = served.start("/full")
    assert "Sse" not in served.last
    assert served.client.get(f"/task/{task_id}/events").status_code == 404
    assert served.client.get("/tasks/events").status_code == 404


def test_the_stream_url_if_ids_are_only_in_the_query(make_app: MakeApp) -> None:
    served = Served(make_app(ASYNCROUTE_TASK_ID_IN=("query",), ASYNCROUTE_URL_PREFIX="/api"))
    task_id = served.start("/full")
    assert served.last["Sse"]["Url"] == f"/api/task/events?Id={task_id}"
    served.end(task_id)
    assert told(read(served.client, served.last["Sse"]["Url"]))[-1] == "Completed"


def test_a_stream_reports_a_restart(served: Served) -> None:
    task_id = served.start("/work/0")
    served.running(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    stream = messages(answer.iter_encoded())
    assert told([next(stream)]) == ["Running"]
    runner = runtime_of(served.app).runner
    back = {"state": State.NOT_STARTED, "owner": None, "started_us": None, "expires_us": None}
    task = runner.store.update(task_id, Expect((State.RUNNING,)), back)
    runner.notifier.end_waits()
    assert task is not None and told(stream) == ["NotStarted"]
    served.gate.set()


def test_streams_end_when_the_server_exits(served: Served) -> None:
    task_id = served.start("/work/0")
    served.running(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    chunks = answer.iter_encoded()
    next(chunks)
    runtime_of(served.app).runner.notifier.end_waits()
    assert list(chunks)[-1] == b"retry: 1000\n\n"
    served.gate.set()


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_store_failure_ends_a_stream(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    from flask_asyncroute.errors import StoreUnavailable

    served = Served(make_app())
    task_id = served.start("/work/0")
    served.running(task_id)
    if has_ended:
        served.end(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    chunks = answer.iter_encoded()
    next(chunks)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(runtime_of(served.app).runner.store, "events", fail)
    assert list(chunks) == [b"retry: 1000\n\n"]
    served.gate.set()


@pytest.mark.covers("F21")
def test_a_stream_ends_when_the_file_of_the_store_is_deleted(
    make_app: MakeApp, tmp_path: Path
) -> None:
    path = tmp_path / "there.db"
    served = Served(make_app(ASYNCROUTE_STORE=f"sqlite:///{path}"))
    threaded = {"wsgi.multithread": True}  # Otherwise the stream ends at its maximum age.
    chunks = served.client.get(
        "/tasks/events", environ_overrides=threaded, buffered=False
    ).iter_encoded()
    next(chunks)
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink()
    assert list(chunks) == [b"retry: 1000\n\n"]
    assert served.client.put("/full").status_code == 503


def test_the_first_id_of_a_group_stream_does_not_reveal_activity(served: Served) -> None:
    """Equal ids would reveal that no task has changed, hidden tasks included."""
    firsts = set()
    for _ in range(2):
        answer = opened(served.client, "/tasks/events")
        firsts.add(next(iter(answer.iter_encoded())))
        answer.close()
    assert len(firsts) == 2


@pytest.mark.covers("F40")
def test_large_events_are_sent_in_pieces(served: Served) -> None:
    """Only one piece is then buffered for a slow client, not all events."""
    task_id = served.start("/large/40")
    served.end(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    pieces = list(answer.iter_encoded())
    answer.close()
    assert [message.data["n"] for message in messages(pieces) if message.name == "step"] == list(
        range(40)
    )
    assert max(map(len, pieces)) <= streams.PIECE
    assert len(pieces) < 40, "small events share a piece"


@pytest.mark.covers("F40")
def test_a_large_result_is_sent_in_pieces(served: Served) -> None:
    """A slow client makes progress with each piece and receives the whole result."""
    task_id = served.start("/huge")
    served.end(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    pieces = list(answer.iter_encoded())
    assert list(messages(pieces))[-1].data["Result"] == "x" * 600_000
    assert max(map(len, pieces)) <= streams.PIECE


def test_a_waiting_stream_keeps_no_sent_data(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = served.start("/work/3")
    served.running(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    kept: set[str] = set()
    wait = Subscriber.wait

    def check_frames(subscriber: Subscriber, seconds: float | None) -> bool:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == streams.__file__:
                kept.update(name for name in ("data", "piece", "found") if name in frame.f_locals)
            frame = frame.f_back
        served.gate.set()
        return wait(subscriber, seconds)

    monkeypatch.setattr(Subscriber, "wait", check_frames)
    assert len(list(messages(answer.iter_encoded()))) > 4
    assert served.gate.is_set()
    assert not kept


def test_a_stream_of_a_finished_task_never_waits(served: Served) -> None:
    """It has no slot, so it holds its thread only while it sends, even if the task is removed."""
    task_id = served.start("/work/2")
    served.end(task_id)
    threaded = {"wsgi.multithread": True}  # Otherwise the stream ends at its maximum age.
    answer = served.client.get(
        f"/task/{task_id}/events", environ_overrides=threaded, buffered=False
    )
    chunks = answer.iter_encoded()
    next(chunks)
    assert served.client.delete(f"/task/{task_id}?purge=true").status_code == 204
    thread = threading.Thread(target=lambda: list(chunks), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_task_removed_before_its_last_event_is_sent_has_none(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are read one by one, each just before it is sent."""
    task_id = served.start("/full")
    served.end(task_id)
    store = runtime_of(served.app).runner.store
    answer = opened(served.client, f"/task/{task_id}/events")
    chunks = answer.iter_encoded()
    next(chunks)
    monkeypatch.setattr(store, "get", lambda asked: None)
    assert not [message for message in messages(list(chunks)) if message.name == "task.completed"]


@pytest.mark.covers("F40")
def test_the_last_block_of_a_stream_must_be_sent_in_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read the ``retry:`` block would otherwise hold the thread."""
    from flask_asyncroute.errors import StoreUnavailable

    task_id = served.start("/work/0")
    served.running(task_id)
    runner = runtime_of(served.app).runner
    answer = opened(served.client, f"/task/{task_id}/events")
    chunks = answer.iter_encoded()
    next(chunks)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(runner.store, "events", fail)
    assert next(chunks) == b"retry: 1000\n\n"
    (subscriber,) = (
        subscriber for followers in runner.notifier._waiting.values() for subscriber in followers
    )
    assert subscriber.must_be_sent_by is not None
    answer.close()


@pytest.mark.parametrize("is_raised", [True, False])
def test_a_stream_that_the_app_replaces_releases_its_slot(served: Served, is_raised: bool) -> None:
    """If an ``after_request`` function fails or returns another response, nothing closes the
    stream's response.
    """

    @served.app.after_request
    def replace(response: Any) -> Any:
        if response.content_type != "text/event-stream":
            return response
        if is_raised:
            raise RuntimeError("broken")
        return served.app.response_class("another", 418)

    served.app.testing = False
    served.app.config["PROPAGATE_EXCEPTIONS"] = False
    task_id = served.start("/work/0")
    for _ in range(3):
        answer = served.client.get(f"/task/{task_id}/events")
        assert answer.status_code == (500 if is_raised else 418)
    assert runtime_of(served.app).runner.stream_slots._value == 2


def test_a_stream_ends_if_the_identity_loader_refuses_its_caller(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A loader may raise, for example if a token has expired. The client gets the error when it
    reconnects.
    """
    monkeypatch.setattr(streams, "LOOK_AGAIN_SECONDS", 0.05)
    served = Served(make_app())
    is_refused = threading.Event()

    @served.async_routes.identity_loader
    def identify() -> Any:
        if is_refused.is_set():
            abort(401)
        return {"id": "me"}

    task_id = served.start("/owned")
    stream = opened(served.client, f"/task/{task_id}/events")
    chunks = stream.iter_encoded()
    assert b"task.state" in next(chunks)
    is_refused.set()
    assert b"".join(chunks).endswith(b"retry: 1000\n\n")
    assert "401" in caplog.text
    stream.close()
    served.gate.set()
    assert served.client.get(f"/task/{task_id}/events").status_code == 401
    assert runtime_of(served.app).runner.stream_slots._value == 2
