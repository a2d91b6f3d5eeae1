"""Which waiting tasks get another Celery message, how many, and how often."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("celery")

from flask_asyncroute.errors import BrokerUnavailable
from flask_asyncroute.stores.base import SharedTaskStore
from flask_asyncroute.task import AsyncRouteTask, now_us
from flask_asyncroute.workers import lost_messages as module
from flask_asyncroute.workers.lost_messages import (
    LOST_SECONDS,
    MOST_OVERDUE,
    OVERDUE_SECONDS,
    LostMessages,
)

LATE, OVERDUE = LOST_SECONDS + 1, OVERDUE_SECONDS + 1
AHEAD_US = 500_000


class FakeExecutor:
    """Records the tasks that it is given. ``count`` messages are in its queue."""

    def __init__(self) -> None:
        self.count: int | None = 0
        self.counts = 0
        self.sent: list[str] = []
        self.is_down = False

    def queue_name(self) -> str:
        return "queue"

    def waiting_messages(self) -> int | None:
        self.counts += 1
        return self.count

    def submit(self, task_id: str) -> None:
        if self.is_down:
            raise BrokerUnavailable("A test wants it so.")
        self.sent.append(task_id)


class Site:
    """A store and the part of a web process that sends lost messages."""

    def __init__(self, store: SharedTaskStore, make_task: Callable[..., AsyncRouteTask]) -> None:
        self.store = store
        self.executor = FakeExecutor()
        self.is_first = True
        self.called_at: list[int] = []
        self._make_task = make_task
        route: Any = SimpleNamespace(endpoint="work")
        executor: Any = self.executor
        self.messages = LostMessages(
            store, {"work": route}, lambda route: executor, lambda: self.is_first,
            self.called_at.append, AHEAD_US,
        )  # fmt: skip

    def add(self, task_id: str, age: float, **fields: Any) -> AsyncRouteTask:
        """Store a waiting task that was created ``age`` seconds ago."""
        task = self._make_task(task_id, created_us=now_us() - round(age * 1_000_000), **fields)
        self.store.add(task, b"", None, ())
        return task

    def add_due(self, task_id: str, age: float) -> AsyncRouteTask:
        """Store a task whose start time came ``age`` seconds ago."""
        start_at_us = self.store.now_us() - round(age * 1_000_000)
        return self.add(task_id, age + 1, start_at_us=start_at_us)

    def check(self) -> list[str]:
        """Make a check of all messages; return the tasks that were sent."""
        self.messages._next_check = 0.0
        before = len(self.executor.sent)
        self.messages.send_again()
        return self.executor.sent[before:]


@pytest.fixture
def site(make_sqlite_store: Any, make_task: Callable[..., AsyncRouteTask]) -> Site:
    store = make_sqlite_store()
    store.open()
    return Site(store, make_task)


def test_a_task_whose_start_time_has_come_is_sent_once(site: Site) -> None:
    site.add_due("due", 0.1)
    assert site.check() == ["due"]
    assert site.check() == site.check() == []


def test_a_start_time_that_comes_soon_is_remembered(site: Site) -> None:
    task = site.add_due("soon", -0.4)
    site.add_due("late", -60)
    assert site.check() == [] and site.called_at == [task.start_at_us]


def test_old_tasks_with_a_start_time_are_not_sent_without_limit(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the process cannot remember more messages."""
    monkeypatch.setattr(module, "LONGEST_MEMORY", 0)
    for number in range(30):
        site.add_due(f"due-{number}", LATE)
    site.executor.count = 30
    assert site.check() == site.check() == []


def test_a_check_sends_a_limited_number_of_due_tasks(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    for number in range(7):
        site.add_due(f"due-{number}", 3 - number / 10)
    assert site.check() == ["due-0", "due-1", "due-2"]


def test_as_many_messages_are_sent_as_are_missing(site: Site) -> None:
    for number in range(5):
        site.add(f"task-{number}", LATE + 5 - number)
    site.executor.count = 3
    assert site.check() == ["task-0", "task-1"], "the oldest first"
    site.executor.count = 5
    assert site.check() == []


@pytest.mark.parametrize("age", [0, LOST_SECONDS - 1])
def test_new_tasks_are_not_taken_for_lost(site: Site, age: float) -> None:
    site.add("new", age)
    assert site.check() == []
    assert site.executor.counts == 0, "the broker is not asked in vain"


def test_the_messages_of_new_tasks_are_not_taken_for_those_of_old_ones(site: Site) -> None:
    site.add("lost", LATE)
    for number in range(3):
        site.add(f"new-{number}", number)
    site.executor.count = 3
    assert site.check() == ["lost"]


def test_overdue_messages_are_sent_in_small_numbers(site: Site) -> None:
    for number in range(MOST_OVERDUE + 5):
        site.add(f"task-{number}", OVERDUE)
    site.executor.count = 1_000_000
    assert len(site.check()) == MOST_OVERDUE
    assert len(site.check()) == 5
    assert site.check() == [], "each at most once a minute"


def test_overdue_messages_are_sent_if_the_broker_cannot_count(site: Site) -> None:
    site.add("late", LATE)
    site.add("overdue", OVERDUE)
    site.executor.count = None
    assert site.check() == ["overdue"]


def test_another_process_sends_nothing(site: Site) -> None:
    site.add("lost", LATE)
    site.add_due("due", 1)
    site.is_first = False
    assert site.check() == []


def test_any_process_sends_the_tasks_that_it_has_restarted(site: Site) -> None:
    task = site.add("restarted", OVERDUE)
    site.is_first = False
    site.messages.add(task)
    assert site.check() == ["restarted"] and site.check() == []
    site.is_first = True
    assert site.check() == [], "it was sent a moment ago"


def test_a_restarted_task_is_sent_later_if_the_broker_is_down(site: Site) -> None:
    site.is_first = False  # this process does not search for lost messages
    site.messages.add(site.add("restarted", LATE))
    site.executor.is_down = True
    assert site.check() == []
    site.executor.is_down = False
    assert site.check() == ["restarted"]
