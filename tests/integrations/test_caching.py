"""Flask-Caching: what may be cached, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask_caching import Cache

from tests.support.flow import Flow, identity_of_header

BY_ANN, BY_BOB = ({"X-User": name} for name in ("ann", "bob"))


@pytest.fixture
def cache_flow(make_flow: Callable[..., Flow]) -> tuple[Flow, Cache]:
    flow = make_flow(CACHE_TYPE="SimpleCache")
    flow.async_routes.identity_loader(identity_of_header)
    return flow, Cache(flow.app)


def test_cached_above_task_returns_the_first_task_to_every_caller(
    cache_flow: tuple[Flow, Cache],
) -> None:
    flow, cache = cache_flow
    calls = []

    @flow.app.post("/work")
    @cache.cached(timeout=60)
    @flow.async_routes.task
    def work() -> None:
        calls.append(1)

    first = flow.start(headers=BY_ANN)
    second = flow.start(headers=BY_BOB)
    assert second["Id"] == first["Id"] and second["User"] == "ann"
    flow.get(second, status=404, headers=BY_BOB)


@pytest.mark.parametrize("kind", ["cached", "memoize", "memoize below"])
def test_results_of_functions_are_cached_within_the_task(
    cache_flow: tuple[Flow, Cache], kind: str
) -> None:
    flow, cache = cache_flow
    calls = []

    def total(year: int) -> dict[str, int]:
        calls.append(year)
        return {"Total": year * 2}

    if kind == "memoize":
        counted = cache.memoize()(total)

        @flow.route("/total/<int:year>")
        def work(year: int) -> Any:
            return counted(year)

    else:
        decorate = cache.cached() if kind == "cached" else cache.memoize()
        flow.app.post("/total/<int:year>")(flow.async_routes.task(decorate(total)))
    ids = set()
    for headers in (BY_ANN, BY_BOB):
        for year in (1, 2, 1):
            started = flow.start(f"/total/{year}", headers=headers)
            flow.headers = headers
            task = flow.ended(started)
            assert task["Result"] == {"Total": year * 2}
            ids.add(task["Id"])
    assert len(ids) == 6 and calls == [1, 2]


def test_the_cache_is_used_within_a_task(cache_flow: tuple[Flow, Cache]) -> None:
    flow, cache = cache_flow

    @flow.route()
    def work() -> Any:
        cache.set("rows", (cache.get("rows") or 0) + 1)
        return cache.get("rows")

    assert [flow.result(), flow.result()] == [1, 2]
    with flow.app.app_context():
        assert cache.get("rows") == 2
