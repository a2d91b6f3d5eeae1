"""Changes that this process has made itself, and need not read again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flask_asyncroute.stores.base import Expect, SharedTaskStore, ViewEvent
from flask_asyncroute.task import AsyncRouteTask, State

NewStore = Callable[..., SharedTaskStore]
NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
RUNNING = Expect((State.RUNNING,), epoch=1)


def ids(store: SharedTaskStore, since: int, known: int) -> list[str]:
    return [task.id for task in store.news(since, known).tasks]


@pytest.fixture(params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest) -> tuple[SharedTaskStore, SharedTaskStore]:
    """Give two stores on one database, as two processes have them."""
    make: NewStore = request.getfixturevalue(f"make_{request.param}_store")
    one, two = make(), make()
    one.open()
    two.open()
    one.news(-1)
    return one, two


def test_own_changes_are_left_out_once_they_are_known(
    make_sqlite_store: NewStore, make_task: NewTask
) -> None:
    store = make_sqlite_store()
    store.open()
    since = store.news(-1).change
    store.add(make_task("a"), b"", None, ())
    known = store.newest()
    assert ids(store, since, known - 1) == ["a"]
    store.add(make_task("b"), b"", None, ())
    known = store.newest()
    news = store.news(since + 1, known)
    assert (news.change, list(news.tasks)) == (known, [])


def test_events_have_change_numbers(make_sqlite_store: NewStore, make_task: NewTask) -> None:
    store = make_sqlite_store()
    store.open()
    store.add(make_task(), b"", None, ())
    store.claim("task", "me", T0)
    since = store.news(-1).change
    known = store.add_events(
        "task", RUNNING, [ViewEvent("step", b"1", 1), ViewEvent("step", b"2", 2)]
    )
    assert known == since + 2 == store.newest()
    assert store.add_events("task", RUNNING, [ViewEvent("step", b"2", 2)]) == known
    assert (
        store.add_events("task", Expect((State.RUNNING,), epoch=2), [ViewEvent("x", b"1", 1)])
        is None
    )
    assert not store.news(since, known).sent


def test_a_change_of_another_process_between_own_ones_is_read(
    pair: tuple[SharedTaskStore, SharedTaskStore], make_task: NewTask
) -> None:
    one, two = pair
    since = one.newest()
    one.add(make_task("a"), b"", None, ())
    two.add(make_task("b"), b"", None, ())
    one.add(make_task("c"), b"", None, ())
    assert "b" in ids(one, since, one.newest())


def test_a_change_of_another_process_after_own_ones_is_read(
    pair: tuple[SharedTaskStore, SharedTaskStore], make_task: NewTask
) -> None:
    one, two = pair
    one.add(make_task("a"), b"", None, ())
    known = one.newest()
    since = one.news(0, known).change
    two.add(make_task("b"), b"", None, ())
    assert ids(one, since, known) == ["b"]
    since = one.newest()
    two.update("b", Expect((State.NOT_STARTED,)), {"progress": 1.0})
    one.add(make_task("c"), b"", None, ())
    assert "b" in ids(one, since, one.newest())
