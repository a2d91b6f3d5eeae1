"""Responses that include the id of their process."""

from __future__ import annotations

import os

from flask import Flask, Response


def name_process(app: Flask) -> None:
    """Add the process id to every response as ``X-Pid``, and a route ``/pid``."""

    @app.after_request
    def add(response: Response) -> Response:
        response.headers["X-Pid"] = str(os.getpid())
        return response

    @app.get("/pid")
    def pid() -> dict[str, int]:
        return {"pid": os.getpid()}
