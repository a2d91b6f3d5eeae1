"""How a run ended, and what an Error says of it. Made by whatever runs a view, in this process or in a child."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from .encoding import clean_text
from .states import State
from .task import MAX_ERROR


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the state to go to and the record fields that go with it."""

    state: State
    values: dict[str, Any] = field(default_factory=dict)


def failed(error: BaseException, expose: bool) -> Outcome:
    """Return the outcome of a run that ended with ``error``.

    :param expose: whether its message is told, beside its type; that of an `HTTPException` always is.
    """
    name = type(error).__name__
    if isinstance(error, HTTPException):
        code = error.code
        # What abort() makes of a response has no code and name of its own.
        status = getattr(getattr(error, "response", None), "status_code", None) if code is None else None
        phrase = HTTP_STATUS_CODES.get(status) if status is not None else None
        text = _told(
            lambda: f"{code or status or 500} {phrase or error.name}: {error.description or ''}".rstrip(": "), name
        )
        return Outcome(State.FAILED, {"error": clean_text(text, MAX_ERROR), "error_status": code or status})
    if not expose:
        return Outcome(State.FAILED, {"error": clean_text(name, MAX_ERROR)})
    message = _told(lambda: str(error)[:MAX_ERROR], "(its message could not be read)")
    return Outcome(State.FAILED, {"error": clean_text(f"{name}: {message}" if message else name, MAX_ERROR)})


def died(cause: str) -> Outcome:
    """Return the outcome of a run whose process ended without one."""
    return Outcome(State.FAILED, {"error": f"Process died: {cause}"})


def cause_of(status: int | None) -> str:
    """Return what an exit status says: ``exit code 3``, or the name of a signal.

    :param status: as :func:`os.waitstatus_to_exitcode` gives it; None: nobody learned of it.
    """
    if status is None:
        return "exit status unknown"
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _told(tell: Callable[[], str], otherwise: str) -> str:
    """Return what an exception says of itself; it is the app's own code that says it, and may raise anything."""
    try:
        return tell()
    except BaseException:
        return otherwise
