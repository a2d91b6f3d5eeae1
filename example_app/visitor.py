"""Identifies the visitor by the session of the sign-in form, or by HTTP Basic, which curl sends."""

from __future__ import annotations

from flask import abort, g, request, session
from werkzeug.datastructures import WWWAuthenticate

from .people import PEOPLE, Person, authenticate


def find_visitor() -> None:
    """Identify the visitor. Runs before each request.

    :raises Unauthorized: if name or password is wrong. Without this error, the request would
        continue as anonymous, and get a confusing 404.
    """
    credentials = request.authorization
    if credentials is not None and credentials.type == "basic":
        g.visitor = authenticate(credentials.username or "", credentials.password or "")
        if g.visitor is None:
            abort(
                401,
                "The name or the password is wrong.",
                www_authenticate=WWWAuthenticate("basic", {"realm": "example"}),
            )
    else:
        g.visitor = PEOPLE.get(session.get("person", ""))


def current_visitor() -> Person | None:
    """Return the visitor of the current request; None if nobody is signed in."""
    visitor: Person | None = g.get("visitor")
    return visitor


def sign_in(person: Person) -> None:
    """Start a session for ``person``, and delete the data of an earlier session."""
    session.clear()
    session["person"] = person.id


def sign_out() -> None:
    session.clear()
