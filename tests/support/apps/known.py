"""The app of `served` for callers that a header identifies."""

from __future__ import annotations

from typing import Any

from flask import Flask, request

from tests.support.apps import served


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app; parameters as for `crowd.create_app`. ``X-User`` names the caller, if any."""
    app = served.create_app(folder, **config)

    @app.extensions["async_routes"].identity_loader
    def load() -> dict[str, str] | None:
        user = request.headers.get("X-User")
        return {"id": user} if user else None

    return app
