"""Tasks started, polled and stopped over random gunicorn workers, checked from outside against what each run wrote down."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

TASKS = 400
DEADLINE = 120.0
TOLD_SECONDS = 0.5


def prove(share: float) -> Iterator[str]:
    """Prove it without and with ``--preload``."""
    for more in ([], ["--preload"]):
        with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as folder:
            yield f"{' '.join(more) or 'no preload'}: {_prove(max(int(TASKS * share), 40), Path(folder), more)}"


def _prove(count: int, folder: Path, more: list[str]) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-w",
        "4",
        "--threads",
        "4",
        "--no-control-socket",
        "--log-level",
        "error",
    ]
    server = subprocess.Popen(
        [*command, "-b", f"127.0.0.1:{port}", *more, "prove.app:app"], env={**os.environ, "PROVE_FOLDER": str(folder)}
    )
    try:
        return _drive(f"http://127.0.0.1:{port}", count, folder)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _drive(base: str, count: int, folder: Path) -> str:
    chance = random.Random(7)
    _await_server(base)

    def start(milliseconds: int) -> str:
        answer = requests.post(f"{base}/job/{milliseconds}", timeout=30)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["Id"])

    stops: dict[str, float] = {}
    with ThreadPoolExecutor(8) as clients:
        starts = [clients.submit(start, chance.randint(200, 2000)) for _ in range(count)]
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            runs = _runs(folder)
            if all(started.done() for started in starts) and sum(len(run) == 2 for run in runs.values()) == count:
                break
            running = [
                (task_id, run[0]["pid"]) for task_id, run in runs.items() if len(run) == 1 and task_id not in stops
            ]
            if running and len(stops) < count // 3:
                task_id, pid = chance.choice(running)
                stopped_at = _stop_elsewhere(base, task_id, pid)
                if stopped_at is not None:
                    stops[task_id] = stopped_at
            polled = [started.result() for started in starts if started.done()]
            if polled:
                answer = requests.get(f"{base}/task/{chance.choice(polled)}", timeout=30)
                assert answer.status_code == 200, answer.text
    return _check(base, [started.result() for started in starts], stops, _runs(folder))


def _check(base: str, ids: list[str], stops: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> str:
    states: Counter[str] = Counter()
    told = []
    for task_id in ids:
        task = requests.get(f"{base}/task/{task_id}", timeout=30).json()
        states[task["State"]] += 1
        written = [line["what"] for line in runs.get(task_id, [])]
        if task["State"] == "Completed":
            assert written == ["begin", "end"] and task_id not in stops, (task, written)
        else:
            assert task["State"] == "Aborted" and task_id in stops and written[0] == "begin", (task, written)
            if written[1:] == ["told"]:
                told.append(runs[task_id][1]["at"] - stops[task_id])
    pids = {line["pid"] for run in runs.values() for line in run}
    assert len(pids) >= 3, pids
    assert told and max(told) <= TOLD_SECONDS, sorted(told)[-5:]
    return f"{dict(states)} on {len(pids)} workers; view told of a stop after at most {max(told):.3f} s"


def _stop_elsewhere(base: str, task_id: str, pid: int) -> float | None:
    """Stop a task through another worker than the one that runs it: a connection stays with its worker.

    :return: when it was stopped; None where it had ended.
    """
    while True:
        with requests.Session() as session:
            if session.get(f"{base}/pid", timeout=30).text == str(pid):
                continue
            stopped_at = time.time()
            answer = session.delete(f"{base}/task/{task_id}", timeout=30)
            assert answer.status_code in (200, 410), answer.text
            assert answer.headers["X-Pid"] != str(pid)
            return stopped_at if answer.status_code == 200 else None


def _runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    file = folder / "runs"
    for line in file.read_text().splitlines() if file.exists() else ():
        entry = json.loads(line)
        runs[entry["id"]].append(entry)
    return runs


def _await_server(base: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            requests.get(f"{base}/pid", timeout=5)
            return
        except requests.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
