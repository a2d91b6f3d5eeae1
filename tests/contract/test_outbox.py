"""The outbox of every store: what is due, who holds it, and that no callback is lost or sent by two at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flask_asyncroute.delivery import Delivery, Shown
from flask_asyncroute.states import State
from flask_asyncroute.stores.base import Expect, TaskStore, Worker
from flask_asyncroute.stores.outbox import AT_ONCE, LONGEST_US, PER_HOST
from flask_asyncroute.task import AsyncRouteTask

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
        assert store.update(task_id, expect, {"state": State.ABORTED, "completed_us": NOW, "error": "E"})


def info(store: TaskStore, task_id: str = "task") -> tuple[str | None, int]:
    task = store.get(task_id)
    assert task is not None
    return task.callback_state, task.callback_attempts


def test_a_callback_is_due_when_its_task_has_ended(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    assert store.outbox.next_due(NOW) is None
    assert store.outbox.claim("me", NOW, 9) == []
    end(store)
    assert store.outbox.next_due(NOW) == AT_ONCE
    [due] = store.outbox.claim("me", NOW, 9)
    assert (due.delivery, due.attempts) == (delivery(webhook_id="msg_task"), 0)
    assert due.task == store.get("task") and info(store) == ("Running", 0)
    assert store.outbox.claim("you", NOW, 9) == [] and store.outbox.next_due(NOW) is None


def test_a_callback_that_was_taken_is_over(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    before = store.get("task")
    task = store.outbox.settle("task", "me", "Completed", None)
    assert task is not None and before is not None and task == store.get("task")
    assert info(store) == ("Completed", 1)
    assert (task.revision, task.change) == (before.revision + 1, store.news(-1).change)
    assert store.outbox.next_due(NOW + LONGEST_US) is None and store.outbox.claim("me", NOW, 9) == []


def test_a_callback_that_failed_is_due_again_later(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    store.outbox.settle("task", "me", "Running", NOW + 5)
    assert info(store) == ("Running", 1)
    assert store.outbox.next_due(NOW) == NOW + 5 and store.outbox.claim("me", NOW, 9) == []
    [due] = store.outbox.claim("you", NOW + 5, 9)
    assert (due.attempts, due.delivery.headers) == (1, {"X-A": "secret"})


def test_f32_a_clock_that_was_set_back_delays_nothing_for_long(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    store.outbox.settle("task", "me", "Running", NOW)
    assert store.outbox.next_due(NOW - 2 * LONGEST_US) == AT_ONCE
    assert len(store.outbox.claim("me", NOW - 2 * LONGEST_US, 9)) == 1


def test_a21_two_at_once_go_to_one_host(store: TaskStore, add: Callable[..., None]) -> None:
    for number in range(5):
        add(f"a{number}", "victim")
    add("b", "other")
    end(store, *(f"a{number}" for number in range(5)), "b")
    taken = store.outbox.claim("me", NOW, 9)
    assert sorted(due.delivery.host for due in taken) == ["other", *["victim"] * PER_HOST]
    assert store.outbox.claim("you", NOW, 9) == []
    first = next(due.task.id for due in taken if due.delivery.host == "victim")
    store.outbox.settle(first, "me", "Completed", None)
    assert len(store.outbox.claim("you", NOW, 9)) == 1


def test_a21_many_for_one_host_hide_none_for_others(store: TaskStore, add: Callable[..., None]) -> None:
    many = [f"a{number}" for number in range(120)]
    for task_id in many:
        add(task_id, "victim")
    add("b", "other")
    end(store, *many, "b")
    taken = store.outbox.claim("me", NOW, 9)
    assert sorted(due.delivery.host for due in taken) == ["other", *["victim"] * PER_HOST]


def test_a_claim_takes_no_more_than_it_may(store: TaskStore, add: Callable[..., None]) -> None:
    for number in range(5):
        add(f"t{number}", f"host{number}")
    end(store, *(f"t{number}" for number in range(5)))
    assert len(store.outbox.claim("me", NOW, 2)) == 2
    assert len(store.outbox.claim("you", NOW, 9)) == 3


def test_f31_only_who_holds_it_settles(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    assert store.outbox.settle("task", "you", "Failed", None) is None
    assert info(store) == ("Running", 0)


def test_f30_what_is_let_go_of_is_sent_by_others(store: TaskStore, add: Callable[..., None]) -> None:
    for task_id in ("one", "two"):
        add(task_id, task_id)
    end(store, "one", "two")
    store.outbox.claim("me", NOW, 9)
    store.outbox.release("you")
    assert store.outbox.claim("you", NOW, 9) == []
    store.outbox.release("me", keep={"two"})
    assert [due.task.id for due in store.outbox.claim("you", NOW, 9)] == ["one"]
    assert store.outbox.settle("one", "me", "Failed", None) is None, "it is another's by now"


def test_f30_a_worker_that_is_gone_lets_go(store: TaskStore, add: Callable[..., None]) -> None:
    if store.workers is None:
        pytest.skip("a memory store has one process")
    store.workers.enter(Worker("me", "", 0, "", frozenset()))
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    assert "me" in store.workers.owners()
    store.workers.leave("me")
    assert [due.delivery.webhook_id for due in store.outbox.claim("you", NOW, 9)] == ["msg_task"]


@pytest.mark.parametrize("state", ["Completed", "Failed"])
def test_headers_are_gone_with_the_last_attempt(store: TaskStore, add: Callable[..., None], state: str) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    store.outbox.settle("task", "me", state, None)
    task = store.outbox.redeliver("task", {"X-B": "b"})
    assert task is not None and info(store) == ("NotStarted", 0)
    [due] = store.outbox.claim("me", NOW, 9)
    assert (due.delivery.webhook_id, due.delivery.headers, due.attempts) == ("msg_task", {"X-B": "b"}, 0)


def test_one_that_waits_keeps_its_headers_when_it_is_sent_anew(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    store.outbox.claim("me", NOW, 9)
    assert store.outbox.redeliver("task", {}) == store.get("task"), "it is being sent at this moment"
    store.outbox.settle("task", "me", "Running", NOW + 100)
    store.outbox.redeliver("task", {})
    [due] = store.outbox.claim("me", NOW, 9)
    assert (due.delivery.headers, due.attempts) == ({"X-A": "secret"}, 0)


def test_what_has_not_ended_or_has_no_callback_is_not_sent_anew(
    store: TaskStore, add: Callable[..., None], make_task: NewTask
) -> None:
    add()
    assert store.outbox.redeliver("task", {}) is None
    store.add(make_task("plain"), b"", None, ())
    end(store, "plain")
    assert store.outbox.redeliver("plain", {}) is None
    assert store.outbox.redeliver("unknown", {}) is None


def test_retention_leaves_what_is_yet_to_be_sent(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    assert store.outlived(NOW + 10, 9) == []
    store.outbox.claim("me", NOW, 9)
    store.outbox.settle("task", "me", "Running", NOW + 5)
    assert store.outlived(NOW + 10, 9) == []
    store.outbox.claim("me", NOW + 5, 9)
    store.outbox.settle("task", "me", "Failed", None)
    assert store.outlived(NOW + 10, 9) == ["task"]


def test_a_callback_goes_with_its_task(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    assert store.delete("task", Expect((State.ABORTED,)))
    assert store.outbox.next_due(NOW) is None and store.outbox.claim("me", NOW, 9) == []


def test_states_of_a_callback_are_no_states_of_its_task(store: TaskStore, add: Callable[..., None]) -> None:
    add()
    end(store)
    before = store.get("task")
    store.outbox.claim("me", NOW, 9)
    store.outbox.settle("task", "me", "Failed", None)
    after = store.get("task")
    assert before is not None and after is not None
    assert (after.state, after.error, after.completed_us) == (before.state, before.error, before.completed_us)
