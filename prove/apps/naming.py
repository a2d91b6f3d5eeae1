"""What the apps of proofs have in common: each answer names the process that gave it."""

from __future__ import annotations

import os

from flask import Flask, Response


def name_process(app: Flask) -> None:
    """Have every answer of ``app`` bear the process id in ``X-Pid``, and ``/pid`` give it."""

    @app.after_request
    def add(response: Response) -> Response:
        response.headers["X-Pid"] = str(os.getpid())
        return response

    @app.get("/pid")
    def pid() -> dict[str, int]:
        return {"pid": os.getpid()}
