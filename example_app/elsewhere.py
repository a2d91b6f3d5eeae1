"""``POST /elsewhere/<seconds>``: runs on a Celery worker, and returns which process that was.

This module needs Celery. ``make demo-celery`` uses it; ``make demo`` does not.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from celery import Celery, Task
from flask import Blueprint, Flask, abort

from flask_asyncroute import current_task

from .extension import async_routes

blueprint = Blueprint("elsewhere", __name__)

MAX_SECONDS = 60


@blueprint.post("/elsewhere/<int:seconds>")
@async_routes.task(executor="celery", timeout=2 * MAX_SECONDS)
def elsewhere(seconds: int) -> dict[str, Any]:
    """Sleep on a Celery worker, with progress every half second."""
    if seconds > MAX_SECONDS:
        abort(400, f"The time is too long; use at most {MAX_SECONDS} seconds.")
    current_task.progress_over(seconds, interval=0.5)
    current_task.sleep(seconds)
    current_task.check()
    return {"host": socket.gethostname(), "process": os.getpid()}


def celery_init_app(app: Flask) -> Celery:
    """Create the Celery app, as Flask's documentation describes, from ``app.config["CELERY"]``."""

    class FlaskTask(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app
