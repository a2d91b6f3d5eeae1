"""The start page: a board of the visitor's tasks, work to run, and commands to try.

``static/board.js`` updates the board. Without JavaScript, the page is a plain list with forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from urllib.parse import urlsplit

from flask import Blueprint, Response, make_response, render_template, request

from flask_asyncroute import AsyncRouteTask

from .extension import async_routes
from .trials import trials
from .visitor import current_visitor
from .works import works

blueprint = Blueprint("start_page", __name__)

MAX_SHOWN = 8
MAX_SEARCHED = 200


@blueprint.get("/")
def show() -> Response:
    """Show the page."""
    root = request.url_root.rstrip("/")
    return _private("start.html", works=works(root), groups=trials(root))


@blueprint.get("/board")
def board() -> Response:
    """Return the list of tasks as HTML, with which the script replaces the list in the page."""
    return _private("board.html")


def latest_tasks() -> list[AsyncRouteTask]:
    """Return the visitor's latest tasks. Visitors who are not signed in share theirs.

    A query in Python does not check permissions, so this function selects by the user.
    """
    visitor = current_visitor()
    tasks: Iterator[AsyncRouteTask]
    if visitor is not None:
        tasks = async_routes.query(User=visitor.id)
    else:
        newest = islice(async_routes.query(), MAX_SEARCHED)
        tasks = (task for task in newest if task.user is None)
    return list(islice(tasks, MAX_SHOWN))


def path_of(url: str) -> str:
    """Return the path of a task's URL, without the host."""
    return urlsplit(url).path


def _private(template: str, **values: object) -> Response:
    """Render a template with the visitor's tasks. Caches must not store the response."""
    page = render_template(template, tasks=latest_tasks(), path_of=path_of, **values)
    response = make_response(page)
    response.cache_control.no_store = True
    return response
