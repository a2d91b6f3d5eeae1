"""The exceptions of the client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Base class of the exceptions of `flask_asyncroute.client`."""


class UnreachableError(ClientError):
    """The server cannot be reached, or sent no complete response in time."""


class InvalidResponseError(ClientError):
    """The response is not that of an async route, or exceeds a limit of the client."""


class TaskError(ClientError):
    """The task has ended without a result.

    :param task: the last task object.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task)
        self.task = task

    def __str__(self) -> str:
        return f"Task {self.task['Id']} is {self.task['State']}: {self.task.get('Error')}"


class TaskFailedError(TaskError):
    """The task is ``Failed``: its view raised an exception."""


class TaskAbortedError(TaskError):
    """The task is ``Aborted``, but not by a stop: for example ``Timeout`` or ``Worker lost``."""


class RefusedError(ClientError):
    """The server refused the request.

    :param status: the HTTP status.
    :param type: the URI of the problem's type (RFC 9457), or ``about:blank``.
    :param title: the kind of problem in words.
    :param detail: what is wrong and what to do; can be empty.
    :param retry_after: seconds after which the request may be sent again, if the server says so.
    """

    def __init__(
        self,
        status: int,
        type: str = "about:blank",
        title: str = "",
        detail: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, type, title, detail, retry_after)
        self.status = status
        self.type = type
        self.title = title
        self.detail = detail
        self.retry_after = retry_after

    def __str__(self) -> str:
        return ": ".join(filter(None, [f"{self.status} {self.title}".rstrip(), self.detail]))


class NotAuthenticatedError(RefusedError):
    """The caller is unknown (401): send valid credentials."""


class NotPermittedError(RefusedError):
    """The caller may not do this (403)."""


class NotFoundError(RefusedError):
    """The path or the task does not exist, or the caller may not read the task (404)."""


class TaskExistsError(RefusedError):
    """Another caller has an unfinished task with the same ``unique`` key (409)."""


class TaskFinishedError(RefusedError):
    """The task has ended and can no longer be stopped (410)."""


class NotCancellableError(RefusedError):
    """The route was declared with ``cancellable=False`` (423)."""


class TooManyRequestsError(RefusedError):
    """The caller has too many unfinished tasks, or sends too many requests (429)."""


class UnavailableError(RefusedError):
    """The server cannot handle the request now (502, 503, 504): for example, its queue is full."""


OF_STATUS: Mapping[int, type[RefusedError]] = {
    401: NotAuthenticatedError,
    403: NotPermittedError,
    404: NotFoundError,
    429: TooManyRequestsError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}
OF_TYPE: Mapping[str, type[RefusedError]] = {
    "task-exists": TaskExistsError,
    "task-finished": TaskFinishedError,
    "not-cancellable": NotCancellableError,
}
"""Classes by the last part of the problem's type, because apps also use these statuses."""

TRANSIENT = (UnreachableError, TooManyRequestsError, UnavailableError)
"""Errors after which the same request can succeed later."""
