"""The `AsyncRoute` object of the application, with which all modules decorate their async views."""

from __future__ import annotations

from flask_asyncroute import AsyncRoute

from .people import Person
from .visitor import current_visitor

async_routes = AsyncRoute()


@async_routes.identity_loader
def load_identity() -> Person | None:
    """Return the caller of the current request to flask_asyncroute; None if nobody is signed in."""
    return current_visitor()
