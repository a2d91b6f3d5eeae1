"""``POST /report``: reads figures from an unreliable service, as an example of ``retry`` and
``unique``.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint

from flask_asyncroute import Retry, current_task

from .extension import async_routes
from .visitor import current_visitor

blueprint = Blueprint("report", __name__)

SECONDS = 2
"""Duration of an attempt, and of the pause before the first retry."""
FAILURES = 2


class ServiceUnavailable(Exception):
    """The service did not respond."""


def one_per_person() -> str | None:
    """Return the key of which there is one unfinished task; None for anonymous callers.

    Without a key, each request starts a task.
    """
    visitor = current_visitor()
    return None if visitor is None else visitor.id


@blueprint.post("/report")
@async_routes.task(
    timeout=60,
    retry=Retry(times=3, on=ServiceUnavailable, delay=SECONDS),
    unique=one_per_person,
)
def report() -> dict[str, Any]:
    """Read the figures. If the service is unavailable, the task runs again."""
    current_task.set_progress(0, "asking the service")
    current_task.progress_over(SECONDS, interval=0.25)
    current_task.sleep(SECONDS)
    current_task.check()
    visitors = read_figures(current_task.attempt)
    current_task.set_progress(100, "got the figures")
    return {"attempts": current_task.attempt, "visitors": visitors}


def read_figures(attempt: int) -> list[int]:
    """Stand in for a request to a service that fails the first two times."""
    if attempt <= FAILURES:
        raise ServiceUnavailable("The service did not respond.")
    return [17, 25, 31]
