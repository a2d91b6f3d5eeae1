"""Events on every store: state changes of tasks and events of views, in one order."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from flask_asyncroute.stores.base import (
    MAX_EVENTS,
    PROGRESS,
    STATE,
    Event,
    Expect,
    SharedTaskStore,
    TaskStore,
    ViewEvent,
)
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.databases import SHARED, new_postgresql_database

NewTask = Callable[..., AsyncRouteTask]
RUNNING = Expect((State.RUNNING,), "me", 1)
END: dict[str, Any] = {"state": State.COMPLETED, "completed_us": 5, "result_json": b'"done"'}


def sent(*names: str, first: int = 1) -> list[ViewEvent]:
    """Return events as a view sends them."""
    return [
        ViewEvent(name, f'"{name}"'.encode(), number) for number, name in enumerate(names, first)
    ]


def summaries(events: Any) -> list[tuple[str, str]]:
    """Return the task id of each event, with the state or the event name."""
    return [
        (event.task.id, event.task.state.value if is_state(event) else event.name)
        for event in events
    ]


def is_state(event: Event) -> bool:
    return event.name == STATE and event.data is None


@pytest.fixture
def add(store: TaskStore, make_task: NewTask) -> Callable[..., None]:
    def add(task_id: str = "task", group: str | None = "g", **fields: Any) -> None:
        store.add(make_task(task_id, sse_group=group, **fields), b"", None, ())

    return add


def test_events_of_a_task_are_in_order(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    store.claim("task", "me", 1)
    assert store.add_events("task", RUNNING, sent("a", "b"))
    assert store.add_events("task", RUNNING, sent("c", first=3))
    store.update("task", RUNNING, END)
    found = store.events(0, 100)
    names = ["NotStarted", "Running", "a", "b", "c", "Completed"]
    assert summaries(found.events) == [("task", name) for name in names]
    numbers = [event.change for event in found.events]
    assert numbers == sorted(set(numbers))
    assert found.change == numbers[-1] == store.newest()
    for start in range(6):
        rest = store.events(numbers[start], 100, "task")
        assert summaries(rest.events) == [("task", name) for name in names[start + 1 :]], start
        assert rest.change == numbers[-1]


def test_a_state_event_has_the_record_of_that_time(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    store.claim("task", "me", 1)
    running = store.get("task")
    store.update(
        "task",
        RUNNING,
        {"progress": 100.0, "error": "E: e", "state": State.FAILED, "completed_us": 5},
    )
    first, second, last = (event.task for event in store.events(0, 100).events)
    assert (first.started_us, first.progress, first.error) == (None, None, None)
    assert running is not None and second.to_wire() == running.to_wire()
    assert last == store.get("task")


@pytest.mark.parametrize("is_sent", [True, False])
def test_events_do_not_include_results(
    store: TaskStore, add: Callable[..., None], is_sent: bool
) -> None:
    """Results may be large. Streams that send them read them one by one."""
    add(sse_result=is_sent)
    store.claim("task", "me", 1)
    store.add_events("task", RUNNING, sent("a"))
    store.update("task", RUNNING, END)
    found = store.events(0, 100).events
    assert [event.task.result_json for event in found] == [None] * 4


def test_only_the_latest_progress_is_an_event(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    store.claim("task", "me", 1)
    for progress in (1.0, 2.0):
        store.update("task", RUNNING, {"progress": progress, "progress_message": "m"})
    *_, last = store.events(0, 100).events
    assert (last.name, last.task.progress, last.change) == (PROGRESS, 2.0, store.newest())
    assert list(store.events(last.change, 100).events) == []
    store.update("task", RUNNING, END)
    assert summaries(store.events(last.change, 100).events) == [("task", "Completed")]


def test_a_restart_keeps_earlier_state_events(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    store.claim("task", "me", 1)
    begun = store.get("task")
    assert begun is not None
    back = {"state": State.NOT_STARTED, "owner": None, "started_us": None, "expires_us": None}
    assert store.update("task", RUNNING, back) is not None
    assert store.claim("task", "me", 7) is not None
    found = store.events(0, 100, "task").events
    states = [
        msgspec.json.decode(event.data)["State"] if event.data else event.task.state.value
        for event in found
    ]
    assert states == ["NotStarted", "Running", "NotStarted", "Running"]
    assert [event.name for event in found] == [STATE] * 4
    assert msgspec.json.decode(found[1].data or b"") == msgspec.json.decode(
        msgspec.json.encode(begun.to_wire())
    )
    assert store.update("task", RUNNING, back) is None, "another run owns the task"
    assert len(store.events(0, 100, "task").events) == 4


def test_events_are_selected_by_group(store: TaskStore, add: Callable[..., None]) -> None:
    for task_id, group in (("one", "g"), ("two", "h"), ("three", "g"), ("four", None)):
        add(task_id, group)
        store.claim(task_id, "me", 1)
        store.add_events(task_id, RUNNING, sent("a"))
    in_group = ["NotStarted", "Running", "a"]
    assert summaries(store.events(0, 100, group="g").events) == [
        (t, n) for t in ("one", "three") for n in in_group
    ]
    assert {task_id for task_id, _ in summaries(store.events(0, 100).events)} == {
        "one",
        "two",
        "three",
    }
    assert (
        store.events(0, 100, group="other").events == []
        or not store.events(0, 100, group="other").events
    )
    assert store.events(0, 100, group="other").change == store.newest()


def test_events_are_paged(store: TaskStore, add: Callable[..., None]) -> None:
    for number in range(5):
        add(f"t{number}")
        store.claim(f"t{number}", "me", 1)
        store.add_events(f"t{number}", RUNNING, sent("a", "b"))
    whole = summaries(store.events(0, 1000).events)
    found: list[tuple[str, str]] = []
    since = 0
    while page := store.events(since, 3):
        found += summaries(page.events)
        if not page.events:
            break
        since = page.change
    assert found == whole and len(whole) == 20


def test_a_run_that_lost_its_task_cannot_add_events(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    store.claim("task", "me", 1)
    for expect in (Expect((State.RUNNING,), "me", 2), Expect((State.RUNNING,), "you", 1)):
        assert not store.add_events("task", expect, sent("a"))
    assert not store.add_events("other", RUNNING, sent("a"))
    assert summaries(store.events(0, 100).events) == [("task", "NotStarted"), ("task", "Running")]


def test_the_last_thousand_events_of_a_task_are_kept(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    add("other")
    for task_id in ("task", "other"):
        store.claim(task_id, "me", 1)
    assert store.add_events("other", RUNNING, sent("first"))
    for first in range(1, 1501, 50):
        assert store.add_events("task", RUNNING, sent(*["n"] * 50, first=first))
    found = [event for event in store.events(0, 5000, "task").events if event.name == "n"]
    assert MAX_EVENTS <= len(found) <= MAX_EVENTS + 100
    assert len(store.events(0, 100, "other").events) == 3


def changes_of(changes: Sequence[int] | None) -> list[int]:
    """Return the change numbers from `TaskStore.add_events`."""
    assert changes is not None
    return list(changes)


def test_events_that_are_already_stored_are_not_added_again(
    store: TaskStore, add: Callable[..., None]
) -> None:
    """A run retries if it does not know whether a write succeeded."""
    add()
    store.claim("task", "me", 1)
    since = store.newest()
    assert changes_of(store.add_events("task", RUNNING, sent("a", "b"))) == [since + 1, since + 2]
    assert changes_of(store.add_events("task", RUNNING, sent("a", "b"))) == []
    assert changes_of(store.add_events("task", RUNNING, sent("c", first=3))) == [since + 3]
    assert [event.name for event in store.events(0, 100).events[2:]] == ["a", "b", "c"]


def test_add_events_returns_the_change_numbers_of_the_events(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    store.claim("task", "me", 1)
    since = store.newest()
    changes = store.add_events("task", RUNNING, sent("a", "b"))
    assert changes is not None
    assert list(changes) == [since + 1, since + 2] and store.newest() == since + 2
    assert [event.change for event in store.events(since, 100).events] == list(changes)
    more = store.add_events("task", RUNNING, sent("a", "b", "c"))
    assert more is not None and list(more) == [since + 3], "only the numbers of new events"
    assert store.add_events("task", Expect((State.RUNNING,), epoch=2), sent("d", first=4)) is None
    assert store.newest() == since + 3


def test_events_are_deleted_with_their_task(
    store: TaskStore, add: Callable[..., None], make_task: NewTask
) -> None:
    add()
    store.claim("task", "me", 1)
    store.add_events("task", RUNNING, sent("a"))
    newest = store.newest()
    store.delete("task", Expect((State.RUNNING,)))
    add()
    assert summaries(store.events(0, 100).events) == [("task", "NotStarted")]
    assert store.events(0, 100).events[0].change > newest


@SHARED
def test_news_lists_tasks_with_new_view_events(
    store: SharedTaskStore, add: Callable[..., None]
) -> None:
    add()
    add("other")
    store.claim("task", "me", 1)
    since = store.newest()
    store.add_events("task", RUNNING, sent("a", "b"))
    news = store.changes_since(since)
    assert (list(news.sent), list(news.tasks), news.change) == (["task"], [], since + 2)
    assert list(store.changes_since(news.change).sent) == []


@SHARED
def test_events_written_while_news_are_read_are_reported(
    store: SharedTaskStore,
    add: Callable[..., None],
    make_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events are written between any two statements of ``news``, and later changes may already be
    in its result.
    """
    assert isinstance(store, SQLTaskStore)
    add()
    store.claim("task", "me", 1)
    fetch_all = store._database.fetch_all
    for write_before in range(3):
        since = store.newest()
        store.add(make_task(f"first-{write_before}"), b"", None, ())
        calls = 0

        def between(*statement: Any, write_before: int = write_before) -> Any:
            nonlocal calls
            if calls == write_before:
                store.add_events("task", RUNNING, [ViewEvent("step", b"1", write_before + 1)])
                store.add(make_task(f"then-{write_before}"), b"", None, ())
            calls += 1
            return fetch_all(*statement)

        monkeypatch.setattr(store._database, "fetch_all", between)
        news = store.changes_since(since)
        monkeypatch.undo()
        if calls <= write_before:
            break
        notified = [*news.sent, *store.changes_since(news.change).sent]
        assert "task" in notified
    assert write_before == 2, "there were two statements"


