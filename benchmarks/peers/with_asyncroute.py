"""This package, with the store of ``PEERS_STORE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Flask, request

from flask_asyncroute import AsyncRoute
from flask_asyncroute.query import NEWEST_FIRST, parse_mapping
from flask_asyncroute.runtime import runtime_of

from ..apps import MANY
from .app import add_ended, do_task, store


def create_app() -> Flask:
    """Return the app."""
    app = Flask("peers", instance_path=str(Path.cwd()))
    app.config.update(ASYNCROUTE_QUEUE_SIZE=MANY, ASYNCROUTE_STORE=store())
    async_routes = AsyncRoute(app)

    @app.put("/task")
    @async_routes.task
    def task() -> dict[str, Any]:
        return do_task(request.get_json())

    def have_ended(started: int) -> bool:
        tasks = runtime_of(app).runner.store
        return not any(
            tasks.query(parse_mapping({"State": {"value": state}}), NEWEST_FIRST, 1, None, None)
            for state in ("NotStarted", "Running")
        )

    add_ended(app, have_ended)
    return app
