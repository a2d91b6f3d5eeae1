"""Tasks that only occupy the queue. The header ``X-User`` names the caller."""

from __future__ import annotations

from typing import Any

from flask import Flask, request

from flask_asyncroute import Access, AsyncRoute, current_task

ADMIN = "root"


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app.

    :param folder: for its store.
    :param config: ``ASYNCROUTE_*`` keys without their prefix, in lower case.
    """
    app = Flask(__name__, instance_path=folder)
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    app.config["ASYNCROUTE_ADMINS"] = Access(users=(ADMIN,))
    async_routes = AsyncRoute(app)

    @async_routes.identity_loader
    def identity() -> dict[str, str] | None:
        user = request.headers.get("X-User")
        return None if user is None else {"id": user}

    @app.post("/hold/<int:seconds>")
    @async_routes.task(max_workers=1)
    def hold(seconds: int) -> None:
        current_task.sleep(seconds)

    return app
