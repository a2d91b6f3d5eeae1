"""Polls, claims and starts beside very many waiting tasks take as long as beside a few."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Engine, create_engine

from flask_asyncroute.stores.base import Expect, SharedTaskStore
from flask_asyncroute.stores.registry import make_store
from flask_asyncroute.stores.sql.tables import tasks
from flask_asyncroute.task import AsyncRouteTask, State

FEW, MANY = 100, 1_000_000
ROUNDS = 200
ATTEMPTS = 5
MOST = 1.5
"""The ratio that a median may reach."""
T0 = 1_700_000_000_000_000
LIMITS = {"work": 10, "other": 10}


def multiply(engine: Engine, namespace: str, count: int) -> None:
    """Copy the only task of a namespace ``count`` times, each a microsecond younger."""
    new = {
        "id": "'copy' || n", "created_us": "created_us + n", "change": "change + n",
        "endpoint": "CASE WHEN n % 2 = 0 THEN 'work' ELSE 'full' END",
    }  # fmt: skip
    names = [f'"{column.name}"' for column in tasks.columns]
    values = [new.get(column.name, f'"{column.name}"') for column in tasks.columns]
    series = (
        f"generate_series(1, {count}) AS n"
        if engine.dialect.name == "postgresql"
        else "(WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < "
        f"{count}) SELECT n FROM s)"
    )
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO asyncroute_tasks ({', '.join(names)}) SELECT {', '.join(values)} "
                f"FROM asyncroute_tasks, {series} WHERE namespace = (SELECT key FROM "
                "asyncroute_namespaces WHERE name = :namespace)"
            ),
            {"namespace": namespace},
        )
        connection.execute(text(f"UPDATE asyncroute_namespaces SET change = change + {count + 1}"))
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE asyncroute_tasks"))


def milliseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times) * 1000


def measure(
    store: SharedTaskStore, make_task: Callable[..., AsyncRouteTask], prefix: str
) -> dict[str, float]:
    """Return the median of each operation in milliseconds."""
    new = iter([f"{prefix}-{number}" for number in range(ROUNDS)])
    waiting = iter([f"{prefix}-{number}" for number in range(ROUNDS)])

    def start() -> None:
        store.add(make_task(next(new), created_us=2 * T0), b"request", None, ())

    def run() -> None:
        task_id = next(waiting)
        claim = store.claim(task_id, "me", T0)
        assert claim is not None
        expect = Expect((State.RUNNING,), "me", claim.task.epoch)
        values = {"state": State.COMPLETED, "completed_us": T0}
        assert store.update(task_id, expect, values) is not None

    def poll() -> None:
        assert len(store.waiting(LIMITS, T0 + 10 * MANY)) == LIMITS["work"]

    return {
        "poll": milliseconds(poll),
        "endpoints": milliseconds(lambda: store.workers.wanted()),
        "start": milliseconds(start),
        "run": milliseconds(run),
    }


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_waiting_tasks(
    request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory,
    make_task: Callable[..., AsyncRouteTask], scaled: Callable[..., int],
    figures: Callable[[str], None],
) -> None:  # fmt: skip
    """The stores are measured in turn, and the best of each counts: the machine may be busy."""
    many = scaled(MANY, 50_000)
    stores: dict[int, SharedTaskStore] = {}
    for count in (FEW, many):
        if kind == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('backlog')}/store.db"
        else:
            url = request.getfixturevalue("postgresql_url")
        store = make_store(url, "", f"test{count}", True)
        assert isinstance(store, SharedTaskStore)
        store.open()
        store.add(make_task("first", created_us=T0), b"request", None, ())
        engine = create_engine(url)
        multiply(engine, f"test{count}", count)
        engine.dispose()
        stores[count] = store
    best: dict[int, dict[str, float]] = {FEW: {}, many: {}}
    for attempt in range(ATTEMPTS):
        for count, store in stores.items():
            for name, found in measure(store, make_task, f"new{attempt}").items():
                best[count][name] = min(found, best[count].get(name, found))
    for store in stores.values():
        store.close()
    ratios = {name: best[many][name] / few for name, few in best[FEW].items()}
    figures(
        f"{many:,} waiting tasks to {FEW}: "
        + ", ".join(f"{name} {best[many][name]:.3f} ms ({ratios[name]:.2f})" for name in ratios)
    )
    assert max(ratios.values()) <= MOST, ratios
