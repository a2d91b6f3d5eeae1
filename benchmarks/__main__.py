"""Runs the benchmarks and prints the results: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sqlite3
import sys
import tempfile
from pathlib import Path
from statistics import median

from . import ceiling, hotpath, incidents, queries, served

PARTS = ("calls", "lists", "stops", "kills", "ceiling")


def main() -> None:
    """Parse the command line, run the benchmarks and print the results."""
    options = parse_options()
    # Without a handler, SIGTERM ends this process before it has killed its servers.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    print(
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    if "calls" in options.only:
        print_hot_path(options.rounds)
    if "stops" in options.only:
        print_stops(options.stops)
    if "kills" in options.only:
        print_recoveries(options.running, options.kills)
    if "ceiling" in options.only:
        print_ceilings()
    if "lists" in options.only:
        for count in options.stored:
            print_queries(count)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)"
    )
    numbers = [
        ("--rounds", 2000, "CALLS", "calls of each kind"),
        ("--stops", 30, "STOPS", "stops by the same worker and by another"),
        ("--kills", 5, "KILLS", "kills of a worker"),
        ("--running", 20, "TASKS", "tasks that run in a killed worker"),
    ]
    for name, default, unit, meaning in numbers:
        parser.add_argument(
            name, type=int, default=default, metavar=unit, help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--stored", type=int, nargs="+", default=[100_000, 1_000_000], metavar="TASKS",
        help="stored tasks when lists are measured (default: 100000 1000000)",
    )  # fmt: skip
    return parser.parse_args()


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


def print_stops(rounds: int) -> None:
    """Print the times from a stop to its response, and until the view has noticed it."""
    print(f"\nstops under gunicorn, {rounds} each, median (maximum) in ms")
    print(f"  {'store':11}{'sent to the':14} {'response':>14} {'ratio':>6} {'noticed':>16}")
    for store in served.stores():
        for stops in incidents.measure_stops(store, rounds):
            answered, noticed = (
                f"{median(times) * 1000:.1f} ({max(times) * 1000:.1f})"
                for times in (stops.answered, stops.noticed)
            )
            print(
                f"  {store:11}{stops.where:14} {answered:>14} {stops.ratio:6.2f} {noticed:>16}",
                flush=True,
            )


def print_recoveries(tasks: int, kills: int) -> None:
    """Print how long it takes until the tasks of a killed worker run again and have ended."""
    print(
        f"\na worker with {tasks} running tasks is killed while {incidents.WAITING} wait, {kills} "
        f"times, median (maximum) in s\n  {'store':11}{'running again':>15} {'all ended':>15}"
    )
    for store in served.stores():
        found = incidents.measure_recoveries(store, tasks, kills)
        again, ended = (
            f"{median(times):.2f} ({max(times):.2f})" for times in (found.again, found.ended)
        )
        print(f"  {store:11}{again:>15} {ended:>15}", flush=True)


def print_ceilings() -> None:
    """Print how many tasks per second one store takes from several processes."""
    counts = "".join(f"{count:>8}" for count in ceiling.PROCESSES)
    print(f"\ntasks per second that processes add, claim and finish\n  {'store':30}{counts}")
    with (
        tempfile.TemporaryDirectory(prefix="asyncroute-bench-") as folder,
        ceiling.stores(Path(folder)) as urls,
    ):
        for name, url in urls.items():
            found = (ceiling.measure(url, Path(folder), count) for count in ceiling.PROCESSES)
            print(f"  {name:30}" + "".join(f"{count:8.0f}" for count in found), flush=True)


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
