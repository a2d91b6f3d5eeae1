"""Short tasks with a ``unique`` key that record their begin and end in one file for all processes.
The header ``X-User`` names the caller.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from flask import Flask, request

from flask_asyncroute import AsyncRoute, current_task
from tests.support.apps.naming import name_process

LONGEST = 0.02
"""The longest random duration of a task, in seconds."""


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app.

    :param folder: for its store and for ``journal``.
    :param config: ``ASYNCROUTE_*`` keys without their prefix, in lower case.
    """
    app = Flask(__name__, instance_path=folder)
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes
    name_process(app)
    journal = Path(folder) / "journal"

    @async_routes.identity_loader
    def identity() -> dict[str, str] | None:
        user = request.headers.get("X-User")
        return None if user is None else {"id": user}

    def note(what: str, key: str) -> None:
        line = {"what": what, "key": key, "id": current_task.id}
        number = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(number, json.dumps(line).encode() + b"\n")
        finally:
            os.close(number)

    @app.post("/click/<key>")
    @async_routes.task(unique=True, max_workers=2, queue_size=2)
    def click(key: str) -> str:
        note("begin", key)
        time.sleep(random.uniform(0, LONGEST))
        note("end", key)
        return key

    return app
