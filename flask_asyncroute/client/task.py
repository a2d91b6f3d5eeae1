"""A task on a server, as a Future."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

from .errors import (
    TRANSIENT,
    ClientError,
    InvalidResponseError,
    NotCancellableError,
    TaskAbortedError,
    TaskFailedError,
    TaskFinishedError,
)
from .sse import ServerEvent
from .transport import LEAST_PAUSE, Answer, Transport, delay, pauses

logger = logging.getLogger("flask_asyncroute")

STATES = ("NotStarted", "Running", "Completed", "Failed", "Aborted")
ENDED = STATES[2:]
STOPPED = "Aborted by the user"
ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._~-]{1,128}")

ProgressHook = Callable[["RemoteTask", float, "str | None"], object]


class RemoteTask(Future[Any]):
    """A task on the server, as a :class:`concurrent.futures.Future`.

    It works with :func:`concurrent.futures.wait` and :func:`~concurrent.futures.as_completed`.
    `AsyncRouteClient` creates it and follows the task on a background thread, which also calls done
    callbacks and progress functions: these must not wait for tasks.

    - ``result(timeout)`` returns the Result. ``exception(timeout)`` returns the error.
    - A task that was stopped raises :exc:`concurrent.futures.CancelledError`. A ``Failed`` task
      raises `TaskFailedError`, and any other ``Aborted`` task `TaskAbortedError`.
    - If the task can no longer be read, ``result`` raises the `ClientError` that says why: for
      example `NotFoundError` after its retention, or `UnreachableError`. The task itself goes on.
    """

    def __init__(
        self, transport: Transport, url: str, document: Mapping[str, Any], hook: ProgressHook | None
    ) -> None:
        super().__init__()
        self.id: str = document["Id"]
        """The id of the task."""
        self.task: dict[str, Any] = {**document}
        """The last task object that the client received. It is replaced, never changed."""
        self._transport = transport
        self._url = url
        self._etag: str | None = None
        self._hooks: list[ProgressHook] = []
        self._update_lock = threading.Lock()
        self._has_outcome = False
        if hook is not None:
            self.add_progress_callback(hook)
        if self.state in ENDED:
            self._has_outcome = True
            self._end()

    def __repr__(self) -> str:
        return f"<RemoteTask {self.id} {self.state}>"

    @property
    def state(self) -> str:
        """``NotStarted``, ``Running``, ``Completed``, ``Failed`` or ``Aborted``."""
        return str(self.task["State"])

    @property
    def progress(self) -> float | None:
        """0 to 100; None if the view reports no progress."""
        value = self.task.get("Progress")
        if not isinstance(value, (int, float)) or not 0 <= value <= 100:
            return None
        return float(value)

    def running(self) -> bool:
        """Return whether the view is running."""
        return self.state == "Running"

    def add_progress_callback(self, function: ProgressHook) -> None:
        """Call ``function(task, progress, message)`` whenever progress or its message changes, and
        now if there is progress already. Exceptions are logged.
        """
        self._hooks.append(function)
        if self.progress is not None:
            self._call(function, self.task)

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait until the task has ended; return the task object, whatever its state.

        :raises TimeoutError: if the task has not ended after ``timeout`` seconds.
        :raises ClientError: if the task can no longer be read.
        """
        if wait([self], timeout).not_done:
            raise TimeoutError(f"Task {self.id} is still {self.state} after {timeout} s.")
        if self.state not in ENDED:
            self.result()  # raises the error of fail()
        return self.task

    def refresh(self) -> dict[str, Any]:
        """Read the task from the server now; return the task object.

        :raises ClientError: if the task cannot be read.
        """
        self.read()
        return self.task

    def cancel(self) -> bool:
        """Stop the task; return whether it has been stopped. False if it ended before, or if its
        route does not allow a stop.

        :raises ClientError: if the request is refused for another reason, or fails.
        """
        if not self.done():
            try:
                answer = self._transport.request("DELETE", self._url)
                self.update(task_of(answer, self.id))
            except TaskFinishedError:
                self.refresh()
            except NotCancellableError:
                pass
        return self.cancelled()

    def events(self) -> Iterator[ServerEvent]:
        """Yield the task's events, beginning with its state, until it has ended.

        The last event is ``task.completed``. The stream is resumed after its last event when the
        connection breaks or the server restarts. See :doc:`/howto/following`.

        :raises ClientError: if there are no events, or no connection for ``retry_for`` seconds.
        """
        sse = self.task.get("Sse")
        if not isinstance(sse, dict) or not isinstance(sse.get("Url"), str):
            raise ClientError(f"Task {self.id} has no events: its route has sse=False.")
        url = self._transport.resolve(sse["Url"], self._url)
        last_id: str | None = None
        failing_since: float | None = None
        delays = pauses()
        while True:
            try:
                with self._transport.stream(url, last_id) as stream:
                    for piece in stream.pieces():
                        failing_since, delays = None, pauses()
                        for event in piece:
                            last_id = event.id or last_id
                            yield event
                            if event.name == "task.completed":
                                return
                    if stream.is_over:
                        return
                    wanted = stream.parser.retry
                    pause = 1.0 if wanted is None else min(max(wanted, LEAST_PAUSE), 10.0)
            except TRANSIENT as error:
                now = time.monotonic()
                failing_since = failing_since or now
                pause = delay(error, next(delays))
                if now + pause - failing_since > self._transport.retry_for:
                    raise
            if self._transport.closed.wait(pause):
                raise ClientError("The client was closed.")

    def read(self, *, once: bool = False) -> float | None:
        """Read the task from the server; return its Retry-After. For the client's own use.

        :param once: send one request only, without further attempts.
        """
        headers = {} if self._etag is None else {"If-None-Match": self._etag}
        answer = self._transport.request("GET", self._url, headers, once=once)
        if answer.status != 304:
            self.update(task_of(answer, self.id))
            self._etag = answer.headers.get("ETag")
        return answer.retry_after

    def update(self, document: Mapping[str, Any]) -> None:
        """Take over a newer task object. For the client's own use."""
        with self._update_lock:
            before = self.task
            if self._has_outcome and document["State"] not in ENDED:
                return  # an answer that was overtaken by the end
            self.task = {**document}
            is_end = not self._has_outcome and self.state in ENDED
            self._has_outcome = self._has_outcome or is_end
        names = ("Progress", "ProgressMessage")
        if self.progress is not None and any(before.get(n) != document.get(n) for n in names):
            for hook in self._hooks:
                self._call(hook, document)
        if is_end:
            self._end()

    def fail(self, error: ClientError) -> None:
        """End the Future because the task cannot be followed. For the client's own use."""
        with self._update_lock:
            if self._has_outcome:
                return
            self._has_outcome = True
        self.set_exception(error)

    def _end(self) -> None:
        if self.state == "Completed":
            self.set_result(self.task.get("Result"))
        elif self.state == "Failed":
            self.set_exception(TaskFailedError(self.task))
        elif self.task.get("Error") == STOPPED:
            super().cancel()
            self.set_running_or_notify_cancel()  # wakes wait() and as_completed()
        else:
            self.set_exception(TaskAbortedError(self.task))

    def _call(self, hook: ProgressHook, document: Mapping[str, Any]) -> None:
        message = document.get("ProgressMessage")
        try:
            hook(self, self.progress or 0.0, message if isinstance(message, str) else None)
        except Exception:
            logger.exception("A progress function of task %s raised an exception.", self.id)


def task_of(answer: Answer, task_id: str | None = None) -> dict[str, Any]:
    """Return the task object in a response.

    :param task_id: the expected id; None: any.
    :raises InvalidResponseError: if the response has no task object, or that of another task.
    """
    document = checked(answer.json(), answer.url)
    if task_id is not None and document["Id"] != task_id:
        raise InvalidResponseError(
            f"{answer.url} answered with another task than {task_id}: {document['Id']}."
        )
    return document


def is_task(answer: Answer) -> bool:
    """Return whether a response has a task object."""
    try:
        task_of(answer)
    except InvalidResponseError:
        return False
    return True


def checked(document: Any, source: str) -> dict[str, Any]:
    """Return ``document`` if it is a task object.

    :raises InvalidResponseError: otherwise.
    """
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("Id"), str)
        or not ID.fullmatch(document["Id"])
        or document.get("State") not in STATES
    ):
        raise InvalidResponseError(f"{source} did not answer with a task object.")
    return document
