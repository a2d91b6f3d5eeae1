"""The apps to measure: one plain Flask app, and one with async routes for each kind of store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request

from flask_asyncroute import AsyncRoute, current_task
from flask_asyncroute.executors.base import TaskExecutor
from flask_asyncroute.runtime import runtime_of

MANY = 1_000_000
"""A queue size that no measurement reaches."""


def make_async_app(folder: Path, store: str | None = None, **config: Any) -> Flask:
    """Return an app with the async routes ``PUT /quick`` and ``PUT /long``.

    :param folder: for the file of its store, if it has one.
    :param store: ``ASYNCROUTE_STORE``; None: the default, SQLite.
    """
    app = Flask("benchmarks", instance_path=str(folder.absolute()))
    app.config.update(ASYNCROUTE_QUEUE_SIZE=MANY, ASYNCROUTE_LIST_ANONYMOUS=True, **config)
    if store is not None:
        app.config["ASYNCROUTE_STORE"] = store
    async_routes = AsyncRoute(app)

    @app.put("/quick")
    @async_routes.task
    def quick() -> dict[str, Any]:
        return {"InnerValue": request.get_json()["message"]}

    @app.put("/long")
    @async_routes.task
    def long() -> dict[str, bool]:
        return {"Slept": current_task.sleep(60)}

    return app


def make_plain_app(started: Any, found: Any) -> Flask:
    """Return an app whose views produce the same responses as a start and a get, and do nothing
    else.

    :param started: the task object that ``PUT /plain`` returns.
    :param found: the task object that ``GET /plain/<task_id>`` returns.
    """
    app = Flask("plain")

    @app.put("/plain")
    def start() -> Response:
        request.get_data()
        response = jsonify(started)
        response.status_code = 202
        headers = response.headers
        headers["Cache-Control"] = "no-store"
        headers["Vary"] = "Accept, Authorization, Cookie"
        headers["Location"] = f"/task/{started['Id']}"
        headers["Retry-After"] = "1"
        return response

    @app.get("/plain/<task_id>")
    def get(task_id: str) -> Response:
        response = jsonify(found)
        headers = response.headers
        headers["Cache-Control"] = "no-store"
        headers["Vary"] = "Accept, Authorization, Cookie"
        headers["ETag"] = '"3-json"'
        return response

    return app


def executor_of(app: Flask, endpoint: str) -> TaskExecutor:
    """Return the executor that runs an endpoint's tasks in this process."""
    runtime = runtime_of(app)
    return runtime.runner.executor_of(runtime.routes[endpoint])


def close(app: Flask) -> None:
    """End the threads of the app and close its store."""
    runtime_of(app).close()
