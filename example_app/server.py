"""The configuration of gunicorn: ``gunicorn --config python:example_app.server``."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import socket
import sys
from typing import Any

from .extension import async_routes

logger = logging.getLogger(__name__)

_first_exit = multiprocessing.Lock()
"""Held by the first worker that exits. Workers are forked, so they share this lock."""


def on_starting(server: Any) -> None:
    """Exit with a hint if another program uses the port. gunicorn would retry and fail later."""
    for address in server.address:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                port = address[1]
                sys.exit(f"Port {port} is in use. Use another one: make demo PORT={port + 1}")


def post_worker_init(worker: Any) -> None:
    """Let a worker run tasks before its first request, and end its streams at a shutdown."""
    # Show the start and the end of tasks in the terminal.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for name in (__name__, "flask_asyncroute"):
        logging.getLogger(name).setLevel(logging.INFO)
    async_routes.start(worker.wsgi)


def worker_exit(server: Any, worker: Any) -> None:
    """Say after Ctrl-C how many tasks the workers wait for. Only the first worker says it."""
    if not _first_exit.acquire(block=False):
        return
    with worker.wsgi.app_context():
        count = sum(1 for _ in async_routes.query(State="Running"))
    if count:
        logger.info(
            "Waiting for %d %s, up to %d s.",
            count, "task" if count == 1 else "tasks", worker.wsgi.config["ASYNCROUTE_DRAIN"],
        )  # fmt: skip
