"""An example application for flask_asyncroute, and a template for real ones.

Run it with ``gunicorn 'example_app:create_app()'``. The async routes are in `tour`, `csv_summary`,
`primes`, `report` and `sleepers`. `people`, `visitor` and `sign_in` identify the visitor.
`start_page` shows the visitor's tasks, the `works` to run and the `trials` with curl. `protection`
and `secret` provide security, and `server` configures gunicorn. `extension` contains the setup of
flask_asyncroute.

``make demo-celery`` also uses `elsewhere`, an async route that runs on a Celery worker, `worker`,
which the worker loads, and `with_celery`, which starts everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flask import Flask

from . import csv_summary, primes, report, sign_in, sleepers, start_page, tour
from .extension import async_routes
from .protection import protect
from .secret import secret_key
from .visitor import find_visitor

MAX_UPLOAD = 64 * 1024 * 1024

__all__ = ["create_app"]


def create_app(config: Mapping[str, Any] | None = None, instance_path: str | None = None) -> Flask:
    """Create the application. Flask and gunicorn find this function by its name.

    Tasks and the secret key are stored in the instance folder.

    :param config: overrides environment variables such as ``FLASK_ASYNCROUTE_STORE``, which
        override the defaults below. With ``CELERY``, the settings of Celery, there is a route that
        runs on Celery workers.
    :param instance_path: an absolute path; default: the folder ``instance`` next to this package.
    :raises OSError: if a secret key must be created and the instance folder is not writable.
    """
    app = Flask(__name__, instance_path=instance_path)
    app.config.update(
        # Child processes, which run the tasks of `primes`, create the app in the same way.
        ASYNCROUTE_APP=f"{__name__}:create_app(instance_path={instance_path!r})",
        ASYNCROUTE_DRAIN=5,
        ASYNCROUTE_LIST_ANONYMOUS=True,
        ASYNCROUTE_MAX_BODY=MAX_UPLOAD,
        MAX_CONTENT_LENGTH=MAX_UPLOAD,
        SESSION_COOKIE_SAMESITE="Lax",
    )
    app.config.from_prefixed_env()
    app.config.update(config or {})
    if app.config["SECRET_KEY"] is None:
        app.config["SECRET_KEY"] = secret_key(Path(app.instance_path))
    protect(app)
    app.before_request(find_visitor)
    for module in (start_page, sign_in, tour, csv_summary, primes, report, sleepers):
        app.register_blueprint(module.blueprint)
    if "CELERY" in app.config:
        from . import elsewhere  # needs Celery

        elsewhere.celery_init_app(app)
        app.register_blueprint(elsewhere.blueprint)
    async_routes.init_app(app)
    return app
