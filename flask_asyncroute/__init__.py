"""Long work behind a Flask view: one decorator, and the client gets a task object at once.

>>> async_routes = AsyncRoute(app)
>>> @app.put("/report/<int:year>")
... @async_routes.task(timeout=300)
... def report(year):
...     return {"rows": count_rows(year)}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .context import current_task
from .errors import (
    AsyncRouteError,
    ConfigurationError,
    InvalidQuery,
    NoCurrentTask,
    NotCancellable,
    StoreUnavailable,
    TaskAborted,
    TaskFinished,
    TaskNotFound,
)
from .extension import AsyncRoute
from .options import Callback, Sse
from .permissions import Access, Permission
from .signals import (
    callback_failed,
    callback_sent,
    task_aborted,
    task_completed,
    task_created,
    task_failed,
    task_finished,
    task_progressed,
    task_started,
)
from .states import State
from .task import AsyncRouteTask

if TYPE_CHECKING:
    from .stores.sql.tables import metadata

__all__ = [
    "Access",
    "AsyncRoute",
    "AsyncRouteError",
    "AsyncRouteTask",
    "Callback",
    "ConfigurationError",
    "InvalidQuery",
    "NoCurrentTask",
    "NotCancellable",
    "Permission",
    "Sse",
    "State",
    "StoreUnavailable",
    "TaskAborted",
    "TaskFinished",
    "TaskNotFound",
    "current_task",
    "metadata",
    "callback_failed",
    "callback_sent",
    "task_aborted",
    "task_completed",
    "task_created",
    "task_failed",
    "task_finished",
    "task_progressed",
    "task_started",
]


def __getattr__(name: str) -> Any:
    """Import the tables' metadata, and with it SQLAlchemy, only for who asks for it."""
    if name == "metadata":
        from .stores.sql.tables import metadata

        return metadata
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
