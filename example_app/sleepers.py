"""Routes that sleep and then return an argument, a value of a closure, or the shared state.

The routes under ``/auth`` require a signed-in visitor. Each lets different other visitors read or
stop a task.
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


@blueprint.route("/asyncParam", methods=["PUT", "POST"])  # forms cannot send PUT
@async_routes.task(arguments={"sleep_time": 2, "message": "coming from an argument"})
def async_param(sleep_time: float, message: str) -> dict[str, str]:
    """Sleep and return an argument of the decorator. This is plain code that does not use tasks."""
    time.sleep(sleep_time)
    return {"InnerValue": message}


def _add_routes_with_a_closure(sleep_time: float, message: str) -> None:
    @blueprint.put("/asyncUsing")
    @async_routes.task()
    def async_using() -> dict[str, str]:
        """Sleep and return a value from the closure."""
        return doze(sleep_time, message)

    @blueprint.put("/auth/asyncUsing")
    @async_routes.task(permission=Permission(read=ANALYSTS))
    def auth_async_using() -> dict[str, str]:
        """Do the same. Analysts may read the task, but only its owner may stop it."""
        return doze(sleep_time, message)


_add_routes_with_a_closure(5, "coming from a closure")


@blueprint.put("/asyncState")
@async_routes.task()
def async_state() -> dict[str, str]:
    """Sleep and return the message from the shared state, read at the start of the task."""
    return doze(**async_routes.state.get(STATE_KEY, DEFAULT_STATE))


@blueprint.put("/auth/asyncState")
@async_routes.task(permission=Permission(write=ANALYSTS))
def auth_async_state() -> dict[str, str]:
    """Do the same. Analysts may read and stop the task."""
    return doze(**async_routes.state.get(STATE_KEY, DEFAULT_STATE))


def readers_in_the_request() -> Permission:
    """Grant read access to users named in the request, as in ``?reader=bob&reader=carol``. Ignore
    unknown names.
    """
    return Permission(
        read=Access(users=[name for name in request.args.getlist("reader") if name in PEOPLE])
    )


@blueprint.put("/auth/asyncParam")
@async_routes.task(
    arguments={"sleep_time": 5, "message": "coming from an argument"},
    permission=readers_in_the_request,
)
def auth_async_param(sleep_time: float, message: str) -> dict[str, str]:
    """Sleep and return an argument. The caller decides who else may read the task."""
    return doze(sleep_time, message)


@blueprint.put("/state")
def change_state() -> dict[str, Any]:
    """Change the message that `async_state` returns. This is a plain, synchronous route."""
    message = request.form.get("message", "")
    if not 0 < len(message) <= MAX_MESSAGE:
        abort(400, f"Send the form field 'message' with 1 to {MAX_MESSAGE} characters.")
    changed: dict[str, Any] = async_routes.state.apply(
        STATE_KEY, lambda data: {**data, "message": message}, default=DEFAULT_STATE
    )
    return changed


def doze(sleep_time: float, message: str) -> dict[str, str]:
    """Sleep with progress every half second. Wake at once if the task is stopped."""
    current_task.progress_over(sleep_time, interval=0.5)
    current_task.sleep(sleep_time)
    current_task.check()
    return {"InnerValue": message}
