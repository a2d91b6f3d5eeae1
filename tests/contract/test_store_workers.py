"""The port of workers, on every store that has one: who is listed, what each holds, what is waited for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flask_asyncroute.states import State
from flask_asyncroute.stores.base import Expect, TaskStore, Worker, Workers
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
ONE = Worker("1-one", "place", 2**61, "pid:[1]/1/2", frozenset({"work", "é"}))


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> TaskStore:
    made: TaskStore = request.getfixturevalue(f"make_{request.param}_store")()
    made.open()
    return made


@pytest.fixture
def workers(store: TaskStore) -> Workers:
    assert store.workers is not None
    return store.workers


def test_a_store_of_one_process_has_no_workers() -> None:
    assert MemoryTaskStore().workers is None
    assert not MemoryTaskStore().is_shared


def test_a_worker_enters_beats_and_leaves(store: TaskStore, workers: Workers) -> None:
    change = store.news(-1).change
    assert workers.listed() == []
    workers.enter(ONE)
    assert workers.listed() == [ONE]
    assert [workers.beat("1-one") for _ in range(3)] == [True] * 3
    assert [worker.beat for worker in workers.listed()] == [3]
    workers.enter(Worker("1-one", "", 7, "", frozenset()))
    assert workers.listed() == [Worker("1-one", "", 7, "", frozenset())], "it is listed once, as it is now"
    workers.leave("1-one")
    workers.leave("1-one")
    assert workers.listed() == []
    assert not workers.beat("1-one")
    assert store.news(-1).change == change, "none of this is news of a task"


def test_namespaces_have_workers_of_their_own(
    request: pytest.FixtureRequest, workers: Workers, store: TaskStore
) -> None:
    kind = "sqlite" if "sqlite" in request.node.name else "postgresql"
    other: TaskStore = request.getfixturevalue(f"make_{kind}_store")("other")
    other.open()
    assert other.workers is not None
    workers.enter(ONE)
    assert other.workers.listed() == []
    assert not other.workers.beat("1-one")
    other.workers.leave("1-one")
    assert workers.listed() == [ONE]


def test_what_a_worker_holds(store: TaskStore, workers: Workers, make_task: NewTask) -> None:
    for name, owner in (("waits", None), ("mine", "me"), ("ended", "me"), ("stopping", "me"), ("theirs", "they")):
        store.add(make_task(name), b"", None, ())
        if owner is not None:
            assert store.claim(name, owner, T0) is not None
    store.update("ended", Expect((State.RUNNING,)), {"state": State.COMPLETED, "completed_us": T0})
    store.update("stopping", Expect((State.RUNNING,)), {"state": State.ABORTED, "completed_us": T0, "stopping": True})
    assert sorted(workers.owners()) == ["me", "they"]
    held = sorted(workers.held("me"), key=lambda task: task.id)
    assert held == [store.get("mine"), store.get("stopping")]
    assert workers.held("nobody") == []
    store.update("stopping", Expect((State.ABORTED,)), {"stopping": False})
    store.update("mine", Expect((State.RUNNING,)), {"state": State.FAILED, "completed_us": T0})
    assert workers.owners() == ["they"]
    assert workers.held("me") == []


def test_what_is_wanted(store: TaskStore, workers: Workers, make_task: NewTask) -> None:
    for number, endpoint in enumerate(["a", "b", "a", "c"]):
        store.add(make_task(f"t{number}", endpoint=endpoint), b"", None, ())
    store.claim("t3", "me", T0)
    assert sorted(workers.wanted()) == ["a", "b"]


def test_a_task_that_is_put_back_waits_as_before(store: TaskStore, make_task: NewTask) -> None:
    store.add(make_task(timeout_us=10), b"request", None, [("roles", "r")])
    first = store.claim("task", "me", T0)
    assert first is not None
    values = {"state": State.NOT_STARTED, "owner": None, "started_us": None, "expires_us": None, "restarts": 1}
    back = store.update("task", Expect((State.RUNNING,), "me", first.task.epoch), values)
    assert back is not None
    assert (back.state, back.owner, back.started_us, back.expires_us, back.restarts) == (
        State.NOT_STARTED,
        *[None] * 3,
        1,
    )
    assert store.waiting({"work": 9}, 2 * T0) == [("task", "work")]
    assert store.claim("task", "they", T0 + 5) is not None
    again = store.get("task")
    assert again is not None
    assert (again.owner, again.epoch, again.started_us, again.restarts) == ("they", first.task.epoch + 1, T0 + 5, 1)
    late = {"state": State.COMPLETED, "completed_us": T0}
    assert store.update("task", Expect((State.RUNNING,), "me", first.task.epoch), late) is None
