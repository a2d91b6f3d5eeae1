"""Workers in every shared store: the list, the tasks that each holds, and the endpoints with
waiting tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flask_asyncroute.stores.base import Expect, SharedTaskStore, Worker, Workers
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.task import AsyncRouteTask, State
from tests.support.tasks import pairs

NewTask = Callable[..., AsyncRouteTask]
T0 = 1_700_000_000_000_000
ONE = Worker("1-one", "place", 2**61, "pid:[1]/1/2", frozenset({"work", "é"}))


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> SharedTaskStore:
    made: SharedTaskStore = request.getfixturevalue(f"make_{request.param}_store")()
    made.open()
    return made


@pytest.fixture
def workers(store: SharedTaskStore) -> Workers:
    return store.workers


def test_is_shared_matches_the_type_of_the_store(store: SharedTaskStore) -> None:
    assert store.is_shared and isinstance(store, SharedTaskStore)
    assert not MemoryTaskStore().is_shared
    assert not isinstance(MemoryTaskStore(), SharedTaskStore)


def test_enter_beat_and_leave(store: SharedTaskStore, workers: Workers) -> None:
    change = store.newest()
    assert workers.listed() == []
    workers.enter(ONE)
    assert workers.listed() == [ONE]
    assert [workers.beat("1-one") for _ in range(3)] == [True] * 3
    assert [worker.beat for worker in workers.listed()] == [3]
    workers.enter(Worker("1-one", "", 7, "", frozenset()))
    assert workers.listed() == [Worker("1-one", "", 7, "", frozenset())], (
        "it is listed once, with its new values"
    )
    workers.leave("1-one")
    workers.leave("1-one")
    assert workers.listed() == []
    assert not workers.beat("1-one")
    assert store.newest() == change, "workers do not change the change number"


def test_a_worker_lists_the_endpoints_that_it_runs_and_the_views_of_its_app(
    workers: Workers,
) -> None:
    views = {"work": ["shop", "/srv", "shop.work"], "mail": ["shop", "/srv", "shop.mail"]}
    shown = Worker("1-one", "place", 1, "pid", frozenset({"mail"}), views=views)
    workers.enter(shown)
    assert workers.listed() == [shown]


def test_a_worker_lists_the_views_of_its_app(workers: Workers) -> None:
    views = {"work": ["shop", "/srv/é", "shop.work"], "mail": ["shop", "/srv/é", "shop.mail"]}
    shown = Worker("1-one", "place", 1, "pid", frozenset(views), views=views)
    workers.enter(shown)
    assert workers.listed() == [shown]


def test_each_namespace_has_its_own_workers(
    request: pytest.FixtureRequest, workers: Workers, store: SharedTaskStore
) -> None:
    kind = "sqlite" if "sqlite" in request.node.name else "postgresql"
    other: SharedTaskStore = request.getfixturevalue(f"make_{kind}_store")("other")
    other.open()
    workers.enter(ONE)
    assert other.workers.listed() == []
    assert not other.workers.beat("1-one")
    other.workers.leave("1-one")
    assert workers.listed() == [ONE]


def test_held_returns_running_and_stopping_tasks_of_a_worker(
    store: SharedTaskStore, workers: Workers, make_task: NewTask
) -> None:
    for name, owner in (
        ("waits", None),
        ("mine", "me"),
        ("ended", "me"),
        ("stopping", "me"),
        ("theirs", "they"),
    ):
        store.add(make_task(name), b"", None, ())
        if owner is not None:
            assert store.claim(name, owner, T0) is not None
    store.update("ended", Expect((State.RUNNING,)), {"state": State.COMPLETED, "completed_us": T0})
    store.update(
        "stopping",
        Expect((State.RUNNING,)),
        {"state": State.ABORTED, "completed_us": T0, "stopping": True},
    )
    assert sorted(workers.owners()) == ["me", "they"]
    held = sorted(workers.held("me"), key=lambda task: task.id)
    assert held == [store.get("mine"), store.get("stopping")]
    assert workers.held("nobody") == []
    store.update("stopping", Expect((State.ABORTED,)), {"stopping": False})
    store.update("mine", Expect((State.RUNNING,)), {"state": State.FAILED, "completed_us": T0})
    assert workers.owners() == ["they"]
    assert workers.held("me") == []


def test_wanted_returns_the_endpoints_of_waiting_tasks(
    store: SharedTaskStore, workers: Workers, make_task: NewTask
) -> None:
    for number, endpoint in enumerate(["a", "b", "a", "c"]):
        store.add(make_task(f"t{number}", endpoint=endpoint), b"", None, ())
    store.claim("t3", "me", T0)
    assert sorted(workers.wanted()) == ["a", "b"]


def test_a_restarted_task_waits_like_a_new_task(store: SharedTaskStore, make_task: NewTask) -> None:
    store.add(make_task(timeout_us=10), b"request", None, [("roles", "r")])
    first = store.claim("task", "me", T0)
    assert first is not None
    values = {
        "state": State.NOT_STARTED,
        "owner": None,
        "started_us": None,
        "expires_us": None,
        "restarts": 1,
    }
    back = store.update("task", Expect((State.RUNNING,), "me", first.task.epoch), values)
    assert back is not None
    assert (back.state, back.owner, back.started_us, back.expires_us, back.restarts) == (
        State.NOT_STARTED,
        *[None] * 3,
        1,
    )
    assert pairs(store.waiting({"work": 9}, 2 * T0)) == [("task", "work")]
    assert store.claim("task", "they", T0 + 5) is not None
    again = store.get("task")
    assert again is not None
    assert (again.owner, again.epoch, again.started_us, again.restarts) == (
        "they",
        first.task.epoch + 1,
        T0 + 5,
        1,
    )
    late = {"state": State.COMPLETED, "completed_us": T0}
    assert store.update("task", Expect((State.RUNNING,), "me", first.task.epoch), late) is None
