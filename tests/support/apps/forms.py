"""An app with plain HTML forms, for the tests of its pages in a browser."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flask import Flask, request

from flask_asyncroute import AsyncRoute, current_task

FORM = """<!doctype html><html lang="en"><title>Upload</title>
<form method="post" action="/import?next=/thanks" enctype="multipart/form-data">
  <input name="title" aria-label="Title" value="May <b>sales</b>">
  <input type="file" name="table" aria-label="Table">
  <button>Import</button>
</form>"""
STEPS = ["Reading the table", "Checking the rows", "Writing the report"]


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app. A task takes its next step when the file ``go-<number>`` exists.

    :param folder: for the database and these files.
    :param config: configuration keys without ``ASYNCROUTE_``, in lower case.
    """
    app = Flask("forms", instance_path=folder)
    app.config["ASYNCROUTE_LIST_ANONYMOUS"] = True
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes

    def wait_for(name: str) -> None:
        while not (Path(folder) / name).exists():
            current_task.sleep(0.02)

    @app.get("/")
    def form() -> str:
        return FORM

    @app.get("/thanks")
    def thanks() -> str:
        return "<!doctype html><html lang=en><title>Thanks</title><h1>Thank you</h1>"

    @app.post("/import")
    @async_routes.task(name="Import of a table")
    def import_table() -> dict[str, Any]:
        size = len(request.files["table"].read())
        for number, step in enumerate(STEPS):
            current_task.set_progress(number * 100 / len(STEPS), step)
            wait_for(f"go-{number}")
        return {"title": request.form["title"], "bytes": size, "rows": [1200, 34], "is_new": True}

    @app.post("/quiet")
    @async_routes.task(name="A route without events", sse=False)
    def quiet() -> str:
        current_task.set_progress(10)
        wait_for("go-0")
        return "done"

    @app.post("/fail")
    @async_routes.task(name="Import of a broken table")
    def fail() -> None:
        current_task.set_progress(40)
        raise ValueError("row 17: 'twelve' is not a number <script>alert(1)</script>")

    @app.post("/deaf")
    @async_routes.task(name="A call that ends late", interrupt_after=None)
    def deaf() -> None:
        current_task.set_progress(30, "Calling the other office")
        while not (Path(folder) / "go-0").exists():
            time.sleep(0.02)

    @app.post("/endless")
    @async_routes.task(name="An import that can be stopped")
    def endless() -> None:
        current_task.set_progress(5, "Waiting for the other office")
        while True:
            current_task.sleep(10)

    return app
