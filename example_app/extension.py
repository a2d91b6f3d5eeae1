"""The one `AsyncRoute` of the application. Every module with an async route decorates its views with it."""

from __future__ import annotations

from flask_asyncroute import AsyncRoute

from .people import Person
from .visitor import current_visitor

async_routes = AsyncRoute()


@async_routes.identity_loader
def load_identity() -> Person | None:
    """Tell flask_asyncroute who makes the present request; None for a visitor who has not signed in."""
    return current_visitor()
