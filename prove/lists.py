"""The newest 100 of very many stored tasks, asked by anybody, at the store and through HTTP."""

from __future__ import annotations

from benchmarks import queries

from . import check, scaled
from .machine import slowness

STORED = (100_000, 1_000_000)
ROUNDS = 100
ATTEMPTS = 3


def prove(share: float) -> str:
    """Measure; each figure may be taken three times, since machines have other things to do."""
    counts = dict.fromkeys((STORED[0], scaled(STORED[1], share, STORED[0])))
    slower = slowness()
    return f"bounds of {slower:.2f} times; " + "; ".join(_prove(count, slower) for count in counts)


def _prove(count: int, slower: float) -> str:
    with queries.filled(count) as made:
        best: dict[str, tuple[float, float]] = {}
        for _ in range(ATTEMPTS):
            measured = queries.measure(made, ROUNDS)
            for one in measured:
                figures = one.store.median_us / 1000, one.http.median_us / 1000
                best[one.name] = tuple(map(min, figures, best.get(one.name, figures)))  # type: ignore[assignment]
            targets = {one.name: one.target_ms for one in measured}
            late = [
                name
                for name, (store, http) in best.items()
                if store > targets[name] * slower or http > queries.HTTP_MS * slower
            ]
            if not late:
                break
    for name in late:
        store, http = best[name]
        check(False, f"{count:,} tasks, {name}: {store:.2f} ms at the store, {http:.2f} ms through HTTP")
    main = best[f"admin: {queries.SPAN}"]
    worst = max(best, key=lambda name: best[name][0])
    return (
        f"{count:,} tasks: {queries.SPAN} {main[0]:.2f} ms, through HTTP {main[1]:.2f} ms; "
        f"slowest of {len(best)} ({worst}) {best[worst][0]:.2f} ms, through HTTP {best[worst][1]:.2f} ms"
    )
