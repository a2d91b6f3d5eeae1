"""An app whose child processes report to Sentry."""

from __future__ import annotations

import sentry_sdk
from flask import Flask

from flask_asyncroute import AsyncRoute


def create_app(folder: str, dsn: str | None = None) -> Flask:
    """Return the app.

    :param folder: for its store.
    :param dsn: the address of Sentry; None: this process does not use Sentry.
    """
    if dsn is not None:
        sentry_sdk.init(dsn=dsn)
    app = Flask(__name__, instance_path=folder)
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes

    @async_routes.route("/work", methods=["POST"], executor="process")
    def work() -> None:
        raise LookupError("no such report")

    return app
