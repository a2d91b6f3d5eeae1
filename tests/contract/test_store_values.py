"""Shared values and the secret in every store, and the isolation of two stores on one file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flask_asyncroute.errors import IdTaken
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.stores.base import Expect, Readers, TaskStore
from flask_asyncroute.task import AsyncRouteTask, State

NewTask = Callable[..., AsyncRouteTask]
NewStore = Callable[..., TaskStore]
T0 = 1_700_000_000_000_000


def held(store: TaskStore, key: str) -> bytes | None:
    found = store.read_value(key)
    return None if found is None else found[0]


def version(store: TaskStore, key: str) -> int:
    found = store.read_value(key)
    return 0 if found is None else found[1]


def test_a_value_can_be_written_read_and_deleted(store: TaskStore) -> None:
    assert store.read_value("k") is None
    assert store.write_value("k", b"1", None) is True
    assert held(store, "k") == b"1"
    assert store.write_value("k", b"2", None) is True
    assert held(store, "k") == b"2"
    assert store.write_value("k", None, None) is True
    assert store.read_value("k") is None
    assert store.write_value("k", None, None) is False


@pytest.mark.parametrize("value", [b"", b"\x00\xff", b"x" * (1024 * 1024)])
@pytest.mark.parametrize("key", ["a", "\U0001f600" * 63, "a b'\"%_", "é", "e\u0301"])
def test_any_key_holds_any_bytes(store: TaskStore, key: str, value: bytes) -> None:
    store.write_value(key, value, None)
    assert held(store, key) == value
    assert list(store.value_keys()) == [key]


def test_a_write_requires_the_expected_version(store: TaskStore) -> None:
    assert store.write_value("k", b"1", 5) is False
    assert store.read_value("k") is None
    assert store.write_value("k", b"1", 0) is True, "0: only if the key does not exist"
    assert store.write_value("k", b"2", 0) is False
    first = version(store, "k")
    assert first != 0
    assert store.write_value("k", b"2", first) is True
    second = version(store, "k")
    assert second not in (0, first)
    assert store.write_value("k", b"3", first) is False
    assert held(store, "k") == b"2"
    assert store.write_value("k", None, first) is False
    assert store.write_value("k", None, second) is True
    assert store.write_value("k", None, 0) is False


def test_versions_are_never_reused(store: TaskStore) -> None:
    """Otherwise a late writer could overwrite a value that was deleted and created again."""
    seen = set()
    for number in range(5):
        store.write_value("k", str(number).encode(), None)
        assert version(store, "k") not in seen
        seen.add(version(store, "k"))
        store.write_value("k", None, None)
    store.write_value("other", b"", None)
    store.write_value("k", b"", None)
    assert version(store, "k") not in seen


def test_keys_are_sorted_by_code_point(store: TaskStore) -> None:
    keys = ["b", "a", "B", "é", "\uffff", "\U0001f600", "z", "a1", "a-1", "_"]
    for key in keys:
        store.write_value(key, b"", None)
    assert list(store.value_keys()) == sorted(keys)


def test_concurrent_increments_lose_no_update(store: TaskStore) -> None:
    def increment(_: int) -> None:
        while True:
            present = store.read_value("n")
            number = 0 if present is None else int(present[0])
            if store.write_value(
                "n", str(number + 1).encode(), 0 if present is None else present[1]
            ):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(100)))
    assert held(store, "n") == b"100"


def test_the_secret_is_random_and_permanent(store: TaskStore) -> None:
    secret = store.secret()
    assert type(secret) is bytes
    assert len(secret) == 32
    assert secret != bytes(32)
    assert store.secret() == secret
    store.close()
    store.open()
    assert store.secret() == secret


def test_each_namespace_of_a_file_has_its_own_secret(make_sqlite_store: NewStore) -> None:
    stores = [make_sqlite_store(), make_sqlite_store(), make_sqlite_store("other")]
    for store in stores:
        store.open()
    one, two, other = (store.secret() for store in stores)
    assert one == two != other


def test_another_store_object_sees_every_write(
    make_sqlite_store: NewStore, make_task: NewTask
) -> None:
    one, two = make_sqlite_store(), make_sqlite_store()
    one.open()
    two.open()
    since = two.newest()
    one.add(make_task(user="anna"), b"request", None, [("groups", "g")])
    assert two.get("task") == one.get("task")
    with pytest.raises(IdTaken):
        two.add(make_task(), b"", None, ())
    claim = two.claim("task", "two", T0)
    assert claim is not None and claim.request == b"request"
    assert one.claim("task", "one", T0) is None
    assert one.get("task") == claim.task
    assert [
        task.id
        for task in two.query((), NEWEST_FIRST, 9, None, Readers(granted=(("groups", "g"),)))
    ] == ["task"]
    assert one.update("task", Expect((State.RUNNING,), owner="two"), {"progress": 5.0}) == two.get(
        "task"
    )
    assert [task.progress for task in two.changes_since(since).tasks] == [5.0]
    assert one.write_value("k", b"1", 0)
    assert two.write_value("k", b"2", 0) is False
    assert held(two, "k") == b"1"
    assert two.delete("task", Expect((State.RUNNING,)))
    assert one.get("task") is None


def test_news_includes_changes_of_another_store_object(
    make_sqlite_store: NewStore, make_task: NewTask
) -> None:
    one, two = make_sqlite_store(), make_sqlite_store()
    one.open()
    two.open()
    since = two.newest()
    for number in range(5):
        one.add(make_task(f"t{number}"), b"", None, ())
        news = two.changes_since(since)
        assert [task.id for task in news.tasks] == [f"t{number}"]
        assert news.change > since
        since = news.change
        assert list(two.changes_since(since).tasks) == []


@pytest.mark.parametrize("other_name", ["other", "TEST", "test ", "tést", "te\u0301st"])
def test_namespaces_of_one_file_are_isolated(
    make_sqlite_store: NewStore, make_task: NewTask, other_name: str
) -> None:
    one, two = make_sqlite_store("test"), make_sqlite_store(other_name)
    one.open()
    two.open()
    before = two.changes_since(-1)
    one.add(make_task(user="anna", retention_us=0), b"one", None, [("groups", "g")])
    one.write_value("k", b"1", None)
    anybody = Readers("anna", (("groups", "g"),), True)

    def seen_by_two() -> list[Any]:
        return [
            two.get("task"), two.claim("task", "me", T0), two.update("task", Expect(tuple(State)), {"error": "x"}),
            two.delete("task", Expect(tuple(State))), two.query((), NEWEST_FIRST, 9, None, None),
            two.query((), NEWEST_FIRST, 9, None, anybody), two.waiting({"work": 9}, 2 * T0),
            two.past_retention(2 * T0, 9), two.body("task").size, list(two.changes_since(before.change).tasks), two.newest(),
            two.read_value("k"), list(two.value_keys()), two.write_value("k", None, None),
        ]  # fmt: skip

    nothing: list[Any] = [
        None,
        None,
        None,
        None,
        [],
        [],
        [],
        [],
        0,
        [],
        before.change,
        None,
        [],
        False,
    ]
    assert seen_by_two() == nothing
    one.claim("task", "me", T0)
    assert seen_by_two() == nothing
    one.update("task", Expect((State.RUNNING,)), {"state": State.FAILED, "completed_us": T0})
    assert seen_by_two() == nothing
    # The other namespace can use the same id and key.
    two.add(make_task(user="ben"), b"two", None, ())
    two.write_value("k", b"2", 0)
    assert held(one, "k") == b"1"
    found = one.get("task")
    assert found is not None and found.user == "anna"
    assert two.delete("task", Expect((State.NOT_STARTED,)))
    assert one.get("task") == found
    assert [task.id for task in one.query((), NEWEST_FIRST, 9, None, anybody)] == ["task"]
