"""A page that starts a task and shows its progress live, with plain JavaScript in
``static/live.js``.
"""

from __future__ import annotations

from flask import Blueprint, render_template

from .tour import MAX_NAME

blueprint = Blueprint("live_page", __name__)


@blueprint.get("/live")
def show() -> str:
    """Show the page, which is the same for all visitors."""
    return render_template("live.html", max_name=MAX_NAME)
