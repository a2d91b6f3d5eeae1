"""The cost of starts and gets, compared with a plain view by the medians of one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import hotpath

ROUNDS = 3000
ATTEMPTS = 3
SHORT_ALLOWANCE = 1.05
"""The medians of a few hundred rounds vary by some per cent."""


def test_starts_and_gets_cost_little_more_than_a_plain_view(
    tmp_path: Path, share: float, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """Each ratio must be kept in one of three attempts, because the machine may be busy."""
    best: dict[tuple[str, str], float] = {}
    late: list[str] = []
    allowance = 1.0 if share == 1.0 else SHORT_ALLOWANCE
    for number in range(ATTEMPTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        bench = hotpath.Bench(folder)
        try:
            cases = hotpath.compare(bench, scaled(ROUNDS, 400))
        finally:
            bench.close()
        for case in cases:
            if case.target is not None:
                key = case.name, case.store
                best[key] = min(case.ratio, best.get(key, case.ratio))
        late = [
            f"{' '.join(key)} {ratio:.2f}"
            for key, ratio in best.items()
            if ratio > hotpath.TARGETS[key] * allowance
        ]
        if not late:
            break
    named = ", ".join(f"{' '.join(key)} {ratio:.2f}" for key, ratio in best.items())
    figures(f"times a plain view: {named}")
    assert not late, f"too many times a plain view: {', '.join(late)}"
