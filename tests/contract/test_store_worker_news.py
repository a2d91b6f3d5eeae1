"""The changes that a worker needs if nobody waits in its process: `SharedTaskStore.news` with the
name of the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.stores.base import Expect, SharedTaskStore, ViewEvent
from flask_asyncroute.stores.sql import events as module
from flask_asyncroute.task import AsyncRouteTask, State

NewStore = Callable[..., SharedTaskStore]
NewTask = Callable[..., AsyncRouteTask]
Pair = tuple[SharedTaskStore, SharedTaskStore]
Change = Callable[[SharedTaskStore], Any]
T0 = 1_700_000_000_000_000
END: dict[str, Any] = {"state": State.COMPLETED, "completed_us": T0 + 9, "result_json": b"1"}
ABORT: dict[str, Any] = {"state": State.ABORTED, "completed_us": T0 + 9, "error": "x"}
REQUEUE: dict[str, Any] = {
    "state": State.NOT_STARTED, "owner": None, "started_us": None, "expires_us": None,
    "progress": None, "progress_message": None,
}  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest, make_task: NewTask) -> Pair:
    """Return the stores of two workers, "me" and "you", on one database.

    Each worker runs a task. The task "waiting" is NotStarted. The task "bound" waits in the queue of
    the worker "me", and only that worker can run it.
    """
    make: NewStore = request.getfixturevalue(f"make_{request.param}_store")
    mine, yours = make(), make()
    for store in (mine, yours):
        store.open()
    for task_id in ("of-me", "of-you", "waiting"):
        mine.add(make_task(task_id, on_loss="restart", sse_group="g"), b"", None, ())
    mine.add(make_task("bound", owner="me"), b"", None, ())
    assert mine.claim("of-me", "me", T0) is not None
    assert yours.claim("of-you", "you", T0) is not None
    return mine, yours


def update(task_id: str, owner: str | None, values: dict[str, Any]) -> Change:
    """Return a change of a task that has this owner."""
    states = tuple(State)
    return lambda store: store.update(task_id, Expect(states, owner), values)


def take_over(store: SharedTaskStore) -> Any:
    """Requeue the task of the worker "me" and run it again, as if that worker were dead."""
    assert update("of-me", "me", REQUEUE)(store) is not None
    return store.claim("of-me", "you", T0 + 5)


def add_events(store: SharedTaskStore) -> Any:
    return store.add_events("of-you", Expect((State.RUNNING,), "you", 1), [ViewEvent("e", b"1", 1)])


NEEDED: dict[str, tuple[str, Change]] = {
    "a stop of its run": ("of-me", update("of-me", "me", {**ABORT, "stopping": True})),
    "a run of another worker that completed": ("of-you", update("of-you", "you", END)),
    "a run of another worker that was stopped": (
        "of-you",
        update("of-you", "you", {**ABORT, "stopping": True}),
    ),
    "its run that was requeued": ("of-me", update("of-me", "me", REQUEUE)),
    "its run that another worker has taken over": ("of-me", take_over),
    "a waiting task that was aborted": ("waiting", update("waiting", None, ABORT)),
    "its run that another worker aborted because it seemed dead": (
        "of-me",
        update("of-me", "me", {**ABORT, "error": "Worker lost"}),
    ),
    "a task in its queue that was aborted": ("bound", update("bound", "me", ABORT)),
}
NOT_NEEDED: dict[str, Change] = {
    "a claim by another worker": lambda store: store.claim("waiting", "you", T0),
    "a claim by itself": lambda store: store.claim("waiting", "me", T0),
    "progress of another worker": update("of-you", "you", {"progress": 5.0}),
    "its own progress": update("of-me", "me", {"progress": 5.0}),
    "events of a view": add_events,
    "its own end": update("of-me", "me", END),
}


@pytest.mark.parametrize("name", NEEDED)
def test_news_for_a_worker_contains(pair: Pair, name: str) -> None:
    task_id, change = NEEDED[name]
    mine, yours = pair
    since = mine.newest()
    assert change(yours)
    news = mine.changes_since(since, "me")
    assert list(news.tasks) == [mine.get(task_id)]
    assert (news.change, list(news.sent)) == (mine.newest(), [])


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_news_for_a_worker_omits(pair: Pair, name: str) -> None:
    mine, yours = pair
    since = mine.newest()
    assert NOT_NEEDED[name](yours)
    news = mine.changes_since(since, "me")
    assert (list(news.tasks), list(news.sent)) == ([], [])
    assert news.change == mine.newest() > since, "omitted changes are not read again"
    all_news = mine.changes_since(since)
    assert all_news.tasks or all_news.sent, "without the worker, the change is included"


def test_news_for_a_worker_omits_new_tasks(pair: Pair, make_task: NewTask) -> None:
    mine, yours = pair
    since = mine.newest()
    yours.add(make_task("new"), b"", None, ())
    assert list(mine.changes_since(since, "me").tasks) == []
    assert [task.id for task in mine.changes_since(since).tasks] == ["new"]


def test_news_for_a_worker_contains_only_later_changes_in_order(
    pair: Pair, make_task: NewTask
) -> None:
    mine, yours = pair
    NEEDED["a run of another worker that completed"][1](yours)
    yours.add(make_task("between"), b"", None, ())
    NEEDED["a stop of its run"][1](yours)
    news = mine.changes_since(0, "me")
    assert [task.id for task in news.tasks] == ["of-you", "of-me"]
    assert list(mine.changes_since(news.change, "me").tasks) == []
    first = news.tasks[0].change
    assert [task.id for task in mine.changes_since(first, "me").tasks] == ["of-me"]


def test_news_for_a_worker_are_paged(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, yours = pair
    monkeypatch.setattr(module, "CHANGES_PAGE", 1)
    since = mine.newest()
    NEEDED["a run of another worker that completed"][1](yours)
    NEEDED["a stop of its run"][1](yours)
    found: list[str] = []
    while (news := mine.changes_since(since, "me")).tasks:
        found += [task.id for task in news.tasks]
        assert news.change > since
        since = news.change
    assert found == ["of-you", "of-me"]


def test_news_for_a_worker_contains_everything_needed_after_a_restore(pair: Pair) -> None:
    """The newest change number is lower than one that this process has already read."""
    mine, yours = pair
    NEEDED["a stop of its run"][1](yours)
    news = mine.changes_since(mine.newest() + 50, "me")
    assert [task.id for task in news.tasks] == ["of-me"]
    assert news.change == mine.newest()
