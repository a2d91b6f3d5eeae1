"""Every error of the package, under one root.

Raised by all modules; `http.problems` turns a `RequestRefused` into an answer. Nothing here imports anything else of the
package, and no error carries a value that a client must not see.
"""

from __future__ import annotations

from typing import ClassVar


class AsyncRouteError(Exception):
    """The root of what this package raises on purpose."""


class ConfigurationError(AsyncRouteError):
    """The application is set up in a way that cannot work; the message names the culprit and the remedy."""


class NoCurrentTask(AsyncRouteError, RuntimeError):
    """`current_task` was used outside a running task."""


class SessionIsReadOnly(AsyncRouteError, TypeError):
    """A task wrote to `session`; the response that would carry the cookie has been sent long ago."""


class ResultError(AsyncRouteError):
    """What a view returned cannot be stored; the message says why and what to return instead."""


class IdTaken(AsyncRouteError):
    """A store has a task with this id already."""


class KeyTaken(AsyncRouteError):
    """A task was started with this ``Idempotency-Key`` already."""


class TaskAborted(BaseException):
    """Raised inside a view whose task was stopped or ran out of time.

    It derives from :exc:`BaseException` so that an ``except Exception`` in the view does not swallow it. Clean up in
    ``finally`` and let it pass.
    """


class RequestRefused(AsyncRouteError):
    """A request that is answered with an error and changes nothing.

    :param detail: what happened and what to do, for the client to read.
    :param task_id: the task in question, where there is one.
    :param retry_after: whole seconds after which to try again, where that makes sense.
    """

    status: ClassVar[int] = 400
    slug: ClassVar[str] = "bad-request"
    title: ClassVar[str] = "Bad request"

    def __init__(self, detail: str, *, task_id: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.task_id = task_id
        self.retry_after = retry_after


class InvalidRequest(RequestRefused):
    """The request cannot be read: a body cut short, a malformed header."""

    slug = "invalid-request"
    title = "Invalid request"


class InvalidQuery(RequestRefused):
    """A query, limit, sort or cursor that is not one; the detail names the culprit."""

    slug = "invalid-query"
    title = "Invalid query"


class CallbackRefused(RequestRefused):
    """The callback that a request asks for cannot be made, or may not; the detail says why."""

    slug = "callback-refused"
    title = "Callback refused"


class NotAuthenticated(RequestRefused):
    """A route with a permission was called by nobody known."""

    status = 401
    slug = "not-authenticated"
    title = "Not authenticated"


class NotPermitted(RequestRefused):
    """The caller is known and may not do this."""

    status = 403
    slug = "not-permitted"
    title = "Not permitted"


class TaskNotFound(RequestRefused, LookupError):
    """No task has this id, or the caller may not read it: the two look the same from outside."""

    status = 404
    slug = "task-not-found"
    title = "Task not found"


class MethodNotAllowed(RequestRefused):
    """A request method that never starts a task."""

    status = 405
    slug = "method-not-allowed"
    title = "Method not allowed"


class NotAcceptable(RequestRefused):
    """None of the media types that the client accepts can be given."""

    status = 406
    slug = "not-acceptable"
    title = "Not acceptable"


class TaskUnfinished(RequestRefused):
    """Something was asked of a task that only a finished one can do."""

    status = 409
    slug = "task-unfinished"
    title = "Task unfinished"


class TaskFinished(RequestRefused):
    """The task has ended; it can no longer be stopped."""

    status = 410
    slug = "task-finished"
    title = "Task finished"


class BodyTooLarge(RequestRefused):
    """The request body is over its limit."""

    status = 413
    slug = "body-too-large"
    title = "Body too large"


class UnsupportedMediaType(RequestRefused):
    """The request body is of a type that this operation does not read."""

    status = 415
    slug = "unsupported-media-type"
    title = "Unsupported media type"


class KeyReused(RequestRefused):
    """The caller's ``Idempotency-Key`` stands for another request."""

    status = 422
    slug = "key-reused"
    title = "Key reused"


class NotCancellable(RequestRefused):
    """The task's route was declared with ``cancellable=False``."""

    status = 423
    slug = "not-cancellable"
    title = "Not cancellable"


class TooManyTasks(RequestRefused):
    """The user has as many unfinished tasks as ``ASYNCROUTE_MAX_TASKS_PER_USER`` allows."""

    status = 429
    slug = "too-many-tasks"
    title = "Too many tasks"

    @classmethod
    def of(cls, quota: int) -> TooManyTasks:
        """Return the error for a user with that many."""
        return cls(f"You have {quota} unfinished tasks, which is as many as you may. Wait for one to end, or stop one.")


class TaskFailed(RequestRefused):
    """The result of a task was asked for that ended without one."""

    status = 500
    slug = "task-failed"
    title = "Task failed"


class CannotStart(RequestRefused):
    """The server could not turn this request into a task: an id generator or a session value is at fault."""

    status = 500
    slug = "cannot-start"
    title = "Cannot start"


class QueueFull(RequestRefused):
    """As many tasks wait as the route's pool allows."""

    status = 503
    slug = "queue-full"
    title = "Queue full"


class ShuttingDown(RequestRefused):
    """This server process is about to end and starts nothing more."""

    status = 503
    slug = "shutting-down"
    title = "Shutting down"


class StoreUnavailable(RequestRefused):
    """The store cannot be read or written now."""

    status = 503
    slug = "store-unavailable"
    title = "Store unavailable"


class CommitUnknown(StoreUnavailable):
    """The store failed in the middle of a write: it may have happened or not."""
