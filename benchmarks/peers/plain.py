"""A plain Flask view that runs the task itself: the unit of all ratios."""

from __future__ import annotations

from typing import Any

from flask import Flask, request

from .app import add_ended, do_task


def create_app() -> Flask:
    """Return the app."""
    app = Flask("plain")

    @app.put("/task")
    def task() -> dict[str, Any]:
        return do_task(request.get_json())

    add_ended(app, lambda started: True)
    return app
