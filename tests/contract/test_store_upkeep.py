"""The port of stores, what watchers, housekeepers and runners ask for: waiting, outlived, news."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flask_asyncroute.states import TERMINAL, UNFINISHED, State
from flask_asyncroute.stores.base import Expect, TaskStore
from flask_asyncroute.task import AsyncRouteTask

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
SECOND = 1_000_000
ALL = 10**9


def finish(store: TaskStore, task_id: str, state: State, at_us: int, stopping: bool = False) -> None:
    values = {"state": state, "completed_us": at_us, "stopping": stopping}
    assert store.update(task_id, Expect(tuple(UNFINISHED)), values) is not None


def test_waiting_gives_the_oldest_first(store: TaskStore, make_task: NewTask) -> None:
    """Whichever was stored first: a request that took longer to arrive is not older for it."""
    for number in (3, 1, 4, 2):
        store.add(make_task(f"t{number}", created_us=T0 + number), b"", None, ())
    assert store.waiting({"work": ALL}, T0 + 10) == [(f"t{number}", "work") for number in (1, 2, 3, 4)]
    assert store.waiting({"work": 2}, T0 + 10) == [("t1", "work"), ("t2", "work")]


def test_waiting_gives_what_is_older_than_asked(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(created_us=T0), b"", None, ())
    assert store.waiting({"work": ALL}, T0) == []
    assert store.waiting({"work": ALL}, T0 + 1) == [("task", "work")]


def test_waiting_gives_the_endpoints_asked_for(store: TaskStore, make_task: NewTask) -> None:
    for number, endpoint in enumerate(["a", "b", "a", "c"]):
        store.add(make_task(f"t{number}", endpoint=endpoint, created_us=T0 + number), b"", None, ())
    assert store.waiting({"a": ALL}, ALL * ALL) == [("t0", "a"), ("t2", "a")]
    assert store.waiting({"b": ALL, "c": ALL}, ALL * ALL) == [("t1", "b"), ("t3", "c")]
    assert store.waiting({}, ALL * ALL) == []
    # The limit counts what fits, not what was looked at.
    assert store.waiting({"c": 1}, ALL * ALL) == [("t3", "c")]


def test_waiting_leaves_out_what_was_claimed_or_has_ended(store: TaskStore, make_task: NewTask) -> None:
    for name in ("waits", "runs", "aborted"):
        store.add(make_task(name), b"", None, ())
    store.claim("runs", "me", T0)
    finish(store, "aborted", State.ABORTED, T0)
    assert store.waiting({"work": ALL}, ALL * ALL) == [("waits", "work")]


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_f34_retention_counts_from_the_end(store: TaskStore, make_task: NewTask, state: State) -> None:
    store.add(make_task(retention_us=SECOND), b"", None, ())
    store.claim("task", "me", T0 + 100 * SECOND)
    finish(store, "task", state, T0 + 200 * SECOND)
    assert store.outlived(T0 + 201 * SECOND, ALL) == []
    assert store.outlived(T0 + 201 * SECOND + 1, ALL) == ["task"]


def test_f34_an_unfinished_task_is_never_outlived(store: TaskStore, make_task: NewTask) -> None:
    for name in ("waits", "runs"):
        store.add(make_task(name, retention_us=0), b"", None, ())
    store.claim("runs", "me", T0)
    store.update("runs", Expect((State.RUNNING,)), {"progress": 1.0})
    assert store.outlived(ALL * ALL, ALL) == []


def test_outlived_leaves_what_still_runs(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(retention_us=0), b"", None, ())
    store.claim("task", "me", T0)
    finish(store, "task", State.ABORTED, T0, stopping=True)
    assert store.outlived(ALL * ALL, ALL) == []
    store.update("task", Expect((State.ABORTED,)), {"stopping": False})
    assert store.outlived(ALL * ALL, ALL) == ["task"]


def test_outlived_counts_from_an_end_that_was_put_right(store: TaskStore, make_task: NewTask) -> None:
    """A clock that was set back between start and end does not shorten the retention."""
    store.add(make_task(retention_us=SECOND), b"", None, ())
    store.claim("task", "me", T0 + 100 * SECOND)
    finish(store, "task", State.COMPLETED, T0)
    assert store.outlived(T0 + 101 * SECOND, ALL) == []
    assert store.outlived(T0 + 101 * SECOND + 1, ALL) == ["task"]


def test_outlived_comes_in_pages(store: TaskStore, make_task: NewTask) -> None:
    for number in range(5):
        store.add(make_task(f"t{number}", retention_us=0), b"", None, ())
        finish(store, f"t{number}", State.ABORTED, T0 + number)
    found = []
    while page := store.outlived(ALL * ALL, 2):
        found += page
        assert len(page) <= 2
        for task_id in page:
            assert store.delete(task_id, Expect(tuple(TERMINAL)))
    assert sorted(found) == [f"t{number}" for number in range(5)]


def test_news_is_what_was_written_after(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("before"), b"", None, ())
    since = store.news(-1).change
    assert list(store.news(since).tasks) == []
    assert store.news(since).change == since
    store.add(make_task("one"), b"", None, ())
    store.add(make_task("two"), b"", None, ())
    store.claim("one", "me", T0)
    news = store.news(since)
    assert [task.id for task in news.tasks] == ["two", "one"], "oldest change first, each task once"
    assert news.tasks[-1] == store.get("one")
    assert news.change == since + 3 == news.tasks[-1].change
    later = store.news(news.change)
    assert (later.change, list(later.tasks)) == (news.change, [])


def test_a_first_look_at_the_news_tells_where_they_begin(store: TaskStore, make_task: NewTask) -> None:
    """As a watcher begins: what was there before is no news, however many tasks that are."""
    store.add(make_task(), b"", None, ())
    news = store.news(-1)
    assert (news.change, list(news.tasks)) == (1, [])


def test_news_can_be_asked_for_again(store: TaskStore, make_task: NewTask) -> None:
    """Whoever asks with an older number gets everything after it, though nothing was written since the last call."""
    for name in ("one", "two"):
        store.add(make_task(name), b"", None, ())
    for since in (0, 1, 2, 1, 0):
        news = store.news(since)
        assert news.change == 2, since
        assert [task.id for task in news.tasks] == ["one", "two"][since:], since


def test_a_removed_task_is_no_news_but_a_change(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("stays"), b"", None, ())
    store.add(make_task("goes"), b"", None, ())
    since = store.news(-1).change
    store.delete("goes", Expect(tuple(State)))
    news = store.news(since)
    assert (news.change, list(news.tasks)) == (since + 1, [])


def test_news_of_very_many_tasks_comes_whole(store: TaskStore, make_task: NewTask) -> None:
    """A reader that goes on from the number that it was given misses nothing and gets nothing twice."""
    count = 2500
    since = store.news(-1).change
    for number in range(count):
        store.add(make_task(f"t{number}"), b"", None, ())
    found: list[str] = []
    for _ in range(count):
        news = store.news(since)
        assert all(task.change > since for task in news.tasks)
        if not news.tasks:
            break
        found += [task.id for task in news.tasks]
        since = news.change
    assert found == [f"t{number}" for number in range(count)]


def test_upkeep_can_be_done_at_any_time(store: TaskStore, make_task: NewTask) -> None:
    store.tend()
    store.add(make_task(), b"", None, ())
    store.tend()
    assert store.get("task") is not None
