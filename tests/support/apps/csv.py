"""An app that reads an uploaded file in a task, line by line."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request

from flask_asyncroute import AsyncRoute


def create_app(folder: str, parses_first: bool = False, **config: Any) -> Flask:
    """Return the app.

    :param folder: for its store.
    :param parses_first: whether forms are parsed before the view, as Flask-WTF's CSRFProtect does.
    :param config: ``ASYNCROUTE_*`` keys without their prefix, in lower case.
    """
    app = Flask(__name__, instance_path=folder)
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    async_routes = AsyncRoute(app)

    @app.get("/pid")
    def pid() -> dict[str, int]:
        return {"pid": os.getpid()}

    @app.before_request
    def parse() -> None:
        if parses_first:
            request.form.get("csrf_token")

    @app.post("/csv")
    @async_routes.task
    def read_csv() -> dict[str, Any]:
        lines = size = 0
        for line in request.files["file"].stream:
            lines += 1
            size += len(line)
        return {
            "Lines": lines,
            "Size": size,
            "Name": request.files["file"].filename,
            "Field": request.form["field"],
        }

    return app
