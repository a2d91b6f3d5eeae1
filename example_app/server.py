"""What gunicorn is told beside its options: ``gunicorn --config python:example_app.server``."""

from __future__ import annotations

from typing import Any

from .extension import async_routes


def post_worker_init(worker: Any) -> None:
    """Have a worker run tasks before its first request, and end its streams when it is told to end."""
    async_routes.start(worker.wsgi)
