"""A pickle that an attacker has written into the store runs no code."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_asyncroute import AsyncRoute
from tests.support.databases import engine_of
from tests.support.flow import Flow

MakeApp = Callable[..., Flask]


class Attack:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.covers("A67")
@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_in_the_store_is_not_loaded(
    make_app: MakeApp, tmp_path: Path, gate: threading.Event, protocol: int
) -> None:
    path = tmp_path / "attacked"
    attack = pickle.dumps(Attack(path), protocol)
    url = f"sqlite:///{tmp_path / 'asyncroute.db'}"
    app = make_app(ASYNCROUTE_STORE=url)
    flow = Flow(app, AsyncRoute(app))

    @flow.route(max_workers=1)
    def work() -> str:
        gate.wait(10)
        return "done"

    first, second = flow.start(), flow.start(data=b"body")
    flow.became(first, "Running")
    with engine_of(url).begin() as connection:
        changed = connection.exec_driver_sql(
            "UPDATE asyncroute_tasks SET request = ? WHERE id = ?", (attack, second["Id"])
        )
        assert changed.rowcount == 1
    gate.set()
    flow.ended(first)
    assert flow.ended(second)["State"] == "Failed"
    with engine_of(url).begin() as connection:
        connection.exec_driver_sql(
            "UPDATE asyncroute_tasks SET result_json = ? WHERE id = ?", (attack, first["Id"])
        )
    app.config["PROPAGATE_EXCEPTIONS"] = False
    flow.request("GET", f"/task/{first['Id']}")
    assert not path.exists()
    pickle.loads(attack)
    assert path.exists(), "the pickle has no effect, so this test proves nothing"
