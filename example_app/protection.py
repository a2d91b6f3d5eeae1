"""What protects a visitor's browser: other sites cannot act in the visitor's name, and what it shows loads nothing but our own."""

from __future__ import annotations

from urllib.parse import urlsplit

from flask import Flask, Response, abort, request

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
DATA_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
"""For tasks that a browser shows: it draws XML with styles and images of its own, inline; scripts there are none."""

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def protect(app: Flask) -> None:
    """Have ``app`` refuse what other sites send, and send the headers with every answer."""
    app.before_request(refuse_other_sites)
    app.after_request(add_headers)


def refuse_other_sites() -> None:
    """Refuse a request that changes something and that a page of another origin made a browser send.

    Browsers say so in ``Sec-Fetch-Site`` (W3C Fetch Metadata), older ones in ``Origin``; neither can be forged by a
    page. So forms need no token, the one for signing in included. Other clients than browsers send neither and act
    with nobody's cookies but their own.
    """
    if request.method in SAFE_METHODS:
        return
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is None and origin is None:
        return
    if site in ("same-origin", "none") or (site is None and origin is not None and _host(origin) == request.host):
        return
    abort(403, "A page of another site asked for this.")


def add_headers(response: Response) -> Response:
    """Add the headers; no view sets them itself."""
    for name, value in HEADERS.items():
        response.headers[name] = value
    is_page = response.mimetype == "text/html"
    response.headers["Content-Security-Policy"] = PAGE_POLICY if is_page else DATA_POLICY
    return response


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
