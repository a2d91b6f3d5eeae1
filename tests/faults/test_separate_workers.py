"""Web servers that leave tasks to workers, while the store cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.workers import runner as runner_module
from flask_asyncroute.workers.role import Role
from tests.support.faulty_store import Down, FaultyStore
from tests.support.flow import Flow, problem

pytestmark = pytest.mark.usefixtures("separate_processes")
MakeProcess = Callable[..., Flow]


@pytest.fixture(params=["sqlite", "postgresql"])
def make_process(
    request: pytest.FixtureRequest,
    make_app: Callable[..., Flask],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> MakeProcess:
    """Return ``make_process(fault, is_worker=False)``, which creates the app of a web server or a
    worker. Its store fails as ``fault`` decides.
    """
    url = "sqlite:///asyncroute.db"
    if request.param == "postgresql":
        url = str(request.getfixturevalue("postgresql_url"))

    def make(fault: Any, is_worker: bool = False) -> Flow:
        app = make_app(
            instance_path=tmp_path / "shared", ASYNCROUTE_STORE=url, ASYNCROUTE_RUN_TASKS=False
        )
        flow = Flow(app, AsyncRoute(app))

        @flow.route()
        def work() -> str:
            return "done"

        with monkeypatch.context() as patch:
            patch.setattr(
                runner_module, "make_store", lambda *given: FaultyStore(make_store(*given), fault)
            )
            if is_worker:
                runtime_of(app).become_worker(Role(frozenset({"work"}), is_worker=True))
            else:
                runtime_of(app).become_runner()
        return flow

    return make


@pytest.mark.covers("F19")
def test_a_start_is_refused_while_the_waiting_tasks_cannot_be_counted(
    make_process: MakeProcess,
) -> None:
    fault = Down("waiting")
    web = make_process(fault)
    fault.is_down = True
    problem(web.request("POST", "/work"), 503, "store-unavailable")
    fault.is_down = False
    assert web.query() == []
    assert web.start()["State"] == "NotStarted"


@pytest.mark.covers("F19")
@pytest.mark.parametrize("name", ["waiting", "claim"])
def test_a_worker_takes_tasks_after_an_outage(
    make_process: MakeProcess, eventually: Callable[..., Any], name: str
) -> None:
    fault = Down(name)
    fault.is_down = True
    web, _ = make_process(Down()), make_process(fault, is_worker=True)
    task = web.start()
    eventually(lambda: name in fault.refused)
    assert web.get(task)["State"] == "NotStarted"
    fault.is_down = False
    assert web.ended(task)["Result"] == "done"


@pytest.mark.covers("F19")
def test_an_outcome_of_a_worker_is_kept_until_it_can_be_written(
    make_process: MakeProcess, eventually: Callable[..., Any]
) -> None:
    fault = Down("update")
    fault.is_down = True
    web, _ = make_process(Down()), make_process(fault, is_worker=True)
    task = web.start()
    eventually(lambda: "update" in fault.refused)
    assert web.get(task)["State"] == "Running"
    fault.is_down = False
    assert web.ended(task)["Result"] == "done"