@pytest.mark.parametrize("task_id", [None, "task-0"])
def test_postgresql_reads_few_rows_for_events_before_it_has_statistics(
    postgresql_server: str, make_task: NewTask, task_id: str | None
) -> None:
    """In a new database, PostgreSQL would otherwise read the events of every task."""
    with new_postgresql_database(postgresql_server) as url:
        made: Any = make_store(url, "", "test", True)
        made.open()
        try:
            for number in range(60):
                made.add(make_task(f"task-{number}", sse_group="g"), b"", None, ())
            sql = made._sql.events_since(task_id is not None, False)
            newest = made.newest()
            values = {
                "ns": made._ns, "since": newest - 2, "newest": newest, "limit": 100,
                "task_id": task_id,
            }  # fmt: skip
            plan = [row[0] for row in made._database.fetch_all(f"EXPLAIN ANALYZE {sql}", values)]
        finally:
            made.close()
    reads = [
        int(found[1])
        for line in plan
        if " on asyncroute_" in line and (found := re.search(r"loops=(\d+)", line))
    ]
    assert reads and sum(reads) < 30, "\n".join(plan)


def test_a_repeated_write_with_more_events_adds_only_the_new_ones(
    store: TaskStore, add: Callable[..., None]
) -> None:
    """As when a commit succeeded but its response was lost. The run then sends all events again,
    and more.
    """
    add()
    store.claim("task", "me", 1)
    store.add_events("task", RUNNING, sent("a", "b"))
    before = store.events(0, 100)
    assert store.add_events("task", RUNNING, sent("a", "b", "c"))
    assert summaries(store.events(0, 100).events)[2:] == [
        ("task", "a"),
        ("task", "b"),
        ("task", "c"),
    ]
    assert summaries(store.events(before.change, 100).events) == [("task", "c")]
