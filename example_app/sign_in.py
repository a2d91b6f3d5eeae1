"""Signs visitors in and out with the buttons at the top of each page."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, flash, redirect, request, url_for
from werkzeug import Response

from . import visitor
from .people import PEOPLE, authenticate

blueprint = Blueprint("sign_in", __name__)


@blueprint.post("/sign-in")
def sign_in() -> Response:
    """Sign in a person with name and password, and redirect to the start page."""
    person = authenticate(request.form.get("name", ""), request.form.get("password", ""))
    if person is None:
        flash("The name or the password is wrong.")
    else:
        visitor.sign_in(person)
    return redirect(url_for("start_page.show"), 303)


@blueprint.post("/sign-out")
def sign_out() -> Response:
    """Sign out, and redirect to the start page."""
    visitor.sign_out()
    return redirect(url_for("start_page.show"), 303)


@blueprint.app_context_processor
def values_of_the_header() -> dict[str, Any]:
    """Return the values that the header of each page needs."""
    return {"visitor": visitor.current_visitor(), "people": PEOPLE.values()}
