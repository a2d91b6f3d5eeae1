"""The way out of a process, step by step: what runs, what waits, what comes too late, and a store that is away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, TaskAborted, current_task
from flask_asyncroute.drain import drain
from flask_asyncroute.errors import StoreUnavailable
from flask_asyncroute.executors.threads import ThreadTaskExecutor
from flask_asyncroute.runner import Runner
from flask_asyncroute.runtime import runtime_of

Eventually = Callable[..., Any]


class Place:
    """An app with views that a test holds in its hand."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.client = app.test_client()
        self.routes = AsyncRoute(app)
        self.begun = threading.Event()
        self.go = threading.Event()
        self.told: list[str] = []

        @app.put("/held")
        @self.routes.task(interrupt_after=None)
        def held() -> str:
            self.begun.set()
            self.go.wait(20)
            return "done"

        @app.put("/loop")
        @self.routes.task()
        def loop() -> None:
            self.begun.set()
            try:
                while True:
                    time.sleep(0.001)
            except TaskAborted:
                self.told.append(current_task.id)
                raise

        @app.put("/polite")
        @self.routes.task(on_loss="restart")
        def polite() -> None:
            current_task.progress = 40
            self.begun.set()
            current_task.sleep(20)
            current_task.check()

        @app.put("/obstinate")
        @self.routes.task(on_loss="restart", interrupt_after=None)
        def obstinate() -> None:
            self.begun.set()
            self.go.wait(20)

        @app.put("/coroutine")
        @self.routes.task()
        async def coroutine() -> None:
            self.begun.set()
            await asyncio.sleep(20)

        @app.put("/single")
        @self.routes.task(max_workers=1)
        def single() -> None:
            self.begun.set()
            self.go.wait(20)

    @property
    def runner(self) -> Runner:
        return runtime_of(self.app).runner

    def start(self, path: str) -> str:
        reply = self.client.put(path)
        assert reply.status_code == 202, reply.text
        return str(reply.json["Id"])

    def begin(self, path: str) -> str:
        """Start a task and wait until its view runs."""
        self.begun.clear()
        task_id = self.start(path)
        assert self.begun.wait(5)
        return task_id

    def task(self, task_id: str) -> Any:
        return self.client.get(f"/task/{task_id}").json

    def listed(self) -> list[str]:
        workers = self.runner.store.workers
        assert workers is not None
        return [worker.name for worker in workers.listed()]


@pytest.fixture
def place(make_app: Callable[..., Flask], gate: threading.Event) -> Any:
    made = Place(make_app())
    made.go = gate
    return made


def test_nothing_runs(place: Place) -> None:
    place.begin("/held")
    place.go.set()
    assert place.runner.dispatcher.wait_idle(5)
    assert place.listed() == [place.runner.lifecycle.owner]
    began = time.monotonic()
    drain({place.runner: 20})
    assert time.monotonic() - began < 1
    assert place.listed() == []


def test_what_ends_in_its_time_is_left_alone(place: Place) -> None:
    task_id = place.begin("/held")
    leaving = threading.Thread(target=drain, args=({place.runner: 20},))
    leaving.start()
    place.go.set()
    leaving.join(5)
    assert not leaving.is_alive()
    assert (place.task(task_id)["State"], place.task(task_id)["Result"]) == ("Completed", "done")
    assert place.listed() == []


def test_what_does_not_end_is_aborted(place: Place) -> None:
    """Its view is asked first, and interrupted soon, whatever the route's ``interrupt_after``."""
    task_id = place.begin("/loop")
    began = time.monotonic()
    drain({place.runner: 0.1})
    assert 0.1 <= time.monotonic() - began < 2
    found = place.task(task_id)
    assert (found["State"], found["Error"], found.get("Stopping")) == ("Aborted", "Server shutdown", None)
    assert place.told == [task_id]


def test_a_view_that_returns_when_asked_has_not_completed(place: Place) -> None:
    @place.app.put("/partly")
    @place.routes.task()
    def partly() -> str:
        place.begun.set()
        current_task.sleep(20)
        return "half of it"

    task_id = place.begin("/partly")
    drain({place.runner: 0})
    found = place.task(task_id)
    assert (found["State"], found["Error"]) == ("Aborted", "Server shutdown")
    assert "Result" not in found


