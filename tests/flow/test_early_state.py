"""Use of shared state while a module builds the app: it opens the store and freezes nothing."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute, ConfigurationError, StoreUnavailable
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.stores.sql.store import SQLTaskStore
from flask_asyncroute.testing import inline
from tests.support.apps import close_app, new_app
from tests.support.flow import Flow
from tests.support.waiting import eventually_true

MakeApp = Callable[..., Flask]

MODULE = """
from flask import Flask
from flask_asyncroute import AsyncRoute

early = Flask("early_app", instance_path={folder!r})
early.config.update(TESTING=True, ASYNCROUTE_STORE={store!r})
async_routes = AsyncRoute(early)

@async_routes.route("/child", methods=["POST"], executor="process")
def child():
    return dict(async_routes.state)

@async_routes.route("/quick", methods=["POST"], executor="process")
def quick():
    return "done"

with early.app_context():
    async_routes.state["greeting"] = "Hello"
    async_routes.state.apply("loads", lambda count: count + 1, default=0)
    assert async_routes.state["greeting"] == "Hello"

@async_routes.route("/late", methods=["POST"])
def late():
    return dict(async_routes.state)

app = early
"""


STARTING = """
import threading
from flask import Flask
from flask_asyncroute import AsyncRoute

app = Flask("early_app", instance_path={folder!r})
app.config.update(TESTING=True, ASYNCROUTE_STORE={store!r})
async_routes = AsyncRoute(app)

@async_routes.route("/threads", methods=["POST"], executor="process")
def threads():
    return [thread.name for thread in threading.enumerate()]

async_routes.start(app)
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Flow]]:
    """Return ``load(store, text)``, which imports a module that builds an app."""
    loaded: list[Flask] = []

    def load(store: str, text: str = MODULE) -> Flow:
        (tmp_path / "early_app.py").write_text(text.format(folder=str(tmp_path), store=store))
        monkeypatch.syspath_prepend(str(tmp_path))
        import early_app  # type: ignore[import-not-found]

        loaded.append(early_app.app)
        return Flow(early_app.app, early_app.async_routes)

    yield load
    for app in loaded:
        close_app(app)
    sys.modules.pop("early_app", None)


