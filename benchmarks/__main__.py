"""Runs the benchmarks and prints the results: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import platform
import sqlite3
import tempfile
from pathlib import Path

from . import hotpath, queries


def main() -> None:
    """Parse the command line, run the benchmarks and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=2000, help="calls of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--stored",
        type=int,
        default=100_000,
        metavar="TASKS",
        help="stored tasks when lists are measured (default: %(default)s)",
    )
    options = parser.parse_args()
    print(
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"{platform.machine()}; {options.rounds} rounds"
    )
    print_hot_path(options.rounds)
    print_queries(options.stored)


def print_hot_path(rounds: int) -> None:
    """Print the response times of starts, gets, stops and short lists beside a plain view, and
    tasks per second.
    """
    with tempfile.TemporaryDirectory(prefix="asyncroute-bench-") as folder:
        bench = hotpath.Bench(Path(folder))
        try:
            print_table(
                "in process, with an idle queue at each call", hotpath.compare(bench, rounds)
            )
            print_table(
                "under load: started tasks run during the calls",
                hotpath.compare_under_load(bench, rounds),
            )
            print("\ntasks per second (start, run, finish)")
            for store in bench.apps:
                print(f"  {store:8} {hotpath.tasks_per_second(bench, store, rounds):8.0f}")
        finally:
            bench.close()


def print_queries(count: int) -> None:
    """Print the response times for the newest 100 of ``count`` stored tasks."""
    print(f"\nthe newest {queries.LIMIT} of {count:,} tasks on SQLite, median (p95) in ms")
    print(f"  {'query':38} {'found':>5} {'store':>14} {'target':>7} {'HTTP':>14} {'target':>7}")
    with queries.filled(count) as filled:
        for one in queries.measure(filled):
            store, http = (
                f"{t.median_us / 1000:.2f} ({t.p95_us / 1000:.2f})" for t in (one.store, one.http)
            )
            targets = f"≤ {one.target_ms:g}", f"≤ {queries.HTTP_MS:g}"
            print(
                f"  {one.name:38} {one.found:5} {store:>14} {targets[0]:>7} {http:>14} "
                f"{targets[1]:>7}"
            )


def print_table(title: str, cases: list[hotpath.Case]) -> None:
    """Print one line per case: median, 95th percentile, ratio to the plain view, target."""
    print(f"\n{title}\n  {'call':22} {'median µs':>10} {'p95 µs':>10} {'ratio':>7} {'target':>7}")
    for case in cases:
        target = "" if case.target is None else f"≤ {case.target}"
        name = f"{case.name} {case.store}".strip()
        print(
            f"  {name:22} {case.times.median_us:10.1f} {case.times.p95_us:10.1f} {case.ratio:7.2f} "
            f"{target:>7}"
        )


if __name__ == "__main__":
    main()
