"""The outbox of every store: claims by several workers, redelivery, and the fields of the task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flask_asyncroute.callbacks.model import Delivery, Shown
from flask_asyncroute.errors import IdTaken, TooManyTasks
from flask_asyncroute.stores.base import Expect, SharedTaskStore, TaskStore
from flask_asyncroute.stores.outbox import AT_ONCE, Outbox
from flask_asyncroute.task import AsyncRouteTask, State

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
SECOND = 1_000_000
SHOWN = msgspec.json.encode(
    Shown(
        url_field="$url", method="POST", content_type="application/json", send_result=True, event_name="e", header_fields=[],
        url="http://x/",
    )
)  # fmt: skip


def delivery(number: int = 1, **fields: Any) -> Delivery:
    values: dict[str, Any] = {
        "webhook_id": f"msg_{number}", "url": f"https://h{number}.example/x?y=é".replace("é", "%C3%A9"), "host": f"h{number}.example", "method": "POST",
        "content_type": "application/json", "headers": {"X-Secret": "é"}, "event_name": "[Put]/é", "send_result": True, "is_trusted": False, "depth": 1,
    }  # fmt: skip
    return Delivery(**(values | fields))


@pytest.fixture
def outbox(store: TaskStore) -> Outbox:
    return store.outbox


@pytest.fixture
def put(store: TaskStore, make_task: NewTask) -> Callable[..., None]:
    """Return ``put(id, delivery, is_over=True)``, which adds an ended task with a callback."""

    def put(name: str, new_delivery: Delivery, is_over: bool = True, **fields: Any) -> None:
        store.add(
            make_task(name, callback_json=SHOWN, callback_state="NotStarted", **fields),
            b"",
            None,
            (),
            delivery=new_delivery,
        )
        if is_over:
            end(store, name)

    return put


def end(store: TaskStore, name: str, state: State = State.COMPLETED) -> None:
    if state is not State.ABORTED:
        assert store.claim(name, "runs", T0) is not None
    assert (
        store.update(
            name, Expect((State.NOT_STARTED, State.RUNNING)), {"state": state, "completed_us": T0}
        )
        is not None
    )


def ids(due: list[Any]) -> list[str]:
    return [one.task.id for one in due]


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.ABORTED])
def test_a_callback_is_due_at_the_end_of_its_task_at_any_clock(
    store: TaskStore, outbox: Outbox, put: Callable[..., None], state: State
) -> None:
    new_delivery = delivery()
    put("a", new_delivery, is_over=False)
    end(store, "a", state)
    task = store.get("a")
    assert task is not None and (task.callback_state, task.callback_attempts) == ("NotStarted", 0)
    for now in (0, T0, 2 * T0):
        assert outbox.next_due(now) == AT_ONCE
    change = store.newest()
    (due,) = outbox.claim("me", 5, 8)
    assert (due.delivery, due.attempts) == (new_delivery, 0)
    assert due.task == store.get("a")
    assert (due.task.state, due.task.callback_state, due.task.callback_attempts) == (
        state,
        "Running",
        0,
    )
    assert due.task.revision == task.revision + 1
    assert due.task.change == change + 1
    if isinstance(store, SharedTaskStore):
        assert [found.id for found in store.changes_since(change).tasks] == ["a"], (
            "the claim is reported as a change"
        )
    assert (
        outbox.next_due(T0) is None
        and outbox.claim("me", T0, 8) == []
        and outbox.claim("they", T0, 8) == []
    )


def test_the_callback_of_a_restarted_task_is_not_due(
    store: TaskStore, outbox: Outbox, put: Callable[..., None]
) -> None:
    put("a", delivery(), is_over=False)
    store.claim("a", "runs", T0)
    store.update("a", Expect((State.RUNNING,)), {"state": State.NOT_STARTED, "owner": None})
    assert outbox.next_due(T0) is None
    end(store, "a")
    assert ids(outbox.claim("me", T0, 8)) == ["a"]


def test_only_the_holder_records_the_outcome_and_releases(
    store: TaskStore, outbox: Outbox, put: Callable[..., None]
) -> None:
    put("a", delivery())
    outbox.claim("me", T0, 8)
    before = store.get("a")
    assert outbox.record_attempt("a", "they", "Completed", None) is None
    assert outbox.record_attempt("nothing", "me", "Completed", None) is None
    assert store.get("a") == before
    outbox.release("they")
    assert outbox.next_due(T0) is None
    outbox.release("me")
    assert outbox.next_due(T0) == AT_ONCE
    assert outbox.record_attempt("a", "me", "Completed", None) is None, (
        "it was released as if its holder were dead"
    )
    (due,) = outbox.claim("they", T0, 8)
    assert due.attempts == 0, "an interrupted attempt does not count"
    assert due.task == before, "its callback was Running before"


def test_release_keeps_the_given_callbacks(outbox: Outbox, put: Callable[..., None]) -> None:
    for number in range(4):
        put(f"t{number}", delivery(number))
    outbox.claim("me", T0, 8)
    outbox.release("me", ["t1", "t2"])
    assert sorted(ids(outbox.claim("me", T0, 8))) == ["t0", "t3"]


@pytest.mark.covers("A21")
def test_at_most_two_callbacks_to_one_host_are_claimed(
    outbox: Outbox, put: Callable[..., None]
) -> None:
    for number in range(300):
        put(f"t{number}", delivery(host="victim.example"))
    put("other", delivery(host="other.example"))
    first = ids(outbox.claim("me", T0, 8)) + ids(outbox.claim("they", T0, 8))
    assert len(first) == 3 and "other" in first, "many callbacks to one host do not delay others"
    victims = [name for name in first if name != "other"]
    assert outbox.claim("me", T0, 8) == []
    assert outbox.record_attempt(victims[0], "me", "Completed", None) is not None
    assert len(outbox.claim("they", T0, 8)) == 1
    assert outbox.claim("me", T0, 8) == []


def test_claims_are_limited_and_ordered_by_due_time(
    outbox: Outbox, put: Callable[..., None]
) -> None:
    for number in range(5):
        put(f"t{number}", delivery(number))
    for due in outbox.claim("me", T0, 8):
        outbox.record_attempt(
            due.task.id, "me", "Running", T0 + int(due.task.id[1:]) % 3 * 10 + int(due.task.id[1:])
        )
    assert ids(outbox.claim("me", T0 + 100, 2)) == ["t0", "t3"]
    assert outbox.claim("me", T0 + 100, 0) == []
    assert ids(outbox.claim("me", T0 + 12, 8)) == ["t1"]


@pytest.mark.covers("F31")
def test_concurrent_claims_take_each_callback_once(
    store: TaskStore, outbox: Outbox, put: Callable[..., None]
) -> None:
    for number in range(40):
        put(f"t{number}", delivery(number))
    taken: list[str] = []

    def take(name: str) -> None:
        while found := outbox.claim(name, T0, 3):
            taken.extend(ids(found))

    threads = [threading.Thread(target=take, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"t{number}" for number in range(40))


def test_a_callback_is_deleted_with_its_task(
    store: TaskStore, outbox: Outbox, put: Callable[..., None]
) -> None:
    put("a", delivery())
    put("b", delivery())
    outbox.claim("me", T0, 1)
    for name in ("a", "b"):
        assert store.delete(name, Expect((State.COMPLETED,)))
    assert outbox.next_due(T0) is None and outbox.claim("me", T0, 8) == []
    assert (
        outbox.record_attempt("a", "me", "Completed", None) is None
        and outbox.record_attempt("b", "me", "Completed", None) is None
    )
    put("a", delivery())
    assert ids(outbox.claim("me", T0, 8)) == ["a"]


@pytest.mark.parametrize("quota", [None, 1])
def test_a_refused_task_leaves_no_callback(
    store: TaskStore, outbox: Outbox, make_task: NewTask, quota: int | None
) -> None:
    store.add(make_task("a", user="ann"), b"", None, ())
    with pytest.raises(IdTaken if quota is None else TooManyTasks):
        store.add(
            make_task("a" if quota is None else "b", user="ann"),
            b"",
            None,
            (),
            quota=quota,
            delivery=delivery(),
        )
    end(store, "a")
    assert outbox.next_due(T0) is None


def test_redeliver(
    store: TaskStore, outbox: Outbox, put: Callable[..., None], make_task: NewTask
) -> None:
    put("a", delivery(), is_over=False)
    store.add(make_task("none"), b"", None, ())
    assert outbox.redeliver("a", {}) is None and outbox.redeliver("nothing", {}) is None
    end(store, "none")
    assert outbox.redeliver("none", {}) is None
    end(store, "a")
    task = outbox.redeliver("a", {"X": "lost"})
    assert task is not None and (task.callback_state, task.callback_attempts) == ("NotStarted", 0)
    (due,) = outbox.claim("me", T0, 8)
    assert due.delivery.headers == {"X-Secret": "é"}, "a pending callback keeps its headers"
    assert outbox.redeliver("a", {}) == due.task, "an attempt is in progress"
    outbox.record_attempt("a", "me", "Running", T0 + SECOND)
    assert outbox.redeliver("a", {}) is not None
    (due,) = outbox.claim("me", T0, 8)
    assert (due.attempts, due.task.callback_state) == (0, "Running")
    outbox.record_attempt("a", "me", "Failed", None)
    task = outbox.redeliver("a", {"X": "again"})
    assert task == store.get("a") and task is not None
    assert (task.callback_state, task.callback_attempts, task.state) == (
        "NotStarted",
        0,
        State.COMPLETED,
    )
    (due,) = outbox.claim("me", T0, 8)
    assert due.delivery == delivery(headers={"X": "again"}) and due.attempts == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_each_namespace_has_its_own_outbox(
    request: pytest.FixtureRequest, kind: str, make_task: NewTask
) -> None:
    make = request.getfixturevalue(f"make_{kind}_store")
    one, other = make("one"), make("other")
    for store in (one, other):
        store.open()
    one.add(
        make_task("a", callback_json=SHOWN, callback_state="NotStarted"),
        b"",
        None,
        (),
        delivery=delivery(),
    )
    end(one, "a")
    assert other.outbox.next_due(T0) is None and other.outbox.claim("me", T0, 8) == []
    other.outbox.release("me")
    assert other.outbox.redeliver("a", {}) is None
    assert ids(one.outbox.claim("me", T0, 8)) == ["a"]
    assert other.outbox.record_attempt("a", "me", "Completed", None) is None
