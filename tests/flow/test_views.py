"""Stops of running tasks: a view is asked to stop, interrupted, or runs to its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flask_asyncroute import TaskAborted, current_task
from tests.support.flow import NOT_ON_CELERY, Flow, problem

MakeFlow = Callable[..., Flow]


def spin(until: threading.Event, seconds: float = 10) -> None:
    """Compute in Python without checking for a stop. The thread can be interrupted."""
    end = time.monotonic() + seconds
    while not until.is_set() and time.monotonic() < end:
        sum(range(100))


def test_a_running_task_is_aborted_at_once_and_stopping_until_it_ends(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    @flow.route(interrupt_after=None)
    def work() -> str:
        begun.release()
        gate.wait(10)
        return "late"

    task = flow.start()
    assert begun.acquire(timeout=5)
    stopped = flow.stop(task)
    assert (stopped["State"], stopped["Error"], stopped["Stopping"], stopped["IsCompleted"]) == (
        "Aborted", "Aborted by the user", True, True,
    )  # fmt: skip
    assert stopped["CreationTime"] <= stopped["StartingTime"] <= stopped["CompletedTime"]
    found = flow.request("GET", f"/task/{task['Id']}")
    assert found.get_json() == stopped and "Retry-After" not in found.headers
    again = flow.stop(task)
    assert again == stopped, "a second stop is answered 200"
    gate.set()
    ended = flow.still(task)
    assert "Stopping" not in ended and "Result" not in ended
    assert ended == {key: value for key, value in stopped.items() if key != "Stopping"}
    etag = flow.request("GET", f"/task/{task['Id']}").headers["ETag"]
    assert etag != found.headers["ETag"], "the end of Stopping raises the revision"
    assert flow.stop(task) == ended


def test_a_stop_is_visible_in_the_view(flow: Flow, executor: Any) -> None:
    begun, seen = threading.Event(), []

    @flow.route(executor=executor)
    def work() -> str:
        begun.set()
        seen.append(current_task.stop_requested)
        seen.append(current_task.sleep(10))
        seen.append(current_task.stop_requested)
        with pytest.raises(TaskAborted):
            current_task.check()
        return "late"

    answers: list[Any] = []
    starter = threading.Thread(target=lambda: answers.append(flow.app.test_client().post("/work")))
    starter.start()
    assert begun.wait(5)
    [task_id] = flow.ids()
    at = time.monotonic()
    assert flow.stop(task_id)["State"] == "Aborted"
    starter.join(5)
    flow.still(task_id)
    assert time.monotonic() - at < 1
    assert seen == [False, False, True]
    assert answers[0].status_code == 202
    if executor == "immediate":
        assert answers[0].get_json()["State"] == "Aborted"


def test_a_view_that_does_not_check_is_interrupted(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    ended: list[str] = []

    @flow.route(interrupt_after=0.1, max_workers=1)
    def work() -> None:
        try:
            begun.release()
            spin(gate)
        except TaskAborted:
            ended.append("interrupted")
            raise
        finally:
            ended.append("cleaned up")

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    assert flow.still(task)["State"] == "Aborted"
    assert ended == ["interrupted", "cleaned up"]
    gate.set()
    assert flow.run()["State"] == "Completed"


def test_without_interrupt_after_a_view_is_not_interrupted(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    ended: list[str] = []

    @flow.route(interrupt_after=None)
    def work() -> None:
        begun.release()
        spin(gate)
        ended.append("by itself")

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    assert not gate.wait(0.3)
    assert flow.get(task)["Stopping"] is True
    gate.set()
    flow.still(task)
    assert ended == ["by itself"]


@pytest.mark.covers("F14")
def test_a_view_that_catches_every_exception_is_stopping_until_it_ends(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    """Its late result is dropped, and another thread takes over its slot."""
    caught: list[str] = []

    @flow.route("/ignores_stop", interrupt_after=0, max_workers=1, queue_size=1, pool="p")
    def ignores_stop() -> str:
        begun.release()
        while not gate.is_set():
            try:
                spin(gate)
            except BaseException as error:
                caught.append(type(error).__name__)
        return "late"

    @flow.route("/quick", interrupt_after=0, max_workers=1, queue_size=1, pool="p")
    def quick() -> str:
        return "done"

    task = flow.start("/ignores_stop")
    assert begun.acquire(timeout=5)
    assert flow.stop(task)["Stopping"] is True
    for _ in range(3):
        assert flow.result("/quick") == "done", "another thread of the pool has the slot"
    assert flow.get(task)["Stopping"] is True
    flow.purge(task, status=409)
    gate.set()
    ended = flow.still(task)
    assert ended["State"] == "Aborted" and "Result" not in ended
    assert caught == ["TaskAborted"]
    for _ in range(3):
        assert flow.result("/quick") == "done"


@pytest.mark.covers("F14")
def test_at_most_max_workers_stopping_views_are_replaced(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore
) -> None:
    """Others keep their slots, so a pool has at most twice ``max_workers`` threads per process."""

    @flow.route(interrupt_after=None, max_workers=2, queue_size=0)
    def work() -> None:
        begun.release()
        gate.wait(10)

    tasks = []
    for _ in range(4):
        task = flow.start()
        assert begun.acquire(timeout=5)
        flow.stop(task)
        tasks.append(task)
    problem(flow.request("POST", "/work"), 503, "queue-full")
    gate.set()
    for task in tasks:
        flow.still(task)
    assert flow.run()["State"] == "Completed"


@NOT_ON_CELERY
@pytest.mark.covers("F18")
def test_a_waiting_task_that_is_stopped_never_starts(
    flow: Flow, gate: threading.Event, later_executor: Any
) -> None:
    ran: list[str] = []

    @flow.route("/<name>", max_workers=2, queue_size=2, executor=later_executor)
    def work(name: str) -> None:
        ran.append(name)
        gate.wait(10)

    running = [flow.start("/a"), flow.start("/b")]
    for task in running:
        flow.became(task, "Running")
    waiting = [flow.start("/c"), flow.start("/d")]
    problem(flow.request("POST", "/x"), 503, "queue-full")
    for task in waiting:
        stopped = flow.stop(task)
        assert (stopped["State"], stopped["Error"]) == ("Aborted", "Aborted by the user")
        assert not {"Stopping", "StartingTime", "ExpireTime"} & set(stopped)
    later = [flow.start("/e"), flow.start("/f")]
    problem(flow.request("POST", "/x"), 503, "queue-full")
    gate.set()
    for task in (*running, *later):
        flow.ended(task)
    assert sorted(ran) == ["a", "b", "e", "f"]


def test_a_stop_of_a_task_that_is_not_cancellable_is_refused(
    flow: Flow, gate: threading.Event
) -> None:
    @flow.route(cancellable=False)
    def work() -> str:
        gate.wait(10)
        return "done"

    task = flow.start()
    assert task["Cancellable"] is False
    found = problem(flow.request("DELETE", f"/task/{task['Id']}"), 423, "not-cancellable")
    assert found["Id"] == task["Id"]
    gate.set()
    assert flow.ended(task)["Result"] == "done"


def test_a_late_result_of_a_stopped_task_is_dropped(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore, later_executor: Any
) -> None:
    @flow.route(executor=later_executor)
    def work() -> str:
        begun.release()
        gate.wait(10)
        current_task.progress = 70
        return "late"

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    gate.set()
    ended = flow.still(task)
    assert ended["State"] == "Aborted" and not {"Result", "Progress"} & set(ended)


def test_a_view_on_an_executor_of_the_app_is_not_interrupted(
    flow: Flow, gate: threading.Event, begun: threading.Semaphore, own_pool: ThreadPoolExecutor
) -> None:
    @flow.route(executor=own_pool, interrupt_after=0)
    def work() -> None:
        begun.release()
        spin(gate)

    task = flow.start()
    assert begun.acquire(timeout=5)
    flow.stop(task)
    assert not gate.wait(0.2)
    assert flow.get(task)["Stopping"] is True
    gate.set()
    flow.still(task)
