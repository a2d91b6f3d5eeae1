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
from flask_asyncroute.workers.overdue_runs import GRACE_SECONDS, OverdueRuns

CHILD = f"{CELERY_CHILD}7-name"
LONG, SHORT = GRACE_SECONDS + 2, GRACE_SECONDS - 2


class Site:
    """A store and the part of a web process that ends overdue runs."""

    def __init__(
        self, app: Flask, store: SharedTaskStore, make_task: Callable[..., AsyncRouteTask]
    ) -> None:
        self.store = store
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

    def begin(self, ago: float, timeout: float | None, owner: str = CHILD) -> None:
        """Store a task that a worker has claimed ``ago`` seconds ago."""
        began_us = now_us() - round(ago * 1_000_000)
        timeout_us = None if timeout is None else round(timeout * 1_000_000)
        task = self._make_task(created_us=began_us, timeout_us=timeout_us)
        self.store.add(task, b"", None, ())
        assert self.store.claim(task.id, owner, began_us) is not None

    def abort(self, ago: float, stopping: bool = True) -> None:
        completed_us = now_us() - round(ago * 1_000_000)
        values = {
            "state": State.ABORTED, "error": "Aborted by the user", "stopping": stopping,
            "completed_us": completed_us,
        }  # fmt: skip
        assert self.store.update("task", Expect((State.RUNNING,)), values) is not None

    def end(self) -> tuple[str, str | None, bool]:
        """Check all runs; return the task's state, error and whether its code still runs."""
        self.runs.end()
        task = self.store.get("task")
        assert task is not None
        return str(task.state), task.error, bool(task.stopping)


@pytest.fixture
def site(
    make_app: Callable[..., Flask],
    make_sqlite_store: Any,
    make_task: Callable[..., AsyncRouteTask],
) -> Site:
    store = make_sqlite_store()
    store.open()
    return Site(make_app(), store, make_task)


def test_an_expired_run_is_aborted_and_killed(site: Site) -> None:
    site.begin(LONG + 1, timeout=1)
    assert site.end() == ("Aborted", "Timeout", True)
    assert site.killed == ["task"]


@pytest.mark.parametrize("timeout", [None, LONG, LONG - SHORT])
def test_a_run_in_time_or_in_the_grace_period_continues(site: Site, timeout: float | None) -> None:
    site.begin(LONG, timeout)
    assert site.end() == ("Running", None, False)
    assert site.killed == []


def test_the_code_of_a_stopped_task_is_killed_again(site: Site) -> None:
    """The first command to kill is lost if the broker was down."""
    site.begin(LONG + 1, timeout=None)
    site.abort(LONG)
    assert site.end() == site.end() == ("Aborted", "Aborted by the user", True)
    assert site.killed == ["task", "task"]


@pytest.mark.parametrize(("ago", "stopping"), [(SHORT, True), (LONG, False)])
def test_code_that_can_still_stop_or_has_ended_is_left(
    site: Site, ago: float, stopping: bool
) -> None:
    site.begin(LONG + 1, timeout=None)
    site.abort(ago, stopping)
    site.end()
    assert site.killed == []


def test_runs_of_web_servers_are_left(site: Site) -> None:
    site.begin(LONG + 1, timeout=1, owner="7-web")
    assert site.end() == ("Running", None, False)


def test_another_process_ends_nothing(site: Site) -> None:
    site.begin(LONG + 1, timeout=1)
    site.is_first = False
    assert site.end() == ("Running", None, False)
