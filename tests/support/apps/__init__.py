"""Flask apps for tests. Real servers run the apps of the modules in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Flask

from flask_asyncroute.runtime import EXTENSION, _runtimes, runtime_of


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
    """Close the runtime of the app in this process. The app cannot be used again."""
    if EXTENSION in app.extensions:
        runtime = runtime_of(app)
        runtime.close()
        # The garbage collector can free the app much later. Until then, the Celery worker that
        # tests share would open the runtime again when it receives a message of a later test.
        _runtimes.discard(runtime)
