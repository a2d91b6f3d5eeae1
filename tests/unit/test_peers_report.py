"""The report of the benchmark beside other task queues."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from benchmarks.peers.measure import Amount, Result
from benchmarks.peers.report import Report

PLAIN = Result("plain view, 2 × 4", 2000.0, 0.5, 2.0, 10.0, 0.5, True)
SMALL = Result("plain view, 1 × 8", 1000.0, 0.4, 2.0, 10.0, 0.5, True)
HUEY = Result("Huey, SQLite fsync=True", 500.0, 1.0, 4.0, 30.0, 60.0, True)
MEMORY = Result("flask_asyncroute, memory", 500.0, 0.6, 2.0, 10.0, 1.0, True)
SLOW = Result("DBOS, SQLite", 50.0, 5.0, 900.0, 2000.0, 10.0, False)
AMOUNT = Amount(tasks=100, rate=300, seconds=1, single=5)


def report(*results: Result) -> Report:
    return Report(AMOUNT, 1, results, {"RQ, Redis": "redis-server is not installed"}, 0.5)


def row(name: str, *results: Result) -> tuple[str, ...]:
    (found,) = (row for row in report(*results).rows() if row[1] == name)
    return found


def test_values_are_ratios_to_the_plain_view() -> None:
    assert row(HUEY.name, PLAIN, SMALL, HUEY) == (
        "fsync per commit", HUEY.name, "0.25", "2", "2", "3", "120",
    )  # fmt: skip


def test_one_process_is_compared_with_one_process() -> None:
    assert row(MEMORY.name, PLAIN, SMALL, MEMORY)[2:4] == ("0.5", "1.5")


def test_the_plain_view_shows_absolute_values() -> None:
    assert row(PLAIN.name, PLAIN)[2:] == ("2000", "0.50 ms", "2.0 ms", "10.0 ms", "0.5 ms")


def test_a_system_that_misses_the_fixed_rate_is_overloaded() -> None:
    assert row(SLOW.name, PLAIN, SLOW)[4:6] == ("overloaded", "overloaded")


def test_values_are_medians_of_the_repeats() -> None:
    faster = Result(HUEY.name, 1500.0, 1.0, 4.0, 30.0, 60.0, True)
    assert row(HUEY.name, PLAIN, HUEY, faster, faster)[2] == "0.75"


def test_skipped_systems_are_named_with_the_reason() -> None:
    made = report(PLAIN)
    assert "RQ, Redis was skipped: redis-server is not installed." in made.text()
    assert "Not measured: RQ, Redis." in made.rst()
    assert json.loads(made.json())["skipped"] == made.skipped


def test_the_chart_has_a_bar_for_each_system() -> None:
    image = ElementTree.fromstring(report(PLAIN, SMALL, HUEY, MEMORY).svg())
    texts = [element.text for element in image.iter("{http://www.w3.org/2000/svg}text")]
    assert HUEY.name in texts and MEMORY.name in texts
    assert PLAIN.name not in texts
    assert len(list(image.iter("{http://www.w3.org/2000/svg}rect"))) == 2
