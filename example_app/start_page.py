"""The start page: the signed-in user, commands to try, and the latest tasks the user may read."""

from __future__ import annotations

from itertools import islice

from flask import Blueprint, make_response, render_template, request
from flask.typing import ResponseReturnValue

from flask_asyncroute import AsyncRouteTask

from .extension import async_routes
from .people import PEOPLE, Person, may_read
from .trials import trials
from .visitor import current_visitor

blueprint = Blueprint("start_page", __name__)

MAX_SHOWN = 10
MAX_SEARCHED = 200


@blueprint.get("/")
def show() -> ResponseReturnValue:
    """Show the page. It must not be cached, because it shows who is signed in."""
    visitor = current_visitor()
    page = render_template(
        "start.html",
        visitor=visitor,
        people=PEOPLE.values(),
        groups=trials(request.url_root.rstrip("/")),
        tasks=latest_tasks(visitor),
    )
    response = make_response(page)
    response.cache_control.no_store = True
    return response


def latest_tasks(visitor: Person | None) -> list[AsyncRouteTask]:
    """Return the latest tasks that this visitor may read, out of the newest 200 tasks.

    `AsyncRoute.query` does not check permissions, so this function does. ``GET /tasks`` checks them
    itself.
    """
    newest = islice(async_routes.query(), MAX_SEARCHED)
    return list(islice((task for task in newest if may_read(visitor, task)), MAX_SHOWN))
