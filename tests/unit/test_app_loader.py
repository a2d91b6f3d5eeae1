"""The import path by which a child process loads the app. The parent process reports errors that it
can detect.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import Access, AsyncRoute, app_loader, config
from flask_asyncroute.errors import ConfigurationError

MakeApp = Callable[..., Flask]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return an empty imported module, ``made_up``."""
    empty = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", empty)
    return empty


def app_factory() -> Flask:
    return Flask("made_up")


@pytest.mark.parametrize(
    "names",
    [
        {"app": 0},
        {"application": 0},
        {"anything": 0},
        {"create_app": 1},
        {"make_app": 1},
        {"app": 0, "other": 0},
    ],
)
def test_a_module_name_is_enough_if_flask_would_find_the_app(
    module: ModuleType, names: dict[str, int]
) -> None:
    for name, kind in names.items():
        setattr(module, name, app_factory if kind else app_factory())
    assert app_loader.found(Flask("made_up"), None) == "made_up"


@pytest.mark.parametrize("names", [[], ["one", "two"]])
def test_a_module_with_no_app_or_two_apps_is_refused(module: ModuleType, names: list[str]) -> None:
    for name in names:
        setattr(module, name, app_factory())
    with pytest.raises(ConfigurationError, match="Set ASYNCROUTE_APP"):
        app_loader.found(Flask("made_up"), None)


@pytest.mark.parametrize("name", ["thing", "thing()", "thing('a', b=5)"])
def test_a_missing_name_in_a_module_is_refused(module: ModuleType, name: str) -> None:
    with pytest.raises(ConfigurationError, match="'made_up' has no 'thing'"):
        app_loader.found(Flask("x"), f"made_up:{name}")
    module.thing = app_factory  # type: ignore[attr-defined]
    assert app_loader.found(Flask("x"), f"made_up:{name}") == f"made_up:{name}"


def test_found_does_not_import_the_module() -> None:
    assert "this" not in sys.modules
    assert app_loader.found(Flask("x"), "this:app") == "this:app"
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "path", ["no_such_module", "no_such.module:app", "json.no_such:app", "sys.path:app"]
)
def test_an_unknown_module_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_APP: the module .* was not found"):
        app_loader.found(Flask("x"), path)


def test_main_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="__main__.*Set ASYNCROUTE_APP"):
        app_loader.found(Flask("__main__"), None)


def test_load_accepts_a_module_an_attribute_or_a_call(module: ModuleType) -> None:
    module.app = app_factory()  # type: ignore[attr-defined]
    module.make = app_factory  # type: ignore[attr-defined]
    assert app_loader.load("made_up") is module.app
    assert app_loader.load("made_up:app") is module.app
    assert app_loader.load("made_up:make()").import_name == "made_up"


@pytest.mark.parametrize(
    "error", [ValueError("bad"), SystemExit(3), ImportError("gone"), KeyError("x")]
)
def test_an_error_while_loading_names_the_key(module: ModuleType, error: BaseException) -> None:
    def make() -> Any:
        raise error

    module.make = make  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigurationError,
        match=f"ASYNCROUTE_APP: loading 'made_up:make..' failed.*{type(error).__name__}",
    ):
        app_loader.load("made_up:make()")


def test_a_child_takes_the_configuration_of_its_parent(make_app: MakeApp, tmp_path: Path) -> None:
    parent = make_app(
        ASYNCROUTE_MAX_RESULT=5, ASYNCROUTE_TIMEOUT=timedelta(minutes=1), ASYNCROUTE_SNAPSHOT_DROP=["Cookie"],
        ASYNCROUTE_ADMINS=Access(roles=["admin"]), ASYNCROUTE_URL_PREFIX="/api", ASYNCROUTE_ID_GENERATOR=lambda: "x",
        SECRET_KEY="parent",
    )  # fmt: skip
    values, own = config.values_for_child(parent, config.read(parent))
    assert values == {
        "ASYNCROUTE_NAMESPACE": "app", "ASYNCROUTE_STORE": f"sqlite:///{tmp_path}/instance-0/asyncroute.db",
        "ASYNCROUTE_MAX_RESULT": 5, "ASYNCROUTE_TIMEOUT": 60.0, "ASYNCROUTE_SNAPSHOT_DROP": ["Cookie"],
    }  # fmt: skip
    child = make_app(
        "another", ASYNCROUTE_MAX_RESULT=7, ASYNCROUTE_MAX_BODY=8, ASYNCROUTE_URL_PREFIX="/x", ASYNCROUTE_ADMINS=None,
        SECRET_KEY="child",
    )  # fmt: skip
    config.take_values(child, values, own)
    found = {name: value for name, value in child.config.items() if name.startswith("ASYNCROUTE_")}
    assert found == {**values, "ASYNCROUTE_URL_PREFIX": "/x", "ASYNCROUTE_ADMINS": None}
    assert child.config["SECRET_KEY"] == "child"


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("memory://", "memory://"),
        ("sqlite:///a/b.db?synchronous=FULL", "sqlite:////folder/a/b.db?synchronous=FULL"),
        ("sqlite:////var/b.db", "sqlite:////var/b.db"),
        ("postgresql+psycopg://ann:s%40cret@host/db", "postgresql+psycopg://ann:s%40cret@host/db"),
    ],
)
def test_relative_sqlite_urls_become_absolute(url: str, absolute: str) -> None:
    from flask_asyncroute.stores.registry import absolute as absolute_of

    assert absolute_of(url, "/folder") == absolute


def test_a_child_does_not_run_maintenance(make_app: MakeApp) -> None:
    from flask_asyncroute.runtime import runtime_of

    app = make_app()
    async_routes = AsyncRoute(app)
    runtime_of(app).become_child()
    async_routes.start(app)
    assert app.test_client().get("/tasks").status_code == 200
    assert runtime_of(app).runner.maintenance._thread is None


@pytest.mark.parametrize("before", [None, "false"])
def test_without_servers_restores_the_environment(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASK_RUN_FROM_CLI", raising=False)
    if before is not None:
        monkeypatch.setenv("FLASK_RUN_FROM_CLI", before)
    with app_loader.without_servers():
        assert os.environ["FLASK_RUN_FROM_CLI"] == "true"
    assert os.environ.get("FLASK_RUN_FROM_CLI") == before
