"""The start page: who is signed in, what can be tried, and the latest tasks that the visitor may see."""

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

SHOWN = 10
LOOKED_AT = 200


@blueprint.get("/")
def show() -> ResponseReturnValue:
    """Show the page; no cache keeps it, since it tells who is signed in."""
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
    """Return the latest of the tasks that this visitor may see, among the newest 200 of all.

    `query` checks no permission, so the page does. A client that wants more asks ``/tasks``, where it is done for it.
    """
    newest = islice(async_routes.query(), LOOKED_AT)
    return list(islice((task for task in newest if may_read(visitor, task)), SHOWN))
