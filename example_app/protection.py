"""Protects visitors: other sites cannot send requests in their name, and pages load only resources
of this app.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from flask import Flask, Response, abort, request

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
DATA_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'"
)
"""For task objects. A browser renders XML with its own inline styles and images, without scripts.
"""

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def protect(app: Flask) -> None:
    """Make ``app`` refuse requests from other sites, and send security headers with responses."""
    app.before_request(refuse_other_sites)
    app.after_request(add_headers)


def refuse_other_sites() -> None:
    """Refuse a request with an unsafe method that comes from a page of another origin.

    Browsers report the origin in ``Sec-Fetch-Site`` (W3C Fetch Metadata) or, if they are older, in
    ``Origin``. Pages cannot forge these headers, so forms need no CSRF token. Clients that send
    neither header are not browsers, and have only their own cookies.
    """
    if request.method in SAFE_METHODS:
        return
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is None and origin is None:
        return
    if site in ("same-origin", "none") or (
        site is None and origin is not None and _host(origin) == request.host
    ):
        return
    abort(403, "A page of another site sent this request.")


def add_headers(response: Response) -> Response:
    """Add the security headers that a response does not have."""
    is_page = response.mimetype == "text/html"
    policy = PAGE_POLICY if is_page else DATA_POLICY
    for name, value in {**HEADERS, "Content-Security-Policy": policy}.items():
        response.headers.setdefault(name, value)
    return response


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
