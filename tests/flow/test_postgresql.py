"""An app with its tasks in PostgreSQL: by URL, by an Engine, and by a function that returns an
Engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine

from flask_asyncroute import AsyncRoute, ConfigurationError
from flask_asyncroute.stores.sql.postgresql import check_setting
from tests.support.databases import engine_of
from tests.support.flow import Flow

MakeFlow = Callable[..., Flow]


@pytest.fixture
def engine(postgresql_url: str) -> Engine:
    return engine_of(postgresql_url)


@pytest.fixture(params=["url", "engine", "function"])
def setting(request: pytest.FixtureRequest, postgresql_url: str) -> Any:
    if request.param == "url":
        return postgresql_url
    engine = request.getfixturevalue("engine")
    return engine if request.param == "engine" else lambda: engine


def test_a_task_runs_with_each_kind_of_setting(make_flow: MakeFlow, setting: Any) -> None:
    flow = make_flow(ASYNCROUTE_STORE=setting)

    @flow.route()
    def work() -> Any:
        return {"Done": True}

    task = flow.run()
    assert (task["State"], task["Result"]) == ("Completed", {"Done": True})
    assert flow.ids() == [task["Id"]]


def test_a_stop_from_another_process(
    make_flow: MakeFlow, postgresql_url: str, gate: threading.Event, eventually: Callable[..., Any],
    separate_processes: None,
) -> None:  # fmt: skip
    """Two apps of one name share only the store, like two machines."""
    one, two = (
        make_flow(ASYNCROUTE_STORE=postgresql_url),
        make_flow(ASYNCROUTE_STORE=postgresql_url),
    )
    begun = threading.Event()
    stopped = threading.Event()

    def work() -> None:
        from flask_asyncroute import current_task

        begun.set()
        while not current_task.stop_requested and not gate.is_set():
            gate.wait(0.01)
        stopped.set()

    for flow in (one, two):
        flow.route(endpoint="work")(work)
    task = one.start()
    assert begun.wait(10)
    assert two.request("DELETE", f"/task/{task['Id']}").status_code == 200
    assert stopped.wait(10)
    ended = eventually(lambda: "Stopping" not in (found := one.get(task["Id"])) and found, 10)
    assert ended["State"] == "Aborted"


@pytest.mark.parametrize("make", [lambda: "sqlite://", lambda: create_engine("sqlite://")])
def test_a_function_that_does_not_return_a_postgresql_engine_is_refused(
    make_app: Callable[..., Flask], make: Callable[[], Any]
) -> None:
    app = make_app(ASYNCROUTE_STORE=make)
    AsyncRoute(app)
    with pytest.raises(ConfigurationError, match="ASYNCROUTE_STORE"):
        app.test_client().get("/tasks")


@pytest.mark.parametrize(
    ("name", "driver"), [("postgresql", "psycopg2"), ("postgresql", "pg8000"), ("mysql", "pymysql")]
)
def test_an_engine_with_another_driver_is_refused(name: str, driver: str) -> None:
    engine: Any = SimpleNamespace(dialect=SimpleNamespace(name=name, driver=driver))
    with pytest.raises(
        ConfigurationError, match=f"ASYNCROUTE_STORE: .* {driver} .*postgresql.psycopg"
    ):
        check_setting("ASYNCROUTE_STORE", engine)


def test_an_engine_for_sqlite_is_refused(make_app: Callable[..., Flask]) -> None:
    with pytest.raises(ConfigurationError, match=r"ASYNCROUTE_STORE.*'sqlite:///path'"):
        AsyncRoute(make_app(ASYNCROUTE_STORE=create_engine("sqlite://")))
