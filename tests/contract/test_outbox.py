"""The outbox of every store: due callbacks, claims, and no lost or duplicate delivery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flask_asyncroute.callbacks.model import Delivery, Shown
from flask_asyncroute.stores.base import Expect, SharedTaskStore, TaskStore, Worker
from flask_asyncroute.stores.outbox import AT_ONCE, LONGEST_US, PER_HOST
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.databases import SHARED

NewTask = Callable[..., AsyncRouteTask]
NOW = 1_700_000_000_000_000
SHOWN = msgspec.json.encode(
    Shown(url_field="$url", method="POST", content_type="application/json", send_result=True, event_name="e",
          header_fields=["X-A"], url="http://host/")
)  # fmt: skip


def delivery(host: str = "host", **fields: Any) -> Delivery:
    values: dict[str, Any] = {
        "webhook_id": "msg_1", "url": f"http://{host}/", "host": host, "method": "POST", "content_type": "application/json",
        "headers": {"X-A": "secret"}, "event_name": "e", "send_result": True, "is_trusted": False, "depth": 1, **fields,
    }  # fmt: skip
    return Delivery(**values)


@pytest.fixture
def add(store: TaskStore, make_task: NewTask) -> Callable[..., None]:
    def add(task_id: str = "task", host: str = "host") -> None:
        task = make_task(task_id, callback_json=SHOWN, callback_state="NotStarted", retention_us=0)
        store.add(task, b"", None, (), delivery=delivery(host, webhook_id=f"msg_{task_id}"))

    return add


def end(store: TaskStore, *task_ids: str) -> None:
    for task_id in task_ids or ("task",):
        expect = Expect((State.NOT_STARTED, State.RUNNING))
        assert store.update(
            task_id, expect, {"state": State.ABORTED, "completed_us": NOW, "error": "E"}
        )


def info(store: TaskStore, task_id: str = "task") -> tuple[str | None, int]:
    task = store.get(task_id)
    assert task is not None
    return task.callback_state, task.callback_attempts


def test_a_callback_is_due_when_its_task_has_ended(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    assert store.outbox.next_due(NOW) is None
    assert store.outbox.claim("me", NOW, 9) == []
    end(store)
    assert store.outbox.next_due(NOW) == AT_ONCE
    [due] = store.outbox.claim("me", NOW, 9)
    assert (due.delivery, due.attempts) == (delivery(webhook_id="msg_task"), 0)
    assert due.task == store.get("task") and info(store) == ("Running", 0)
    assert store.outbox.claim("you", NOW, 9) == [] and store.outbox.next_due(NOW) is None


def test_a_delivered_callback_is_completed(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    before = store.get("task")
    task = store.outbox.record_attempt("task", "me", "Completed", None)
    assert task is not None and before is not None and task == store.get("task")
    assert info(store) == ("Completed", 1)
    assert (task.revision, task.change) == (before.revision + 1, store.newest())
    assert (
        store.outbox.next_due(NOW + LONGEST_US) is None and store.outbox.claim("me", NOW, 9) == []
    )


def test_a_failed_attempt_is_due_again_later(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    store.outbox.record_attempt("task", "me", "Running", NOW + 5)
    assert info(store) == ("Running", 1)
    assert store.outbox.next_due(NOW) == NOW + 5 and store.outbox.claim("me", NOW, 9) == []
    [due] = store.outbox.claim("you", NOW + 5, 9)
    assert (due.attempts, due.delivery.headers) == (1, {"X-A": "secret"})


@pytest.mark.covers("F32")
def test_a_clock_set_back_does_not_delay_callbacks_for_long(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    store.outbox.record_attempt("task", "me", "Running", NOW)
    assert store.outbox.next_due(NOW - 2 * LONGEST_US) == AT_ONCE
    assert len(store.outbox.claim("me", NOW - 2 * LONGEST_US, 9)) == 1


@pytest.mark.covers("A21")
def test_at_most_two_callbacks_to_one_host_are_claimed(
    store: TaskStore, add: Callable[..., None]
) -> None:
    for number in range(5):
        add(f"a{number}", "victim")
    add("b", "other")
    end(store, *(f"a{number}" for number in range(5)), "b")
    taken = store.outbox.claim("me", NOW, 9)
    assert sorted(due.delivery.host for due in taken) == ["other", *["victim"] * PER_HOST]
    assert store.outbox.claim("you", NOW, 9) == []
    first = next(due.task.id for due in taken if due.delivery.host == "victim")
    store.outbox.record_attempt(first, "me", "Completed", None)
    assert len(store.outbox.claim("you", NOW, 9)) == 1


@pytest.mark.covers("A21")
def test_many_callbacks_to_one_host_do_not_delay_others(
    store: TaskStore, add: Callable[..., None]
) -> None:
    many = [f"a{number}" for number in range(120)]
    for task_id in many:
        add(task_id, "victim")
    add("b", "other")
    end(store, *many, "b")
    taken = store.outbox.claim("me", NOW, 9)
    assert sorted(due.delivery.host for due in taken) == ["other", *["victim"] * PER_HOST]


def test_a_claim_respects_its_limit(store: TaskStore, add: Callable[..., None]) -> None:
    for number in range(5):
        add(f"t{number}", f"host{number}")
    end(store, *(f"t{number}" for number in range(5)))
    assert len(store.outbox.claim("me", NOW, 2)) == 2
    assert len(store.outbox.claim("you", NOW, 9)) == 3


@pytest.mark.covers("F31")
def test_only_the_holder_records_an_outcome(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    assert store.outbox.record_attempt("task", "you", "Failed", None) is None
    assert info(store) == ("Running", 0)


@pytest.mark.covers("F30")
def test_released_callbacks_can_be_claimed_by_others(
    store: TaskStore, add: Callable[..., None]
) -> None:
    for task_id in ("one", "two"):
        add(task_id, task_id)
    end(store, "one", "two")
    store.outbox.claim("me", NOW, 9)
    store.outbox.release("you")
    assert store.outbox.claim("you", NOW, 9) == []
    store.outbox.release("me", keep={"two"})
    assert [due.task.id for due in store.outbox.claim("you", NOW, 9)] == ["one"]
    assert store.outbox.record_attempt("one", "me", "Failed", None) is None, (
        "another worker holds it now"
    )


@SHARED
@pytest.mark.covers("F30")
def test_the_callbacks_of_a_removed_worker_are_released(
    store: SharedTaskStore, add: Callable[..., None]
) -> None:
    store.workers.enter(Worker("me", "", 0, "", frozenset()))
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    assert "me" in store.workers.owners()
    store.workers.leave("me")
    assert [due.delivery.webhook_id for due in store.outbox.claim("you", NOW, 9)] == ["msg_task"]


@pytest.mark.parametrize("state", ["Completed", "Failed"])
def test_headers_are_deleted_after_the_last_attempt(
    store: TaskStore, add: Callable[..., None], state: str
) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    store.outbox.record_attempt("task", "me", state, None)
    task = store.outbox.redeliver("task", {"X-B": "b"})
    assert task is not None and info(store) == ("NotStarted", 0)
    [due] = store.outbox.claim("me", NOW, 9)
    assert (due.delivery.webhook_id, due.delivery.headers, due.attempts) == (
        "msg_task",
        {"X-B": "b"},
        0,
    )


def test_redelivery_of_a_pending_callback_keeps_its_headers(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    assert store.outbox.redeliver("task", {}) == store.get("task"), "an attempt is in progress"
    store.outbox.record_attempt("task", "me", "Running", NOW + 100)
    store.outbox.redeliver("task", {})
    [due] = store.outbox.claim("me", NOW, 9)
    assert (due.delivery.headers, due.attempts) == ({"X-A": "secret"}, 0)


def test_redeliver_returns_none_without_a_callback_or_before_the_end(
    store: TaskStore, add: Callable[..., None], make_task: NewTask
) -> None:
    add()
    assert store.outbox.redeliver("task", {}) is None
    store.add(make_task("plain"), b"", None, ())
    end(store, "plain")
    assert store.outbox.redeliver("plain", {}) is None
    assert store.outbox.redeliver("unknown", {}) is None


def test_a_task_with_a_pending_callback_is_not_past_its_retention(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    end(store)
    assert store.past_retention(NOW + 10, 9) == []
    store.outbox.claim("me", NOW, 9)
    store.outbox.record_attempt("task", "me", "Running", NOW + 5)
    assert store.past_retention(NOW + 10, 9) == []
    store.outbox.claim("me", NOW + 5, 9)
    store.outbox.record_attempt("task", "me", "Failed", None)
    assert store.past_retention(NOW + 10, 9) == ["task"]


def test_a_callback_is_deleted_with_its_task(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    assert store.delete("task", Expect((State.ABORTED,)))
    assert store.outbox.next_due(NOW) is None and store.outbox.claim("me", NOW, 9) == []


def test_the_outcome_of_a_callback_does_not_change_its_task(
    store: TaskStore, add: Callable[..., None]
) -> None:
    add()
    end(store)
    before = store.get("task")
    store.outbox.claim("me", NOW, 9)
    store.outbox.record_attempt("task", "me", "Failed", None)
    after = store.get("task")
    assert before is not None and after is not None
    assert (after.state, after.error, after.completed_us) == (
        before.state,
        before.error,
        before.completed_us,
    )
