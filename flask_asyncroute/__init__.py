"""Run slow Flask views as background tasks. The client receives the task's id immediately.

>>> async_routes = AsyncRoute(app)
>>> @app.put("/report/<int:year>")
... @async_routes.task(timeout=300)
... def report(year):
...     return {"rows": count_rows(year)}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .callbacks.model import Callback
from .current_task import current_task
from .errors import (
    AsyncRouteError,
    BodyTooLarge,
    BrokerUnavailable,
    CallbackRefused,
    CannotStart,
    ConfigurationError,
    InvalidQuery,
    InvalidRequest,
    KeyReused,
    LengthRequired,
    MethodNotAllowed,
    NoCurrentTask,
    NotAcceptable,
    NotAuthenticated,
    NotCancellable,
    NotPermitted,
    QueueFull,
    RequestRefused,
    ResultError,
    RetryRequested,
    ShuttingDown,
    StateValueError,
    StoreUnavailable,
    TaskAborted,
    TaskExists,
    TaskFailed,
    TaskFinished,
    TaskNotFound,
    TaskUnfinished,
    TooManyTasks,
    UnsupportedMediaType,
)
from .extension import AsyncRoute
from .options import Sse
from .permissions import Access, Permission
from .retries import Retry
from .signals import (
    callback_failed,
    callback_sent,
    task_aborted,
    task_completed,
    task_created,
    task_failed,
    task_finished,
    task_progressed,
    task_removed,
    task_retried,
    task_started,
)
from .task import AsyncRouteTask, State

if TYPE_CHECKING:
    from .stores.sql.tables import metadata

__all__ = [
    "Access", "AsyncRoute", "AsyncRouteError", "AsyncRouteTask", "BodyTooLarge",
    "BrokerUnavailable", "Callback", "CallbackRefused", "CannotStart", "ConfigurationError",
    "InvalidQuery", "InvalidRequest", "KeyReused", "LengthRequired", "MethodNotAllowed",
    "NoCurrentTask", "NotAcceptable", "NotAuthenticated", "NotCancellable", "NotPermitted",
    "Permission", "QueueFull", "RequestRefused", "ResultError", "Retry", "RetryRequested",
    "ShuttingDown", "Sse", "State", "StateValueError", "StoreUnavailable", "TaskAborted",
    "TaskExists", "TaskFailed", "TaskFinished", "TaskNotFound", "TaskUnfinished", "TooManyTasks",
    "UnsupportedMediaType",
    "current_task", "metadata",
    "callback_failed", "callback_sent", "task_aborted", "task_completed", "task_created",
    "task_failed", "task_finished", "task_progressed", "task_removed", "task_retried",
    "task_started",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import ``metadata``, and so SQLAlchemy, only when it is used."""
    if name == "metadata":
        from .stores.sql.tables import metadata

        return metadata
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
