"""Stops and timeouts of tasks in threads, from whichever worker: how long until the view has ended, and what an obstinate
one costs others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from . import check, scaled
from .apps.crowd import read_journal
from .client import Reply, send
from .losses import START
from .server import gunicorn

TRIALS = 100
INTERRUPT_AFTER = 1.0
LATE_SECONDS = 0.2
AT_ONCE_SECONDS = 0.1
CAPACITY_SECONDS = 0.5
TIMEOUT = 0.5
PATIENCE = 20.0


def prove(share: float) -> str:
    """Run all trials on one server; return the figures."""
    trials = scaled(TRIALS, share, 5)
    with tempfile.TemporaryDirectory(prefix="asyncroute-prove-") as name:
        folder = Path(name)
        (folder / "gunicorn.conf.py").write_text(START)
        options = ["--workers", "2", "--threads", "4", "--config", str(folder / "gunicorn.conf.py")]
        app = f"prove.apps.crowd:create_app({name!r})"
        with gunicorn(folder / "log", app, *options) as server:
            loops = [stop_loop(server.port, folder) for _ in range(trials)]
            late = [time_out(server.port, folder) for _ in range(trials)]
        with gunicorn(folder / "log", app, *options[2:]) as server:
            deaf = [stop_deaf(server.port, folder) for _ in range(scaled(trials, 0.2, 3))]
    check(max(loops) <= INTERRUPT_AFTER + LATE_SECONDS, f"a loop in a thread ended {max(loops):.3f} s after its stop")
    answered, capacity = zip(*deaf, strict=True)
    check(max(answered) <= AT_ONCE_SECONDS, f"a stop was answered after {max(answered):.3f} s")
    check(max(capacity) <= CAPACITY_SECONDS, f"a place came free {max(capacity):.3f} s after the stop")
    check(max(late) <= LATE_SECONDS, f"a timeout came {max(late):.3f} s late")
    return (
        f"{trials} loops ended {figures(loops)} after the stop (interrupt_after {INTERRUPT_AFTER:.0f} s); "
        f"{len(deaf)} stops of C calls answered after {figures(answered)}, their place free after {figures(capacity)}; "
        f"{trials} timeouts late by {figures(late)}"
    )


def figures(seconds: Any) -> str:
    """Return median and maximum as text."""
    return f"{median(seconds) * 1000:.0f} ms, at most {max(seconds) * 1000:.0f} ms"


def begin(port: int, path: str, folder: Path) -> str:
    """Start a task and wait until its view runs."""
    reply = send(port, "PUT", path)
    check(reply.status == 202, f"a start was answered {reply.status}")
    task_id: str = reply.json()["Id"]
    wait_for(lambda: any(line["id"] == task_id and line["what"] == "begin" for line in read_journal(folder)), task_id)
    return task_id


def stop(port: int, task_id: str) -> Reply:
    """Stop a task over a connection to whichever worker answers."""
    reply = send(port, "DELETE", f"/task/{task_id}")
    check(reply.status == 200 and reply.json()["State"] == "Aborted", f"a stop was answered {reply.status}")
    return reply


def stop_loop(port: int, folder: Path) -> float:
    """Stop a view that computes and looks at nothing; return the seconds until its code has ended."""
    task_id = begin(port, "/loop", folder)
    reply = stop(port, task_id)
    line = wait_for(
        lambda: next((n for n in read_journal(folder) if n["id"] == task_id and n["what"] == "told"), None), task_id
    )
    return float(line["at"] - reply.sent_at)


def stop_deaf(port: int, folder: Path) -> tuple[float, float]:
    """Stop a view that is in one long C call, on the only thread of its pool; return the seconds until the stop was
    answered, and until another task had the place.
    """
    task_id = begin(port, "/lonely/1500", folder)
    reply = stop(port, task_id)
    task = send(port, "GET", f"/task/{task_id}").json()
    check(task["State"] == "Aborted" and task.get("Stopping") is True, f"a task in a C call is {task}")
    begin(port, "/lonely/1", folder)
    free_after = time.monotonic() - reply.answered_at
    wait_for(lambda: "Stopping" not in send(port, "GET", f"/task/{task_id}").json(), task_id)
    return reply.answered_at - reply.sent_at, free_after


def time_out(port: int, folder: Path) -> float:
    """Let a view run out of time; return by how many seconds its end came late."""
    task_id = begin(port, "/short", folder)
    path = f"/task/{task_id}"
    task = wait_for(lambda: found if (found := send(port, "GET", path).json())["IsCompleted"] else None, task_id)
    check(task["Error"] == "Timeout", f"{task_id} ended with {task.get('Error')}")
    began, ended = (datetime.fromisoformat(task[name]) for name in ("StartingTime", "CompletedTime"))
    return (ended - began).total_seconds() - TIMEOUT


def wait_for(condition: Callable[[], Any], task_id: str) -> Any:
    """Wait for a true value and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        check(time.monotonic() < deadline, f"{task_id}: nothing came of it within {PATIENCE:.0f} s")
        time.sleep(0.005)
    return value
