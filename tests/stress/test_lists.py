"""The newest 100 of very many tasks, listed for any caller, from the store and over HTTP."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import queries
from tests.support.machine import slowness

ROUNDS = 100
ATTEMPTS = 3


@pytest.mark.parametrize("stored", [100_000, 1_000_000])
def test_lists_of_many_tasks(
    stored: int, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """Each bound must be kept in one of three attempts, because the machine may be busy."""
    count = stored if stored == 100_000 else scaled(stored, 100_000)
    if count < stored and count == 100_000:
        pytest.skip("the share is no more than the smaller count")
    slower = slowness()
    with queries.filled(count) as filled:
        best: dict[str, tuple[float, float]] = {}
        late: dict[str, tuple[float, float]] = {}
        for _ in range(ATTEMPTS):
            measured = queries.measure(filled, ROUNDS)
            for one in measured:
                store, http = one.store.median_us / 1000, one.http.median_us / 1000
                before = best.get(one.name, (store, http))
                best[one.name] = min(store, before[0]), min(http, before[1])
            targets = {one.name: one.target_ms for one in measured}
            late = {
                name: found
                for name, found in best.items()
                if found[0] > targets[name] * slower or found[1] > queries.HTTP_MS * slower
            }
            if not late:
                break
    main = best[f"admin: {queries.SPAN}"]
    worst = max(best, key=lambda name: best[name][0])
    figures(
        f"{count:,} tasks, bounds of {slower:.2f} times: {queries.SPAN} {main[0]:.2f} ms, through "
        f"HTTP {main[1]:.2f} ms; slowest of {len(best)} ({worst}) {best[worst][0]:.2f} ms, through "
        f"HTTP {best[worst][1]:.2f} ms"
    )
    assert not late, f"{count:,} tasks, milliseconds at the store and through HTTP: {late}"
