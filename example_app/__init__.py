"""An example application of flask_asyncroute, and the seed of a real one: ``gunicorn 'example_app:create_app()'``.

`create_app` puts it together. Each module beside it is one part: `sleepers`, `primes`, `csv_summary` and `tour` hold the
async routes, `people`, `visitor` and `sign_in` say who calls, `start_page` shows what can be tried, `live_page` follows a
task in the browser, `protection` and `secret` keep it safe, `server` is for gunicorn. All that flask_asyncroute needs
stands in `extension`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flask import Flask

from . import csv_summary, live_page, primes, sign_in, sleepers, start_page, tour
from .extension import async_routes
from .protection import protect
from .secret import secret_key
from .visitor import find_visitor

MAX_UPLOAD = 64 * 1024 * 1024

__all__ = ["create_app"]


def create_app(config: Mapping[str, Any] | None = None, instance_path: str | None = None) -> Flask:
    """Return the application; Flask and gunicorn call it by name.

    Tasks and the secret key are kept in the instance folder.

    :param config: goes before environment variables (``FLASK_ASYNCROUTE_STORE=…`` and the like), which go before what
        is set here.
    :param instance_path: an absolute path; the folder ``instance`` beside this package where it is left out.
    :raises OSError: where a secret key has to be made and the instance folder cannot be written.
    """
    app = Flask(__name__, instance_path=instance_path)
    app.config.update(
        # Child processes, which run tasks of `primes`, make the app in the same way.
        ASYNCROUTE_APP=f"{__name__}:create_app(instance_path={instance_path!r})",
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
    for module in (start_page, live_page, sign_in, sleepers, csv_summary, primes, tour):
        app.register_blueprint(module.blueprint)
    async_routes.init_app(app)
    return app
