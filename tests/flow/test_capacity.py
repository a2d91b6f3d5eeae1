"""After many concurrent starts, stops, failures and timeouts, a pool has as many free slots as
before.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_asyncroute import current_task
from tests.support.flow import NOT_ON_CELERY, Flow

MAX_WORKERS, QUEUE_SIZE = 2, 3


def run_client(
    flow: Flow, seed: int, count: int, paths: list[str], started: list[str], answers: list[int]
) -> None:
    """Start tasks and stop or purge some of them, as one of several clients."""
    chance = random.Random(seed)
    client = flow.app.test_client()
    mine: list[str] = []
    for _ in range(count):
        response = client.post(chance.choice(paths))
        answers.append(response.status_code)
        if response.status_code == 202:
            mine.append(response.get_json()["Id"])
        if mine and chance.random() < 0.5:
            answers.append(client.delete(f"/task/{chance.choice(mine)}").status_code)
        if mine and chance.random() < 0.1:
            answers.append(client.delete(f"/task/{chance.choice(mine)}?purge=true").status_code)
    started += mine


@pytest.mark.parametrize("interrupt_after", [None, 0])
@NOT_ON_CELERY
def test_the_capacity_of_a_pool_is_unchanged_after_a_storm(
    flow: Flow,
    later_executor: Any,
    gate: threading.Event,
    eventually: Callable[..., Any],
    interrupt_after: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool: dict[str, Any] = {
        "executor": later_executor, "max_workers": MAX_WORKERS, "queue_size": QUEUE_SIZE, "interrupt_after": interrupt_after, "pool": "p",
    }  # fmt: skip

    @flow.route("/quick", **pool)
    def quick() -> int:
        return 1

    @flow.route("/slow", **pool)
    def slow() -> None:
        current_task.sleep(0.003)

    @flow.route("/bad", **pool)
    def bad() -> None:
        raise ValueError

    @flow.route("/late", timeout=0.002, **pool)
    def late() -> None:
        current_task.sleep(0.1)

    @flow.route("/ignores_stop", **pool)
    def ignores_stop() -> None:
        try:
            threading.Event().wait(0.005)
        except BaseException:
            threading.Event().wait(0.005)

    @flow.route("/held", **pool)
    def held() -> None:
        gate.wait(10)

    monkeypatch.setattr(flow.app.logger, "disabled", True)
    started: list[str] = []
    answers: list[int] = []
    paths = ["/quick", "/slow", "/bad", "/late", "/ignores_stop"]
    clients = [
        threading.Thread(target=run_client, args=(flow, seed, 25, paths, started, answers))
        for seed in range(4)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert set(answers) <= {200, 202, 204, 404, 409, 410, 503}
    assert answers.count(202) > 10
    eventually(
        lambda: all(
            task["IsCompleted"] and "Stopping" not in task for task in flow.query("limit=500")
        )
    )
    # The last thread may not have released its slot yet.
    eventually(lambda: all(executor.free() == MAX_WORKERS for executor in executors_of(flow)))
    accepted = [flow.start("/held")["Id"] for _ in range(MAX_WORKERS + QUEUE_SIZE)]
    flow.start("/held", status=503)
    gate.set()
    for task_id in accepted:
        assert flow.ended(task_id)["State"] == "Completed"


def executors_of(flow: Flow) -> list[Any]:
    from flask_asyncroute.runtime import runtime_of

    return list(runtime_of(flow.app).runner._executors.values())
