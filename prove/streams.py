"""Many streams at once: what each costs, that none misses an end, and that a server whose places are taken still answers."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from . import check, scaled
from .audience import Audience, Spectator
from .client import Connection, send
from .server import Server, gunicorn

STREAMS = 480
FIRST = 20
"""Streams that are not counted: with them comes what all share, such as arenas of the C library and compiled statements."""
SPARE_THREADS = 20
TASKS = 20
STREAM_KIB = 48
CROWD = 100
"""Clients for the two places of a worker with eight threads."""
ANSWER_SECONDS = 0.05
POLLED_SECONDS = 30
PATIENCE = 60.0


def prove(share: float) -> str:
    """Try both; return the figures."""
    return f"{many(scaled(STREAMS, share, 60))}; {crowded(scaled(POLLED_SECONDS, share, 2))}"


def many(streams: int) -> str:
    """Have so many clients on one worker with a thread for each: half follow a task, half follow all."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        threads = FIRST + streams + SPARE_THREADS
        with serve(Path(name), threads, f"max_streams={threads}") as server:
            tasks = [start(server.port) for _ in range(TASKS)]
            for task_id in tasks:
                wait_for(lambda task_id=task_id: state(server.port, task_id) == "Running", "a task does not start")
            (pid,) = server.workers()
            spectators = [
                Spectator(f"/task/{tasks[number % TASKS]}/events", 1)
                if number % 2
                else Spectator("/tasks/events?group=gate", TASKS)
                for number in range(FIRST + streams)
            ]
            first, others = Audience(server.port, spectators[:FIRST]), Audience(server.port, spectators[FIRST:])
            with first, others:
                cold = private_kib(pid)
                first.begin()
                wait_for(lambda: first.begun == FIRST, "the first streams do not begin")
                before = private_kib(pid)
                others.begin()
                wait_for(lambda: others.begun == streams, "not all streams have begun")
                after = private_kib(pid)
                began = time.monotonic()
                (Path(name) / "open").touch()
            took = time.monotonic() - began
            log = server.output()
    each, with_first = (after - before) / streams, (after - cold) / (FIRST + streams)
    check("Traceback" not in log, f"the server wrote of an error:\n{log[-3000:]}")
    came_back = sum(spectator.connections > 1 for spectator in spectators)
    check(not came_back, f"{came_back} clients had to come back")
    most = STREAM_KIB if streams == STREAMS else STREAM_KIB * 2  # few bear more of what is taken in steps
    check(each <= most, f"a stream takes {each:.1f} KiB")
    ends = sum(spectator.ends for spectator in spectators)
    return (
        f"{FIRST + streams} streams on one worker: {each:.1f} KiB each after the first {FIRST}, {with_first:.1f} with "
        f"them, all {ends:,} ends were told, the last {took:.1f} s after {TASKS} tasks were let go"
    )


def crowded(seconds: float) -> str:
    """Have a crowd that tries to stream, and a browser in it, while somebody polls."""
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        with serve(Path(name), 8) as server, browser() as chromium:
            task_id = start(server.port)
            spectators = [Spectator(f"/task/{task_id}/events", 1) for _ in range(CROWD)]
            with Audience(server.port, spectators) as audience:
                audience.begin()
                # Before the browser comes, so that it finds all places taken.
                wait_for(lambda: audience.begun == CROWD, "not all clients were answered")
                if chromium is not None:
                    page = chromium.new_page()
                    page.goto(f"http://127.0.0.1:{server.port}/page/{task_id}")
                found = poll(server.port, f"/task/{task_id}", seconds)
                (Path(name) / "open").touch()
            if chromium is not None:
                page.wait_for_function("document.title !== 'waiting'", timeout=20_000)
                title = page.title()
                check(title.startswith("Completed after "), f"the browser saw {title!r}")
                check(int(title.split()[-1]) > 1, "the browser was not among those who had to come back")
            log = server.output()
    check("Traceback" not in log, f"the server wrote of an error:\n{log[-3000:]}")
    p99 = quantiles(found, n=100)[98]
    check(p99 <= ANSWER_SECONDS, f"the 99th percentile of {len(found)} GETs was {p99 * 1000:.0f} ms")
    connections = sum(spectator.connections for spectator in spectators)
    seen = "there is no Chromium here" if chromium is None else f"Chromium saw the end too ({title})"
    return (
        f"{CROWD} clients for 2 places came {connections} times and all saw the end; {len(found)} GETs meanwhile, 99 % "
        f"within {p99 * 1000:.1f} ms, all within {max(found) * 1000:.1f} ms; {seen}"
    )


def serve(folder: Path, threads: int, config: str = "drain=0.5") -> Server:
    """Return a server of one worker."""
    app = f"prove.apps.news:create_app({str(folder)!r}, {config})"
    return gunicorn(folder / "log", app, "--workers", "1", "--worker-class", "gthread", "--threads", str(threads))


@contextmanager
def browser() -> Iterator[Any]:
    """Give a Chromium without a window, or None where there is none, but where ``REQUIRE_SERVICES`` is 1."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        check(os.environ.get("REQUIRE_SERVICES") != "1", "there is no Chromium (apt-get install chromium)")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox does not work for root, as whom containers often run.
        chromium = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        try:
            yield chromium
        finally:
            chromium.close()


def poll(port: int, path: str, seconds: float) -> list[float]:
    """Get a task over and over, each time on a new connection; return how long each answer took."""
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with Connection(port) as connection:
            reply = connection.send("GET", path, headers={"Connection": "close"})
        check(reply.status == 200, f"a GET was answered {reply.status}")
        found.append(reply.answered_at - reply.sent_at)
        time.sleep(0.01)
    return found


def start(port: int) -> str:
    """Start a task that goes on until the gate is open; return its id."""
    reply = send(port, "PUT", "/gate")
    check(reply.status == 202, f"a start was answered {reply.status}")
    return str(reply.json()["Id"])


def state(port: int, task_id: str) -> Any:
    """Return the state of a task."""
    return send(port, "GET", f"/task/{task_id}").json()["State"]


def private_kib(pid: int) -> int:
    """Return what a process has in memory that it shares with nobody, in KiB (Linux)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    return sum(int(found) for found in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))


def wait_for(condition: Any, otherwise: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        check(time.monotonic() < deadline, otherwise)
        time.sleep(0.01)
