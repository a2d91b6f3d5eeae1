"""What background threads read from every store: waiting tasks, tasks past their retention and changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.stores.base import AHEAD_US, Expect, SharedTaskStore, TaskStore
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.task import TERMINAL, UNFINISHED, AsyncRouteTask, State
from tests.support.databases import SHARED
from tests.support.tasks import pairs

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
SECOND = 1_000_000
ALL = 10**9


def finish(
    store: TaskStore, task_id: str, state: State, at_us: int, stopping: bool = False
) -> None:
    values = {"state": state, "completed_us": at_us, "stopping": stopping}
    assert store.update(task_id, Expect(tuple(UNFINISHED)), values) is not None


@SHARED
def test_waiting_returns_the_oldest_tasks_first(store: SharedTaskStore, make_task: NewTask) -> None:
    """By creation time. The order in which they were stored does not matter."""
    for number in (3, 1, 4, 2):
        store.add(make_task(f"t{number}", created_us=T0 + number), b"", None, ())
    assert pairs(store.waiting({"work": ALL}, T0 + 10)) == [
        (f"t{number}", "work") for number in (1, 2, 3, 4)
    ]
    assert pairs(store.waiting({"work": 2}, T0 + 10)) == [("t1", "work"), ("t2", "work")]


@SHARED
def test_waiting_returns_only_tasks_created_before_the_given_time(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    store.add(make_task(created_us=T0), b"", None, ())
    assert pairs(store.waiting({"work": ALL}, T0)) == []
    assert pairs(store.waiting({"work": ALL}, T0 + 1)) == [("task", "work")]


@SHARED
def test_waiting_returns_only_the_requested_endpoints(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    for number, endpoint in enumerate(["a", "b", "a", "c"]):
        store.add(make_task(f"t{number}", endpoint=endpoint, created_us=T0 + number), b"", None, ())
    assert pairs(store.waiting({"a": ALL}, ALL * ALL)) == [("t0", "a"), ("t2", "a")]
    assert pairs(store.waiting({"b": ALL, "c": ALL}, ALL * ALL)) == [("t1", "b"), ("t3", "c")]
    assert pairs(store.waiting({}, ALL * ALL)) == []
    # The limit counts matching tasks, not rows that were read.
    assert pairs(store.waiting({"c": 1}, ALL * ALL)) == [("t3", "c")]


@SHARED
def test_waiting_omits_claimed_and_ended_tasks(store: SharedTaskStore, make_task: NewTask) -> None:
    for name in ("waits", "runs", "aborted"):
        store.add(make_task(name), b"", None, ())
    store.claim("runs", "me", T0)
    finish(store, "aborted", State.ABORTED, T0)
    assert pairs(store.waiting({"work": ALL}, ALL * ALL)) == [("waits", "work")]


@pytest.mark.covers("F34")
@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_retention_counts_from_the_end(store: TaskStore, make_task: NewTask, state: State) -> None:
    store.add(make_task(retention_us=SECOND), b"", None, ())
    store.claim("task", "me", T0 + 100 * SECOND)
    finish(store, "task", state, T0 + 200 * SECOND)
    assert store.past_retention(T0 + 201 * SECOND, ALL) == []
    assert store.past_retention(T0 + 201 * SECOND + 1, ALL) == ["task"]


@pytest.mark.covers("F34")
def test_an_unfinished_task_is_never_past_its_retention(
    store: TaskStore, make_task: NewTask
) -> None:
    for name in ("waits", "runs"):
        store.add(make_task(name, retention_us=0), b"", None, ())
    store.claim("runs", "me", T0)
    store.update("runs", Expect((State.RUNNING,)), {"progress": 1.0})
    assert store.past_retention(ALL * ALL, ALL) == []


def test_past_retention_omits_tasks_that_are_stopping(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(retention_us=0), b"", None, ())
    store.claim("task", "me", T0)
    finish(store, "task", State.ABORTED, T0, stopping=True)
    assert store.past_retention(ALL * ALL, ALL) == []
    store.update("task", Expect((State.ABORTED,)), {"stopping": False})
    assert store.past_retention(ALL * ALL, ALL) == ["task"]


def test_retention_counts_from_the_corrected_end_time(store: TaskStore, make_task: NewTask) -> None:
    """A clock set back between start and end does not shorten the retention."""
    store.add(make_task(retention_us=SECOND), b"", None, ())
    store.claim("task", "me", T0 + 100 * SECOND)
    finish(store, "task", State.COMPLETED, T0)
    assert store.past_retention(T0 + 101 * SECOND, ALL) == []
    assert store.past_retention(T0 + 101 * SECOND + 1, ALL) == ["task"]


def late(store: TaskStore, now_us: int, limit: int = ALL, owner: str = "me") -> list[str]:
    return [task.id for task in store.not_started_in_time(now_us, owner, limit)]


def test_tasks_not_started_in_time_are_returned_the_earliest_first(
    store: TaskStore, make_task: NewTask
) -> None:
    for number in (3, 1, 4, 2):
        store.add(make_task(f"t{number}", start_by_us=T0 + number), b"", None, ())
    store.add(make_task("without a limit"), b"", None, ())
    assert late(store, T0) == []
    assert late(store, T0 + 1) == ["t1"]
    assert late(store, T0 + 9) == ["t1", "t2", "t3", "t4"]
    assert late(store, T0 + 9, limit=2) == ["t1", "t2"]
    found = store.not_started_in_time(T0 + 9, "me", 1)
    assert found == [store.get("t1")]


def test_a_task_that_was_claimed_in_time_is_never_late(
    store: TaskStore, make_task: NewTask
) -> None:
    """Not after its restart either, because the requeue clears the limit."""
    store.add(make_task(start_by_us=T0 + SECOND), b"", None, ())
    assert store.claim("task", "me", T0) is not None
    assert late(store, ALL * ALL) == []
    values = {"state": State.NOT_STARTED, "owner": None, "started_us": None, "start_by_us": None}
    assert store.update("task", Expect((State.RUNNING,)), values) is not None
    assert late(store, ALL * ALL) == []
    assert store.claim("task", "me", T0 + 60 * SECOND) is not None


def test_a_task_whose_claim_was_undone_can_be_late(store: TaskStore, make_task: NewTask) -> None:
    limit = T0 + SECOND
    store.add(make_task(start_by_us=limit), b"", None, ())
    assert store.claim("task", "me", T0) is not None
    values = {
        "state": State.NOT_STARTED, "owner": None, "started_us": None, "start_by_us": limit,
    }  # fmt: skip
    assert store.update("task", Expect((State.RUNNING,)), values) is not None
    assert late(store, limit - 1) == []
    assert late(store, limit) == ["task"]
    assert store.claim("task", "me", limit) is None


def test_an_ended_or_deleted_task_is_not_late(store: TaskStore, make_task: NewTask) -> None:
    for name in ("stopped", "deleted"):
        store.add(make_task(name, start_by_us=T0 + 1), b"", None, ())
    finish(store, "stopped", State.ABORTED, T0)
    assert store.delete("deleted", Expect((State.NOT_STARTED,))) == "work"
    assert late(store, ALL * ALL) == []


def test_a_late_task_that_only_one_process_can_run_is_returned_to_that_process(
    store: TaskStore, make_task: NewTask
) -> None:
    for owner in (None, "me", "other"):
        store.add(make_task(f"of {owner}", owner=owner, start_by_us=T0 + 1), b"", None, ())
    assert sorted(late(store, T0 + 1)) == ["of None", "of me"]
    assert sorted(late(store, T0 + 1, owner="other")) == ["of None", "of other"]
    assert late(store, T0 + 1, limit=1, owner="third") == ["of None"]


def test_late_tasks_of_other_namespaces_are_not_returned(
    make_sqlite_store: Callable[..., TaskStore], make_task: NewTask
) -> None:
    one, two = make_sqlite_store("one"), make_sqlite_store("two")
    for store in (one, two):
        store.open()
    one.add(make_task(start_by_us=T0), b"", None, ())
    assert late(one, T0) == ["task"]
    assert late(two, T0) == []


def test_past_retention_is_paged(store: TaskStore, make_task: NewTask) -> None:
    for number in range(5):
        store.add(make_task(f"t{number}", retention_us=0), b"", None, ())
        finish(store, f"t{number}", State.ABORTED, T0 + number)
    found = []
    while page := store.past_retention(ALL * ALL, 2):
        found += page
        assert len(page) <= 2
        for task_id in page:
            assert store.delete(task_id, Expect(tuple(TERMINAL)))
    assert sorted(found) == [f"t{number}" for number in range(5)]


@SHARED
def test_news_returns_everything_if_the_change_number_went_back(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    """As after the restore of a database, or a failover to an outdated replica."""
    store.add(make_task("one"), b"", None, ())
    newest = store.newest()
    news = store.changes_since(newest + 50)
    assert ([task.id for task in news.tasks], news.change) == (["one"], newest)
    assert list(store.changes_since(news.change).tasks) == []


@SHARED
def test_news_returns_later_changes(store: SharedTaskStore, make_task: NewTask) -> None:
    store.add(make_task("before"), b"", None, ())
    since = store.newest()
    assert list(store.changes_since(since).tasks) == []
    assert store.changes_since(since).change == since
    store.add(make_task("one"), b"", None, ())
    store.add(make_task("two"), b"", None, ())
    store.claim("one", "me", T0)
    news = store.changes_since(since)
    assert [task.id for task in news.tasks] == ["two", "one"], "oldest change first, each task once"
    assert news.tasks[-1] == store.get("one")
    assert news.change == since + 3 == news.tasks[-1].change
    later = store.changes_since(news.change)
    assert (later.change, list(later.tasks)) == (news.change, [])


@SHARED
def test_a_first_news_returns_only_the_change_number(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    """As when polling begins. Earlier changes are not reported, however many there are."""
    store.add(make_task(), b"", None, ())
    news = store.changes_since(-1)
    assert (news.change, list(news.tasks)) == (store.newest(), [])


@SHARED
def test_news_can_be_repeated_with_an_older_number(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    """An older number returns all changes after it, even if nothing was written since the last
    call.
    """
    before = store.newest()
    for name in ("one", "two"):
        store.add(make_task(name), b"", None, ())
    for since in (0, 1, 2, 1, 0):
        news = store.changes_since(before + since)
        assert news.change == before + 2, since
        assert [task.id for task in news.tasks] == ["one", "two"][since:], since


@SHARED
def test_a_deleted_task_increases_the_change_number_only(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    store.add(make_task("stays"), b"", None, ())
    store.add(make_task("goes"), b"", None, ())
    since = store.newest()
    store.delete("goes", Expect(tuple(State)))
    news = store.changes_since(since)
    assert (news.change, list(news.tasks)) == (since + 1, [])


@SHARED
def test_changes_of_many_tasks_are_complete(store: SharedTaskStore, make_task: NewTask) -> None:
    """A reader that continues from the returned number misses no task and gets none twice."""
    count = 2500
    since = store.newest()
    for number in range(count):
        store.add(make_task(f"t{number}"), b"", None, ())
    found: list[str] = []
    for _ in range(count):
        news = store.changes_since(since)
        assert all(task.change > since for task in news.tasks)
        if not news.tasks:
            break
        found += [task.id for task in news.tasks]
        since = news.change
    assert found == [f"t{number}" for number in range(count)]


@SHARED
def test_tend_can_be_called_at_any_time(store: SharedTaskStore, make_task: NewTask) -> None:
    store.maintain()
    store.add(make_task(), b"", None, ())
    store.maintain()
    assert store.get("task") is not None


@SHARED
def test_waiting_of_more_endpoints_than_one_statement_reads(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    for number in range(250):
        store.add(
            make_task(f"t{number}", endpoint=f"e{number}", created_us=T0 + number), b"", None, ()
        )
    limits = {f"e{number}": 1 for number in reversed(range(250))}
    expected = [(f"t{number}", f"e{number}") for number in range(250)]
    assert pairs(store.waiting(limits, T0 + 1000)) == expected


@SHARED
def test_waiting_includes_tasks_created_before_the_clock_was_set_back(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    store.add(make_task("far", created_us=T0 + AHEAD_US + 10), b"", None, ())
    store.add(make_task("soon", created_us=T0 + 10), b"", None, ())
    store.add(make_task("old", created_us=T0 - 10), b"", None, ())
    assert pairs(store.waiting({"work": 9}, T0)) == [("old", "work"), ("far", "work")]
    assert pairs(store.waiting({"work": 1}, T0)) == [("old", "work")]


@SHARED
def test_waiting_without_a_creation_time_returns_only_delayed_tasks(
    store: SharedTaskStore, make_task: NewTask
) -> None:
    store.add(make_task("new", created_us=T0), b"", None, ())
    for number in (3, 1, 2):
        store.add(make_task(f"t{number}", created_us=T0, start_at_us=T0 + number), b"", None, ())
    found = store.waiting({"work": 9}, None, T0 + 3)
    assert [(task.id, task.due_us) for task in found] == [("t1", T0 + 1), ("t2", T0 + 2)]
    assert pairs(store.waiting({"work": 1}, None, T0 + 9)) == [("t1", "work")]
    assert store.waiting({"work": 9}, None) == []


def test_a_poll_without_waiting_tasks_is_one_statement(
    make_sqlite_store: Callable[..., SharedTaskStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_sqlite_store()
    store.open()
    assert isinstance(store, SQLTaskStore)
    fetch, statements = store._database.fetch_all, []

    def fetch_all(sql: str, values: Any) -> Any:
        statements.append(sql)
        return fetch(sql, values)

    monkeypatch.setattr(store._database, "fetch_all", fetch_all)
    assert pairs(store.waiting({f"e{number}": 1 for number in range(500)}, T0)) == []
    assert len(statements) == 1
