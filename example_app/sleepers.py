"""Routes that sleep and then answer: with an argument, a closure, or the state that all workers share.

Those under ``/auth`` are for visitors who have signed in, and differ in who else may see and stop a task.
"""

from __future__ import annotations

import time
from typing import Any

from flask import Blueprint, abort, request

from flask_asyncroute import Access, Permission, current_task

from .extension import async_routes
from .people import PEOPLE

blueprint = Blueprint("sleepers", __name__)

STATE_KEY = "data"
DEFAULT_STATE = {"sleep_time": 5, "message": "coming from the shared state"}
MAX_MESSAGE = 200

ANALYSTS = Access(groups=("analysts",))


@blueprint.put("/asyncParam")
@async_routes.task(arguments={"sleep_time": 2, "message": "coming from an argument"})
def async_param(sleep_time: float, message: str) -> dict[str, str]:
    """Sleep and answer with the arguments given in the decorator. Plain code that knows nothing of tasks."""
    time.sleep(sleep_time)
    return {"InnerValue": message}


def _add_routes_with_a_closure(sleep_time: float, message: str) -> None:
    @blueprint.put("/asyncUsing")
    @async_routes.task()
    def async_using() -> dict[str, str]:
        """Sleep and answer with what the function was defined with."""
        return doze(sleep_time, message)

    @blueprint.put("/auth/asyncUsing")
    @async_routes.task(permission=Permission(read=ANALYSTS))
    def auth_async_using() -> dict[str, str]:
        """The same; analysts may see the task, its owner alone may stop it."""
        return doze(sleep_time, message)


_add_routes_with_a_closure(5, "coming from a closure")


@blueprint.put("/asyncState")
@async_routes.task()
def async_state() -> dict[str, str]:
    """Sleep and answer with what the shared state holds at that time."""
    return doze(**async_routes.state.get(STATE_KEY, DEFAULT_STATE))


@blueprint.put("/auth/asyncState")
@async_routes.task(permission=Permission(write=ANALYSTS))
def auth_async_state() -> dict[str, str]:
    """The same; analysts may see and stop the task."""
    return doze(**async_routes.state.get(STATE_KEY, DEFAULT_STATE))


def readers_in_the_request() -> Permission:
    """Let those see the task who are named in the request: ``?reader=bob&reader=carol``. Names that nobody has are left out."""
    return Permission(read=Access(users=[name for name in request.args.getlist("reader") if name in PEOPLE]))


@blueprint.put("/auth/asyncParam")
@async_routes.task(arguments={"sleep_time": 5, "message": "coming from an argument"}, permission=readers_in_the_request)
def auth_async_param(sleep_time: float, message: str) -> dict[str, str]:
    """Sleep and answer; whoever starts it says who may see it."""
    return doze(sleep_time, message)


@blueprint.put("/state")
def change_state() -> dict[str, Any]:
    """Change the message that `async_state` answers with. A plain route: it answers when it is done."""
    message = request.form.get("message", "")
    if not 0 < len(message) <= MAX_MESSAGE:
        abort(400, f"Send the form field 'message' with 1 to {MAX_MESSAGE} characters.")
    return async_routes.state.apply(STATE_KEY, lambda data: {**data, "message": message}, default=DEFAULT_STATE)  # type: ignore[no-any-return]


def doze(sleep_time: float, message: str) -> dict[str, str]:
    """Sleep, with progress every half second, and wake at once where the task is stopped."""
    current_task.progress_over(sleep_time, interval=0.5)
    current_task.sleep(sleep_time)
    current_task.check()
    return {"InnerValue": message}
