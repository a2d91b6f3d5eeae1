"""A page that starts a task and shows it as it goes; ``static/live.js`` does that in the browser, without a framework."""

from __future__ import annotations

from flask import Blueprint, render_template

from .tour import MAX_NAME

blueprint = Blueprint("live_page", __name__)


@blueprint.get("/live")
def show() -> str:
    """Show the page, which is the same for everybody."""
    return render_template("live.html", max_name=MAX_NAME)
