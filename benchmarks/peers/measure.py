"""Measures one system: starts its processes, puts load on it, and reads times and CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import mkdtemp

from . import load
from .app import STORE
from .processes import Process, cpu_seconds, free_port
from .systems import PYTHON, System

PATIENCE = 30.0
"""Seconds for a server to start."""
DRAIN = 120.0
"""Seconds for all started tasks to end."""
WARM_UP = 64
"""Tasks before the measurement."""


@dataclass(frozen=True)
class Amount:
    """How much is measured in each repeat.

    :param tasks: whole tasks.
    :param rate: starts per second, for ``seconds``.
    :param single: tasks that run one at a time.
    """

    tasks: int
    rate: float
    seconds: float
    single: int


@dataclass(frozen=True)
class Result:
    """One repeat of one system.

    :param kept_up: whether the server answered the fixed rate in time.
    """

    name: str
    tasks_per_second: float
    cpu_ms: float
    start_p50_ms: float
    start_p99_ms: float
    end_to_end_ms: float
    kept_up: bool


def measure(system: System, service: str, amount: Amount) -> Result:
    """Start the system, measure it and stop it.

    :param service: the URL of an empty database for it; empty if it needs none.
    """
    with running(system, service) as port:
        load.one_at_a_time(port, 2)
        load.flood(port, WARM_UP)
        started = WARM_UP + 2
        load.wait_for_the_end(port, started, DRAIN)
        single = load.one_at_a_time(port, amount.single)
        started += amount.single
        load.wait_for_the_end(port, started, DRAIN)
        cpu, began = cpu_seconds(), time.perf_counter()
        # A plain view is so fast that it needs more tasks for the same precision.
        tasks = amount.tasks * (10 if system.is_plain else 1)
        load.flood(port, tasks)
        started += tasks
        load.wait_for_the_end(port, started, DRAIN)
        seconds = time.perf_counter() - began
        cpu = cpu_seconds() - cpu
        latencies, kept_up = load.at_rate(port, amount.rate, amount.seconds)
    return Result(
        system.name, tasks / seconds, cpu / tasks * 1000, median(latencies) * 1000,
        quantiles(latencies, n=100)[98] * 1000, median(single) * 1000, kept_up,
    )  # fmt: skip


@contextmanager
def running(system: System, service: str) -> Iterator[int]:
    """Yield the port of the system's web server while it and its workers run."""
    folder = Path(mkdtemp(prefix="peers-"))
    try:
        with ExitStack() as stack:
            store = system.store.format(folder=folder, service=service)
            environ = {STORE: store, "PYTHONUNBUFFERED": "1"}

            def start(command: tuple[str, ...], name: str) -> Process:
                full = [part.format(service=service, store=store) for part in (*PYTHON, *command)]
                process = Process(full, folder / name, environ)
                stack.callback(process.kill)
                return process

            if system.prepares:
                start(system.prepares, "prepare").wait(PATIENCE)
            number = system.workers if system.worker else 0
            workers = [start(system.worker, f"worker{n}") for n in range(number)]
            port = free_port()
            processes, threads = system.layout
            server = start(
                (
                    "gunicorn", "--bind", f"127.0.0.1:{port}", "--no-control-socket",
                    "--workers", str(processes), "--threads", str(threads),
                    f"benchmarks.peers.{system.module}:create_app()",
                ),
                "server",
            )  # fmt: skip
            _wait_until_it_responds(server, port, workers)
            yield port
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_responds(server: Process, port: int, workers: list[Process]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        for process in (server, *workers):
            process.check()
        try:
            with load.Client(port) as client:
                client.send(load.request("GET", "/ended/0"), 200)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The server did not start: {server.output()}") from None
            time.sleep(0.05)