def test_what_does_not_hear_is_left_to_the_exit(place: Place, eventually: Eventually) -> None:
    """The code ends with the process, a moment after the drain: nothing is said to be stopping for ever."""
    task_id = place.begin("/held")
    drain({place.runner: 0})
    found = place.task(task_id)
    assert (found["State"], found["Error"], found.get("Stopping")) == ("Aborted", "Server shutdown", None)
    place.go.set()
    assert place.runner.dispatcher.wait_idle(5)
    assert place.task(task_id)["Error"] == "Server shutdown", "a result that comes late is dropped"


@pytest.mark.parametrize("path", ["/polite", "/obstinate"])
def test_what_is_to_be_restarted_waits_again(place: Place, path: str) -> None:
    task_id = place.begin(path)
    drain({place.runner: 0})
    found = place.task(task_id)
    assert found["State"] == "NotStarted"
    assert not {"StartingTime", "ExpireTime", "Progress", "Error"} & found.keys()
    stored = place.runner.store.get(task_id)
    assert stored is not None
    assert (stored.owner, stored.restarts) == (None, 0), "a shutdown is no loss"
    place.go.set()
    assert place.runner.dispatcher.wait_idle(5)
    assert place.task(task_id)["State"] == "NotStarted"


def test_a_coroutine_is_cancelled(place: Place) -> None:
    task_id = place.begin("/coroutine")
    began = time.monotonic()
    drain({place.runner: 0})
    assert time.monotonic() - began < 0.9
    assert place.task(task_id)["Error"] == "Server shutdown"


def test_what_waits_stays_and_is_run_by_the_next(
    place: Place, make_app: Callable[..., Flask], eventually: Eventually
) -> None:
    running = place.begin("/single")
    waiting = [place.start("/single") for _ in range(3)]
    drain({place.runner: 0})
    place.go.set()
    assert place.runner.dispatcher.wait_idle(5)
    assert place.task(running)["Error"] == "Server shutdown"
    assert [place.task(task_id)["State"] for task_id in waiting] == ["NotStarted"] * 3
    runtime_of(place.app).close()
    following = Place(make_app(instance_path=place.app.instance_path))
    following.go = place.go
    following.client.get("/task/none")
    eventually(lambda: all(following.task(task_id)["State"] == "Completed" for task_id in waiting), 10)


