"""Measures this package beside other task queues: ``python -m benchmarks.peers``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import services
from .measure import Amount, Result, measure
from .processes import ROOT
from .report import Report
from .systems import SYSTEMS, System

PAGE = ROOT / "docs" / "explanation" / "benchmark-results.rst"
CHART = ROOT / "docs" / "_static" / "benchmark.svg"
STARTERS = {"redis": services.redis, "postgresql": services.postgresql}


def main() -> None:
    """Parse the command line, measure, and print or write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="repeats of all systems (default: %(default)s)")
    add("--tasks", type=int, default=1000, help="whole tasks per repeat (default: %(default)s)")
    add("--rate", type=float, default=300, help="starts per second (default: %(default)g)")
    add("--seconds", type=float, default=3, help="length of that rate (default: %(default)g)")
    add("--single", type=int, default=50, help="tasks one at a time (default: %(default)s)")
    add("--only", default="", metavar="TEXT", help="only systems with this text in their name")
    add("--json", type=Path, metavar="FILE", help="write the raw results to a file")
    add("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)} and its chart")
    options = parser.parse_args()
    # Exit through the context managers, which stop all servers and workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    amount = Amount(options.tasks, options.rate, options.seconds, options.single)
    with ExitStack() as stack:
        servers = _Servers(stack)
        report = _run(servers, options.only, options.repeats, amount)
    print(report.text())
    if options.json is not None:
        options.json.write_text(report.json(), "utf-8")
    if options.write:
        PAGE.write_text(report.rst(), "utf-8")
        CHART.write_text(report.svg(), "utf-8")


def _run(servers: _Servers, only: str, repeats: int, amount: Amount) -> Report:
    """Measure all systems in every repeat, in another order each time."""
    load_average = os.getloadavg()[0]
    skipped: dict[str, str] = {}
    results: list[Result] = []
    systems = [s for s in SYSTEMS if s.is_plain or only.lower() in s.name.lower()]
    for repeat in range(repeats):
        for system in random.sample(systems, len(systems)):
            if system.name in skipped:
                continue
            print(f"repeat {repeat + 1} of {repeats}: {system.name}", file=sys.stderr)
            if importlib.util.find_spec(system.package) is None:
                skipped[system.name] = f"the package {system.package} is not installed"
                continue
            try:
                with servers.database(system) as url:
                    results.append(measure(system, url, amount))
            except services.Unavailable as error:
                skipped[system.name] = str(error)
            except Exception as error:
                # The other systems are measured anyway.
                print(f"{system.name} failed: {error!r}", file=sys.stderr)
                skipped[system.name] = "it failed; see the messages above"
    return Report(amount, repeats, results, skipped, load_average)


class _Servers:
    """Starts each service when the first system needs it.

    :param stack: stops the services at the end.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._urls: dict[str, str] = {}

    @contextmanager
    def database(self, system: System) -> Iterator[str]:
        """Yield the URL of an empty database for a system; empty if it needs none."""
        name = system.service
        if name is None:
            yield ""
            return
        if name not in self._urls:
            self._urls[name] = self._stack.enter_context(STARTERS[name]())
        with services.EMPTY[name](self._urls[name]) as url:
            yield url


if __name__ == "__main__":
    main()
