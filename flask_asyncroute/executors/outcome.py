"""How a task ended: its final State, its Error text, and whether it can be retried."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import responses
from typing import Any, TypeGuard

from werkzeug.exceptions import BadRequestKeyError, HTTPException

from ..encoding import clean_text
from ..errors import AsyncRouteError, ResultError, RetryRequested, TaskAborted
from ..task import MAX_ERROR, State

TEMPORARY = (408, 425, 429)
"""HTTP statuses from 400 to 499 after which a task can be retried."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run (execution) of a task ended.

    :param state: a final State.
    :param values: the other fields of the task record to store with the State.
    """

    state: State
    values: dict[str, Any] = field(default_factory=dict)
    can_retry: bool = False  # whether the task runs again if it has retries left
    retry_after: float | None = None  # seconds until then; None: as scheduled


def is_http_error(error: BaseException) -> TypeGuard[HTTPException]:
    """Check whether a view answered with an HTTP status, as by ``abort(404)``."""
    # The package's own HTTPExceptions, such as TaskNotFound, do not count: they are about another
    # task.
    return isinstance(error, HTTPException) and not isinstance(error, AsyncRouteError)


def can_retry(error: BaseException, on: tuple[type[BaseException], ...]) -> bool:
    """Check whether a task can run again after its view has raised ``error``.

    :param on: the exception classes in the ``retry`` option of the route.
    """
    if isinstance(error, RetryRequested):
        return True
    if isinstance(error, (TaskAborted, ResultError)):
        return False
    if is_http_error(error) and 400 <= (_status_of(error) or 500) < 500:
        return _status_of(error) in TEMPORARY and isinstance(error, on)
    return isinstance(error, on)


def _status_of(error: HTTPException) -> int | None:
    # abort(response) raises an exception without code and name.
    return error.code or getattr(getattr(error, "response", None), "status_code", None)


def failed(error: BaseException, expose: bool) -> Outcome:
    """Create the outcome for a view that raised ``error``.

    :param expose: whether clients see the message of ``error``. Clients always see the message of
        an HTTPException, such as that of ``abort()``.
    """
    name = type(error).__name__
    if is_http_error(error):
        status: Any = _status_of(error)

        def describe() -> str:
            phrase = error.name if error.code else responses.get(status, error.name)
            reason = _description_of(error)
            if isinstance(error, BadRequestKeyError) and error.args:
                reason = f"{reason} (missing: {error.args[0]!r})"
            return f"{status or 500} {phrase}: {reason}".rstrip(": ")

        text = clean_text(_call(describe, name), MAX_ERROR)
        return Outcome(State.FAILED, {"error": text, "error_status": status})
    if expose:
        message = _call(lambda: str(error)[:MAX_ERROR], "(its message could not be read)")
        name = f"{name}: {message}" if message else name
    return Outcome(State.FAILED, {"error": clean_text(name, MAX_ERROR)})


def _description_of(error: HTTPException) -> str:
    # A custom description comes first, then the message of an extension, then the standard text of
    # the status. Flask-RESTX, Flask-RESTful and webargs put their message into the attribute
    # `data`; abort(response) puts it into the response.
    data: Any = getattr(error, "data", None)
    if error.description is not type(error).description:
        data = error.description
    elif data is None and getattr(error.response, "is_sequence", False):  # not a file or stream
        response: Any = error.response
        data = response.get_json(silent=True) or response.get_data(as_text=True)
    if isinstance(data, Mapping):
        found = [data[name] for name in ("message", "messages", "errors") if data.get(name)]
        data = "; ".join(value if isinstance(value, str) else _json(value) for value in found)
    return data if isinstance(data, str) and data else str(error.description or "")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def died(cause: str) -> Outcome:
    """Create the outcome for a child process that ended without reporting an outcome."""
    return Outcome(State.FAILED, {"error": f"Process died: {cause}"}, can_retry=True)


def cause_of(status: int | None) -> str:
    """Describe an exit status, such as "exit code 1" or "SIGKILL", for an error message.

    :param status: from :func:`os.waitstatus_to_exitcode`; None: unknown.
    """
    if status is None:
        return "exit status unknown"
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _call(describe: Callable[[], str], otherwise: str) -> str:
    try:
        return describe()
    except BaseException:
        return otherwise