def test_f02_a_backlog_of_one_route_keeps_no_other_waiting(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """What a process has left begins at once where there is a place, and goes on as places are free again."""

    def make(**config: Any) -> tuple[Flask, list[str]]:
        app, ran = make_app(**config), []
        routes = AsyncRoute(app)
        for path in ("/many", "/one"):
            routes.route(path, methods=["PUT"], max_workers=2, endpoint=path[1:])(lambda: ran.append(current_task.id))
        return app, ran

    app, _ = make()
    with monkeypatch.context() as idle:
        idle.setattr(ThreadTaskExecutor, "_start", lambda self, task_id: Future())
        left = [app.test_client().put("/many").json["Id"] for _ in range(60)]
        last = app.test_client().put("/one").json["Id"]
    runtime_of(app).close()
    app, ran = make(instance_path=app.instance_path)
    app.test_client().get("/task/none")
    eventually(lambda: last in ran, 10)
    assert len(ran) < 45, "the other route had places all along"
    eventually(lambda: set(ran) == {*left, last}, 10)
    assert len(ran) == 61


def test_what_waits_for_an_executor_of_the_app_is_aborted(place: Place) -> None:
    """No other process can run it."""
    with ThreadPoolExecutor(1) as pool:

        @place.app.put("/own")
        @place.routes.task(executor=pool)
        def own() -> None:
            place.begun.set()
            place.go.wait(20)

        running = place.begin("/own")
        waiting = place.start("/own")
        drain({place.runner: 0})
        assert {place.task(task_id)["Error"] for task_id in (running, waiting)} == {"Server shutdown"}
        place.go.set()


def test_one_that_cannot_be_settled_keeps_no_other_from_it(
    make_app: Callable[..., Flask], tmp_path: Path, gate: threading.Event
) -> None:
    """Neither an Executor of the app nor what cancels a run is ours: both may fail, in one app of several."""

    class Broken(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            return Unreachable()

    class Unreachable(Future[None]):
        def cancel(self) -> bool:
            raise RuntimeError("the cluster is gone")

    def fail() -> None:
        raise RuntimeError("its loop is closed")

    broken, good = (Place(make_app(instance_path=str(tmp_path / name))) for name in ("broken", "good"))
    broken.go = good.go = gate
    broken.app.put("/own")(broken.routes.task(executor=Broken())(lambda: None))
    broken.start("/own")
    ids = [(place, place.begin("/held")) for place in (broken, good)]
    execution, _ = broken.runner.dispatcher.running[ids[0][1]]
    execution.cancel_with(fail)
    drain({broken.runner: 0, good.runner: 0})
    assert [place.task(task_id)["Error"] for place, task_id in ids] == ["Server shutdown"] * 2


def test_a_start_that_slips_in_and_that_nobody_else_can_run_is_aborted(
    place: Place, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.app.put("/now")(place.routes.task(executor="immediate")(lambda: None))
    create = place.runner.lifecycle.create

    def create_late(*given: Any) -> None:
        drain({place.runner: 0})
        create(*given)

    monkeypatch.setattr(place.runner.lifecycle, "create", create_late)
    task_id = place.start("/now")
    eventually(lambda: place.task(task_id).get("Error") == "Server shutdown")


def test_a_start_that_slips_in_is_left_to_others(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was let in before the exit began, and stored after it: 202, and not begun here."""
    place.begin("/held")
    create = place.runner.lifecycle.create

    def create_late(*given: Any) -> None:
        drain({place.runner: 0})
        create(*given)

    monkeypatch.setattr(place.runner.lifecycle, "create", create_late)
    task_id = place.start("/polite")
    place.begun.clear()
    place.go.set()
    assert place.runner.dispatcher.wait_idle(5)
    assert not place.begun.is_set()
    assert place.task(task_id)["State"] == "NotStarted"


def test_a_start_that_comes_too_late_is_refused(place: Place) -> None:
    place.begin("/held")
    place.runner.dispatcher.is_closing = True
    before = len(list(place.client.get("/tasks").json))
    reply = place.client.put("/held")
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json["type"] == "urn:flask-asyncroute:shutting-down"
    assert len(place.client.get("/tasks").json) == before, "nothing was stored"


def test_a_store_that_is_away(place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The process goes all the same; it stays listed, so that others find what it ran."""
    task_id = place.begin("/held")

    def fail(*given: Any) -> Any:
        raise StoreUnavailable("not now")

    with monkeypatch.context() as away:
        away.setattr(place.runner.store, "update", fail)
        began = time.monotonic()
        drain({place.runner: 0})
        assert time.monotonic() - began < 3
        assert "Not all tasks could be settled at the exit" in caplog.text
        assert place.listed() == [place.runner.lifecycle.owner]
    assert place.task(task_id)["State"] == "Running"


def test_tasks_in_memory_have_their_time_too(make_app: Callable[..., Flask], gate: threading.Event) -> None:
    place = Place(make_app(ASYNCROUTE_STORE="memory://"))
    place.go = gate
    task_id = place.begin("/held")
    leaving = threading.Thread(target=drain, args=({place.runner: 20},))
    leaving.start()
    gate.set()
    leaving.join(5)
    assert place.task(task_id)["State"] == "Completed"


def test_f04_apps_of_one_process_share_the_time(
    make_app: Callable[..., Flask], tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither code that does not end nor stores that do not answer add up."""
    places = [Place(make_app(instance_path=str(tmp_path / str(number)))) for number in range(4)]
    is_back = threading.Event()
    for place in places:
        place.go = gate
        place.begin("/held")
        monkeypatch.setattr(place.runner.store, "update", lambda *given: is_back.wait(20) and None)
    began = time.monotonic()
    drain({place.runner: 0.1 for place in places})
    took = time.monotonic() - began
    is_back.set()
    gate.set()
    assert took < 0.1 + 1.5 + 0.5
