"""Single tasks in every store: add, get, claim, body, update and delete. Each rule of `stores.base`
has a test.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from flask_asyncroute.errors import IdTaken
from flask_asyncroute.permissions import Access, Permission
from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.snapshot import CHUNK, Body
from flask_asyncroute.stores.base import Expect, Readers, SharedTaskStore, TaskStore
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.task import TERMINAL, UNFINISHED, AsyncRouteTask, State

NewTask = Callable[..., AsyncRouteTask]
CREATED = 1_700_000_000_000_000
SECOND = 1_000_000
RUNNING = Expect((State.RUNNING,))
FINISHED = Expect(tuple(TERMINAL))
ANY_STATE = Expect(tuple(State))

FULL = {
    "async_route_id": "[Post]/wørk/<int:n>",
    "endpoint": "blue.work",
    "cancellable": False,
    "user": "josé \U0001f600",
    "url": "http://localhost/w%C3%B8rk/1",
    "method": "POST",
    "created_us": CREATED,
    "progress": 12.34,
    "progress_message": "línea\none 'two' \"three\" %_\\",
    "result_json": b'{"InnerValue":"\xc3\xa9"}',
    "error": "ValueError: x",
    "error_status": 404,
    "permission_json": msgspec.json.encode(Permission(Access(groups=("g",)))),
    "timeout_us": 36_000 * SECOND,
    "start_by_us": CREATED + 60 * SECOND,
    "retention_us": 5,
    "on_loss": "restart",
    "body_size": 7,
}


def body_of(data: bytes) -> Body:
    return Body([data])


def listed(store: TaskStore, readers: Readers) -> list[str]:
    return [task.id for task in store.query((), NEWEST_FIRST, 100, None, readers)]


def test_an_added_task_round_trips(store: TaskStore, make_task: NewTask) -> None:
    task = make_task("full", **FULL)
    store.add(task, b"{}", None, [("groups", "g")])
    found = store.get("full")
    assert found is not None
    assert msgspec.structs.replace(found, change=0) == task
    assert found.change > 0
    assert found.granted == Permission(Access(groups=("g",)))


def test_empty_fields_round_trip(store: TaskStore, make_task: NewTask) -> None:
    task = make_task()
    store.add(task, b"{}", None, ())
    found = store.get("task")
    assert found is not None
    assert msgspec.structs.replace(found, change=0) == task
    assert type(found.cancellable) is bool
    assert type(found.stopping) is bool
    assert type(found.state) is State


def test_operations_on_an_unknown_task_return_none(store: TaskStore) -> None:
    assert store.get("nobody") is None
    assert store.claim("nobody", "me", CREATED) is None
    assert store.update("nobody", ANY_STATE, {"error": "x"}) is None
    assert store.delete("nobody", ANY_STATE) is None


@pytest.mark.covers("A43")
@pytest.mark.parametrize(
    "task_id", ["a", "A", "a.b", "~", "é", "e\u0301", "..", "'; DROP TABLE x; --", "%", "_"]
)
def test_ids_are_compared_exactly(store: TaskStore, make_task: NewTask, task_id: str) -> None:
    others = {"a", "A", "é", "e\u0301", "ab", "x"} - {task_id}
    for other in sorted(others):
        store.add(make_task(other), b"", None, ())
    assert store.get(task_id) is None
    store.add(make_task(task_id), b"", None, ())
    found = store.get(task_id)
    assert found is not None and found.id == task_id


def test_an_add_with_an_existing_id_changes_nothing(store: TaskStore, make_task: NewTask) -> None:
    first = make_task("x", user="anna", body_size=5)
    store.add(first, b"first", body_of(b"first"), [("groups", "g")])
    before = store.get("x")
    second = make_task("x", user="ben", url="http://localhost/other", body_size=6)
    refused = body_of(b"second")
    with pytest.raises(IdTaken, match="'x'"):
        store.add(second, b"second", refused, [("groups", "h"), ("roles", "r")])
    refused.close()
    assert store.get("x") == before
    assert listed(store, Readers(granted=(("groups", "h"),))) == []
    assert listed(store, Readers(granted=(("groups", "g"),))) == ["x"]
    claim = store.claim("x", "me", CREATED)
    assert claim is not None and claim.request == b"first"
    with_body = store.body("x")
    assert with_body.open().read() == b"first"
    with_body.close()


def test_a_refused_body_can_be_added_again(store: TaskStore, make_task: NewTask) -> None:
    """If a generated id already exists, a start tries another with the same body."""
    store.add(make_task("x"), b"", None, ())
    body = body_of(b"data")
    with pytest.raises(IdTaken):
        store.add(make_task("x", body_size=4), b"", body, ())
    store.add(make_task("y", body_size=4), b"", body, ())
    assert store.claim("y", "me", CREATED) is not None
    got = store.body("y")
    assert got.open().read() == b"data"
    got.close()


def test_a_duplicate_grant_counts_once(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("x", user="anna"), b"", None, [("groups", "g"), ("groups", "g")])
    assert listed(store, Readers(granted=(("groups", "g"),))) == ["x"]


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_a_body_round_trips(store: TaskStore, make_task: NewTask, size: int) -> None:
    data = bytes(index * 7 % 251 for index in range(size))
    store.add(make_task(body_size=size), b"request", body_of(data), ())
    claim = store.claim("task", "me", CREATED)
    assert claim is not None
    assert claim.task.body_size == size
    body = store.body("task")
    assert body.size == size
    assert body.open().read() == data
    body.close()


def test_a_task_without_a_body_has_an_empty_body(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"request", None, ())
    store.claim("task", "me", CREATED)
    body = store.body("task")
    assert body.open().read() == b""
    body.close()


def test_a_claim_sets_owner_epoch_and_times(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(timeout_us=5 * SECOND), b"request", None, ())
    now = CREATED + 3 * SECOND
    claim = store.claim("task", "worker", now)
    assert claim is not None
    assert claim.request == b"request"
    assert claim.task == store.get("task")
    assert claim.task.state is State.RUNNING
    assert claim.task.owner == "worker"
    assert claim.task.epoch == 1
    assert claim.task.revision == 2
    assert claim.task.started_us == now
    assert claim.task.expires_us == now + 5 * SECOND


@pytest.mark.covers("F32")
def test_the_start_time_is_never_before_the_creation_time(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task(timeout_us=SECOND), b"", None, ())
    claim = store.claim("task", "worker", CREATED - 3600 * SECOND)
    assert claim is not None
    assert claim.task.started_us == CREATED
    assert claim.task.expires_us == CREATED + SECOND


def test_a_task_without_a_timeout_does_not_expire(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(timeout_us=None), b"", None, ())
    claim = store.claim("task", "worker", CREATED)
    assert claim is not None and claim.task.expires_us is None


def test_a_task_is_claimed_once(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"", None, ())
    assert store.claim("task", "one", CREATED) is not None
    before = store.get("task")
    newest = store.newest()
    assert store.claim("task", "two", CREATED) is None
    assert store.get("task") == before
    assert store.newest() == newest, (
        "a failed claim uses no change number and sends no notification"
    )


@pytest.mark.parametrize("grants", [(), (("groups", "g"),)])
def test_a_task_is_claimed_only_before_its_time_for_the_first_start(
    store: TaskStore, make_task: NewTask, grants: Any
) -> None:
    permission = msgspec.json.encode(Permission()) if grants else None
    limit = CREATED + 5 * SECOND
    for name in ("late", "punctual"):
        store.add(make_task(name, start_by_us=limit, permission_json=permission), b"", None, grants)
    newest = store.newest()
    for now in (limit, limit + SECOND):
        assert store.claim("late", "me", now) is None
    assert store.newest() == newest, "a refused claim uses no change number"
    found = store.get("late")
    assert found is not None and found.state is State.NOT_STARTED
    assert store.claim("late", "me", limit - 1) is not None
    assert store.claim("punctual", "me", CREATED - 3600 * SECOND) is not None


def test_an_update_in_another_state_uses_no_change_number(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task(), b"", None, ())
    newest = store.newest()
    for values in ({"progress": 1.0}, {"state": State.COMPLETED, "completed_us": CREATED}):
        assert store.update("task", Expect((State.RUNNING,), "me", 1), values) is None
    assert store.newest() == newest


@pytest.mark.covers("F18")
def test_an_aborted_task_is_not_claimed(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"", None, ())
    assert store.update(
        "task", Expect((State.NOT_STARTED,)), {"state": State.ABORTED, "completed_us": CREATED}
    )
    assert store.claim("task", "one", CREATED) is None


@pytest.mark.parametrize("state", sorted(State))
@pytest.mark.parametrize(
    "expected", [(state,) for state in sorted(State)] + [tuple(TERMINAL), tuple(UNFINISHED)]
)
def test_an_update_requires_an_expected_state(
    store: TaskStore, make_task: NewTask, state: State, expected: tuple[State, ...]
) -> None:
    bring_to(store, make_task, state)
    before = store.get("task")
    assert before is not None
    after = store.update("task", Expect(expected), {"error": "changed"})
    if state in expected:
        assert after is not None
        assert (after.error, after.revision) == ("changed", before.revision + 1)
        assert after.change > before.change
        assert store.get("task") == after
    else:
        assert after is None
        assert store.get("task") == before


@pytest.mark.parametrize(
    ("expect", "is_met"),
    [
        ({"owner": "me"}, True),
        ({"owner": "you"}, False),
        ({"owner": ""}, False),
        ({"epoch": 1}, True),
        ({"epoch": 0}, False),
        ({"epoch": 2}, False),
        ({"stopping": True}, True),
        ({"stopping": False}, False),
        ({"owner": "me", "epoch": 1, "stopping": True}, True),
        ({"owner": "me", "epoch": 2, "stopping": True}, False),
    ],
)
@pytest.mark.parametrize("write", ["update", "delete"])
def test_a_write_requires_the_expected_owner_epoch_and_stopping(
    store: TaskStore, make_task: NewTask, write: str, expect: dict[str, object], is_met: bool
) -> None:
    store.add(make_task(), b"", None, ())
    store.claim("task", "me", CREATED)
    store.update(
        "task", RUNNING, {"state": State.ABORTED, "completed_us": CREATED, "stopping": True}
    )
    before = store.get("task")
    condition = Expect((State.ABORTED,), **expect)  # type: ignore[arg-type]
    if write == "update":
        after = store.update("task", condition, {"stopping": False})
        assert (after is not None) is is_met
        assert store.get("task") == (after if is_met else before)
    else:
        assert (store.delete("task", condition) is not None) is is_met
        assert store.get("task") == (None if is_met else before)


def test_a_waiting_task_has_no_owner(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"", None, ())
    assert store.update("task", Expect((State.NOT_STARTED,), owner="me"), {"error": "x"}) is None
    assert store.update("task", Expect((State.NOT_STARTED,), epoch=0), {"error": "x"}) is not None


def test_every_record_field_can_be_written(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"", None, ())
    values = {
        **FULL,
        "started_us": CREATED + 1,
        "expires_us": CREATED + 2,
        "owner": "o",
        "epoch": 9,
        "stopping": True,
    }
    after = store.update("task", ANY_STATE, values)
    assert after is not None
    for name, value in values.items():
        assert getattr(after, name) == value, name
    cleared = {
        name: None
        for name in (
            "progress",
            "progress_message",
            "error",
            "error_status",
            "result_json",
            "owner",
        )
    }
    after = store.update("task", ANY_STATE, cleared)
    assert after is not None
    for name in cleared:
        assert getattr(after, name) is None, name


def test_an_empty_update_increases_the_revision(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(), b"", None, ())
    after = store.update("task", ANY_STATE, {})
    assert after is not None and after.revision == 2


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_terminal_state_deletes_the_request_and_body(
    store: TaskStore, make_task: NewTask, state: State
) -> None:
    store.add(make_task(body_size=4), b"request", body_of(b"body"), ())
    store.claim("task", "me", CREATED)
    assert store.update("task", RUNNING, {"state": state, "completed_us": CREATED}) is not None
    body = store.body("task")
    assert body.open().read() == b""
    body.close()
    # The task cannot be claimed again, because its request is deleted.
    assert store.claim("task", "me", CREATED) is None


def test_aborting_a_waiting_task_deletes_its_body(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(body_size=4), b"request", body_of(b"body"), ())
    store.update(
        "task", Expect((State.NOT_STARTED,)), {"state": State.ABORTED, "completed_us": CREATED}
    )
    body = store.body("task")
    assert body.open().read() == b""
    body.close()


@pytest.mark.covers("F32")
@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("offset", [-3600 * SECOND, -1, 0, 1, 3600 * SECOND])
def test_the_end_time_is_never_before_the_start_time(
    store: TaskStore, make_task: NewTask, state: State, offset: int
) -> None:
    store.add(make_task(), b"", None, ())
    started = CREATED + 5 * SECOND
    store.claim("task", "me", started)
    after = store.update("task", RUNNING, {"state": state, "completed_us": started + offset})
    assert after is not None
    assert after.completed_us == started + max(offset, 0)


@pytest.mark.covers("F32")
def test_the_end_time_without_a_start_is_never_before_the_creation_time(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task(), b"", None, ())
    after = store.update(
        "task", Expect((State.NOT_STARTED,)), {"state": State.ABORTED, "completed_us": 1}
    )
    assert after is not None and after.completed_us == CREATED


def test_delete_removes_the_record_body_and_grants(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(body_size=4, user="anna"), b"request", body_of(b"body"), [("groups", "g")])
    assert store.delete("task", Expect((State.RUNNING,))) is None
    assert store.delete("task", Expect((State.NOT_STARTED,))) == "work"
    assert store.get("task") is None
    assert store.delete("task", ANY_STATE) is None
    body = store.body("task")
    assert body.open().read() == b""
    body.close()
    assert listed(store, Readers(user="anna", granted=(("groups", "g"),))) == []
    # The id can be used again, and earlier grants do not apply.
    store.add(make_task(user="ben"), b"other", None, ())
    assert listed(store, Readers(granted=(("groups", "g"),))) == []
    claim = store.claim("task", "me", CREATED)
    assert claim is not None
    assert (claim.request, claim.task.epoch, claim.task.revision) == (b"other", 1, 2)


def test_delete_returns_the_endpoint_of_the_removed_task(
    store: TaskStore, make_task: NewTask
) -> None:
    for number, endpoint in enumerate(["reports.yearly", "é"]):
        store.add(make_task(f"t{number}", endpoint=endpoint), b"", None, ())
        assert store.delete(f"t{number}", RUNNING) is None
        assert store.delete(f"t{number}", ANY_STATE) == endpoint
        assert store.delete(f"t{number}", ANY_STATE) is None


def test_one_of_several_concurrent_deletes_returns_the_endpoint(
    store: TaskStore, make_task: NewTask
) -> None:
    for number in range(20):
        store.add(make_task(f"t{number}"), b"", None, ())
    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            deletes = [pool.submit(store.delete, f"t{number}", ANY_STATE) for _ in range(4)]
            returned = [delete.result() for delete in deletes]
            assert sorted(map(str, returned)) == ["None", "None", "None", "work"]


def test_each_write_increases_the_change_number(store: TaskStore, make_task: NewTask) -> None:
    start = store.newest()
    store.add(make_task(), b"", None, ())
    first = store.get("task")
    assert first is not None and first.change == start + 1
    claim = store.claim("task", "me", CREATED)
    assert claim is not None and claim.task.change == start + 2
    changes: list[dict[str, Any]] = [
        {"progress": 1.0},
        {"state": State.FAILED, "completed_us": CREATED},
    ]
    for number, values in enumerate(changes, 3):
        after = store.update("task", RUNNING, values)
        assert after is not None and after.change == start + number
    # A failed write may use a change number, but is not reported as a change.
    assert store.update("task", RUNNING, {"progress": 2.0}) is None
    assert store.claim("task", "me", CREATED) is None
    assert store.delete("task", RUNNING) is None
    with pytest.raises(IdTaken):
        store.add(make_task(), b"", None, ())
    if isinstance(store, SharedTaskStore):
        assert not store.changes_since(start + 4).tasks
    before = store.newest()
    assert before >= start + 4
    assert store.delete("task", FINISHED) == "work"
    assert store.newest() == before + 1


def test_a_closed_store_can_be_used_again(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("before"), b"", None, ())
    store.close()
    store.close()
    assert store.get("before") is not None
    store.add(make_task("after"), b"", None, ())
    store.open()
    store.open()
    assert store.get("after") is not None
    store.newest()
    store.close()


def bring_to(store: TaskStore, make_task: NewTask, state: State) -> None:
    store.add(make_task(), b"", None, ())
    if state is State.NOT_STARTED:
        return
    store.claim("task", "me", CREATED)
    if state is not State.RUNNING:
        assert store.update("task", RUNNING, {"state": state, "completed_us": CREATED}) is not None


def test_each_step_of_a_plain_task_is_one_statement(
    store: TaskStore, make_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most tasks have only one row, so they need no transaction of several statements, whose lock
    others would wait for.
    """
    if not isinstance(store, SQLTaskStore):
        pytest.skip("a memory store has no statements")
    written: list[str] = []
    write_one = store._database.write_one
    monkeypatch.setattr(
        store._database, "write", lambda work: pytest.fail("a transaction of several statements")
    )
    monkeypatch.setattr(
        store._database, "write_one", lambda *args: (written.append("one"), write_one(*args))[1]
    )
    store.add(make_task("plain"), b"{}", None, ())
    assert store.claim("plain", "me", CREATED) is not None
    assert store.update("plain", RUNNING, {"progress": 50.0}) is not None
    assert (
        store.update("plain", RUNNING, {"state": State.COMPLETED, "completed_us": CREATED + 1})
        is not None
    )
    assert len(written) == 4
