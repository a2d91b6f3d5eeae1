"""Stops and timeouts of tasks in threads, from any worker: the time until the view has ended, and
until the thread of an uninterruptible view is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.support.apps.crowd import read_journal
from tests.support.client import Reply, send
from tests.support.server import START, gunicorn
from tests.support.waiting import eventually_true

TRIALS = 100
INTERRUPT_AFTER = 1.0
LATE_SECONDS = 0.2
AT_ONCE_SECONDS = 0.1
CAPACITY_SECONDS = 0.5
TIMEOUT = 0.5
PATIENCE = 20.0


@pytest.mark.covers("F14")
def test_stops_and_timeouts_are_prompt(
    tmp_path: Path, scaled: Callable[..., int], figures: Callable[[str], None]
) -> None:
    trials = scaled(TRIALS, 5)
    app = f"tests.support.apps.crowd:create_app({str(tmp_path)!r})"
    with gunicorn(tmp_path / "log", app, "--workers", "2", "--threads", "4", conf=START) as server:
        loops = [stop_loop(server.port, tmp_path) for _ in range(trials)]
        late = [time_out(server.port, tmp_path) for _ in range(trials)]
    with gunicorn(tmp_path / "log", app, "--threads", "4", conf=START) as server:
        c_calls = [stop_c_call(server.port, tmp_path) for _ in range(max(round(trials * 0.2), 3))]
    answered, capacity = zip(*c_calls, strict=True)
    figures(
        f"{trials} loops ended {ms(loops)} after the stop (interrupt_after {INTERRUPT_AFTER:.0f} "
        f"s); {len(c_calls)} stops of C calls answered after {ms(answered)}, their slot free after "
        f"{ms(capacity)}; {trials} timeouts late by {ms(late)}"
    )
    assert max(loops) <= INTERRUPT_AFTER + LATE_SECONDS, "a loop ended too late after its stop"
    assert max(answered) <= AT_ONCE_SECONDS, "a stop was answered too late"
    assert max(capacity) <= CAPACITY_SECONDS, "a slot was free too late after the stop"
    assert max(late) <= LATE_SECONDS, "a timeout came too late"


def ms(seconds: Any) -> str:
    """Return median and maximum as text."""
    return f"{median(seconds) * 1000:.0f} ms, at most {max(seconds) * 1000:.0f} ms"


def begin(port: int, path: str, folder: Path) -> str:
    """Start a task and wait until its view runs."""
    reply = send(port, "PUT", path)
    assert reply.status == 202, f"a start was answered {reply.status}"
    task_id: str = reply.json()["Id"]
    eventually_true(lambda: line_of(folder, task_id, "begin"), PATIENCE)
    return task_id


def line_of(folder: Path, task_id: str, what: str) -> dict[str, Any] | None:
    """Return the line of this kind that the view of a task wrote."""
    lines = read_journal(folder)
    return next((line for line in lines if (line["id"], line["what"]) == (task_id, what)), None)


def stop(port: int, task_id: str) -> Reply:
    """Stop a task through any worker."""
    reply = send(port, "DELETE", f"/task/{task_id}")
    assert reply.status == 200 and reply.json()["State"] == "Aborted", (
        f"a stop was answered {reply.status}"
    )
    return reply


def stop_loop(port: int, folder: Path) -> float:
    """Stop a view that loops without checking; return the seconds until its code has ended."""
    task_id = begin(port, "/loop", folder)
    reply = stop(port, task_id)
    line = eventually_true(lambda: line_of(folder, task_id, "told"), PATIENCE)
    return float(line["at"] - reply.sent_at)


def stop_c_call(port: int, folder: Path) -> tuple[float, float]:
    """Stop a view during a long C call on the only thread of its pool; return the seconds until the
    response, and until another task ran in the pool.
    """
    task_id = begin(port, "/lonely/1500", folder)
    reply = stop(port, task_id)
    task = send(port, "GET", f"/task/{task_id}").json()
    assert task["State"] == "Aborted" and task.get("Stopping") is True, (
        f"a task in a C call is {task}"
    )
    begin(port, "/lonely/1", folder)
    free_after = time.monotonic() - reply.answered_at
    path = f"/task/{task_id}"
    eventually_true(lambda: "Stopping" not in send(port, "GET", path).json(), PATIENCE)
    return reply.answered_at - reply.sent_at, free_after


def time_out(port: int, folder: Path) -> float:
    """Let a view exceed its timeout; return the seconds by which it ended late."""
    task_id = begin(port, "/short", folder)
    path = f"/task/{task_id}"
    eventually_true(lambda: send(port, "GET", path).json()["IsCompleted"], PATIENCE)
    task = send(port, "GET", path).json()
    assert task["Error"] == "Timeout", f"{task_id} ended with {task.get('Error')}"
    began, ended = (
        datetime.fromisoformat(task[name]) for name in ("StartingTime", "CompletedTime")
    )
    return (ended - began).total_seconds() - TIMEOUT
