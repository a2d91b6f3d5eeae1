"""Retries on every store: start times, attempts, and what a task keeps between its attempts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flask_asyncroute.query import NEWEST_FIRST
from flask_asyncroute.query.parsing import parse_mapping
from flask_asyncroute.retries import Retry
from flask_asyncroute.snapshot import CHUNK, Body
from flask_asyncroute.stores.base import STATE, Expect, TaskStore, ViewEvent, Waiting
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask, State, now_us, rfc3339

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
SECOND = 1_000_000
HOUR_NS = 3_600_000_000_000
ALL = 99
RETRY = msgspec.json.encode(Retry(times=2).schedule)


class Clock:
    """The clock of a store, which does not run."""

    def __init__(self, store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = T0
        monkeypatch.setattr(store, "now_us", lambda: self.now)


@pytest.fixture
def clock(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(store, monkeypatch)


def retry(store: TaskStore, attempt: int, start_at_us: int, **more: Any) -> AsyncRouteTask | None:
    """Requeue the task after a failed attempt, as `Lifecycle.retry` does.

    :param attempt: the number of the next attempt.
    """
    values = {
        "state": State.NOT_STARTED, "owner": None, "started_us": None, "expires_us": None,
        "progress": None, "progress_message": None, "start_by_us": None, "attempt": attempt,
        "last_error": f"error {attempt - 1}", "start_at_us": start_at_us, **more,
    }  # fmt: skip
    return store.update("task", Expect((State.RUNNING,), "me", attempt - 1), values)


def test_a_claim_before_the_start_time_is_refused(
    store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    store.add(make_task(retry_json=RETRY), b"request", None, ())
    assert store.claim("task", "me", T0) is not None
    waiting = retry(store, 2, T0 + SECOND)
    clock.now = T0 + SECOND - 1
    assert store.claim("task", "me", T0 + SECOND - 1) is None
    assert store.get("task") == waiting
    clock.now += 1
    claim = store.claim("task", "me", T0 + SECOND)
    assert claim is not None and claim.task.state is State.RUNNING


@pytest.mark.covers("F49")
@pytest.mark.parametrize("hours", [1, -1])
def test_only_the_clock_of_the_store_decides_about_the_start_time(
    store: TaskStore, make_task: NewTask, clock: Clock, hours: int
) -> None:
    """The clock of the host is an hour ahead or behind."""
    host = T0 + hours * HOUR_NS // 1000
    store.add(make_task(retry_json=RETRY, permission_json=b"{}"), b"request", None, ())
    assert store.claim("task", "me", host) is not None
    assert retry(store, 2, T0 + SECOND) is not None
    assert store.claim("task", "me", host + SECOND) is None
    clock.now = T0 + SECOND
    claim = store.claim("task", "me", host + SECOND)
    assert claim is not None and claim.task.started_us == max(host + SECOND, T0)


def test_the_clock_of_the_store_is_the_current_time(store: TaskStore) -> None:
    before = now_us()
    found = store.now_us()
    assert before - SECOND <= found <= now_us() + SECOND


@pytest.mark.covers("F49")
@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
@pytest.mark.parametrize("hours", [1, -1])
def test_the_clock_of_a_server_does_not_depend_on_the_clock_of_the_host(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    real, before = time.time_ns, store.now_us()
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * HOUR_NS)
    assert before <= store.now_us() <= before + 10 * SECOND


def test_only_a_task_with_retries_counts_its_attempts(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task("plain"), b"", None, ())
    store.add(make_task("retried", retry_json=RETRY), b"", None, ())
    for task_id, expected in (("plain", None), ("retried", 1)):
        added = store.get(task_id)
        assert added is not None and added.attempt is None
        claim = store.claim(task_id, "me", T0)
        assert claim is not None and claim.task.attempt == expected


def test_each_retry_is_the_next_attempt(store: TaskStore, make_task: NewTask, clock: Clock) -> None:
    store.add(make_task(retry_json=RETRY), b"", None, ())
    for attempt in (1, 2, 3):
        claim = store.claim("task", "me", T0)
        assert claim is not None
        assert (claim.task.attempt, claim.task.retries_left) == (attempt, 3 - attempt)
        assert claim.task.epoch == attempt
        if attempt < 3:
            waiting = retry(store, attempt + 1, T0)
            assert waiting is not None
            assert (waiting.attempt, waiting.last_error) == (attempt + 1, f"error {attempt}")


def test_a_restart_after_a_loss_repeats_the_attempt(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(retry_json=RETRY), b"", None, ())
    store.claim("task", "me", T0)
    values = {"state": State.NOT_STARTED, "owner": None, "start_at_us": None, "restarts": 1}
    assert store.update("task", Expect((State.RUNNING,), "me", 1), values) is not None
    claim = store.claim("task", "me", T0)
    assert claim is not None and (claim.task.attempt, claim.task.epoch) == (1, 2)


@pytest.mark.parametrize("size", [1, CHUNK, 3 * CHUNK + 7])
def test_each_attempt_gets_the_request_and_the_body(
    store: TaskStore, make_task: NewTask, clock: Clock, size: int
) -> None:
    data = bytes(index * 7 % 251 for index in range(size))
    store.add(make_task(retry_json=RETRY, body_size=size), b"request", Body([data]), ())
    for attempt in (1, 2, 3):
        claim = store.claim("task", "me", T0)
        assert claim is not None and claim.request == b"request"
        body = store.body("task")
        assert (body.size, body.open().read()) == (size, data)
        if attempt == 3:
            # A view can still read the body after a stop.
            end = {"state": State.ABORTED, "completed_us": T0, "stopping": True}
            assert store.update("task", Expect((State.RUNNING,)), end) is not None
            assert body.open().read() == data
        body.close()
        retry(store, attempt + 1, T0)
    empty = store.body("task")
    assert empty.size == 0
    empty.close()


def test_states_of_earlier_attempts_remain_as_events(
    store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    store.add(make_task(retry_json=RETRY, sse_group="g"), b"", None, ())
    for attempt in (1, 2):
        store.claim("task", "me", T0)
        event = ViewEvent("tick", b"%d" % attempt, 1)
        expect = Expect((State.RUNNING,), "me", attempt)
        assert store.add_events("task", expect, [event]) is not None
        if attempt == 1:
            retry(store, 2, T0 + SECOND)
            clock.now += SECOND
    end = {"state": State.COMPLETED, "completed_us": T0 + 5}
    store.update("task", Expect((State.RUNNING,)), end)
    found = store.events(0, ALL, "task").events
    wires = [
        (event.task.to_wire() if event.data is None else msgspec.json.decode(event.data))
        if event.name == STATE
        else event.data
        for event in found
    ]
    shown = [
        (wire["State"], wire.get("Attempt"), wire.get("LastError"), wire.get("NextAttemptTime"))
        if isinstance(wire, dict)
        else wire
        for wire in wires
    ]
    assert shown == [
        ("NotStarted", None, None, None),
        ("Running", 1, None, None),
        b"1",
        ("NotStarted", 2, "error 1", rfc3339(T0 + SECOND)),
        ("Running", 2, "error 1", None),
        b"2",
        ("Completed", 2, "error 1", None),
    ]
    changes = [event.change for event in found]
    assert changes == sorted(set(changes))


def test_a_waiting_task_shows_the_next_attempt_and_nothing_of_the_last(
    store: TaskStore, make_task: NewTask
) -> None:
    store.add(make_task(retry_json=RETRY, timeout_us=SECOND), b"", None, ())
    store.claim("task", "me", T0)
    running = Expect((State.RUNNING,))
    store.update("task", running, {"progress": 50.0, "progress_message": "half"})
    retry(store, 2, T0 + SECOND)
    waiting = store.get("task")
    assert waiting is not None
    wire = waiting.to_dict()
    assert (wire["State"], wire["Attempt"], wire["LastError"]) == ("NotStarted", 2, "error 1")
    assert wire["NextAttemptTime"] == rfc3339(T0 + SECOND)
    assert waiting.next_attempt_time is not None
    absent = {"StartingTime", "ExpireTime", "Progress", "ProgressMessage", "Error"}
    assert not absent & wire.keys()


def wait_for(store: TaskStore, task: AsyncRouteTask, start_at_us: int) -> None:
    """Let a task wait for its second attempt."""
    store.add(task, b"", None, ())
    assert store.claim(task.id, "me", T0) is not None
    values = {
        "state": State.NOT_STARTED, "owner": task.owner, "attempt": 2, "start_at_us": start_at_us
    }  # fmt: skip
    assert store.update(task.id, Expect((State.RUNNING,)), values) is not None


def test_waiting_returns_retries_by_their_start_time(store: TaskStore, make_task: NewTask) -> None:
    for number in (3, 1, 2):
        task = make_task(f"t{number}", created_us=T0 - number, retry_json=RETRY)
        wait_for(store, task, T0 + number * SECOND)
    found = store.waiting({"work": ALL}, T0, T0 + 3 * SECOND)
    assert found == [Waiting(f"t{number}", "work", T0 + number * SECOND) for number in (1, 2)]
    assert store.waiting({"work": 1}, T0, T0 + 9 * SECOND) == found[:1]
    assert store.waiting({"other": ALL}, T0, T0 + 9 * SECOND) == []
    # Without a time of its own, the time for created tasks applies.
    assert store.waiting({"work": ALL}, T0 + 2 * SECOND) == found[:1]


def test_waiting_returns_created_and_retried_tasks_by_their_due_time(
    store: TaskStore, make_task: NewTask
) -> None:
    if isinstance(store, MemoryTaskStore):
        pytest.skip("It may omit created tasks, which its only process has queued.")
    wait_for(store, make_task("retried", created_us=T0, retry_json=RETRY), T0 + 20)
    for name, created in (("early", T0 + 10), ("late", T0 + 30)):
        store.add(make_task(name, created_us=created), b"", None, ())
    found = store.waiting({"work": ALL}, T0 + 100, T0 + 100)
    assert [task.id for task in found] == ["early", "retried", "late"]


def test_waiting_returns_bound_retries_only_to_their_process(
    store: TaskStore, make_task: NewTask
) -> None:
    wait_for(store, make_task("mine", owner="me", retry_json=RETRY), T0)
    wait_for(store, make_task("free", retry_json=RETRY), T0)
    for owner, expected in (("me", {"mine", "free"}), ("they", {"free"})):
        found = store.waiting({"work": ALL}, T0, T0 + 1, owner)
        assert {task.id for task in found} == expected


def test_waiting_omits_a_retry_that_was_claimed_stopped_or_deleted(
    store: TaskStore, make_task: NewTask, clock: Clock
) -> None:
    for name in ("claimed", "stopped", "deleted", "waits"):
        wait_for(store, make_task(name, retry_json=RETRY), T0)
    assert store.claim("claimed", "me", T0) is not None
    waiting = Expect((State.NOT_STARTED,))
    end = {"state": State.ABORTED, "completed_us": T0}
    assert store.update("stopped", waiting, end) is not None
    assert store.delete("deleted", waiting) == "work"
    found = store.waiting({"work": ALL}, T0, T0 + 1)
    assert [task.id for task in found] == ["waits"]


def test_tasks_can_be_listed_by_their_attempt(store: TaskStore, make_task: NewTask) -> None:
    wait_for(store, make_task("second", retry_json=RETRY), T0)
    store.add(make_task("first", retry_json=RETRY), b"", None, ())
    store.claim("first", "me", T0)
    store.add(make_task("unstarted", retry_json=RETRY), b"", None, ())
    store.add(make_task("plain"), b"", None, ())
    for operator, value, expected in (
        ("EQ", 2, {"second"}),
        ("GE", 1, {"first", "second"}),
        ("LT", 2, {"first"}),
        ("NE", 1, {"second"}),
    ):
        conditions = parse_mapping({"Attempt": {"op": operator, "value": value}})
        found = store.query(conditions, NEWEST_FIRST, ALL, None, None)
        assert {task.id for task in found} == expected, operator
