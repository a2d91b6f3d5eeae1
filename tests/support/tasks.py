"""Task records for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask_asyncroute import AsyncRouteTask
from flask_asyncroute.stores.base import Waiting
from flask_asyncroute.task import State


def new_task(id: str = "task", **fields: Any) -> AsyncRouteTask:
    """Return the record of a new task."""
    defaults: dict[str, Any] = {
        "id": id,
        "async_route_id": "[Put]/work",
        "endpoint": "work",
        "state": State.NOT_STARTED,
        "cancellable": True,
        "user": None,
        "url": "http://localhost/work",
        "method": "PUT",
        "created_us": 1_700_000_000_000_000,
        "retention_us": 86_400_000_000,
    }
    return AsyncRouteTask(**(defaults | fields))


def pairs(waiting: Iterable[Waiting]) -> list[tuple[str, str]]:
    """Return the ids and endpoints of waiting tasks."""
    return [(task.id, task.endpoint) for task in waiting]
