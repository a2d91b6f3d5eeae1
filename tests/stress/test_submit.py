"""Tasks that transactions of the app add: rolled back, killed, committed and held open."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from flask_asyncroute import AsyncRoute, AsyncRouteTask
from flask_asyncroute.runtime import runtime_of
from tests.support.databases import new_postgresql_database

ENDS = 200
"""Transactions that are rolled back or whose process is killed."""
COMMITS = 300
WARM_UP = 5
HELD_SECONDS = 10.0
MEDIAN_SECONDS, SLOWEST_SECONDS, DELAY_SECONDS = 0.1, 0.5, 0.05
KILL_WITHIN = 0.08
"""Seconds after its first output within which a process is killed; it adds tasks for longer."""
TABLES = ("tasks", "grants", "bodies", "keys", "callbacks")

SCRIPT = """
import os
import sys
from flask import Flask
from sqlalchemy import create_engine
from flask_asyncroute import AsyncRoute

name, folder, url = sys.argv[1:]
app = Flask(name, instance_path=folder)
app.config["ASYNCROUTE_STORE"] = url
async_routes = AsyncRoute(app)


@async_routes.route("/work/<int:n>", methods=["POST"], unique=True)
def work(n): ...


for line in sys.stdin:
    if os.fork():
        os.wait()
        print("ended", flush=True)
        continue
    with app.app_context(), create_engine(url).begin() as connection:
        print(os.getpid(), flush=True)
        for n in range(1_000_000):
            async_routes.submit(
                "work", {"n": n % 50}, user="anna", data=b"x" * 20_000, connection=connection
            )
"""


@dataclass(frozen=True)
class Runner:
    """An app that takes tasks in this process."""

    app: Flask
    async_routes: AsyncRoute

    def submit(self, connection: Any, *values: Any) -> AsyncRouteTask:
        with self.app.app_context():
            return self.async_routes.submit(*values, connection=connection)

    def ended(self, task: AsyncRouteTask) -> AsyncRouteTask:
        with self.app.app_context():
            return self.async_routes.wait(task.id, 60)


@pytest.fixture
def url(postgresql_server: str) -> Iterator[str]:
    with new_postgresql_database(postgresql_server) as made:
        yield made


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    made = create_engine(url)
    yield made
    made.dispose()


@pytest.fixture
def runner(make_app: Callable[..., Flask], url: str) -> Runner:
    app = make_app(ASYNCROUTE_STORE=url)
    made = AsyncRoute(app)

    @made.route("/work/<int:n>", methods=["POST"], unique=True)
    def work(n: int) -> int:
        return n

    @made.route("/quick", methods=["POST"], max_workers=4)
    def quick() -> None: ...

    made.start(app)
    return Runner(app, made)


@contextmanager
def forking_script(folder: Path, url: str) -> Iterator[subprocess.Popen[str]]:
    script = folder / "submits.py"
    script.write_text(SCRIPT, "utf-8")
    with subprocess.Popen(
        [sys.executable, str(script), "app", str(folder), url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process


@pytest.mark.covers("F50")
def test_rollbacks_and_kills_leave_nothing(
    runner: Runner, url: str, engine: Engine, tmp_path: Path,
    scaled: Callable[..., int], figures: Callable[[str], None],
) -> None:  # fmt: skip
    """Every transaction holds the same unique keys, which must be free again afterwards."""
    cycles = scaled(ENDS, 5)
    chance = random.Random(5)
    kept = []
    with forking_script(tmp_path, url) as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(cycles):
            if number % 2:
                process.stdin.write("next\n")
                process.stdin.flush()
                pid = int(process.stdout.readline())
                time.sleep(chance.uniform(0, KILL_WITHIN))
                os.kill(pid, signal.SIGKILL)
                assert process.stdout.readline() == "ended\n"
            else:
                with engine.connect() as connection:
                    for n in range(chance.randrange(1, 5)):
                        runner.submit(connection, "work", {"n": n})
                    connection.rollback()
            if number % 10 == 9:
                with engine.begin() as connection:
                    kept.append(runner.submit(connection, "work", {"n": number % 50}))
                assert runner.ended(kept[-1]).result == number % 50
        process.stdin.close()
    left = {}
    with engine.connect() as connection:
        for name in TABLES:
            left[name] = connection.scalar(text(f"SELECT count(*) FROM asyncroute_{name}"))
    assert left == {**dict.fromkeys(TABLES, 0), "tasks": len(kept)}
    figures(f"{cycles} transactions rolled back or killed left nothing; {len(kept)} committed ran")


def test_a_task_begins_soon_after_the_commit(
    runner: Runner, engine: Engine, scaled: Callable[..., int],
    figures: Callable[[str], None],
) -> None:  # fmt: skip
    seconds = []
    for _ in range(WARM_UP + scaled(COMMITS, 20)):
        with engine.begin() as connection:
            task = runner.submit(connection, "quick")
        committed = time.time()
        done = runner.ended(task)
        assert done.started_us is not None
        seconds.append(max(done.started_us / 1_000_000 - committed, 0.0))
    del seconds[:WARM_UP]
    slowest = quantiles(seconds, n=100)[98]
    figures(
        f"start after the commit: median {median(seconds) * 1000:.1f} ms, "
        f"99 % {slowest * 1000:.1f} ms, longest {max(seconds) * 1000:.1f} ms"
    )
    assert median(seconds) <= MEDIAN_SECONDS
    assert slowest <= SLOWEST_SECONDS


@pytest.mark.covers("F50")
def test_an_open_transaction_delays_no_other_task(
    runner: Runner, engine: Engine, share: float, figures: Callable[[str], None]
) -> None:
    store = runtime_of(runner.app).runner.store
    is_over = threading.Event()
    change_seconds: list[float] = []

    def read_changes() -> None:
        while not is_over.wait(0.02):
            began = time.monotonic()
            store.newest()
            change_seconds.append(time.monotonic() - began)

    def measure(seconds: float) -> tuple[list[float], list[float]]:
        """Return the seconds of starts, and from starts to ends."""
        starts, wholes = [], []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            task = runner.submit(None, "quick")
            starts.append(time.monotonic() - began)
            runner.ended(task)
            wholes.append(time.monotonic() - began)
        return starts, wholes

    seconds = HELD_SECONDS * share
    reader = threading.Thread(target=read_changes)
    reader.start()
    try:
        measure(1.0)
        change_seconds.clear()
        before = (*measure(seconds), list(change_seconds))
        change_seconds.clear()
        with engine.begin() as connection:
            held = runner.submit(connection, "work", {"n": 1})
            during = (*measure(seconds), list(change_seconds))
    finally:
        is_over.set()
        reader.join()
    assert runner.ended(held).result == 1
    texts = []
    for name, free, open_ in zip(("start", "whole task", "read"), before, during, strict=True):
        slow, slower = quantiles(free, n=20)[18], quantiles(open_, n=20)[18]
        texts.append(
            f"{name}: median {median(free) * 1000:.1f} → {median(open_) * 1000:.1f} ms, "
            f"95 % {slow * 1000:.1f} → {slower * 1000:.1f} ms, "
            f"longest {max(free) * 1000:.0f} → {max(open_) * 1000:.0f} ms"
        )
        assert median(open_) <= median(free) + DELAY_SECONDS
        assert slower <= slow + DELAY_SECONDS
    figures(f"without → with a transaction open for {seconds:.0f} s: " + "; ".join(texts))
