"""The application that `workers` serves under gunicorn: each run tells a file of its beginning and end."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from flask import Flask, Response

from flask_asyncroute import AsyncRoute, current_task

FOLDER = os.environ.get("PROVE_FOLDER", "")

app = Flask(__name__, instance_path=FOLDER or None)
app.config["ASYNCROUTE_MAX_WORKERS"] = 8
async_routes = AsyncRoute(app)


def note(what: str) -> None:
    """Append a line to the file of runs, in one write."""
    line = json.dumps({"id": current_task.id, "pid": os.getpid(), "what": what, "at": time.time()}) + "\n"
    file = os.open(os.path.join(FOLDER, "runs"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, line.encode())
    os.close(file)


@app.post("/job/<int:milliseconds>")
@async_routes.task(interrupt_after=None)
def job(milliseconds: int) -> Any:
    """Run for a while, or until a stop is asked for."""
    note("begin")
    if not current_task.sleep(milliseconds / 1000):
        note("told")
        return None
    note("end")
    return {"pid": os.getpid()}


@app.get("/pid")
def pid() -> str:
    """Tell which worker answers."""
    return str(os.getpid())


@app.after_request
def name_worker(response: Response) -> Response:
    """Name the worker in every answer."""
    response.headers["X-Pid"] = str(os.getpid())
    return response
