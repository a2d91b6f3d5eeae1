"""The configuration of gunicorn: ``gunicorn --config python:example_app.server``."""

from __future__ import annotations

import logging
from typing import Any

from .extension import async_routes


def post_worker_init(worker: Any) -> None:
    """Let a worker run tasks before its first request, and end its streams at a shutdown."""
    # Show the start and the end of tasks in the terminal.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("flask_asyncroute").setLevel(logging.INFO)
    async_routes.start(worker.wsgi)
