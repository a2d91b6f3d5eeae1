"""Who makes the present request: by the session that the sign-in form began, or by HTTP Basic as curl sends it."""

from __future__ import annotations

from flask import abort, g, request, session
from werkzeug.datastructures import WWWAuthenticate

from .people import PEOPLE, Person, authenticate


def find_visitor() -> None:
    """Look the visitor up, once per request; runs before each.

    :raises Unauthorized: for a wrong name or password. Going on without a name would answer 404 where the password was
        the mistake.
    """
    credentials = request.authorization
    if credentials is not None and credentials.type == "basic":
        g.visitor = authenticate(credentials.username or "", credentials.password or "")
        if g.visitor is None:
            abort(
                401,
                "This name and password do not go together.",
                www_authenticate=WWWAuthenticate("basic", {"realm": "example"}),
            )
    else:
        g.visitor = PEOPLE.get(session.get("person", ""))


def current_visitor() -> Person | None:
    """Return who makes the present request; None where nobody has signed in."""
    visitor: Person | None = g.visitor
    return visitor


def sign_in(person: Person) -> None:
    """Begin a session for ``person``; what an earlier one held is gone."""
    session.clear()
    session["person"] = person.id


def sign_out() -> None:
    """End the session."""
    session.clear()
