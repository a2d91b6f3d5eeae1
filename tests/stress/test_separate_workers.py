"""Web servers that leave tasks to worker processes: how fast tasks start, stop and are streamed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pytest

from tests.support.apps.crowd import read_journal
from tests.support.client import send
from tests.support.event_streams import Stream, told
from tests.support.server import START, gunicorn
from tests.support.waiting import eventually_true
from tests.support.worker_processes import WorkerProcesses

TASKS = 200
STOPS = 50
STOPPED_SECONDS = 0.5
STARTED_SECONDS = 1.0
PAUSE_SECONDS = 0.12
"""Longest pause between two starts, so that workers are idle at a start."""


@pytest.mark.covers("I2")
def test_starts_and_stops_reach_the_workers(
    tmp_path: Path, store_url: str, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    arguments = f"{str(tmp_path)!r}, store={store_url!r}, run_tasks=False"
    app = f"tests.support.apps.crowd:create_app({arguments})"
    chance = random.Random(TASKS)
    with (
        gunicorn(tmp_path / "log", app, "--workers", "2", "--threads", "4", conf=START) as server,
        WorkerProcesses(tmp_path, app, 2) as workers,
    ):
        port, pids = server.port, set(workers.pids())
        answered, sent = {}, {}
        for _ in range(scaled(TASKS, 20)):
            time.sleep(chance.uniform(0, PAUSE_SECONDS))
            reply = send(port, "PUT", "/work/5")
            assert reply.status == 202, reply.body
            answered[reply.json()["Id"]] = reply.answered_at
        eventually_true(lambda: answered.keys() <= moments(tmp_path, "begin").keys(), 30, 0.05)
        starts = [moments(tmp_path, "begin")[key][0] - at for key, at in answered.items()]
        for _ in range(scaled(STOPS, 10)):
            reply = send(port, "PUT", "/work/60000")
            task_id = reply.json()["Id"]
            with Stream(port, f"/task/{task_id}/events") as stream:
                eventually_true(partial(has_begun, tmp_path, task_id), 10, 0.01)
                stop = send(port, "DELETE", f"/task/{task_id}")
                assert (stop.status, stop.json()["State"]) == (200, "Aborted")
                assert told(stream.messages())[-2:] == ["Running", "Aborted"]
            sent[task_id] = stop.sent_at
        eventually_true(lambda: sent.keys() <= moments(tmp_path, "told").keys(), 10, 0.05)
        stops = [moments(tmp_path, "told")[key][0] - at for key, at in sent.items()]
        ran_by = {pid for _, pid in moments(tmp_path, "begin").values()}
        server.assert_no_traceback()
        workers.assert_no_traceback()
    figures(
        f"view began {shown(starts)} after the 202; was asked to stop {shown(stops)} after the "
        "request"
    )
    assert ran_by <= pids, "a web server ran tasks"
    assert max(starts) <= STARTED_SECONDS
    assert max(stops) <= STOPPED_SECONDS


def moments(folder: Path, what: str) -> dict[str, tuple[float, int]]:
    """Return when and in which process each task wrote a line of this kind."""
    return {
        line["id"]: (line["at"], line["pid"])
        for line in read_journal(folder)
        if line["what"] == what
    }


def has_begun(folder: Path, task_id: str) -> bool:
    return task_id in moments(folder, "begin")


def shown(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    late = ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
    return f"{median(ordered) * 1000:.1f} ms (p99 {late * 1000:.1f} ms)"
