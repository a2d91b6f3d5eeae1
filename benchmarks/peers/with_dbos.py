"""DBOS: workflows in the web processes, on SQLite or PostgreSQL."""

from __future__ import annotations

import os
from typing import Any

from dbos import DBOS, DBOSConfig
from flask import Flask

from .app import Started, do_task, make_app, store


@DBOS.workflow()
def run(body: dict[str, Any]) -> dict[str, Any]:
    """Run the task as a workflow without steps."""
    return do_task(body)


class Workflows:
    """Lists workflows that have not ended."""

    def start(self, body: dict[str, Any]) -> Started:
        handle = DBOS.start_workflow(run, body)
        return handle.workflow_id, handle.get_result

    def have_ended(self, started: int) -> bool:
        return not DBOS.list_workflows(
            status=["PENDING", "ENQUEUED"], limit=1, load_input=False, load_output=False
        )


def create_app() -> Flask:
    """Return the app."""
    # Each process has its own executor id, so that no process recovers the workflows of the other.
    config: DBOSConfig = {
        "name": "peers",
        "system_database_url": store(),
        "executor_id": str(os.getpid()),
        "application_version": "1",
        "log_level": "WARNING",
    }
    DBOS(config=config)
    DBOS.launch()
    return make_app(Workflows())
