"""Prints the figures: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import platform
import sqlite3
import tempfile
from pathlib import Path

from . import hotpath


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="calls of each kind (default: %(default)s)")
    given = parser.parse_args()
    print(
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.machine()}; {given.rounds} rounds"
    )
    with tempfile.TemporaryDirectory(prefix="asyncroute-bench-") as folder:
        bench = hotpath.Bench(Path(folder))
        try:
            print_table("in process, the queue drained between two calls", hotpath.compare(bench, given.rounds))
            print_table(
                "the same under load: tasks run beside the call", hotpath.compare_under_load(bench, given.rounds)
            )
            print("\nwhole lives (start, run, finish) per second")
            for store in bench.apps:
                print(f"  {store:8} {hotpath.lives_per_second(bench, store, given.rounds):8.0f}")
        finally:
            bench.close()


def print_table(title: str, cases: list[hotpath.Case]) -> None:
    """Print one line per case: median, 95th percentile, ratio to the plain view, target."""
    print(f"\n{title}\n  {'call':22} {'median µs':>10} {'p95 µs':>10} {'ratio':>7} {'target':>7}")
    for case in cases:
        target = "" if case.target is None else f"≤ {case.target}"
        name = f"{case.name} {case.store}".strip()
        print(f"  {name:22} {case.times.median_us:10.1f} {case.times.p95_us:10.1f} {case.ratio:7.2f} {target:>7}")


main()
