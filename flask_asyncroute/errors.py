"""All errors of the package.

Clients see a `RequestRefused` as a problem response (RFC 9457), so messages contain no secrets.
"""

from __future__ import annotations

import re
from typing import Any

from werkzeug.exceptions import Conflict, Gone, HTTPException, Locked, NotFound


class AsyncRouteError(Exception):
    """Base class of this package's errors."""


class ConfigurationError(AsyncRouteError):
    """The app is misconfigured; the message names the cause and the remedy."""


class NoCurrentTask(AsyncRouteError, RuntimeError):
    """`current_task` was used outside a running task."""


class ResultError(AsyncRouteError):
    """The return value of a view cannot be stored; the message says what to return instead."""


class StateValueError(AsyncRouteError, ValueError):
    """The shared state cannot hold this key or value; the message says why."""


class IdTaken(AsyncRouteError):
    """The store already has a task with this id."""


class UniqueTaken(AsyncRouteError):
    """The store already has an unfinished task with this ``unique`` key."""


class KeyTaken(AsyncRouteError):
    """The store already has a task with this ``Idempotency-Key``."""


class TaskAborted(BaseException):
    """Raised inside a view whose task was stopped or timed out.

    Derives from :exc:`BaseException`, so ``except Exception`` does not catch it. Clean up in
    ``finally``; do not suppress it.
    """


class RetryRequested(BaseException):
    """Raised by ``current_task.retry()`` to end the attempt.

    Derives from :exc:`BaseException`, so ``except Exception`` does not catch it. Do not suppress
    it.

    :param after: seconds until the next attempt; None: as in the route's ``retry``.
    """

    def __init__(self, reason: str = "", after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class RequestRefused(AsyncRouteError):
    """The request is answered with an error and changes nothing.

    A subclass without a status keeps the status and slug of its base class.

    :param detail: what is wrong and what the client can do.
    :param task_id: the task's id, if any.
    :param retry_after: seconds after which the client may try again.
    """

    status = 400
    slug = "bad-request"
    """The class name with hyphens, such as ``task-not-found``, for clients."""

    def __init_subclass__(cls, status: int | None = None, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if status is not None:
            cls.status = status
            cls.slug = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(
        self, detail: str, *, task_id: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.task_id = task_id
        self.retry_after = retry_after

    @property
    def title(self) -> str:
        """The kind of error in words."""
        return self.slug.replace("-", " ").capitalize()


class _TaskRefused(RequestRefused, HTTPException):
    """A refusal that a plain view may let through: Flask sends the response of its status.

    Subclasses also derive from Werkzeug's class for the status, so that error handlers for the
    status receive them. A task that raises one fails as with any other exception; see
    `executors.outcome`.
    """

    def __init__(
        self, detail: str, *, task_id: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(detail, task_id=task_id, retry_after=retry_after)
        self.args = (detail,)  # HTTPException empties it, and pickle needs it

    def __str__(self) -> str:
        return self.detail

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.detail!r})"

    def get_headers(self, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
        headers = list(super().get_headers(*arguments, **options))
        if self.retry_after is not None:
            headers.append(("Retry-After", str(self.retry_after)))
        return headers


class InvalidRequest(RequestRefused, status=400):
    """The request is malformed, such as an incomplete body or an invalid header."""


class InvalidQuery(RequestRefused, status=400):
    """The query, limit, sort or cursor is invalid; the message names the invalid part."""


class CallbackRefused(RequestRefused, status=400):
    """The requested callback is invalid or not allowed; the message says why."""


class NotAuthenticated(RequestRefused, status=401):
    """The route has a permission and the caller is unknown."""


class NotPermitted(RequestRefused, status=403):
    """The caller is known but may not use the operation."""


class TaskNotFound(_TaskRefused, NotFound, LookupError, status=404):
    """No task has this id, or the caller may not read the task. Responses do not say which."""


class MethodNotAllowed(RequestRefused, status=405):
    """A request with this method never starts a task."""


class NotAcceptable(RequestRefused, status=406):
    """The client accepts none of the available media types."""


class TaskUnfinished(_TaskRefused, Conflict, status=409):
    """The operation needs a finished task."""


class TaskExists(RequestRefused, status=409):
    """An unfinished task that the caller may not read has the same ``unique`` key."""


class TaskFinished(_TaskRefused, Gone, status=410):
    """The task has ended and can no longer be stopped."""


class LengthRequired(RequestRefused, status=411):
    """The server does not support chunked request bodies; send a Content-Length."""


class BodyTooLarge(RequestRefused, status=413):
    """The request body exceeds a size limit."""


class UnsupportedMediaType(RequestRefused, status=415):
    """The operation does not read request bodies of this type."""


class KeyReused(RequestRefused, status=422):
    """The caller already used this ``Idempotency-Key`` for another request."""


class NotCancellable(_TaskRefused, Locked, status=423):
    """The task's route was declared with ``cancellable=False``."""


class TooManyTasks(RequestRefused, status=429):
    """The user has as many unfinished tasks as ``ASYNCROUTE_MAX_TASKS_PER_USER`` allows."""

    @classmethod
    def of(cls, quota: int) -> TooManyTasks:
        return cls(
            f"You have {quota} unfinished tasks, the maximum per user. Wait until one ends, or "
            "stop one."
        )


class TaskFailed(RequestRefused, status=500):
    """The task failed, so it has no result."""


class CannotStart(RequestRefused, status=500):
    """An error in the app, such as in its id generator, prevents the task from starting."""


class QueueFull(RequestRefused, status=503):
    """The queue of the route's pool is full."""


class BrokerUnavailable(RequestRefused, status=503):
    """The message broker of Celery does not accept the task at the moment."""


class ShuttingDown(RequestRefused, status=503):
    """This server process is shutting down and starts no more tasks."""


class StoreUnavailable(RequestRefused, status=503):
    """The store cannot be read or written at the moment."""


class CommitUnknown(StoreUnavailable):
    """The store failed during a commit; it is unknown whether the write was stored."""
