"""Detection of different apps that share a namespace, in one process and between processes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute
from flask_asyncroute.config import Config, read
from flask_asyncroute.errors import ConfigurationError
from flask_asyncroute.routes import Route
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import TaskStore
from flask_asyncroute.stores.memory import MemoryTaskStore
from flask_asyncroute.workers.app_identity import (
    difference,
    leave,
    refuse_superseded,
    supersede_others,
    views_of,
)

HERE = ["shop", "/srv/shop", "shop.report"]


@dataclass(eq=False)
class Member:
    """The attributes of a runner that the comparison reads."""

    app: Flask
    config: Config
    routes: dict[str, Route]
    store: TaskStore
    superseded_by: Callable[[], Any] = lambda: None  # noqa: E731


@pytest.fixture
def store() -> TaskStore:
    return MemoryTaskStore()


def member(store: TaskStore, name: str = "shop") -> Member:
    """Return a member for a new app, as an app factory creates it."""
    app = Flask(name, root_path="/srv")
    app.config["ASYNCROUTE_STORE"] = "memory://"

    @AsyncRoute(app).route("/report")
    def report() -> None: ...

    runtime_of(app).prepare()
    return Member(app, read(app), runtime_of(app).routes, store)


@pytest.fixture(autouse=True)
def drop_members() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize("name", ["shop", "api"])
def test_a_superseded_app_is_refused_until_the_newer_app_leaves(
    store: TaskStore, name: str
) -> None:
    first, second = member(store), member(store, name)
    supersede_others(first)
    refuse_superseded(first)
    supersede_others(second)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"'shop' and '{name}'") as refused:
            refuse_superseded(first)
        assert "ASYNCROUTE_NAMESPACE" in str(refused.value)
        assert "memory://" in str(refused.value)
        refuse_superseded(second)
    leave(second)
    refuse_superseded(first)


def test_two_apps_opened_at_once_are_both_refused(store: TaskStore) -> None:
    first, second = member(store), member(store)
    supersede_others(first)
    supersede_others(second)
    supersede_others(first)
    for each in (first, second):
        with pytest.raises(ConfigurationError):
            refuse_superseded(each)


def test_an_app_of_another_namespace_or_store_supersedes_none(store: TaskStore) -> None:
    """Namespaces are compared by their secrets."""
    supersede_others(one := member(store))
    supersede_others(two := member(MemoryTaskStore()))
    refuse_superseded(one)
    refuse_superseded(two)


def test_an_unreferenced_app_supersedes_none(store: TaskStore) -> None:
    supersede_others(first := member(store))
    supersede_others(member(store))
    refuse_superseded(first)


@pytest.mark.parametrize(
    ("other_views", "expected"),
    [
        ({"report": HERE}, None),
        ({}, None),
        ({"report": HERE, "mail": [*HERE[:2], "shop.mail"]}, None),
        ({"mail": [*HERE[:2], "shop.mail"]}, None),
        ({"report": ["api", *HERE[1:]]}, "the import name is 'shop' and 'api'"),
        ({"mail": ["api", *HERE[1:]]}, "the import name is 'shop' and 'api'"),
        ({"report": ["shop", "/opt", HERE[2]]}, "the root path is '/srv/shop' and '/opt'"),
        (
            {"report": [*HERE[:2], "reports.year"]},
            "the view of the endpoint 'report' is shop.report and reports.year",
        ),
    ],
    ids=str,
)
def test_difference_between_the_apps_of_two_processes(
    other_views: dict[str, list[str]], expected: str | None
) -> None:
    assert difference({"report": HERE}, other_views) == expected
    assert difference({}, other_views) is None


def test_views_of_returns_the_name_of_the_undecorated_function(store: TaskStore) -> None:
    own = member(store)
    name = f"{__name__}.member.<locals>.report"
    assert views_of(own.app, own.routes) == {"report": ["shop", "/srv", name]}
