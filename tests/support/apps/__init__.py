"""Flask apps for tests. Real servers run the apps of the modules in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Flask

from flask_asyncroute.runtime import EXTENSION, runtime_of


def new_app(name: str, instance_path: Path | str, config: dict[str, Any]) -> Flask:
    """Return a Flask app in testing mode; ``config`` is applied last."""
    app = Flask(
        name,
        instance_path=str(Path(instance_path).absolute()),
        root_path=str(Path(__file__).parents[2]),
    )
    app.config.update({"TESTING": True, "SECRET_KEY": "not secret", **config})
    return app


def close_app(app: Flask) -> None:
    """Close the runtime of the app in this process."""
    if EXTENSION in app.extensions:
        runtime_of(app).close()
