"""Which runs of Celery workers another process ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute.engine.lifecycle import Lifecycle
from flask_asyncroute.executors.registry import CELERY_CHILD
from flask_asyncroute.stores.base import Expect, SharedTaskStore
from flask_asyncroute.task import AsyncRouteTask, State, now_us
from flask_asyncroute.workers import overdue_runs as module
from flask_asyncroute.workers.overdue_runs import GRACE_SECONDS, OverdueRuns

CHILD = f"{CELERY_CHILD}7-name"
STEP = 2.0
"""Seconds between two checks."""


class Clock:
    """A manual clock in place of the module's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Site:
    """A store and the part of a web process that ends overdue runs."""

    def __init__(
        self, app: Flask, store: SharedTaskStore, make_task: Callable[..., AsyncRouteTask],
        clock: Clock,
    ) -> None:  # fmt: skip
        self.store = store
        self.clock = clock
        self.killed: list[str] = []
        self.is_first = True
        self._make_task = make_task
        route: Any = object()
        executor: Any = self
        self.runs = OverdueRuns(
            store, Lifecycle(app, store, "web"), {"work": route}, lambda route: executor,
            lambda: self.is_first,
        )  # fmt: skip

    def cancel(self, task: AsyncRouteTask) -> None:
        """Stand in for the executor."""
        assert (task.state, task.owner) == (State.ABORTED, CHILD)
        self.killed.append(task.id)

    def begin(self, timeout: float | None, owner: str = CHILD) -> None:
        """Store a task that a worker has claimed one second ago."""
        began_us = now_us() - 1_000_000
        timeout_us = None if timeout is None else round(timeout * 1_000_000)
        task = self._make_task(created_us=began_us, timeout_us=timeout_us)
        self.store.add(task, b"", None, ())
        assert self.store.claim(task.id, owner, began_us) is not None

    def update(self, state: State, stopping: bool = False) -> None:
        values = {"state": state, "stopping": stopping, "completed_us": now_us()}
        assert self.store.update("task", Expect((State.RUNNING,)), values) is not None

    def check(self, seconds: float) -> tuple[str, str | None, bool]:
        """Check the runs for this long; return the task's state, error and whether its code still
        runs.
        """
        end = self.clock.now + seconds
        while True:
            self.runs.end()
            if self.clock.now >= end:
                break
            self.clock.now += STEP
        task = self.store.get("task")
        assert task is not None
        return str(task.state), task.error, bool(task.stopping)


@pytest.fixture
def site(
    make_app: Callable[..., Flask],
    make_sqlite_store: Any,
    make_task: Callable[..., AsyncRouteTask],
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    store = make_sqlite_store()
    store.open()
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return Site(make_app(), store, make_task, clock)


def test_an_expired_run_is_aborted_and_killed(site: Site) -> None:
    site.begin(timeout=0.5)
    assert site.check(GRACE_SECONDS - STEP) == ("Running", None, False)
    assert site.killed == []
    assert site.check(STEP) == ("Aborted", "Timeout", True)
    assert site.killed == ["task"]


@pytest.mark.parametrize("timeout", [None, 3600])
def test_a_run_in_time_continues(site: Site, timeout: float | None) -> None:
    site.begin(timeout)
    assert site.check(2 * GRACE_SECONDS) == ("Running", None, False)
    assert site.killed == []


def test_the_code_of_a_stopped_task_is_killed_again(site: Site) -> None:
    """The first command to kill is lost if the broker was down."""
    site.begin(timeout=None)
    site.update(State.ABORTED, stopping=True)
    site.check(GRACE_SECONDS - STEP)
    assert site.killed == []
    assert site.check(2 * STEP) == ("Aborted", None, True)
    assert site.killed == ["task", "task"]


@pytest.mark.parametrize("state", [State.COMPLETED, State.ABORTED])
def test_a_run_that_ends_in_the_grace_period_is_left(site: Site, state: State) -> None:
    site.begin(timeout=0.5)
    site.check(GRACE_SECONDS - STEP)
    site.update(state)
    assert site.check(2 * GRACE_SECONDS) == (state, None, False)
    assert site.killed == []


def test_the_grace_period_begins_again_after_the_store_was_down(site: Site) -> None:
    """The view can have ended in time, and its worker is about to store the outcome."""
    site.begin(timeout=0.5)
    site.check(STEP)
    site.clock.now += 10 * GRACE_SECONDS
    assert site.check(GRACE_SECONDS - STEP) == ("Running", None, False)
    assert site.check(STEP) == ("Aborted", "Timeout", True)


def test_runs_of_web_servers_are_left(site: Site) -> None:
    site.begin(timeout=0.5, owner="7-web")
    assert site.check(2 * GRACE_SECONDS) == ("Running", None, False)


def test_another_process_ends_nothing(site: Site) -> None:
    site.begin(timeout=0.5)
    site.is_first = False
    assert site.check(2 * GRACE_SECONDS) == ("Running", None, False)
