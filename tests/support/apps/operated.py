"""Tasks that the command line starts, watches and stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Flask

from flask_asyncroute import AsyncRoute, current_task


def create_app(folder: str, **config: Any) -> Flask:
    """Return the app.

    :param folder: for its store and for the files of ``held``.
    :param config: ``ASYNCROUTE_*`` keys without their prefix, in lower case.
    """
    app = Flask(__name__, instance_path=folder)
    app.config.update({f"ASYNCROUTE_{name.upper()}": value for name, value in config.items()})
    async_routes = AsyncRoute(app)
    app.extensions["async_routes"] = async_routes

    @app.put("/double/<int:number>")
    @async_routes.task
    def double(number: int) -> int:
        return 2 * number

    @app.put("/fail")
    @async_routes.task
    def fail() -> None:
        raise ValueError("no")

    @app.put("/held")
    @async_routes.task
    def held() -> None:
        """Report half of the progress, then wait until the file ``go`` exists."""
        current_task.set_progress(50, "half way")
        while not (Path(folder) / "go").exists():
            current_task.sleep(0.02)
            current_task.check()

    @app.put("/steps/<int:count>")
    @async_routes.task
    def steps(count: int) -> dict[str, int]:
        for number in range(1, count + 1):
            current_task.set_progress(100 * number / count, f"step {number} of {count}")
            current_task.sleep(0.15)
        return {"steps": count}

    return app
