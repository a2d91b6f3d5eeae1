"""Refusals as answers: problem details of RFC 9457, with Pode's ``Error`` and ``Id``.

`route` and `http.operations` call it for every :exc:`RequestRefused`. It never fails because of what a client sent, and
never answers 406 about an error: who accepts none of our types gets JSON.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from flask import Response

from ..encoding import clean_text
from ..errors import NotAcceptable, RequestRefused
from .negotiation import negotiate, render

PROBLEM_TYPES = ("application/problem+json", "application/problem+xml", "application/yaml")
"""YAML has no problem type in IANA's registry, so it goes under its own name."""

MAX_DETAIL = 2000
MAX_INSTANCE = 2000

CHALLENGE = 'App realm="sign in as this application asks"'
"""RFC 9110 wants a challenge with each 401. How one signs in is the app's affair, so it names no registered scheme:
``Basic`` would open the browser's own dialogue, ``Bearer`` promise tokens that an app with cookies does not take."""


def problem_response(refusal: RequestRefused, accept: str | None, instance: str) -> Response:
    """Return the answer to a refused request.

    Characters that cannot be printed are escaped in the detail; they can come from the client.

    :param accept: the Accept header of the request.
    :param instance: the path of the request, decoded; one that is over 2,000 characters when encoded is left out.
    """
    try:
        media_type = negotiate(accept, PROBLEM_TYPES)
    except NotAcceptable:
        media_type = PROBLEM_TYPES[0]
    detail = _printable(clean_text(refusal.detail, MAX_DETAIL))
    document: dict[str, Any] = {
        "type": f"urn:flask-asyncroute:{refusal.slug}",
        "title": refusal.title,
        "status": refusal.status,
        "detail": detail,
    }
    place = quote(instance, safe="/:@!$&'()*+,;=", errors="replace") if len(instance) <= MAX_INSTANCE else ""
    if 0 < len(place) <= MAX_INSTANCE:
        document["instance"] = place
    if refusal.task_id is not None:
        document["Id"] = _printable(clean_text(refusal.task_id, MAX_DETAIL))
    document["Error"] = detail
    headers = []
    if refusal.retry_after is not None:
        headers.append(("Retry-After", str(refusal.retry_after)))
    if refusal.status == 401:
        headers.append(("WWW-Authenticate", CHALLENGE))
    return render(document, media_type, "Problem", refusal.status, headers)


def _printable(text: str) -> str:
    """Escape what is not printable: control characters, line breaks, and those that turn the direction of text."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
