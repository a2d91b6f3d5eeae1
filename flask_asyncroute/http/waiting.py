"""Requests that are held until a task has ended or changed: ``?wait=N`` and ``Prefer: wait=N`` (RFC 7240, section 4.3).

Such a request holds a thread of the server and one of the places that streams have too; nothing of the store.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from flask import Request
from werkzeug.http import parse_list_header

from ..delivery import PENDING
from ..errors import InvalidRequest
from ..runner import Runner
from ..task import AsyncRouteTask
from .asking import arguments

_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")
_WHOLE_SECONDS = re.compile(r"[0-9]+")


def asked_wait(request: Request, longest: float) -> float:
    """Return for how many seconds a request to an operation asks to be held, at most ``longest``.

    :raises InvalidRequest: for what is no number of seconds.
    """
    # Most ask for nothing, and to parse that takes longer than all else here.
    values = arguments(request).getlist("wait") if request.environ.get("QUERY_STRING") else []
    if not values:
        return 0.0
    if len(values) > 1 or not _SECONDS.fullmatch(values[0]):
        raise InvalidRequest("wait takes one number of seconds, such as wait=20.")
    return min(float(values[0]), longest)


def preferred_wait(request: Request, longest: float) -> float | None:
    """Return for how many seconds a start is preferred to be held, at most ``longest``; None where nothing is preferred.

    What is malformed is ignored, as the RFC has it; of several the first counts.
    """
    for preference in parse_list_header(", ".join(request.headers.getlist("Prefer"))):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait" and _WHOLE_SECONDS.fullmatch(value.strip().strip('"')):
            return min(float(value.strip().strip('"')), longest)
    return None


def may_change(task: AsyncRouteTask) -> bool:
    """Return whether a task will go on changing by itself: until its code and its callback have come to their ends too."""
    return not task.state.is_terminal or task.stopping or task.callback_state in PENDING


def hold(
    runner: Runner, task: AsyncRouteTask, seconds: float, is_enough: Callable[[AsyncRouteTask], bool]
) -> tuple[AsyncRouteTask | None, bool]:
    """Return a task once it is as wanted, or as it is when the time is up (None where it was removed), and whether the request
    got what it asked for: not where no place was free, and it is answered at once.
    """
    if seconds <= 0 or is_enough(task):
        return task, True
    if not runner.places.take():
        return task, False
    try:
        return runner.notifier.wait(task.id, is_enough, seconds), True
    finally:
        runner.places.give_back()
