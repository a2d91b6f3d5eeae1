"""Procrastinate on PostgreSQL."""

from __future__ import annotations

import time
from typing import Any

from flask import Flask
from procrastinate import App, PsycopgConnector

from .app import PATIENCE, POLL, Started, do_task, make_app, store

app = App(connector=PsycopgConnector(conninfo=store()))


@app.task(name="run")
def run(body: dict[str, Any]) -> dict[str, Any]:
    """Run the task in a worker."""
    return do_task(body)


class Jobs:
    """Polls the states of jobs, because Procrastinate has no way to wait for one."""

    def start(self, body: dict[str, Any]) -> Started:
        job_id = run.defer(body=body)
        return job_id, lambda: self._wait(job_id)

    def have_ended(self, started: int) -> bool:
        queues = list(app.job_manager.list_queues())
        return bool(sum(queue["succeeded"] for queue in queues) >= started)

    def _wait(self, job_id: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while app.job_manager.get_job_status(job_id).value != "succeeded":
            if time.monotonic() > deadline:
                raise TimeoutError(f"Job {job_id} has not ended within {PATIENCE} s.")
            time.sleep(POLL)


def create_app() -> Flask:
    """Return the Flask app."""
    app.open()
    return make_app(Jobs())
