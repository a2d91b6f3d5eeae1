"""Many streams at once: the cost of each, no missed end, and a server that answers while all stream
slots are in use.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest

from tests.support.audience import Audience, Spectator
from tests.support.client import send
from tests.support.poller import poll, poll_from_another_process
from tests.support.processes import private_memory
from tests.support.server import Server, gunicorn
from tests.support.waiting import eventually_true

STREAMS = 480
FIRST = 20
"""Streams that are not counted, because they allocate what all streams share, such as arenas of the
C library and compiled statements.
"""
SPARE_THREADS = 20
TASKS = 20
STREAM_KIB = 48
CROWD = 100
"""Clients for the two stream slots of a worker with eight threads."""
ANSWER_SECONDS = 0.05
POLLED_SECONDS = 30
FLOW_SECONDS = 40
"""Longer than the interval at which the caller of each stream is identified again."""
FLOW_MILLISECONDS = 2000
"""The interval at which each task sends an event and reports progress."""
PATIENCE = 60.0


def test_many_streams_on_one_worker(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """Half of the clients follow one task each, half follow all tasks."""
    streams = scaled(STREAMS, 60)
    threads = FIRST + streams + SPARE_THREADS
    with serve(tmp_path, threads, f"max_streams={threads}") as server:
        tasks = [start(server.port) for _ in range(TASKS)]
        for task_id in tasks:
            wait_until_running(server.port, task_id)
        (pid,) = server.workers()
        spectators = [
            Spectator(f"/task/{tasks[number % TASKS]}/events", 1)
            if number % 2
            else Spectator("/tasks/events?group=gate", TASKS)
            for number in range(FIRST + streams)
        ]
        first = Audience(server.port, spectators[:FIRST])
        others = Audience(server.port, spectators[FIRST:])
        with first, others:
            cold = private_memory(pid)
            first.begin()
            eventually_true(lambda: first.begun == FIRST, PATIENCE)
            before = private_memory(pid)
            others.begin()
            eventually_true(lambda: others.begun == streams, PATIENCE)
            after = private_memory(pid)
            began = time.monotonic()
            (tmp_path / "open").touch()
        took = time.monotonic() - began
        server.assert_no_traceback()
    each = (after - before) / streams / 1024
    with_first = (after - cold) / (FIRST + streams) / 1024
    ends = sum(spectator.ends for spectator in spectators)
    figures(
        f"{FIRST + streams} streams: {each:.1f} KiB each after the first {FIRST}, "
        f"{with_first:.1f} with them; all {ends:,} ends were received, the last {took:.1f} s after "
        f"{TASKS} tasks were allowed to end"
    )
    reconnected = sum(spectator.connections > 1 for spectator in spectators)
    assert not reconnected, f"{reconnected} clients had to reconnect"
    # Memory grows in steps, which fewer streams share.
    most = STREAM_KIB if streams == STREAMS else STREAM_KIB * 2
    assert each <= most, f"a stream takes {each:.1f} KiB"


@dataclass(frozen=True)
class Flow:
    """The cost of streams while events are sent.

    :param kib: the memory of each stream after the first ones, with its thread.
    :param p99: the seconds in which 99 % of the GETs were answered meanwhile.
    """

    kib: float
    p99: float
    gets: int
    reconnected: int

    def __str__(self) -> str:
        return (
            f"{self.kib:.1f} KiB a stream, {self.gets} GETs, 99 % within {self.p99 * 1000:.1f} ms"
        )


def test_many_streams_while_events_flow(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """Half of the clients follow one task each, half follow all tasks, and all see the ends. For
    comparison, the same is measured with generators in plain Flask.
    """
    streams, seconds = scaled(STREAMS, 60), scaled(FLOW_SECONDS, 3)
    found = {}
    for name, config in (
        ("news", f", max_streams={FIRST + streams}"),
        ("plain_streams", ""),
    ):
        folder = tmp_path / name
        folder.mkdir()
        app = f"tests.support.apps.{name}:create_app({str(folder)!r}{config})"
        found[name] = measure_flow(folder, app, streams, seconds)
    ours, plain = found["news"], found["plain_streams"]
    figures(
        f"{FIRST + streams} streams, {TASKS} tasks with an event and progress every "
        f"{FLOW_MILLISECONDS} ms, for {seconds} s: {ours}; plain generators: {plain}"
    )
    assert not ours.reconnected, f"{ours.reconnected} clients had to reconnect"
    # Memory grows in steps, which fewer streams share.
    most = STREAM_KIB if streams == STREAMS else STREAM_KIB * 2
    assert ours.kib <= most, f"a stream takes {ours.kib:.1f} KiB"
    assert ours.p99 <= ANSWER_SECONDS, f"the 99th percentile was {ours.p99 * 1000:.0f} ms"


def test_many_clients_for_few_stream_slots(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    """All clients and a browser see the end of the task, and a poller is answered quickly."""
    seconds = scaled(POLLED_SECONDS, 2)
    with serve(tmp_path, 8) as server, browser() as chromium:
        task_id = start(server.port)
        spectators = [Spectator(f"/task/{task_id}/events", 1) for _ in range(CROWD)]
        with Audience(server.port, spectators) as audience:
            audience.begin()
            # The clients connect before the browser, so that it finds all slots in use.
            eventually_true(lambda: audience.begun == CROWD, PATIENCE)
            if chromium is not None:
                page = chromium.new_page()
                page.goto(f"http://127.0.0.1:{server.port}/page/{task_id}")
            found = poll(server.port, f"/task/{task_id}", seconds)
            (tmp_path / "open").touch()
        seen = "no Chromium here"
        if chromium is not None:
            page.wait_for_function("document.title !== 'waiting'", timeout=20_000)
            seen = page.title()
        server.assert_no_traceback()
    p99 = quantiles(found, n=100)[98]
    connections = sum(spectator.connections for spectator in spectators)
    figures(
        f"{CROWD} clients for 2 slots connected {connections} times and all saw the end; "
        f"{len(found)} GETs meanwhile, 99 % within {p99 * 1000:.1f} ms, all within "
        f"{max(found) * 1000:.1f} ms; browser: {seen}"
    )
    if chromium is not None:
        assert seen.startswith("Completed after "), f"the browser saw {seen!r}"
        assert int(seen.split()[-1]) > 1, "the browser did not have to reconnect"
    assert p99 <= ANSWER_SECONDS, f"the 99th percentile was {p99 * 1000:.0f} ms"


def serve(folder: Path, threads: int, config: str = "drain=0.5") -> Server:
    app = f"tests.support.apps.news:create_app({str(folder)!r}, {config})"
    options = ("--workers", "1", "--worker-class", "gthread", "--threads", str(threads))
    return gunicorn(folder / "log", app, *options)


def measure_flow(folder: Path, app: str, streams: int, seconds: float) -> Flow:
    """Serve an app with one worker, open the streams, and poll a task while others send events."""
    threads = FIRST + streams + SPARE_THREADS
    options = ("--workers", "1", "--worker-class", "gthread", "--threads", str(threads))
    with gunicorn(folder / "log", app, *options) as server:
        tasks = [start(server.port, f"/flow/{FLOW_MILLISECONDS}") for _ in range(TASKS)]
        for task_id in tasks:
            wait_until_running(server.port, task_id)
        (pid,) = server.workers()
        spectators = spectators_of(tasks, FIRST + streams)
        first = Audience(server.port, spectators[:FIRST])
        others = Audience(server.port, spectators[FIRST:])
        with first, others:
            first.begin()
            eventually_true(lambda: first.begun == FIRST, PATIENCE)
            before = private_memory(pid)
            others.begin()
            eventually_true(lambda: others.begun == streams, PATIENCE)
            found = poll_from_another_process(server.port, f"/task/{tasks[0]}", seconds)
            after = private_memory(pid)
            (folder / "open").touch()
        server.assert_no_traceback()
    return Flow(
        kib=(after - before) / streams / 1024,
        p99=quantiles(found, n=100)[98],
        gets=len(found),
        reconnected=sum(spectator.connections > 1 for spectator in spectators),
    )


def spectators_of(tasks: list[str], count: int) -> list[Spectator]:
    """Return clients of which every second follows one task, and the others all of them."""
    return [
        Spectator(f"/task/{tasks[number % len(tasks)]}/events", 1)
        if number % 2
        else Spectator("/tasks/events", len(tasks))
        for number in range(count)
    ]


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a headless Chromium, or None without one if ``REQUIRE_SERVICES`` is not 1."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail("there is no Chromium (apt-get install chromium)")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox does not work for root, and containers often run as root.
        chromium = playwright.chromium.launch(
            executable_path=path, chromium_sandbox=os.geteuid() != 0
        )
        try:
            yield chromium
        finally:
            chromium.close()


def start(port: int, path: str = "/gate") -> str:
    """Start a task that runs until the file ``open`` exists; return its id."""
    reply = send(port, "PUT", path)
    assert reply.status == 202, f"a start was answered {reply.status}"
    return str(reply.json()["Id"])


def wait_until_running(port: int, task_id: str) -> None:
    path = f"/task/{task_id}"
    eventually_true(lambda: send(port, "GET", path).json()["State"] == "Running", PATIENCE)
