"""The route that all systems share, and the task that all systems run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from flask import Flask, Response, jsonify, request

STORE = "PEERS_STORE"
"""Environment variable with the URL or path of the system's store."""
PATIENCE = 20
"""Seconds that a request with ``Prefer: wait`` waits for the end of its task."""
POLL = 0.005
"""Seconds between two polls of a system that can only be polled."""

Started = tuple[Any, Callable[[], object]]
"""The id of a task, and a function that returns when the task has ended."""


class Peer(Protocol):
    """A task queue in a web process."""

    def start(self, body: dict[str, Any]) -> Started:
        """Start a task with the body of the request."""

    def have_ended(self, started: int) -> bool:
        """Return whether all tasks have ended, according to the system's own store.

        :param started: how many tasks were started in all processes.
        """


def do_task(body: dict[str, Any]) -> dict[str, Any]:
    """Run the task. It returns at once, so that only the cost of the system is measured."""
    return {"InnerValue": body["message"]}


def make_app(peer: Peer) -> Flask:
    """Return an app with ``PUT /task`` and ``GET /ended/<started>``.

    ``PUT /task`` responds 202 at once. With a ``Prefer`` header, it responds 200 after the end of
    the task.
    """
    app = Flask("peers")

    @app.put("/task")
    def start() -> tuple[Response, int]:
        task_id, wait = peer.start(request.get_json())
        waits = "Prefer" in request.headers
        if waits:
            wait()
        return jsonify(Id=str(task_id)), 200 if waits else 202

    add_ended(app, peer.have_ended)
    return app


def add_ended(app: Flask, have_ended: Callable[[int], bool]) -> None:
    """Add ``GET /ended/<started>``, which returns whether all tasks have ended."""

    @app.get("/ended/<int:started>")
    def ended(started: int) -> Response:
        return jsonify(have_ended(started))


def store() -> str:
    """Return the URL or path of the store."""
    return os.environ[STORE]