def test_state_set_in_a_module_before_its_routes_are_complete(
    load: Callable[..., Flow], store_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flow = load(store_url)
    assert flow.result("/late") == {"greeting": "Hello", "loads": 1}
    if store_url == "memory://":
        quick = flow.ended(flow.start("/quick"), 30)
        assert quick["Result"] == "done", "loading the app sets state in a child too"
        assert "cannot access tasks" in flow.ended(flow.start("/child"), 30)["Error"]
    else:
        for _ in range(2):
            child = flow.ended(flow.start("/child"), 30)
            assert child["Result"] == {"greeting": "Hello", "loads": 2}, "the fork server loads it"
    assert "import the app again" not in capfd.readouterr().err


def test_start_in_a_module_has_no_effect_in_children(
    load: Callable[..., Flow], store_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flow = load(store_url, STARTING)
    task = flow.ended(flow.start("/threads"), 30)
    assert [name for name in task["Result"] if name.startswith("asyncroute")] == []
    assert "import the app again" not in capfd.readouterr().err


def own_threads() -> set[threading.Thread]:
    """Return the running threads of all apps.

    A thread without a name may appear at any time: it closes a garbage-collected app of an earlier
    test.
    """
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncroute")}


def test_state_in_a_factory_freezes_no_setting_and_starts_no_thread(
    make_app: MakeApp, store_url: str
) -> None:
    async_routes = AsyncRoute()
    app = make_app(ASYNCROUTE_STORE=store_url)
    with app.app_context():
        with pytest.raises(ConfigurationError, match="init_app"):
            async_routes.state["x"] = 1
    async_routes.init_app(app)
    before = own_threads()
    with app.app_context():
        assert async_routes.state.setdefault("x", 1) == 1
        assert list(async_routes.state) == ["x"]
    assert own_threads() <= before
    app.config["ASYNCROUTE_ACCEPTED_STATUS"] = 200
    async_routes.route("/work", methods=["POST"])(lambda: async_routes.state["x"])
    flow = Flow(app, async_routes)
    assert flow.ended(flow.start(status=200))["Result"] == 1


def test_the_runner_uses_the_store_that_state_opened(
    make_app: MakeApp, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no second SQLite connection or PostgreSQL pool. A function that returns an Engine is
    called once.
    """
    opened: list[object] = []
    for kind in (MemoryTaskStore, SQLTaskStore):
        monkeypatch.setattr(
            kind,
            "__init__",
            lambda self, *arguments, init=kind.__init__: (
                opened.append(self) or init(self, *arguments)
            ),
        )
    app = make_app(ASYNCROUTE_STORE=store_url)
    flow = Flow(app, AsyncRoute(app))
    with app.app_context():
        flow.async_routes.state["x"] = 1
        early = opened[0]
    flow.route()(lambda: flow.async_routes.state["x"])
    assert flow.result() == 1
    from flask_asyncroute.runtime import runtime_of

    assert runtime_of(app).runner.store is early


@pytest.mark.parametrize("key", ["STORE", "NAMESPACE"])
def test_a_store_setting_changed_after_use_of_state_is_an_error(
    make_app: MakeApp, tmp_path: Path, key: str
) -> None:
    app = make_app()
    flow = Flow(app, AsyncRoute(app))
    flow.route()(lambda: flow.async_routes.state["x"])
    with app.app_context():
        flow.async_routes.state["x"] = 1
    app.config[f"ASYNCROUTE_{key}"] = {"STORE": "memory://", "NAMESPACE": "other"}[key]
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"ASYNCROUTE_{key}.*state.*before"):
            flow.client.post("/work")
    del app.config[f"ASYNCROUTE_{key}"]
    assert flow.result() == 1


def test_the_store_may_change_after_it_could_not_be_opened(
    make_app: MakeApp, tmp_path: Path
) -> None:
    blocker = tmp_path / "folder"
    blocker.write_text("a file, not a folder")
    app = make_app(ASYNCROUTE_STORE=f"sqlite:///{blocker}/tasks.db")
    flow = Flow(app, AsyncRoute(app))
    flow.route()(lambda: flow.async_routes.state["x"])
    with app.app_context():
        with pytest.raises(StoreUnavailable):
            flow.async_routes.state["x"] = 1
        app.config["ASYNCROUTE_STORE"] = "memory://"
        flow.async_routes.state["x"] = 2
    assert flow.result() == 2


def test_each_inline_block_starts_with_the_state_in_memory(make_app: MakeApp) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    flow = Flow(app, AsyncRoute(app))
    state = flow.async_routes.state
    flow.route()(lambda: state.apply("hits", lambda hits: hits + 1))
    with app.app_context():
        state["hits"] = 1
    for _ in range(2):
        with inline(app):
            assert flow.result() == 2
            assert flow.result() == 3
    assert flow.result() == 2


def test_inline_does_not_use_the_store(make_app: MakeApp) -> None:
    app = make_app()
    flow = Flow(app, AsyncRoute(app))
    state = flow.async_routes.state
    flow.route()(lambda: sorted(state))
    with app.app_context():
        state["file"] = 1
        for _ in range(2):
            with inline(app):
                state["memory"] = 1
                assert flow.result() == ["memory"]
    assert flow.result() == ["file"]


def test_a_forked_child_does_not_use_the_connection_of_the_parent(
    make_app: MakeApp, store_url: str
) -> None:
    app = make_app(ASYNCROUTE_STORE=store_url)
    flow = Flow(app, AsyncRoute(app))
    state = flow.async_routes.state
    flow.route()(lambda: state.apply("n", lambda n: n + 1))
    with app.app_context():
        state["n"] = 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if flow.result() == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with app.app_context():
        assert state["n"] == (1 if store_url == "memory://" else 2)
    assert flow.result() == (2 if store_url == "memory://" else 3)


def test_garbage_collection_of_an_app_that_only_used_state_closes_its_store(
    tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    for store in (MemoryTaskStore, SQLTaskStore):
        monkeypatch.setattr(
            store, "close", lambda self, close=store.close: (close(self), closed.append(store_url))
        )

    def use_one() -> weakref.ref[Flask]:
        app = new_app("dropped", tmp_path, {"ASYNCROUTE_STORE": store_url})
        async_routes = AsyncRoute(app)
        with app.app_context():
            async_routes.state["x"] = 1
        return weakref.ref(app)

    dropped = use_one()
    eventually_true(lambda: gc.collect() is not None and dropped() is None)
    eventually_true(lambda: closed == [store_url])
