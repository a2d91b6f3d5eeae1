"""RQ on Redis. Run this module as the worker.

RQ recommends a worker script that imports the modules of its tasks, because RQ forks a process for
each task, which would import them again.
"""

from __future__ import annotations

from typing import Any

from flask import Flask
from redis import Redis
from rq import Queue, Worker

from .app import PATIENCE, Started, do_task, make_app, store


class Jobs:
    """Counts jobs in RQ's registry of finished jobs."""

    def __init__(self) -> None:
        self.queue = Queue(connection=Redis.from_url(store()))

    def start(self, body: dict[str, Any]) -> Started:
        job = self.queue.enqueue(do_task, body)
        return job.id, lambda: job.latest_result(timeout=PATIENCE)

    def have_ended(self, started: int) -> bool:
        return bool(self.queue.finished_job_registry.get_job_count(cleanup=False) >= started)


def create_app() -> Flask:
    """Return the app."""
    return make_app(Jobs())


if __name__ == "__main__":
    Worker([Queue(connection=Redis.from_url(store()))]).work(logging_level="WARNING")
