"""``make demo-celery``: runs the web server and a Celery worker until Ctrl-C, or until one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from celery import Celery

REDIS_URL = "redis://127.0.0.1:6379/0"
QUEUE = "flask_asyncroute_demo"
"""A queue of its own, because other apps may use the same Redis."""
SECONDS_TO_END = 10.0
CHECK_SECONDS = 0.2


def main(port: str) -> str | None:
    """Run both processes; return an error message, or None after Ctrl-C or TERM."""
    url = os.environ.get("REDIS_URL") or REDIS_URL
    if (missing := unreachable(url)) is not None:
        return missing
    root = f"http://127.0.0.1:{port}"
    print(f"The example application: {root}/ (Ctrl-C stops it)")
    print(f"A task on the Celery worker: curl -X POST -H 'Prefer: wait=10' {root}/elsewhere/5")
    environ = {
        **os.environ,
        "FLASK_CELERY": json.dumps(
            {"broker_url": url, "task_default_queue": QUEUE, "task_ignore_result": True}
        ),
        "PYTHONUNBUFFERED": "1",
    }
    python = [sys.executable, "-m"]
    return run_all(
        {
            "The Celery worker": [
                *python, "celery", "--app", "example_app.worker", "worker", "--concurrency", "2",
                "--loglevel", "INFO",
            ],
            "gunicorn": [
                *python, "gunicorn", "--config", "python:example_app.server", "--workers", "2",
                "--threads", "4", "--bind", f"127.0.0.1:{port}", "--no-control-socket",
                "example_app:create_app()",
            ],
        },
        environ,
    )  # fmt: skip


def unreachable(url: str) -> str | None:
    """Return a message if there is no broker at this URL; None if there is one."""
    name = "this URL"
    try:
        with Celery(broker=url).connection_for_write(connect_timeout=3) as connection:
            name = connection.as_uri()  # without the password
            connection.ensure_connection(max_retries=1, timeout=5)
    except Exception as error:
        return (
            f"No Redis answers at {name} ({error}).\n"
            "Start one (on Debian and Ubuntu: apt-get install redis-server), or name another:\n"
            "    make demo-celery REDIS_URL=redis://host:6379/0\n"
            "If it is on another machine, FLASK_ASYNCROUTE_STORE must name a PostgreSQL database."
        )
    return None


def run_all(commands: dict[str, Sequence[str]], environ: dict[str, str]) -> str | None:
    """Run commands until one ends, or until this process receives INT or TERM. Then stop all.

    :return: an error message if a command ended; None after a signal.
    """
    processes: dict[str, subprocess.Popen[Any]] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name, command in commands.items():
            # In a session of their own, the processes do not receive Ctrl-C a second time, which
            # would make Celery drop its tasks.
            processes[name] = subprocess.Popen(command, env=environ, start_new_session=True)
        while True:
            for name, process in processes.items():
                if process.poll() is not None:
                    return f"{name} has ended with the exit code {process.returncode}."
            time.sleep(CHECK_SECONDS)
    except KeyboardInterrupt:
        return None
    finally:
        stop(list(processes.values()))


def stop(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Let processes end their tasks, then kill them and their children."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + SECONDS_TO_END
    for process in processes:
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(max(0.0, until - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
