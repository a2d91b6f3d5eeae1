"""Streams of one process share reads: one read per change, no change is missed, and each stream
sends only what its own caller may read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from flask import Flask, request

from flask_asyncroute import AsyncRoute, AsyncRouteTask
from flask_asyncroute.engine import notifier
from flask_asyncroute.http import streams
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Events
from tests.support.event_streams import Message, Parser, opened

Eventually = Callable[..., Any]
NewTask = Callable[..., AsyncRouteTask]
MANY = 30


class Client:
    """A client that reads a stream on its own thread until the server ends it."""

    def __init__(self, app: Flask, path: str, last_id: str | None = None, **headers: str) -> None:
        self.got: list[Message] = []
        self.parser = Parser()
        self._response = opened(app.test_client(), path, last_id, **headers)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for piece in self._response.iter_encoded():
            self.got += self.parser.feed(piece)

    def close(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the stream did not end"
        self._response.close()

    @property
    def ids(self) -> list[str]:
        """The task ids of the events with an id, in order."""
        return [message.data["Id"] for message in self.got if message.id is not None]


class Served:
    """An app on ``memory://`` whose tasks the test changes.

    Reads of events are recorded. They block before they return while ``may_return`` is not set.
    """

    def __init__(self, app: Flask, make_task: NewTask, monkeypatch: pytest.MonkeyPatch) -> None:
        @AsyncRoute(app).identity_loader
        def identity() -> Any:
            name = request.headers.get("X-User")
            return None if name is None else {"id": name}

        self.app = app
        self.runner = runtime_of(app).runner
        self.may_return = threading.Event()
        self.may_return.set()
        self.found: list[Events] = []
        self.threads: set[str] = set()
        self._make_task = make_task
        self._clients = ExitStack()
        read = self.runner.store.events

        def events(*given: Any) -> Events:
            found = read(*given)
            self.found.append(found)
            self.threads.add(threading.current_thread().name)
            assert self.may_return.wait(20)
            return found

        monkeypatch.setattr(self.runner.store, "events", events)
        self._waiting: set[notifier.Subscriber] = set()
        wait = notifier.Subscriber.wait

        def waiting(subscriber: notifier.Subscriber, seconds: float) -> Any:
            self._waiting.add(subscriber)
            try:
                return wait(subscriber, seconds)
            finally:
                self._waiting.discard(subscriber)

        monkeypatch.setattr(notifier.Subscriber, "wait", waiting)

    def create(self, task_id: str, **fields: Any) -> None:
        """Store a task, which is one change."""
        task = self._make_task(task_id, sse_group="group", **fields)
        self.runner.lifecycle.create(task, b"", None, ())

    def abort(self, task_id: str) -> None:
        """Abort a task, which is one change."""
        task = self.runner.store.get(task_id)
        assert task is not None
        self.runner.lifecycle.abort(task, "Aborted by a test")

    def client(self, path: str, last_id: str | None = None, **headers: str) -> Client:
        client = Client(self.app, path, last_id, **headers)
        self._clients.callback(client.close)
        return client

    @property
    def waiting(self) -> int:
        """The number of streams that wait for a change."""
        return sum(subscriber._changed.locked() for subscriber in self._waiting.copy())

    def close(self) -> None:
        self.may_return.set()
        self.runner.notifier.end_waits()
        self._clients.close()


@pytest.fixture
def served(
    make_app: Callable[..., Flask], make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    monkeypatch.setattr(notifier, "REREAD_SECONDS", 60.0)  # Drop no read because of its age.
    app = make_app(ASYNCROUTE_MAX_STREAMS=MANY + 1, ASYNCROUTE_STORE="memory://")
    created = Served(app, make_task, monkeypatch)
    created.runner.notifier._check_late_at = math.inf  # The same for the watcher's first check.
    yield created
    created.close()


def test_streams_of_one_group_read_once_for_each_change(
    served: Served, eventually: Eventually
) -> None:
    clients = [served.client("/tasks/events?group=group") for _ in range(MANY)]
    eventually(lambda: served.waiting == MANY)
    for number in range(5):
        served.found.clear()
        served.create(f"task-{number}")
        eventually(lambda number=number: all(len(each.ids) > number for each in clients))
        eventually(lambda: served.waiting == MANY)
        assert sum(bool(found.events) for found in served.found) == 1
    assert all(each.ids == [f"task-{number}" for number in range(5)] for each in clients)


def test_streams_of_many_tasks_read_on_one_thread(served: Served, eventually: Eventually) -> None:
    """They therefore need only one connection."""
    names = [f"task-{number}" for number in range(MANY)]
    for name in names:
        served.create(name)
    clients = [served.client(f"/task/{name}/events") for name in names]
    eventually(lambda: served.waiting == MANY)
    for name in names:
        served.abort(name)
    eventually(lambda: all(each.got[-1].name == "task.completed" for each in clients))
    assert served.threads == {"asyncroute-reader"}


def test_a_change_during_a_read_reaches_all_streams(served: Served, eventually: Eventually) -> None:
    """The streams are woken after a newer read. Otherwise the clients would receive this change only
    after the next one.
    """
    woken = served.client("/tasks/events?group=group")
    eventually(lambda: served.waiting == 1)
    served.runner.notifier.shared_reads.forget()
    served.may_return.clear()
    served.found.clear()
    late = served.client("/tasks/events?group=group")
    eventually(lambda: served.found)
    assert not served.found[0].events, "the read of the second stream found nothing"
    served.create("task")
    assert served.waiting == 1, "the first stream is not woken before there is something to send"
    served.may_return.set()
    # Before the streams end, as they do after five seconds under a server without threads.
    eventually(lambda: woken.ids == late.ids == ["task"], 3)


def test_streams_that_share_a_read_send_only_what_their_caller_may_list(
    served: Served, eventually: Eventually
) -> None:
    clients = {
        user: served.client("/tasks/events?group=group", **{"X-User": user})
        for user in ("ann", "bob")
    }
    eventually(lambda: served.waiting == 2)
    for user in clients:
        served.create(f"of-{user}", user=user)
    eventually(lambda: served.waiting == 2 and all(each.ids for each in clients.values()))
    assert {user: each.ids for user, each in clients.items()} == {
        "ann": ["of-ann"],
        "bob": ["of-bob"],
    }


def test_a_stream_of_a_finished_task_does_not_use_an_older_read(
    served: Served, eventually: Eventually
) -> None:
    """Another process may have finished the task after that read."""
    served.create("task")
    first = served.client("/task/task/events")
    eventually(lambda: served.waiting == 1)
    with pytest.MonkeyPatch.context() as patch:
        # The change is stored, but streams of this process are not notified yet.
        patch.setattr(served.runner.notifier, "_notify", lambda *given, **extra: None)
        served.abort("task")
    late = served.client("/task/task/events")
    late.close()
    assert late.got[-1].name == "task.completed"
    served.runner.notifier._notify("task")
    first.close()


def test_full_pages_are_not_cached(served: Served, eventually: Eventually) -> None:
    """A stream that is far behind reads many pages, which may take megabytes each."""
    position = served.client("/tasks/events")
    eventually(lambda: served.waiting == 1)
    last_id = position.parser.last_id
    for number in range(250):
        served.create(f"task-{number}")
    late = served.client("/tasks/events", last_id)
    eventually(lambda: len(late.ids) == 250 and served.waiting == 2)
    assert max(len(found.events) for found in served.found) == streams.PAGE
    kept = [each.result() for each in served.runner.notifier.shared_reads._reads.values()]
    assert all(len(page.events) < streams.PAGE for page in kept)
