"""Flask-Executor: a thread pool in the web process."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any
from uuid import uuid4

from flask import Flask
from flask_executor import Executor

from .app import Started, do_task, make_app


class Pool:
    """Counts the futures that are done."""

    def __init__(self) -> None:
        self.executor = Executor()
        self.executor.add_default_done_callback(self._count)
        self._ended: list[None] = []

    def start(self, body: dict[str, Any]) -> Started:
        task_id = uuid4().hex
        self.executor.submit_stored(task_id, do_task, body)
        return task_id, lambda: self.executor.futures.pop(task_id).result()

    def have_ended(self, started: int) -> bool:
        return len(self._ended) >= started

    def _count(self, future: Future[Any]) -> None:
        # Threads call this at the same time. Appending is atomic, an addition is not.
        self._ended.append(None)


def create_app() -> Flask:
    """Return the app."""
    pool = Pool()
    app = make_app(pool)
    app.config["EXECUTOR_MAX_WORKERS"] = 2
    pool.executor.init_app(app)
    return app
