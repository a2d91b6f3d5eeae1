"""Streams of events over HTTP: what a client gets, when it comes back, and what it never gets."""

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
from flask_asyncroute.followers import Follower
from flask_asyncroute.http import streams
from flask_asyncroute.http.event_ids import EventIds
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Expect
from tests.flow.streaming import Message, messages, opened, read, told

MakeApp = Callable[..., Flask]
Eventually = Callable[..., Any]
POSITION = re.compile(rb"id: (\S{32})\n\n")
"""What the stream of a group begins with."""


class Served:
    """An app with routes whose views go on until they are let."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.async_routes = AsyncRoute(app)
        self.gate = threading.Event()
        self.client = app.test_client()

        @self.async_routes.identity_loader
        def who() -> Any:
            name = request.headers.get("X-User")
            return None if name is None else {"id": name, "roles": request.headers.get("X-Roles", "").split()}

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
            "/owned", methods=["PUT"], permission=Permission(read=Access(roles=("reader",))), max_workers=8
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
            runtime_of(self.app).runner.notifier.wait(task_id, lambda task: task.state is State.RUNNING, 10)


@pytest.fixture(params=["memory://", "sqlite:///asyncroute.db"])
def served(request: pytest.FixtureRequest, make_app: MakeApp) -> Iterator[Served]:
    made = Served(make_app(ASYNCROUTE_STORE=request.param, ASYNCROUTE_ADMINS=Access(roles=("admin",))))
    yield made
    made.gate.set()


def test_a_stream_tells_all_to_the_end(served: Served) -> None:
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


def test_a_finished_task_is_told_whole(served: Served) -> None:
    task_id = served.start("/work/2")
    served.end(task_id)
    found = read(served.client, f"/task/{task_id}/events")
    assert told(found) == ["Completed", "step", "step", "message", "Completed"]
    assert [m.name for m in found] == ["task.state", "step", "step", "message", "task.completed"]
    for number in range(1, 4):
        assert told(read(served.client, f"/task/{task_id}/events", found[number].id)) == told(found[number + 1 :])
    answer = opened(served.client, f"/task/{task_id}/events", found[-1].id)
    assert (answer.status_code, answer.data) == (204, b"")


def test_the_result_comes_where_the_route_sends_it(served: Served) -> None:
    task_id = served.start("/full")
    assert served.last["Sse"] == {"Group": "full", "Url": f"/task/{task_id}/events", "SendResult": True}
    served.end(task_id)
    first, *_, last = read(served.client, f"/task/{task_id}/events")
    assert last.data["Result"] == [1, 2] and "Result" not in first.data


def test_a_failed_task_is_completed_too(served: Served) -> None:
    task_id = served.start("/fails")
    served.end(task_id)
    last = read(served.client, f"/task/{task_id}/events")[-1]
    assert (last.name, last.data["State"], last.data["Error"]) == ("task.completed", "Failed", "ValueError: broken")


def test_who_comes_back_gets_what_came_after(served: Served, eventually: Eventually) -> None:
    """Each event once, in the same order, wherever the stream was cut."""
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


@pytest.mark.parametrize("last_id", ["", "0", "-1", "9" * 40, "é", "A" * 32, "A" * 31 + "=", "x" * 5000])
def test_a63_an_id_that_is_not_ours_is_ignored(served: Served, last_id: str) -> None:
    task_id = served.start("/work/1")
    served.end(task_id)
    whole = told(read(served.client, f"/task/{task_id}/events"))
    assert told(read(served.client, f"/task/{task_id}/events", last_id)) == whole


def test_a63_an_id_of_another_task_is_ignored(served: Served) -> None:
    ids = [served.start("/work/1") for _ in range(2)]
    for task_id in ids:
        served.end(task_id)
    other = read(served.client, f"/task/{ids[1]}/events")
    assert len(read(served.client, f"/task/{ids[0]}/events", other[-1].id)) == len(other)


def test_a63_an_id_from_a_store_that_was_there_before_is_ignored(served: Served) -> None:
    task_id = served.start("/work/1")
    served.end(task_id)
    ahead = EventIds(runtime_of(served.app).runner.store.secret()).seal(10**9, task_id)
    assert told(read(served.client, f"/task/{task_id}/events", ahead))[0] == "Completed"


def test_a_group_is_told_only_what_comes(served: Served) -> None:
    before = served.start("/full")
    served.end(before)
    answer = opened(served.client, "/tasks/events?group=full")
    stream = messages(answer.iter_encoded())
    chunks = answer.iter_encoded()
    assert POSITION.fullmatch(next(chunks)), "an id, and no event"
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


@pytest.mark.parametrize("has_place", [True, False])
def test_a_group_is_resumed_from_before_its_first_event(served: Served, has_place: bool) -> None:
    """By who was cut off before one came, and by who found no place."""
    if not has_place:
        runtime_of(served.app).runner.places._left = 0
    answer = opened(served.client, "/tasks/events?group=full")
    first = POSITION.fullmatch(next(answer.iter_encoded()))
    answer.close()
    runtime_of(served.app).runner.places._left = 2
    task_id = served.start("/full")
    served.end(task_id)
    assert first is not None
    again = opened(served.client, "/tasks/events?group=full", first[1].decode())
    rest = messages(again.iter_encoded())
    assert told(next(rest) for _ in range(3)) == ["NotStarted", "Running", "Completed"]
    again.close()


def test_groups_default_to_the_rule(served: Served) -> None:
    task_id = served.start("/work/0")
    assert served.last["Sse"] == {"Group": "/work/<int:count>", "Url": f"/task/{task_id}/events", "SendResult": False}


def test_a_group_that_nobody_is_in_is_silent(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    answer = opened(served.client, "/tasks/events?group=nobody")
    chunks = answer.iter_encoded()
    served.end(served.start("/full"))
    assert POSITION.fullmatch(next(chunks))
    assert [next(chunks) for _ in range(3)] == [b":\n\n"] * 3
    answer.close()


@pytest.mark.parametrize("query", ["group=a&group=b", "group=", "group=%00", "group=" + "x" * 256])
def test_what_cannot_be_a_group_is_refused(served: Served, query: str) -> None:
    answer = served.client.get(f"/tasks/events?{query}")
    assert answer.status_code == 400, query


def test_tasks_of_quiet_routes_have_no_events(served: Served) -> None:
    task_id = served.start("/quiet")
    assert "Sse" not in served.last
    assert served.client.get(f"/task/{task_id}/events").status_code == 404
    store = runtime_of(served.app).runner.store
    served.end(task_id)
    assert not store.events(0, 100).events


def test_who_may_not_read_gets_what_an_unknown_id_gets(served: Served) -> None:
    task_id = served.start("/owned", **{"X-User": "ann"})
    for who in ({"X-User": "bob"}, {}):
        theirs = served.client.get(f"/task/{task_id}/events", headers=who)
        unknown = served.client.get(f"/task/{'0' * len(task_id)}/events", headers=who)
        assert theirs.status_code == unknown.status_code == 404
        assert theirs.data.replace(task_id.encode(), b"") == unknown.data.replace(b"0" * len(task_id), b"")
    for who in ({"X-User": "ann"}, {"X-User": "cat", "X-Roles": "reader"}, {"X-User": "dan", "X-Roles": "admin"}):
        answer = opened(served.client, f"/task/{task_id}/events", **who)
        assert answer.status_code == 200, who
        answer.close()


def test_a_group_has_only_what_its_caller_may_list(served: Served) -> None:
    seen: dict[str, set[str]] = {}
    callers = {
        "ann": {"X-User": "ann"},
        "bob": {"X-User": "bob"},
        "reader": {"X-User": "cat", "X-Roles": "reader"},
        "admin": {"X-User": "dan", "X-Roles": "admin"},
        "nobody": {},
    }
    runtime_of(served.app).runner.places._left = len(callers)
    open_streams = {name: opened(served.client, "/tasks/events", **headers) for name, headers in callers.items()}
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


def test_a63_the_caller_is_looked_up_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_AGAIN_SECONDS", 0.05)
    allowed = {"ann": True}

    @served.async_routes.identity_loader
    def who() -> Any:
        assert request.path.startswith(("/task/", "/owned")) and request.headers["X-Kept"] == "yes"
        return {"id": "ann"} if allowed["ann"] else None

    headers = {"X-Kept": "yes"}
    task_id = served.start("/owned", **headers)
    answer = opened(served.client, f"/task/{task_id}/events", **headers)
    chunks = answer.iter_encoded()
    next(chunks)
    allowed["ann"] = False
    assert b"completed" not in b"".join(chunks), "the stream ends, and not for the task's end"
    answer.close()
    assert served.client.get(f"/task/{task_id}/events", headers=headers).status_code == 404


def test_a_stream_beats_and_ends_for_its_age(
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


def test_streams_of_servers_without_threads_are_short(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_asyncroute.http.sse.UNTHREADED_SECONDS", 0.2)
    served = Served(make_app())
    task_id = served.start("/work/0")
    answer = served.client.get(f"/task/{task_id}/events", environ_overrides={"wsgi.multithread": False})
    assert answer.data.endswith(b"retry: 1000\n\n")
    served.gate.set()


def test_over_the_cap_a_stream_is_a_look(make_app: MakeApp) -> None:
    served = Served(make_app(ASYNCROUTE_MAX_STREAMS=1))
    task_id = served.start("/work/1")
    held = opened(served.client, f"/task/{task_id}/events")
    next(iter(held.iter_encoded()))
    for path in (f"/task/{task_id}/events", "/tasks/events"):
        answer = served.client.get(path)
        assert answer.status_code == 200 and answer.data.endswith(b"retry: 3000\n\n"), path
    look = list(messages([served.client.get(f"/task/{task_id}/events").data]))
    assert [(m.name, m.id) for m in look] == [("task.state", None)]
    served.end(task_id)
    assert told(read(served.client, f"/task/{task_id}/events"))[-1] == "Completed", "a finished one is sent whole"
    held.close()
    again = served.start("/full")
    assert told(read(served.client, f"/task/{again}/events"))[-1] == "Completed", "the place is free again"


def test_a_stream_that_is_never_read_gives_its_place_back(served: Served) -> None:
    task_id = served.start("/work/0")
    for _ in range(5):
        opened(served.client, f"/task/{task_id}/events").close()
    assert runtime_of(served.app).runner.places._left == 2


def test_head_holds_nothing(served: Served) -> None:
    task_id = served.start("/work/0")
    for path in (f"/task/{task_id}/events", "/tasks/events"):
        answer = served.client.head(path)
        assert (answer.status_code, answer.content_type, answer.data) == (200, "text/event-stream", b"")
    assert runtime_of(served.app).runner.places._left == 2


@pytest.mark.parametrize(("accept", "status"), [("application/json", 406), ("*/*", 200), ("text/*", 200)])
def test_events_are_negotiated(served: Served, accept: str, status: int) -> None:
    task_id = served.start("/full")
    served.end(task_id)
    assert served.client.get(f"/task/{task_id}/events", headers={"Accept": accept}).status_code == status


def test_headers_of_streams(served: Served) -> None:
    task_id = served.start("/full")
    served.end(task_id)
    headers = served.client.get(f"/task/{task_id}/events").headers
    assert headers["Content-Type"] == "text/event-stream"
    assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
    assert headers["Vary"] == "Accept, Authorization, Cookie"


def test_events_can_be_left_out(make_app: MakeApp) -> None:
    served = Served(make_app(ASYNCROUTE_OPERATIONS=("get",)))
    task_id = served.start("/full")
    assert "Sse" not in served.last
    assert served.client.get(f"/task/{task_id}/events").status_code == 404
    assert served.client.get("/tasks/events").status_code == 404


def test_events_where_ids_are_in_the_query_alone(make_app: MakeApp) -> None:
    served = Served(make_app(ASYNCROUTE_TASK_ID_IN=("query",), ASYNCROUTE_URL_PREFIX="/api"))
    task_id = served.start("/full")
    assert served.last["Sse"]["Url"] == f"/api/task/events?Id={task_id}"
    served.end(task_id)
    assert told(read(served.client, served.last["Sse"]["Url"]))[-1] == "Completed"


def test_a_restart_is_told_too(served: Served) -> None:
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


def test_streams_end_with_the_server(served: Served) -> None:
    task_id = served.start("/work/0")
    served.running(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    chunks = answer.iter_encoded()
    next(chunks)
    runtime_of(served.app).runner.notifier.end_waits()
    assert list(chunks)[-1] == b"retry: 1000\n\n"
    served.gate.set()


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_store_that_fails_ends_a_stream(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, has_ended: bool) -> None:
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


def test_f21_the_stream_of_a_group_ends_where_its_store_is_replaced(
    make_app: MakeApp, tmp_path: Path, eventually: Eventually
) -> None:
    """The numbers of the new one begin anew: what happens there would not be after what the client has."""
    path = tmp_path / "there.db"
    served = Served(make_app(ASYNCROUTE_STORE=f"sqlite:///{path}"))
    for _ in range(3):
        served.end(served.start("/full"))
    threaded = {"wsgi.multithread": True}  # else it would end for its age
    chunks = served.client.get("/tasks/events", environ_overrides=threaded, buffered=False).iter_encoded()
    next(chunks)
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink()
    eventually(lambda: served.client.put("/full").status_code == 202 and path.exists())
    thread = threading.Thread(target=lambda: rest.extend(chunks), daemon=True)
    rest: list[bytes] = []
    thread.start()
    thread.join(10)
    assert rest == [b"retry: 1000\n\n"]
    again = opened(served.client, "/tasks/events")
    chunks = again.iter_encoded()
    next(chunks)
    task_id = served.start("/full")
    assert task_id.encode() in next(chunks)
    again.close()


def test_a_group_s_first_id_does_not_tell_whether_anything_was_written(served: Served) -> None:
    """Two that are alike would: also of tasks that the caller may not see."""
    firsts = set()
    for _ in range(2):
        answer = opened(served.client, "/tasks/events")
        firsts.add(next(iter(answer.iter_encoded())))
        answer.close()
    assert len(firsts) == 2


def test_f40_large_events_are_sent_piece_by_piece(served: Served) -> None:
    """So that what waits for a slow client is one of them, not all that there are."""
    task_id = served.start("/large/40")
    served.end(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    pieces = list(answer.iter_encoded())
    answer.close()
    assert [message.data["n"] for message in messages(pieces) if message.name == "step"] == list(range(40))
    assert max(map(len, pieces)) <= streams.PIECE
    assert len(pieces) < 40, "small ones go together"


def test_f40_a_large_result_is_sent_in_pieces(served: Served) -> None:
    """A client that reads slowly, but reads, gets on with each, and so gets all of it in the end."""
    task_id = served.start("/huge")
    served.end(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    pieces = list(answer.iter_encoded())
    assert list(messages(pieces))[-1].data["Result"] == "x" * 600_000
    assert max(map(len, pieces)) <= streams.PIECE


def test_what_was_sent_is_not_held(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = served.start("/work/3")
    served.running(task_id)
    answer = opened(served.client, f"/task/{task_id}/events")
    held: set[str] = set()
    wait = Follower.wait

    def look(follower: Follower, seconds: float | None) -> bool:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == streams.__file__:
                held.update(name for name in ("data", "piece", "found") if name in frame.f_locals)
            frame = frame.f_back
        served.gate.set()
        return wait(follower, seconds)

    monkeypatch.setattr(Follower, "wait", look)
    assert len(list(messages(answer.iter_encoded()))) > 4
    assert served.gate.is_set()
    assert not held


def test_the_stream_of_a_finished_task_waits_for_nothing(served: Served) -> None:
    """It has no place, so it must hold its thread no longer than to send; also where the task is removed meanwhile."""
    task_id = served.start("/work/2")
    served.end(task_id)
    threaded = {"wsgi.multithread": True}  # else it would end for its age
    answer = served.client.get(f"/task/{task_id}/events", environ_overrides=threaded, buffered=False)
    chunks = answer.iter_encoded()
    next(chunks)
    assert served.client.delete(f"/task/{task_id}?purge=true").status_code == 204
    thread = threading.Thread(target=lambda: list(chunks), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_result_that_is_gone_by_now_is_left_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are read one by one when their turn has come; the task may be removed by then."""
    task_id = served.start("/full")
    served.end(task_id)
    store = runtime_of(served.app).runner.store
    answer = opened(served.client, f"/task/{task_id}/events")
    chunks = answer.iter_encoded()
    next(chunks)
    monkeypatch.setattr(store, "get", lambda asked: None)
    assert not [message for message in messages(list(chunks)) if message.name == "task.completed"]


def test_f40_what_a_stream_says_at_last_has_its_time_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its store fails, it tells its client when to come back; one that does not read would hold the thread by that."""
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
    (follower,) = (follower for followers in runner.notifier._waiting.values() for follower in followers)
    assert follower.must_be_sent_by is not None
    answer.close()


@pytest.mark.parametrize("is_raised", [True, False])
def test_a_stream_that_the_app_takes_away_gives_its_place_back(served: Served, is_raised: bool) -> None:
    """An ``after_request`` function may fail, or answer with something else: nobody closes the stream's response then."""

    @served.app.after_request
    def instead(response: Any) -> Any:
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
    assert runtime_of(served.app).runner.places._left == 2


def test_a_caller_that_the_app_refuses_meanwhile_ends_the_stream(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An identity loader may refuse by an exception, as of a token that has run out; the client then learns it itself."""
    monkeypatch.setattr(streams, "LOOK_AGAIN_SECONDS", 0.05)
    served = Served(make_app())
    is_refused = threading.Event()

    @served.async_routes.identity_loader
    def who() -> Any:
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
    assert runtime_of(served.app).runner.places._left == 2
