"""Short tasks with callbacks that are retried within fractions of a second."""

from __future__ import annotations

import time
from typing import Any

from flask import Flask

from flask_asyncroute import AsyncRoute, Callback
from flask_asyncroute.webhooks import client, sender
from tests.support.apps.crowd import create_app as create_crowd

SECRET = "whsec_QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="
ATTEMPTS = 4


def create_app(folder: str, attempt_seconds: float = 0.6, **config: Any) -> Flask:
    """Return the app of `crowd` with two more routes.

    :param attempt_seconds: the timeout of one attempt.
    """
    sender.DELAYS = (0.0, 0.1, 0.1, 0.1)
    client.ATTEMPT_SECONDS = attempt_seconds
    config = {
        "callback_allowed_hosts": ["127.0.0.0/8"],
        "callback_secret": SECRET,
        "callback_attempts": ATTEMPTS,
        **config,
    }
    app = create_crowd(folder, **config)
    async_routes: AsyncRoute = app.extensions["async_routes"]

    @app.put("/call/<int:milliseconds>")
    @async_routes.task(max_workers=8, callback=Callback(send_result=True))
    def call(milliseconds: int) -> dict[str, int]:
        time.sleep(milliseconds / 1000)
        return {"Answer": milliseconds}

    @app.put("/break/<int:milliseconds>")
    @async_routes.task(max_workers=8, callback=Callback(send_result=True))
    def break_(milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)
        raise ValueError("on purpose")

    return app
