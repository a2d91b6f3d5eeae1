"""A client for programs that start tasks of an app with async routes.

It uses requests, and neither a Flask app nor a context. (Python also imports the package
``flask_asyncroute`` itself, and so Flask.)

>>> with AsyncRouteClient("https://example.com/app") as client:
...     task = client.start("POST", "/reports/2026")
...     print(task.result(timeout=60))
"""

from __future__ import annotations

from .client import AsyncRouteClient
from .errors import (
    ClientError,
    InvalidResponseError,
    NotAuthenticatedError,
    NotCancellableError,
    NotFoundError,
    NotPermittedError,
    RefusedError,
    TaskAbortedError,
    TaskError,
    TaskExistsError,
    TaskFailedError,
    TaskFinishedError,
    TooManyRequestsError,
    UnavailableError,
    UnreachableError,
)
from .sse import ServerEvent
from .task import ProgressHook, RemoteTask

__all__ = [
    "AsyncRouteClient", "ClientError", "InvalidResponseError", "NotAuthenticatedError",
    "NotCancellableError", "NotFoundError", "NotPermittedError", "ProgressHook", "RefusedError",
    "RemoteTask", "ServerEvent", "TaskAbortedError", "TaskError", "TaskExistsError",
    "TaskFailedError", "TaskFinishedError", "TooManyRequestsError", "UnavailableError",
    "UnreachableError",
]  # fmt: skip
