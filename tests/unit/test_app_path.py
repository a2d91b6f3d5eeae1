"""From where another process can load the app: what can be seen to be wrong is told in the parent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import Access, AsyncRoute, app_path, config
from flask_asyncroute.errors import ConfigurationError

MakeApp = Callable[..., Flask]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Give an imported module, ``made_up``, that is empty."""
    made = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", made)
    return made


def some_factory() -> Flask:
    return Flask("made_up")


@pytest.mark.parametrize(
    "names",
    [{"app": 0}, {"application": 0}, {"anything": 0}, {"create_app": 1}, {"make_app": 1}, {"app": 0, "other": 0}],
)
def test_a_module_alone_is_enough_where_flask_would_find_the_app(module: ModuleType, names: dict[str, int]) -> None:
    for name, kind in names.items():
        setattr(module, name, some_factory if kind else some_factory())
    assert app_path.found(Flask("made_up"), None) == "made_up"


@pytest.mark.parametrize("names", [[], ["one", "two"]])
def test_a_module_without_an_app_or_with_two_is_refused(module: ModuleType, names: list[str]) -> None:
    for name in names:
        setattr(module, name, some_factory())
    with pytest.raises(ConfigurationError, match="Set ASYNCROUTE_APP"):
        app_path.found(Flask("made_up"), None)


@pytest.mark.parametrize("name", ["thing", "thing()", "thing('a', b=5)"])
def test_a_name_must_be_there(module: ModuleType, name: str) -> None:
    with pytest.raises(ConfigurationError, match="'made_up' has no 'thing'"):
        app_path.found(Flask("x"), f"made_up:{name}")
    module.thing = some_factory  # type: ignore[attr-defined]
    assert app_path.found(Flask("x"), f"made_up:{name}") == f"made_up:{name}"


def test_a_module_that_is_not_imported_yet_is_not_imported() -> None:
    assert "this" not in sys.modules
    assert app_path.found(Flask("x"), "this:app") == "this:app"
    assert "this" not in sys.modules


@pytest.mark.parametrize("path", ["no_such_module", "no_such.module:app", "json.no_such:app", "sys.path:app"])
def test_a_module_must_be_there(path: str) -> None:
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_APP: there is no module"):
        app_path.found(Flask("x"), path)


def test_main_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="__main__.*Set ASYNCROUTE_APP"):
        app_path.found(Flask("__main__"), None)


def test_loading(module: ModuleType) -> None:
    module.app = some_factory()  # type: ignore[attr-defined]
    module.make = some_factory  # type: ignore[attr-defined]
    assert app_path.load("made_up") is module.app
    assert app_path.load("made_up:app") is module.app
    assert app_path.load("made_up:make()").import_name == "made_up"


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), ImportError("gone"), KeyError("x")])
def test_what_goes_wrong_in_loading_names_the_key(module: ModuleType, error: BaseException) -> None:
    def make() -> Any:
        raise error

    module.make = make  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigurationError, match=f"ASYNCROUTE_APP: 'made_up:make..' does not give.*{type(error).__name__}"
    ):
        app_path.load("made_up:make()")


def test_the_values_of_a_parent_become_those_of_its_child(make_app: MakeApp, tmp_path: Path) -> None:
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
def test_a_store_has_the_same_url_everywhere(url: str, absolute: str) -> None:
    from flask_asyncroute.store_url import absolute as absolute_of

    assert absolute_of(url, "/folder") == absolute


def test_a_child_is_no_runner(make_app: MakeApp) -> None:
    from flask_asyncroute.runtime import runtime_of

    app = make_app()
    async_routes = AsyncRoute(app)
    runtime_of(app).become_child()
    async_routes.start(app)
    assert app.test_client().get("/tasks").status_code == 200
    assert runtime_of(app).runner.housekeeper._thread is None
