"""Checks in the transaction that adds a task, apart from its id: idempotency keys, unique keys and
quotas.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute.errors import IdTaken, KeyTaken, TooManyTasks, UniqueTaken
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.snapshot import Body
from flask_asyncroute.stores.base import Expect, StartKey, TaskStore
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.task import TERMINAL, AsyncRouteTask, State

NewTask = Callable[..., AsyncRouteTask]
CREATED = 1_700_000_000_000_000
KEY = StartKey("k" * 64, "f" * 64)
UNIQUE = "u" * 64
ENDS = [
    {"state": State.COMPLETED, "completed_us": CREATED + 2},
    {"state": State.FAILED, "completed_us": CREATED + 2, "error": "ValueError"},
    {"state": State.ABORTED, "completed_us": CREATED + 2, "error": "Timeout", "stopping": True},
]
ANY_STATE = Expect(tuple(State))


def all_ids(store: TaskStore) -> list[str]:
    return sorted(task.id for task in store.query((), NEWEST_FIRST, 500, None, None))


def found_with(store: TaskStore, key: StartKey) -> tuple[str, str] | None:
    found = store.started_with(key.name)
    return None if found is None else (found[0].id, found[1])


@pytest.fixture
def other_store(store: TaskStore, request: pytest.FixtureRequest) -> TaskStore:
    """Return a second store with another namespace in the same database. A memory store has only
    one namespace.
    """
    kind = request.node.callspec.params["store"]
    if kind == "memory":
        pytest.skip("a memory store has one namespace")
    other: TaskStore = request.getfixturevalue(f"make_{kind}_store")("other")
    other.open()
    return other


# Idempotency keys


def test_a_key_returns_the_current_record_of_its_task(store: TaskStore, make_task: NewTask) -> None:
    assert store.started_with(KEY.name) is None
    store.add(make_task("a", user="anna"), b"{}", None, [("groups", "g")], KEY)
    assert store.started_with(KEY.name) == (store.get("a"), KEY.fingerprint)
    store.claim("a", "me", CREATED)
    found = store.started_with(KEY.name)
    assert found is not None and found[0].state is State.RUNNING
    assert store.started_with("x" * 64) is None


@pytest.mark.parametrize("fingerprint", [KEY.fingerprint, "other"])
def test_a_second_task_with_the_same_key_is_refused(
    store: TaskStore, make_task: NewTask, fingerprint: str
) -> None:
    store.add(make_task("a"), b"{}", None, (), KEY)
    body = Body([b"data"])
    with pytest.raises(KeyTaken):
        store.add(
            make_task("b", body_size=4),
            b"{}",
            body,
            [("groups", "g")],
            StartKey(KEY.name, fingerprint),
        )
    assert body.open().read() == b"data"
    body.close()
    assert all_ids(store) == ["a"]
    assert found_with(store, KEY) == ("a", KEY.fingerprint)


@pytest.mark.parametrize("end", ENDS)
def test_a_key_is_deleted_with_its_task(
    store: TaskStore, make_task: NewTask, end: dict[str, Any]
) -> None:
    store.add(make_task("a"), b"{}", None, (), KEY)
    store.claim("a", "me", CREATED)
    store.update("a", ANY_STATE, end)
    assert found_with(store, KEY) == ("a", KEY.fingerprint)
    assert store.delete("a", Expect((State.NOT_STARTED,))) is None
    assert found_with(store, KEY) == ("a", KEY.fingerprint)
    assert store.delete("a", Expect(tuple(TERMINAL))) == "work"
    assert store.started_with(KEY.name) is None
    store.add(make_task("b"), b"{}", None, (), KEY)
    assert found_with(store, KEY) == ("b", KEY.fingerprint)


def test_deleting_a_task_keeps_the_keys_of_others(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("a"), b"{}", None, (), KEY)
    store.add(make_task("b"), b"{}", None, ())
    store.add(make_task("c"), b"{}", None, (), StartKey("c" * 64, "f"))
    store.delete("b", ANY_STATE)
    store.delete("c", ANY_STATE)
    assert found_with(store, KEY) == ("a", KEY.fingerprint)


def test_a_refused_start_leaves_no_key(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("a", user="anna"), b"{}", None, ())
    with pytest.raises(IdTaken):
        store.add(make_task("a", user="anna"), b"{}", None, (), KEY)
    with pytest.raises(TooManyTasks):
        store.add(make_task("b", user="anna"), b"{}", None, (), KEY, quota=1)
    assert store.started_with(KEY.name) is None


def test_a_key_is_checked_before_the_quota(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("a", user="anna"), b"{}", None, (), KEY, 1)
    with pytest.raises(KeyTaken):
        store.add(make_task("b", user="anna"), b"{}", None, (), KEY, 1)


def test_a_key_belongs_to_one_namespace(
    store: TaskStore, other_store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("a"), b"{}", None, (), KEY)
    assert other_store.started_with(KEY.name) is None
    other_store.add(make_task("a"), b"{}", None, (), KEY)
    other_store.delete("a", ANY_STATE)
    assert found_with(store, KEY) == ("a", KEY.fingerprint)


# Unique keys


def holder(store: TaskStore) -> str | None:
    """Return the id of the unfinished task with the key `UNIQUE`."""
    found = store.started_with(UNIQUE)
    return None if found is None else found[0].id


def test_a_unique_key_returns_the_current_record_of_its_task(
    store: TaskStore, make_task: NewTask
) -> None:
    assert store.started_with(UNIQUE) is None
    store.add(make_task("a", unique_key=UNIQUE, user="anna"), b"{}", None, [("groups", "g")], KEY)
    assert store.started_with(UNIQUE) == (store.get("a"), "")
    assert store.started_with(KEY.name) == (store.get("a"), KEY.fingerprint)
    claim = store.claim("a", "me", CREATED)
    assert claim is not None and store.started_with(UNIQUE) == (claim.task, "")
    assert claim.task.unique_key == UNIQUE


def test_a_second_task_with_the_same_unique_key_is_refused(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("a", unique_key=UNIQUE), b"{}", None, ())
    body = Body([b"data"])
    again = make_task("b", unique_key=UNIQUE, body_size=4)
    with pytest.raises(UniqueTaken):
        store.add(again, b"{}", body, [("groups", "g")], KEY, 5)
    assert body.open().read() == b"data"
    body.close()
    assert all_ids(store) == ["a"]
    assert store.started_with(KEY.name) is None
    store.add(make_task("c", unique_key="v" * 64), b"{}", None, ())


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("is_started", [True, False])
def test_the_end_of_a_task_releases_its_unique_key(
    store: TaskStore, make_task: NewTask, end: dict[str, Any], is_started: bool
) -> None:
    store.add(make_task("a", unique_key=UNIQUE, user="anna"), b"{}", None, (), KEY, 5)
    if is_started:
        store.claim("a", "me", CREATED)
    ended = store.update("a", ANY_STATE, end)
    assert ended is not None and ended.unique_key == UNIQUE
    assert store.started_with(UNIQUE) is None
    assert found_with(store, KEY) == ("a", KEY.fingerprint), "it is kept as long as the task"
    store.add(make_task("b", unique_key=UNIQUE), b"{}", None, ())
    # Later changes of the first task do not release the key of the second.
    if end.get("stopping"):
        assert store.update("a", Expect(tuple(TERMINAL)), {"stopping": False}) is not None
    assert holder(store) == "b"
    assert store.delete("a", ANY_STATE) == "work"
    assert holder(store) == "b"
    assert store.started_with(KEY.name) is None


def test_an_update_that_expects_another_state_keeps_the_unique_key(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("a", unique_key=UNIQUE), b"{}", None, ())
    assert store.update("a", Expect((State.RUNNING,)), ENDS[0]) is None
    assert holder(store) == "a"


def test_a_task_that_is_run_again_keeps_its_unique_key(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("a", unique_key=UNIQUE), b"{}", None, ())
    for epoch in (1, 2):
        assert store.claim("a", "me", CREATED) is not None
        assert store.update("a", Expect((State.RUNNING,), "me", epoch), {"progress": 5.0})
        assert store.update("a", ANY_STATE, {"state": State.NOT_STARTED, "owner": None})
        assert holder(store) == "a"
        with pytest.raises(UniqueTaken):
            store.add(make_task("b", unique_key=UNIQUE), b"{}", None, ())


@pytest.mark.parametrize("state", [State.NOT_STARTED, State.RUNNING])
def test_deleting_an_unfinished_task_releases_its_unique_key(
    store: TaskStore, make_task: NewTask, state: State
) -> None:
    store.add(make_task("a", unique_key=UNIQUE), b"{}", None, (), KEY)
    if state is State.RUNNING:
        store.claim("a", "me", CREATED)
    assert store.delete("a", Expect((state,))) == "work"
    assert store.started_with(UNIQUE) is None
    store.add(make_task("a", unique_key=UNIQUE), b"{}", None, (), KEY)
    assert holder(store) == "a"


def test_a_refused_start_leaves_no_unique_key(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("a", user="anna"), b"{}", None, (), KEY)
    with pytest.raises(IdTaken):
        store.add(make_task("a", unique_key=UNIQUE), b"{}", None, ())
    with pytest.raises(KeyTaken):
        store.add(make_task("b", unique_key=UNIQUE), b"{}", None, (), KEY)
    with pytest.raises(TooManyTasks):
        store.add(make_task("b", unique_key=UNIQUE, user="anna"), b"{}", None, (), quota=1)
    assert store.started_with(UNIQUE) is None
    store.add(make_task("b", unique_key=UNIQUE), b"{}", None, ())


def test_a_unique_key_is_checked_before_the_quota(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("a", unique_key=UNIQUE, user="anna"), b"{}", None, (), quota=1)
    with pytest.raises(UniqueTaken):
        store.add(make_task("b", unique_key=UNIQUE, user="anna"), b"{}", None, (), quota=1)


def test_a_unique_key_belongs_to_one_namespace(
    store: TaskStore, other_store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("a", unique_key=UNIQUE), b"{}", None, ())
    assert other_store.started_with(UNIQUE) is None
    other_store.add(make_task("a", unique_key=UNIQUE), b"{}", None, ())
    assert other_store.update("a", ANY_STATE, ENDS[0]) is not None
    assert other_store.started_with(UNIQUE) is None
    assert holder(store) == "a"


# Quotas


@pytest.mark.covers("A70")
def test_a_quota_counts_the_unfinished_tasks_of_the_user(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("other", user="ben"), b"{}", None, ())
    store.add(make_task("nobody"), b"{}", None, ())
    store.add(make_task("a", user="anna"), b"{}", None, (), quota=2)
    store.add(make_task("b", user="anna"), b"{}", None, (), quota=2)
    store.claim("b", "me", CREATED)
    assert [store.count_unfinished(user, 9) for user in ("anna", "ben", "carol")] == [2, 1, 0]
    assert store.count_unfinished("anna", 1) == 1
    body = Body([b"data"])
    with pytest.raises(TooManyTasks, match="You have 2 unfinished tasks"):
        store.add(make_task("c", user="anna", body_size=4), b"{}", body, [("groups", "g")], quota=2)
    assert body.open().read() == b"data"
    body.close()
    assert all_ids(store) == ["a", "b", "nobody", "other"]
    store.add(make_task("d", user="anna"), b"{}", None, (), quota=3)
    store.add(make_task("e", user="anna"), b"{}", None, ())
    store.add(make_task("f", user="ben"), b"{}", None, (), quota=2)


@pytest.mark.covers("A70")
@pytest.mark.parametrize("end", ENDS)
def test_ended_and_deleted_tasks_do_not_count(
    store: TaskStore, make_task: NewTask, end: dict[str, Any]
) -> None:
    store.add(make_task("a", user="anna"), b"{}", None, (), quota=1)
    store.claim("a", "me", CREATED)
    store.update("a", ANY_STATE, end)
    store.add(make_task("b", user="anna"), b"{}", None, (), quota=1)
    store.delete("b", ANY_STATE)
    store.add(make_task("c", user="anna"), b"{}", None, (), quota=1)
    store.claim("c", "me", CREATED)
    store.update("c", ANY_STATE, {"state": State.NOT_STARTED, "owner": None})
    assert store.count_unfinished("anna", 9) == 1
    with pytest.raises(TooManyTasks):
        store.add(make_task("d", user="anna"), b"{}", None, (), quota=1)


@pytest.mark.covers("A70")
def test_a_quota_applies_to_one_namespace(
    store: TaskStore, other_store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task("a", user="anna"), b"{}", None, (), quota=1)
    other_store.add(make_task("a", user="anna"), b"{}", None, (), quota=1)
    assert store.get("a") and other_store.get("a")


# Concurrent starts


def concurrently(count: int, act: Callable[[int], str]) -> list[str]:
    """Call ``act`` on ``count`` threads at once; return the sorted results."""
    barrier = threading.Barrier(count)
    results: list[str] = []

    def call(number: int) -> None:
        barrier.wait(10)
        results.append(act(number))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return sorted(results)


@pytest.mark.covers("A75")
def test_one_of_many_concurrent_starts_with_one_key_is_stored(
    store: TaskStore, make_task: NewTask
) -> None:
    def add(number: int) -> str:
        try:
            store.add(make_task(f"t{number}"), b"{}", None, (), KEY)
        except KeyTaken:
            return "taken"
        return "stored"

    for _ in range(5):
        assert concurrently(16, add) == ["stored"] + ["taken"] * 15
        (only,) = all_ids(store)
        assert found_with(store, KEY) == (only, KEY.fingerprint)
        store.delete(only, ANY_STATE)


@pytest.mark.parametrize("quota", [None, 100])
def test_one_of_many_concurrent_starts_with_one_unique_key_is_stored(
    store: TaskStore, make_task: NewTask, quota: int | None
) -> None:
    def add(number: int) -> str:
        task = make_task(f"t{number}", unique_key=UNIQUE, user="anna")
        try:
            store.add(task, b"{}", None, (), quota=quota)
        except UniqueTaken:
            return "taken"
        return "stored"

    for _ in range(5):
        assert concurrently(16, add) == ["stored"] + ["taken"] * 15
        (only,) = all_ids(store)
        assert holder(store) == only
        store.delete(only, ANY_STATE)


def test_tasks_that_start_and_end_at_once_never_share_a_unique_key(
    store: TaskStore, make_task: NewTask
) -> None:
    """No other thread has an unfinished task while a thread starts its own."""
    alone = threading.Lock()

    def run(number: int) -> str:
        stored = 0
        for attempt in range(40):
            task = make_task(f"t{number}-{attempt}", unique_key=UNIQUE, user="anna")
            try:
                store.add(task, b"{}", None, (), quota=1000)
            except UniqueTaken:
                continue
            stored += 1
            assert alone.acquire(blocking=False)
            assert store.claim(task.id, "me", CREATED) is not None
            alone.release()
            assert store.update(task.id, ANY_STATE, ENDS[stored % 3]) is not None
        return f"{stored}"

    stored = [int(count) for count in concurrently(6, run)]
    assert len(stored) == 6 and sum(stored) == len(all_ids(store))
    assert store.started_with(UNIQUE) is None


@pytest.mark.covers("A70")
def test_concurrent_starts_do_not_exceed_the_quota(store: TaskStore, make_task: NewTask) -> None:
    def add(number: int) -> str:
        try:
            store.add(make_task(f"t{number}", user="anna"), b"{}", None, (), quota=3)
        except TooManyTasks:
            return "too many"
        return "stored"

    assert concurrently(16, add) == ["stored"] * 3 + ["too many"] * 13
    assert len(all_ids(store)) == 3


def test_collecting_a_memory_store_closes_the_bodies_of_its_tasks(
    make_task: Callable[..., AsyncRouteTask], eventually: Callable[..., Any]
) -> None:
    """A large body is a file. Python warns if a file is collected while it is open."""
    store = make_store("memory://", "", "test", True)
    body = Body([b"x" * 300_000])
    file = body.open()
    store.add(make_task(body_size=300_000), b"", body, ())
    del store, body
    gc.collect()
    eventually(lambda: file.closed)
