"""Celery with Redis as broker (database 0) and as result backend (database 1)."""

from __future__ import annotations

from typing import Any

from celery import Celery
from flask import Flask
from redis import Redis

from .app import PATIENCE, Started, do_task, make_app, store

RESULTS = f"{store()}/1"
celery = Celery("peers", broker=f"{store()}/0", backend=RESULTS)


@celery.task(name="run")
def run(body: dict[str, Any]) -> dict[str, Any]:
    """Run the task in a worker."""
    return do_task(body)


class Queue:
    """Counts results in the result backend."""

    def __init__(self) -> None:
        self.results = Redis.from_url(RESULTS)

    def start(self, body: dict[str, Any]) -> Started:
        result = run.delay(body)
        return result.id, lambda: result.get(timeout=PATIENCE)

    def have_ended(self, started: int) -> bool:
        return bool(self.results.dbsize() >= started)


def create_app() -> Flask:
    """Return the app."""
    return make_app(Queue())
